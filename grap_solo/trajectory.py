"""Effective weights over a run: recorded step by step, read back, and their median."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from grap_solo.errors import ConfigError

WEIGHTS_FILE = "weights.csv"
MEDIAN_FILE = "median_weights.yaml"


class TrajectoryRecorder(Callback):
    """Writes ``weights.csv`` while a method trains, and ``median_weights.yaml`` at its end.

    A row is written for each optimiser step: ``step,epoch`` and a column of effective weights for
    each term. Rows stay on the device until the epoch ends, so that recording costs no
    synchronisation. A resumed run drops the rows that it is about to write again.

    Args:
        directory: where to write. When None, the folder of solo-learn's checkpoints if its
            Checkpointer is there, else the trainer's.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.rows: list[tuple[int, int, Tensor]] = []
        self.last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.last_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if self.directory is None:
            paths = [getattr(each, "path", None) for each in trainer.callbacks]  # type: ignore[attr-defined]
            given = next((path for path in paths if path is not None), trainer.default_root_dir)
            self.directory = Path(given)
        self.directory.mkdir(parents=True, exist_ok=True)
        terms = pl_module.weighting.terms
        kept: list[list[Any]] = []
        if self.last_step and self.file.exists():
            with self.file.open(newline="") as lines:
                kept = list(csv.reader(lines))[1:]
        with self.file.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", *terms])
            writer.writerows(row for row in kept if int(row[0]) <= self.last_step)

    @property
    def file(self) -> Path:
        assert self.directory is not None
        return self.directory / WEIGHTS_FILE

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step > self.last_step and trainer.is_global_zero:
            row = (
                trainer.global_step,
                trainer.current_epoch,
                pl_module.effective_weights,
            )
            self.rows.append(row)
        self.last_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._flush()
        if trainer.is_global_zero and trainer.global_step:
            write_median(self.file, pl_module.weighting.warmup_epochs)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._flush()

    def _flush(self) -> None:
        """Appends the rows that wait: one transfer from the device for all of them."""
        if not self.rows:
            return
        weights = torch.stack([row[2] for row in self.rows]).double().cpu().tolist()
        with self.file.open("a", newline="") as file:
            writer = csv.writer(file)
            for (step, epoch, _), values in zip(self.rows, weights, strict=True):
                writer.writerow([step, epoch, *(f"{value:.9g}" for value in values)])
        self.rows.clear()


def read_weights(
    path: str | os.PathLike[str],
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The terms, the steps and epochs (N, 2), and the weights (N, K) of a ``weights.csv``.

    Raises:
        ConfigError: no such file, no rows, or rows that are not a trajectory's.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file: give the folder of a run that has been trained")
    with open(path, newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header[:2] != ["step", "epoch"] or len(header) < 3 or not rows:
        raise ConfigError(f"{path}: not a record of weights: expected 'step,epoch,TERM...' rows")
    try:
        table = np.array(rows, dtype=float)
    except ValueError:
        raise ConfigError(f"{path}: a row is cut short or not numeric: remove it") from None
    return header[2:], table[:, :2].astype(int), table[:, 2:]


def median_weights(path: str | os.PathLike[str], warmup_epochs: int = 0) -> dict[str, float]:
    """The median effective weight of each term over the steps after the warm-up.

    Args:
        path: a ``weights.csv``.
        warmup_epochs: leading epochs to leave out, since the weights were held there. All steps
            count where the run was no longer than that.

    Raises:
        ConfigError: see :func:`read_weights`.
    """
    terms, steps, weights = read_weights(path)
    learned = weights[steps[:, 1] >= warmup_epochs]
    median = np.median(learned if len(learned) else weights, axis=0)
    return {term: float(f"{value:.6g}") for term, value in zip(terms, median, strict=True)}


def write_median(path: Path, warmup_epochs: int) -> None:
    """Writes the median beside a ``weights.csv``, as a block to train with."""
    block = {"name": "fixed", "weights": median_weights(path, warmup_epochs)}
    text = "# Median of the effective weights over the run's steps, as a block to train with.\n"
    text += yaml.safe_dump({"weighting": block}, sort_keys=False)
    (path.parent / MEDIAN_FILE).write_text(text)


def read_median(path: str | os.PathLike[str]) -> dict[str, float]:
    """The weights in a ``median_weights.yaml``.

    Raises:
        ConfigError: no such file, or one without the block.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file: give the folder of a run that has been trained")
    try:
        weights: Sequence[Any] | dict[str, float]
        weights = yaml.safe_load(Path(path).read_text())["weighting"]["weights"]
    except (yaml.YAMLError, KeyError, TypeError):
        raise ConfigError(f"{path}: expected a block 'weighting: weights:'") from None
    if not isinstance(weights, dict):
        raise ConfigError(f"{path}: expected a weight for each term under 'weights:'")
    return weights
