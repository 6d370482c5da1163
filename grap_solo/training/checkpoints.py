"""Where a run starts, and checkpoints that are either complete or absent."""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from grap_solo.data.sampling import mixed_seed
from grap_solo.errors import ConfigError, Diverged
from grap_solo.methods import CompositeMethod
from grap_solo.records.files import CHECKPOINTS_FOLDER, CONFIG_FILE, TRAINED_FILE
from grap_solo.solo.optimizers import MARKS
from grap_solo.training.loggers import is_first_process
from grap_solo.training.same_run import (
    describe_free,
    find_differences,
    read_run_config,
    refuse_differences,
)

RESUMABLE = ("state_dict", "global_step", "epoch")
"""The entries of a checkpoint from which a run can resume."""

WEIGHTING_PREFIX = "weighting."
"""The prefix of the weighting's names in a method's state dict."""


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        path: the checkpoint that it resumes from; None for a new run.
        epoch: the first epoch to train.
        steps: the optimiser steps that were trained before.
        seconds: how long these took.
        online: the online probe's top-1 after these, in percent; None if it was not validated.
        shapes: the shapes of the checkpoint's state dict, by name; None for what is no tensor.
        optimizer: the names of the options that its optimiser has.
    """

    path: Path | None = None
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    online: float | None = None
    shapes: Mapping[str, Any] = field(default_factory=dict)
    optimizer: frozenset[str] = frozenset()


def find_start(source: DictConfig, cfg: DictConfig, directory: Path) -> Start:
    """Decides where a run starts. Never overwrites a run; resumes an interrupted one.

    Every process must call it: all of them must raise, or the others deadlock.

    Args:
        source: the configuration as the run keeps it.
        cfg: the same, prepared.
        directory: the run's folder.

    Raises:
        ConfigError: the folder holds a finished run or another one, or the checkpoint to resume
            cannot be used.
    """
    taken = os.path.exists(directory / CONFIG_FILE)  # Also of a path that is too long.
    found: tuple[Path, dict[str, Any]] | None = None
    if cfg.resume_from_checkpoint is not None:
        path = Path(cfg.resume_from_checkpoint)
        key = f"resume_from_checkpoint: {path}"
        found = path, read_checkpoint(path, key)
        if taken and directory.resolve() not in path.resolve().parents:
            raise ConfigError(f"{key}: it is not of the run in {directory}: give another name")
    elif taken:
        if (directory / TRAINED_FILE).exists():
            raise ConfigError(
                f"name: {directory} already holds a run: give another name or checkpoint.dir"
            )
        differences = find_differences(read_run_config(directory), resolve_source(source))
        where = f"name: {directory} already holds a run"
        free = refuse_differences(differences, where, "another name or checkpoint.dir")
        found = newest_whole(directory / CHECKPOINTS_FOLDER)
        if free and found is not None and is_first_process():
            print(f"{cfg.name}: {describe_free(free)}", flush=True)
    if found is None:
        return Start()
    path, state = found
    return Start(
        path,
        state["epoch"] + 1,
        state["global_step"],
        state.get("seconds", 0.0),
        state.get("online"),
        _shapes(state["state_dict"]),
        frozenset(
            option
            for each in state.get("optimizer_states") or []
            for group in each["param_groups"]
            for option in group
        ),
    )


def read_checkpoint(path: Path, key: str, parts: Sequence[str] = RESUMABLE) -> dict[str, Any]:
    """Reads a checkpoint that a key names.

    Args:
        path: the checkpoint.
        key: the key and its value, for the error.
        parts: the entries that the checkpoint must have.

    Raises:
        ConfigError: no such file, or not a whole checkpoint.
    """
    try:
        return _load_whole(path, parts)
    except FileNotFoundError:
        raise ConfigError(f"{key}: no such file: give a run's checkpoint") from None
    except Diverged as error:
        raise ConfigError(f"{key}: {error}: give an earlier checkpoint") from None
    except Exception:
        raise ConfigError(f"{key}: not a checkpoint, or one cut short") from None


def _load_whole(path: Path, parts: Sequence[str] = RESUMABLE) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = {**state, **{name: state[name] for name in parts}}  # Raises if one is missing.
    bad = find_not_finite({name: state.get(name) for name in ("state_dict", "optimizer_states")})
    if bad is not None:
        raise Diverged(f"'{bad}' is not finite")
    return state


def find_not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested dictionaries and lists that has a number that is not
    finite; None if all are finite."""
    if isinstance(state, Tensor):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    if isinstance(state, Mapping):
        parts = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        parts = [(str(number), value) for number, value in enumerate(state)]
    else:
        return None
    found = (find_not_finite(value, f"{name}.{key}" if name else key) for key, value in parts)
    return next((each for each in found if each is not None), None)


def resolve_source(source: DictConfig) -> dict[Any, Any]:
    """Resolves a configuration as its run keeps it: without hydra's keys and the checkpoint from
    which it was resumed."""
    resolved = OmegaConf.to_container(source, resolve=True)
    assert isinstance(resolved, dict)
    for key in ("hydra", "resume_from_checkpoint"):
        resolved.pop(key, None)
    return resolved


def check_fits(cfg: DictConfig, model: CompositeMethod, start: Start, key: str) -> None:
    """Refuses a checkpoint of a run with another weighting, other terms, networks or optimiser.

    Args:
        cfg: the prepared configuration.
        model: before it is trained.
        start: where the run starts.
        key: the key that names the checkpoint, for the error.

    Raises:
        ConfigError: the states differ in a name or shape, or the optimisers in their options.
    """
    theirs, ours = start.shapes, _shapes(model.state_dict())
    names = [name for name in {**ours, **theirs} if theirs.get(name, ()) != ours.get(name, ())]
    names += [name for name in {**ours, **theirs} if (name in ours) != (name in theirs)]
    what = None
    if any(name.startswith(WEIGHTING_PREFIX) for name in names):
        what = "another weighting or other terms"
    elif names:
        sizes = [str(each.get(names[0], "none")) for each in (theirs, ours)]
        what = f"other networks ('{names[0]}': {sizes[0]}, not {sizes[1]})"
    elif start.optimizer and MARKS[cfg.optimizer.name] not in start.optimizer:
        what = f"another optimizer.name than {cfg.optimizer.name}"
    if what is not None:
        raise ConfigError(
            f"{key}: {start.path}: it is of a run with {what}: give that run's configuration, or "
            "leave the key out"
        )


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shape of each entry but solo-learn's positional encodings, which are not loaded."""
    return {
        key: tuple(value.shape) if isinstance(value, Tensor) else None
        for key, value in state.items()
        if not key.endswith("cached_penc")
    }


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest epoch first. It may have had another name before.

    Older versions called them ``<name>-ep=<epoch>.ckpt``, as solo-learn does; hydra takes such a
    name in quotes only.
    """
    named = re.compile(r".+-ep(=?)(\d+)\.ckpt", re.ASCII)
    found = [(path, named.fullmatch(path.name)) for path in folder.glob("*.ckpt")]
    epochs = {path: (int(match[2]), not match[1]) for path, match in found if match is not None}
    return sorted(epochs, key=lambda path: epochs[path], reverse=True)


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint of a run, and its content; None if there is none.

    Checkpoints that are cut short, foreign or not finite are skipped with a warning.
    """
    for path in epoch_checkpoints(folder):
        try:
            return path, _load_whole(path)
        except Diverged as error:
            warnings.warn(f"{path} is skipped: {error}", stacklevel=2)
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"{path} is not a whole checkpoint and is skipped: {line}", stacklevel=2)
    return None


class EpochCheckpoint(Checkpoint):
    """Writes a checkpoint at the end of every ``frequency`` epochs and of the last epoch.

    It is written only if all its tensors are finite and a step of the epoch was usable: the newest
    checkpoint is always one to resume from. A training that ends within an epoch leaves
    ``<name>-interrupted.ckpt``, as a signal does.

    A checkpoint gets its final name only when it and the epoch's metrics are on the disk, so that a
    resumed run finds files of the same moment. Then the previous checkpoint is removed.

    Args:
        folder: the checkpoints' folder.
        name: the run's name: files are ``<name>-ep<epoch>.ckpt``.
        frequency: epochs between two checkpoints.
        keep: whether to keep all checkpoints.
        start: where the run starts.
    """

    def __init__(self, folder: Path, name: str, frequency: int, keep: bool, start: Start) -> None:
        self.folder, self.name, self.frequency, self.keep = folder, name, frequency, keep
        self.online, self.began = start.online, time.monotonic() - start.seconds
        self.interrupted = folder / f"{name}-interrupted.ckpt"
        self.waiting: tuple[Path, Path] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get("val_acc1")  # All processes: it may synchronise.
        if found is not None and not trainer.sanity_checking:
            self.online = found.item()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the last accuracy and the elapsed seconds."""
        checkpoint |= {"online": self.online, "seconds": time.monotonic() - self.began}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        due = (epoch + 1) % self.frequency == 0 or last
        if due and is_whole_epoch(trainer) and pl_module.usable_in_epoch:
            self._save(trainer, pl_module, epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)
        if trainer.global_step and not is_whole_epoch(trainer) and self._is_finite(trainer):
            waiting = self.interrupted.with_suffix(".ckpt.new")
            trainer.save_checkpoint(waiting)
            if trainer.is_global_zero:
                _put_in_place(waiting, self.interrupted)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes a checkpoint when a signal stops the training."""
        waiting = self.interrupted.with_suffix(".ckpt.new")
        if not trainer.global_step:
            return
        if isinstance(exception, SIGTERMException):  # All processes are here.
            if not self._is_finite(trainer):
                return
            trainer.save_checkpoint(waiting)
        elif isinstance(exception, KeyboardInterrupt):
            # No collective here: other processes may be in the middle of a step.
            state = trainer._checkpoint_connector.dump_checkpoint()
            if find_not_finite(trained_state(trainer)) is not None:
                return
            trainer.strategy.save_checkpoint(state, waiting)
        else:
            return
        if trainer.is_global_zero:
            _put_in_place(waiting, self.interrupted)

    def _save(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        if not self._is_finite(trainer):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"{self.name}-ep{epoch}.ckpt"
        waiting = final.with_suffix(".ckpt.new")
        trainer.save_checkpoint(waiting)
        self.waiting = waiting, final

    def _is_finite(self, trainer: Trainer) -> bool:
        """Whether the first process, which writes, has finite tensors alone. Warns if not."""
        bad: str | None = find_not_finite(trained_state(trainer))
        bad = trainer.strategy.broadcast(bad)  # All save, or none: saving communicates.
        if bad is not None and trainer.is_global_zero:
            warnings.warn(
                f"{self.name}: '{bad}' is not finite after step {trainer.global_step}: no "
                "checkpoint is written, and the last one is kept",
                stacklevel=2,
            )
        return bad is None

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
        for path in self.folder.glob("*-interrupted.ckpt"):  # Of an earlier stop, and older.
            path.unlink()
        if not self.keep:
            for path in epoch_checkpoints(self.folder):
                if path != final:
                    path.unlink()


def trained_state(trainer: Trainer) -> dict[str, Any]:
    """The tensors that training changes: the model's, and the optimiser's by parameter."""
    optimizers = [each.state_dict()["state"] for each in trainer.optimizers]
    return {**trainer.lightning_module.state_dict(), "optimizer_states": optimizers}


def is_whole_epoch(trainer: Trainer) -> bool:
    """Whether the newest epoch has had all its batches."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _put_in_place(waiting: Path, final: Path) -> None:
    """Gives a file its final name once all of it is on the disk."""
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


class EpochSeed(Callback):
    """Seeds the random numbers of each epoch, such as dropout's, from the run's seed and the epoch:
    they do not depend on earlier draws, so a resumed run draws the same.

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
