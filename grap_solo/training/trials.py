"""Trial runs, which leave nothing that blocks the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grap_solo.records.files import CONFIG_FILE
from grap_solo.training.checkpoints import resolve_source
from grap_solo.training.config import run_dir
from grap_solo.training.loggers import is_first_process
from grap_solo.training.same_run import read_limit

LIMITS = ("limit_train_batches", "limit_val_batches")
"""The keys that make a run a trial of a longer one."""


@contextmanager
def folder_of_trial(cfg: DictConfig) -> Iterator[None]:
    """Gives a run with ``fast_dev_run`` a folder of its own, which is removed at its end.

    Args:
        cfg: a prepared configuration; its ``checkpoint.dir`` is set.
    """
    if not cfg.get("fast_dev_run"):
        yield
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cfg.checkpoint.dir = folder
        yield
    if is_first_process():
        print(f"{cfg.name}: the trial run (fast_dev_run) went through; nothing of it is kept")


def set_trial_aside(source: DictConfig, cfg: DictConfig) -> bool:
    """Renames the run's folder if a trial run with other limits is in it.

    Args:
        source: the configuration as the run keeps it.
        cfg: the same, prepared.

    Returns:
        Whether there was such a trial, so that the run starts anew. Every process must ask.
    """
    directory = run_dir(cfg)
    if not (directory / CONFIG_FILE).exists() or cfg.resume_from_checkpoint is not None:
        return False
    theirs: Any = OmegaConf.to_container(OmegaConf.load(directory / CONFIG_FILE))
    ours = resolve_source(source)
    limits = {key: read_limit(theirs, key) for key in LIMITS}
    limits = {k: v for k, v in limits.items() if v is not None and v != read_limit(ours, k)}
    if not limits:
        return False
    if is_first_process():
        names = (f"{directory.name}_trial{number}" for number in chain([""], count(2)))
        aside = next(each for each in map(directory.with_name, names) if not each.exists())
        os.replace(directory, aside)
        key, value = next(iter(limits.items()))
        print(f"{directory} held a trial run ({key}={value}): it is now in {aside}")
    return True
