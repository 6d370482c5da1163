"""Checkpoints that are whole or not there, and going on from the newest one."""

from __future__ import annotations

import os
import random
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from grap_solo.data.sampling import mixed_seed


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        path: the checkpoint that it goes on from; None at the beginning.
        epoch: the first epoch to train.
        steps: the optimiser steps before that.
        seconds: what these took.
        online: the online probe's top-1 after them, in percent, if it was validated.
    """

    path: Path | None = None
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    online: float | None = None


class EpochCheckpoint(Checkpoint):
    """A checkpoint at the end of every ``frequency`` epochs and of the last one.

    It is written beside its place, brought to the disk and moved into it only when the epoch's
    metrics are on the disk too, so that what a resumed run finds is of one moment. The one before
    is removed after that.

    Args:
        folder: where to.
        name: the run's name: files are ``<name>-ep=<epoch>.ckpt``.
        frequency: epochs between two checkpoints.
        keep: keep all of them.
        start: where the run starts.
    """

    def __init__(self, folder: Path, name: str, frequency: int, keep: bool, start: Start) -> None:
        self.folder, self.name, self.frequency, self.keep = folder, name, frequency, keep
        self.online, self.began = start.online, time.monotonic() - start.seconds
        self.interrupted = folder / f"{name}-interrupted.ckpt"
        self.waiting: tuple[Path, Path] | None = None
        self.saved_at = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get("val_acc1")  # Each process asks: it may be shared.
        if found is not None and not trainer.sanity_checking:
            self.online = found.item()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What the run's end tells and nothing else in the checkpoint knows."""
        checkpoint |= {"online": self.online, "seconds": time.monotonic() - self.began}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if (epoch + 1) % self.frequency == 0 or epoch + 1 == trainer.max_epochs:
            self._save(trainer, epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)
        if trainer.global_step and self.saved_at != trainer.global_step:  # Ended by its steps.
            self._save(trainer, max(trainer.current_epoch - 1, 0))
            self._commit(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stopped by a signal: what has been trained so far is written too."""
        waiting = self.interrupted.with_suffix(".ckpt.new")
        if not trainer.global_step:
            return
        if isinstance(exception, SIGTERMException):
            trainer.save_checkpoint(waiting)  # Where all processes are.
        elif isinstance(exception, KeyboardInterrupt):
            state = trainer._checkpoint_connector.dump_checkpoint()
            trainer.strategy.save_checkpoint(state, waiting)  # The others may be anywhere.
        else:
            return
        if trainer.is_global_zero:
            _put_in_place(waiting, self.interrupted)

    def _save(self, trainer: Trainer, epoch: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"{self.name}-ep={epoch}.ckpt"
        waiting = final.with_suffix(".ckpt.new")
        trainer.save_checkpoint(waiting)
        self.waiting, self.saved_at = (waiting, final), trainer.global_step

    def _commit(self, trainer: Trainer) -> None:
        if self.waiting is None:
            return
        waiting, final = self.waiting
        self.waiting = None
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        _put_in_place(waiting, final)
        self.interrupted.unlink(missing_ok=True)  # Of an earlier stop: this one is newer.
        if not self.keep:
            for path in epoch_checkpoints(self.folder, self.name):
                if path != final:
                    path.unlink()


def _put_in_place(waiting: Path, final: Path) -> None:
    """Gives a file its name when all of it is on the disk."""
    _to_disk(waiting)
    os.replace(waiting, final)
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def epoch_checkpoints(folder: Path, name: str) -> list[Path]:
    """A run's checkpoints, the newest epoch first."""

    def epoch(path: Path) -> int:
        number = path.stem.removeprefix(f"{name}-ep=")
        return int(number) if number.isdigit() else -1

    return sorted((p for p in folder.glob("*.ckpt") if epoch(p) >= 0), key=epoch, reverse=True)


def newest_whole(folder: Path, name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, and what it holds; None without any.

    One that is cut short or foreign is skipped with a warning.
    """
    for path in epoch_checkpoints(folder, name):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state["state_dict"], state["global_step"], state["epoch"]
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"{path} is not a whole checkpoint and is left out: {line}", stacklevel=2)
            continue
        return path, state
    return None


class EpochSeed(Callback):
    """Starts the random numbers of each epoch (dropout's) anew from seed and epoch, so that they do
    not depend on what was drawn before.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            draw = mixed_seed(self.seed, trainer.current_epoch, trainer.global_rank)
            random.seed(draw)
            np.random.seed(draw)
            torch.manual_seed(draw)
