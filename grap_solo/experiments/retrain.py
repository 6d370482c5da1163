"""Trains runs that start from other runs: from their median weights or their backbone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grap_solo.errors import ConfigError
from grap_solo.methods import weighted_name
from grap_solo.records.files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    read_config,
)
from grap_solo.records.weights import pooled_weights
from grap_solo.training.checkpoints import epoch_checkpoints
from grap_solo.training.run import Run, pretrain

WARMUP = "weighting.warmup_epochs"


def retrain(
    parents: Sequence[Path],
    load: Callable[[Path], DictConfig],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
) -> Run:
    """Trains from scratch with the median weights that runs have found ("tuned", paper 4.2).

    The new run lies beside the first one and is named after it with ``_tuned`` appended, unless the
    command line gives another ``name`` or ``checkpoint.dir``. Its ``config.yaml`` holds the weights
    and, in ``tuned_from``, where they come from.

    Args:
        parents: the runs' directories; the first one's configuration is trained.
        load: composes a configuration file with the command line's overrides.
        epochs: see :func:`~grap_solo.records.weights.pooled_weights`.
        last: see :func:`~grap_solo.records.weights.pooled_weights`.

    Raises:
        ConfigError: not a run's directory, or a configuration that :func:`pretrain` refuses.
    """
    cfg = _child(parents[0], load, "tuned")
    for each in parents:
        if not (each / TRAINED_FILE).exists():
            warnings.warn(
                f"{each} is not finished: its median weights are of the steps so far", stacklevel=2
            )
    warmup = [OmegaConf.select(_read_config(each), WARMUP, default=0) for each in parents]
    weights = pooled_weights([each / WEIGHTS_FILE for each in parents], warmup, epochs, last)
    cfg.method = weighted_name(cfg.method)
    cfg.weighting = {"name": "fixed", "weights": weights}
    cfg.tuned_from = {"runs": [str(each) for each in parents], "epochs": epochs, "last": last}
    return pretrain(cfg)


def finetune(parent: Path, load: Callable[[Path], DictConfig]) -> Run:
    """Trains a run's backbone further with the labels, end to end ("Tuned", paper Table 6).

    The new run lies beside the old one and is named after it with ``_finetuned`` appended, as in
    :func:`retrain`.

    Args:
        parent: the run's directory.
        load: composes a configuration file with the command line's overrides.

    Raises:
        ConfigError: not a run's directory, a run without a checkpoint, or a configuration that
            :func:`pretrain` refuses.
    """
    cfg = _child(parent, load, "finetuned")
    cfg.method = weighted_name(cfg.method)
    cfg.weighting = {"name": "supervised"}
    cfg.labels = {**cfg.get("labels", {}), "split": "train"}
    cfg.pretrained_feature_extractor = str(newest_checkpoint(parent))
    return pretrain(cfg)


def newest_checkpoint(run: Path) -> Path:
    """Finds the newest checkpoint of a run: of an epoch, unless a stop has left one since then. The
    files' times say nothing once the run has been copied.

    Raises:
        ConfigError: the run has none.
    """
    folder = run / CHECKPOINTS_FOLDER
    found = [*sorted(folder.glob("*-interrupted.ckpt")), *epoch_checkpoints(folder)]
    if not found:
        raise ConfigError(
            f"{run / CHECKPOINTS_FOLDER}: no checkpoint: train with checkpoint.enabled"
        )
    return found[0]


def _read_config(run: Path) -> Any:
    file = run / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"{file}: no such file: give the folder of a run that has been trained")
    return read_config(file)


def _child(parent: Path, load: Callable[[Path], DictConfig], suffix: str) -> DictConfig:
    """Makes the configuration of a new run beside its parent."""
    saved = _read_config(parent)
    cfg = load(parent / CONFIG_FILE)
    OmegaConf.set_struct(cfg, False)
    if cfg.name == saved.name:
        cfg.name = f"{parent.resolve().name}_{suffix}"
    if OmegaConf.select(cfg, "checkpoint.dir") == OmegaConf.select(saved, "checkpoint.dir"):
        OmegaConf.update(cfg, "checkpoint.dir", str(parent.parent), force_add=True)
    cfg.resume_from_checkpoint = None
    return cfg
