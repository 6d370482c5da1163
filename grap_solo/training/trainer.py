"""Lightning's Trainer, made from a configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, Timer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from grap_solo.errors import ConfigError
from grap_solo.records.files import CHECKPOINTS_FOLDER
from grap_solo.training.checkpoints import EpochCheckpoint, EpochSeed, Start, is_whole_epoch
from grap_solo.training.loggers import ResumableCSVLogger, WeightsProgressBar, wandb_logger
from grap_solo.training.trainer_keys import ARGUMENTS

OUTPUT = {
    "enable_model_summary": "lightning.pytorch.callbacks.model_summary",
    "profiler": "lightning.pytorch.utilities.rank_zero",
}
"""The loggers by which Lightning prints what these arguments ask for. A run hides them else."""


def make_trainer(
    cfg: DictConfig, directory: Path, further: Sequence[Callback], start: Start
) -> pl.Trainer:
    """Makes a Trainer from the configuration's keys that are arguments of it.

    Args:
        cfg: a prepared configuration.
        directory: the run's folder.
        further: callbacks to add to those of every run.
        start: where the run starts.

    Raises:
        ConfigError: an argument that the Trainer refuses.
    """
    callbacks: list[Callback] = [EpochSeed(cfg.seed), *further]
    if cfg.get("enable_progress_bar", True):
        # Without a terminal, lines cannot be overwritten: print one for each epoch.
        refresh = 1 if sys.stdout.isatty() else sys.maxsize
        callbacks.append(WeightsProgressBar(refresh_rate=refresh, leave=True))
    if cfg.checkpoint.enabled:
        folder, every = directory / CHECKPOINTS_FOLDER, cfg.checkpoint.frequency
        keep = cfg.checkpoint.keep_prev
        callbacks.append(EpochCheckpoint(folder, cfg.name, every, keep, start))
    loggers: list[Logger] = [ResumableCSVLogger(directory, start.steps)]
    if cfg.wandb.enabled and not cfg.get("fast_dev_run"):
        wandb = wandb_logger(cfg, directory)
        if wandb is not None:
            loggers.append(wandb)
            callbacks.append(LearningRateMonitor(logging_interval="step"))

    container: Any = OmegaConf.to_container(cfg, resolve=True)
    kwargs = {name: value for name, value in container.items() if name in ARGUMENTS}
    # Null means "not given", but a validation that counts no epochs is asked for by null.
    keeps_null = ("check_val_every_n_epoch",) if kwargs.get("val_check_interval") else ()
    kwargs = {k: v for k, v in kwargs.items() if v is not None or k in keeps_null}
    for name, printer in OUTPUT.items():
        if kwargs.get(name):
            logging.getLogger(printer).setLevel(logging.INFO)
    steps = kwargs.pop("max_steps", -1)
    if steps != -1:
        callbacks.append(StopAtStep(steps))
    try:
        if "max_time" in kwargs:
            callbacks.append(TimeOfStart(kwargs.pop("max_time")))
        kwargs.update(
            logger=loggers,
            callbacks=callbacks,
            default_root_dir=str(directory),
            enable_checkpointing=cfg.checkpoint.enabled,
            enable_model_summary=bool(kwargs.get("enable_model_summary")),
            use_distributed_sampler=False,  # The loaders have their own samplers.
        )
        return pl.Trainer(**kwargs)
    except ImportError as error:  # What a TPU, a strategy or a profiler needs.
        line = " ".join(str(error).split())
        raise ConfigError(
            f"trainer: a package is missing for what its keys ask for: {line}"
        ) from None
    except (MisconfigurationException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}".splitlines()[0]) from None


class TimeOfStart(Timer):
    """Ends the training after a time. Each start of a run has the whole time: Lightning's own timer
    goes on from the checkpoint, so that starting a run again would not take it any further."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class StopAtStep(Callback):
    """Ends the training after an optimiser step. Lightning's own ``max_steps`` would shorten the
    schedules, and takes a resumed run for one within its epoch.

    Args:
        last: the number of the step.
    """

    def __init__(self, last: int) -> None:
        self.last = last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        if trainer.global_step >= self.last:
            trainer.should_stop = True


def key_that_ended(trainer: pl.Trainer, epochs: int) -> str | None:
    """The key that has ended a training before its epochs were over; None if none has.

    Args:
        trainer: after the training.
        epochs: the epochs to train.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    if progress.processed >= epochs and is_whole_epoch(trainer):
        return None
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    for each in callbacks:
        if isinstance(each, StopAtStep) and trainer.global_step >= each.last:
            return "max_steps"
        left = each.time_remaining() if isinstance(each, Timer) else None
        if left is not None and left <= 0:
            return "max_time"
    return None
