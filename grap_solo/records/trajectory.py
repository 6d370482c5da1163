"""Effective weights over a run: recorded step by step, read back, and their median."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.records.files import DIAGNOSTICS_FILE, TERMS_FILE, WEIGHTS_FILE, whole_file
from grap_solo.records.weights import write_median
from grap_solo.weighting import CAUSES


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
