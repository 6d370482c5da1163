"""Effective weights over a run: recorded step by step, read back, and their median."""

from __future__ import annotations

import contextlib
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
from grap_solo.records.files import whole_file
from grap_solo.weighting import CAUSES

WEIGHTS_FILE = "weights.csv"
MEDIAN_FILE = "median_weights.yaml"
DIAGNOSTICS_FILE = "diagnostics.csv"
TERMS_FILE = "terms.yaml"


class _Table:
    """A CSV file of one row for each optimiser step, whose numbers wait on the device.

    Args:
        path: the file.
        columns: its header, after ``step,epoch``.
        kept: the last step whose rows, written by an earlier part of the run, stay.
    """

    def __init__(self, path: Path, columns: Sequence[str], kept: int) -> None:
        self.path = path
        self.waiting: list[tuple[int, int, Tensor]] = []
        rows: list[list[str]] = []
        if kept and path.exists():
            with path.open(newline="") as lines:
                whole = (row for row in list(csv.reader(lines))[1:] if len(row) == 2 + len(columns))
                rows = [row for row in whole if int(row[0]) <= kept]
        with whole_file(path) as file:  # Killed here, the earlier rows are still there.
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", *columns])
            writer.writerows(rows)

    def flush(self, last: Sequence[str] = ()) -> None:
        """Appends the rows that wait: one transfer from the device for all of them.

        Args:
            last: the texts of which the last column is an index; none for a table of numbers.
        """
        if not self.waiting:
            return
        numbers = torch.stack([row[2] for row in self.waiting]).double().cpu().tolist()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            for (step, epoch, _), values in zip(self.waiting, numbers, strict=True):
                texts = [last[int(values.pop())]] if last else []
                writer.writerow([step, epoch, *(f"{value:.9g}" for value in values), *texts])
        self.waiting.clear()


class TrajectoryRecorder(Callback):
    """Writes ``weights.csv`` while a method trains, ``terms.yaml`` before that and
    ``median_weights.yaml`` at its end.

    A row is written for each optimiser step: ``step,epoch`` and a column of effective weights for
    each term. A weighting that needs gradients gets ``diagnostics.csv`` too, with the columns of
    :func:`~grap_solo.diagnostics.diagnostic_names` and ``skipped``, why a step was not learned
    from. Rows stay on the device until the epoch ends, so that recording costs no
    synchronisation. A resumed run drops the rows that it is about to write again.

    Args:
        directory: where to write. When None, the folder of solo-learn's checkpoints if its
            Checkpointer is there, else the trainer's.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.weights: _Table | None = None
        self.diagnostics: _Table | None = None
        self.last_step = self.resumed_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.last_step = self.resumed_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        if self.directory is None:
            callbacks: list[Callback] = getattr(trainer, "callbacks", [])
            paths = [getattr(each, "path", None) for each in callbacks]
            given = next((path for path in paths if path is not None), trainer.default_root_dir)
            self.directory = Path(given)
        self.directory.mkdir(parents=True, exist_ok=True)
        terms = pl_module.weighting.terms
        self.weights = _Table(self.directory / WEIGHTS_FILE, terms, self.resumed_at)
        write_terms(self.directory / TERMS_FILE, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch
        if step > self.last_step and self.weights is not None:
            self.weights.waiting.append((step, epoch, pl_module.effective_weights))
            if pl_module.diagnostics:
                self._record_diagnostics(step, epoch, pl_module)
        self.last_step = step

    def _record_diagnostics(self, step: int, epoch: int, pl_module: Any) -> None:
        found = pl_module.diagnostics
        if self.diagnostics is None:
            assert self.directory is not None
            path = self.directory / DIAGNOSTICS_FILE
            self.diagnostics = _Table(path, [*found, "skipped"], self.resumed_at)
        values = torch.stack(list(found.values()))
        cause = pl_module.weighting.cause
        cause = values.new_zeros(1) if cause is None else cause.to(values)[None]
        self.diagnostics.waiting.append((step, epoch, torch.cat([values, cause])))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._flush()
        if self.weights is not None and trainer.global_step:
            write_median(self.weights.path, pl_module.weighting.warmup_epochs)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._flush()
        if self.weights is not None:
            with contextlib.suppress(ConfigError):  # There is no row yet.
                write_median(self.weights.path, pl_module.weighting.warmup_epochs)

    def _flush(self) -> None:
        if self.weights is not None:
            self.weights.flush()
        if self.diagnostics is not None:
            self.diagnostics.flush(last=CAUSES)


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


def format_weight(value: float) -> str:
    """A weight with two decimals, or with two digits if it is below 0.01."""
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def median_weights(path: str | os.PathLike[str], warmup_epochs: int = 0) -> dict[str, float]:
    """The median effective weight of each term over the steps after the warm-up.

    Args:
        path: a ``weights.csv``.
        warmup_epochs: leading epochs to leave out, since the weights were held there. All steps
            count where the run was no longer than that.

    Raises:
        ConfigError: see :func:`read_weights`.
    """
    return pooled_weights([path], [warmup_epochs])


def pooled_weights(
    paths: Sequence[str | os.PathLike[str]],
    warmup_epochs: Sequence[int],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
) -> dict[str, float]:
    """One weight of each term from the effective weights of one or several runs' steps.

    Args:
        paths: the runs' ``weights.csv``.
        warmup_epochs: each run's leading epochs to leave out, unless ``epochs`` is given.
        epochs: the first and last epoch, counted from 0, whose steps' median to take.
        last: take the mean of so many last steps of each run instead of the median.

    Returns:
        The median, or mean, over the chosen steps of all runs together.

    Raises:
        ConfigError: see :func:`read_weights`; runs with other terms, no step in the range, or
            both ``epochs`` and ``last``.
    """
    if epochs is not None and last is not None:
        raise ConfigError("retrain: epochs and the last steps are two choices: give one")
    chosen = []
    first_terms: list[str] = []
    for path, warmup in zip(paths, warmup_epochs, strict=True):
        terms, steps, weights = read_weights(path)
        first_terms = first_terms or terms
        if terms != first_terms:
            raise ConfigError(
                f"{path}: its terms are {', '.join(terms)}, the first run's "
                f"{', '.join(first_terms)}: give runs of the same terms"
            )
        epoch = steps[:, 1]
        if epochs is not None:
            weights = weights[(epoch >= epochs[0]) & (epoch <= epochs[1])]
        elif last is not None:
            weights = weights[-last:]
        elif (epoch >= warmup).any():
            weights = weights[epoch >= warmup]
        chosen.append(weights)
    rows = np.concatenate(chosen)
    if not len(rows):
        assert epochs is not None
        raise ConfigError(f"retrain: no step in the epochs {epochs[0]} to {epochs[1]}: give others")
    pooled = np.median(rows, axis=0) if last is None else rows.mean(axis=0)
    return {term: float(f"{value:.6g}") for term, value in zip(first_terms, pooled, strict=True)}


def write_median(path: Path, warmup_epochs: int) -> None:
    """Writes the median beside a ``weights.csv``, as a block to train with."""
    block: dict[str, Any] = {"name": "fixed", "weights": median_weights(path, warmup_epochs)}
    text = "# Median of the effective weights over the run's steps, as a block to train with.\n"
    if min(block["weights"].values()) < 0 or not any(block["weights"].values()):
        text += "# Not as it stands: fixed weights are 0 or more, and not all 0.\n"
    text += yaml.safe_dump({"weighting": block}, sort_keys=False)
    (path.parent / MEDIAN_FILE).write_text(text)


def write_terms(path: Path, pl_module: Any) -> None:
    """Writes what a run trains: the method, the rule, and the terms' reference weights."""
    weighting = pl_module.weighting
    reference = zip(weighting.terms, weighting.reference.tolist(), strict=True)
    content = {
        "method": pl_module.cfg.method,
        "weighting": pl_module.cfg.weighting.name,
        "reference_weights": {term: float(f"{value:.6g}") for term, value in reference},
    }
    with whole_file(path) as file:
        file.write("# The method, the rule, and the weights that the method has by itself.\n")
        yaml.safe_dump(content, file, sort_keys=False)


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
