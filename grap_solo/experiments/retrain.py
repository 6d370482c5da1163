"""Trains runs that start from other runs: from their median weights or their backbone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grap_solo.data import move_labelled_set
from grap_solo.errors import ConfigError
from grap_solo.methods import weighted_name
from grap_solo.records.files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    read_config,
)
from grap_solo.records.weights import course_of_weights, pooled_weights
from grap_solo.training.checkpoints import epoch_checkpoints
from grap_solo.training.run import Run, pretrain
from grap_solo.training.same_run import read_run_config
from grap_solo.weighting import DEFAULT_WEIGHTING, Fixed, find_weighting

WARMUP = "weighting.warmup_epochs"
AS_LEARNED = "as-learned"


def retrain(
    parents: Sequence[Path],
    load: Callable[[Path], DictConfig],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
    heads: str = AS_LEARNED,
    schedule: bool = False,
) -> Run:
    """Trains from scratch with the weights that runs have found ("tuned", paper 4.2).

    The new run lies beside the first one and is named after it with ``_tuned`` appended, or
    ``_scheduled``, unless the command line gives another ``name`` or ``checkpoint.dir``. Its
    ``config.yaml`` holds the weights and, in ``tuned_from``, where they come from.

    Args:
        parents: the runs' directories; the first one's configuration is trained.
        load: composes a configuration file with the command line's overrides.
        epochs: see :func:`learned_weighting`.
        last: see :func:`learned_weighting`.
        heads: see :func:`learned_weighting`.
        schedule: see :func:`learned_weighting`.

    Raises:
        ConfigError: not a run's directory, or a configuration that :func:`pretrain` refuses.
    """
    cfg = _child(parents[0], load, "scheduled" if schedule else "tuned")
    for each in parents:
        if not (each / TRAINED_FILE).exists():
            warnings.warn(
                f"{each} is not finished: its median weights are of the steps so far", stacklevel=2
            )
    cfg.weighting = learned_weighting(parents, epochs, last, heads, schedule)
    cfg.method = weighted_name(cfg.method)
    cfg.tuned_from = {"runs": [str(each) for each in parents], "epochs": epochs, "last": last}
    return pretrain(cfg)


def learned_weighting(
    parents: Sequence[Path],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
    heads: str = AS_LEARNED,
    schedule: bool = False,
) -> dict[str, Any]:
    """The ``weighting:`` block that trains with the weights that runs have found.

    The heads count: where terms share a projector, weights were found with a projector that was
    trained in a certain way, and they may be worth less with another one.

    Args:
        parents: the runs' directories.
        epochs: see :func:`~grap_solo.records.weights.pooled_weights`.
        last: see :func:`~grap_solo.records.weights.pooled_weights`.
        heads: ``as-learned`` trains heads and shared heads as the first run did; ``weighted``
            trains the plain sum ``sum_k w_k L_k``, as the paper does.
        schedule: replay the weights in the course of the run instead of holding their median.

    Raises:
        ConfigError: not a run's directory, or a choice that does not go with another.
    """
    if schedule and (epochs is not None or last is not None):
        raise ConfigError("retrain: --schedule replays all steps: leave --epochs and the like out")
    configs = [OmegaConf.create(read_run_config(each)) for each in parents]
    files = [each / WEIGHTS_FILE for each in parents]
    if schedule:
        block: dict[str, Any] = {"name": "scheduled", "weights": course_of_weights(files)}
    else:
        warmup = [OmegaConf.select(each, WARMUP, default=0) for each in configs]
        weights = pooled_weights(files, warmup, epochs, last)
        block = {"name": "fixed", "weights": weights}
    if heads == AS_LEARNED:
        learned: Any = OmegaConf.to_container(configs[0].get("weighting") or OmegaConf.create({}))
        rule = find_weighting(learned.pop("name", DEFAULT_WEIGHTING))
        options = rule.read_options(learned)
        plain = Fixed.read_options({})
        for key in ("heads", "shared_heads"):
            if options[key] != plain[key]:
                block[key] = options[key]
    return block


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
    move_labelled_set(cfg)
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
