"""Records the effective weights and the diagnostics of a run, step by step, and warns of a
collapse."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.records.collapse import RANKME, SPREAD, Validations, find_collapse
from grap_solo.records.files import (
    DIAGNOSTICS_FILE,
    TERMS_FILE,
    WEIGHTS_FILE,
    read_text,
    whole_file,
)
from grap_solo.records.weights import read_weights, write_median
from grap_solo.weighting import CAUSES


class _Table:
    """Appends one row per optimiser step to a CSV file. The numbers stay on the device until then.

    Args:
        path: the file.
        columns: its header, after ``step,epoch``.
        kept: the step that the run resumes after. Rows up to it stay, later ones are dropped.
    """

    def __init__(self, path: Path, columns: Sequence[str], kept: int) -> None:
        self.path = path
        self.waiting: list[tuple[int, int, Tensor]] = []
        rows: list[list[str]] = []
        if kept and path.exists():
            lines = csv.reader(io.StringIO(read_text(path)))
            whole = (row for row in list(lines)[1:] if len(row) == 2 + len(columns))
            rows = [row for row in whole if int(row[0]) <= kept]
        with whole_file(path) as file:  # Killed here, the earlier rows are still there.
            writer = csv.writer(file)
            writer.writerow(["step", "epoch", *columns])
            writer.writerows(rows)

    def flush(self, last: Sequence[str] = ()) -> None:
        """Appends the waiting rows, with one transfer from the device for all of them.

        Args:
            last: the texts for the last column, whose numbers are indexes into them; empty if the
                last column holds numbers.
        """
        if not self.waiting:
            return
        numbers = torch.stack([row[2] for row in self.waiting]).double().cpu().tolist()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for (step, epoch, _), values in zip(self.waiting, numbers, strict=True):
                texts = [last[int(values.pop())]] if last else []
                writer.writerow([step, epoch, *(f"{value:.9g}" for value in values), *texts])
        self.waiting.clear()


class TrajectoryRecorder(Callback):
    """Writes ``terms.yaml`` when training starts, ``weights.csv`` during it and
    ``median_weights.yaml`` at its end.

    ``weights.csv`` has a row for each optimiser step: ``step,epoch`` and the effective weight of
    each term. With a weighting that needs gradients, ``diagnostics.csv`` has a row too: the
    columns of :func:`~grap_solo.diagnostics.diagnostic_names`, and ``skipped``, the reason why the
    weights did not learn from the step. Rows stay on the device until the epoch ends, so that
    recording never makes the host wait. A resumed run drops the rows that it will write again.

    Args:
        directory: where to write. By default the folder of solo-learn's Checkpointer, if the
            trainer has one, else the trainer's ``default_root_dir``.
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


class CollapseWatch(Callback):
    """Warns once in a run, at the end of the epoch in which its embeddings collapsed, and names the
    term whose weight fell. See :meth:`~grap_solo.records.collapse.Validations.collapsed_at`.

    Args:
        recorder: the recorder of the run's weights, which comes before this callback.
    """

    def __init__(self, recorder: TrajectoryRecorder) -> None:
        self.recorder = recorder
        self.rows: list[list[float]] = []  # Epoch, RankMe and spread of each validation.
        self.said = False

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "said": self.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.said = list(state_dict["rows"]), state_dict["said"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics  # All ranks: reading it may communicate.
        if not trainer.sanity_checking and RANKME in metrics:
            found = metrics[RANKME].item(), metrics[SPREAD].item()
            self.rows.append([trainer.current_epoch, *found])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        record = self.recorder.weights  # The first rank's alone.
        if self.said or record is None or not self.rows:
            return
        epochs, rankme, spread = np.array(self.rows).T
        validations = Validations(epochs.astype(int), rankme, spread)
        if validations.collapsed_at() is None:
            return
        self.said = True
        terms, steps, weights = read_weights(record.path, allow_no_rows=True)
        found = find_collapse(validations, terms, steps[:, 1], weights)
        if found is not None:
            warnings.warn(f"{pl_module.cfg.name}: {found.describe()}", stacklevel=2)


def write_terms(path: Path, pl_module: Any) -> None:
    """Writes ``terms.yaml``: the method, the rule, and the terms' reference weights."""
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
