"""The progress bar and the loggers of a training: ``metrics.csv`` and W&B."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from grap_solo.methods import CompositeMethod
from grap_solo.records.files import (
    METRICS_FILE,
    WANDB_FILE,
    read_json,
    read_text,
    whole_file,
    write_json,
)
from grap_solo.records.weights import format_weight


def is_first_process() -> bool:
    """Whether this process writes the files. It also works before the processes are joined."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


class WeightsProgressBar(TQDMProgressBar):
    """Shows the epoch, the current effective weights and the probe's accuracy; with a
    ``downstream:`` block the measure of each head."""

    accuracy: float | None = None
    measures: dict[str, str] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, CompositeMethod)
        named = zip(pl_module.weighting.terms, pl_module.shown_weights, strict=True)
        metrics: dict[str, Any] = {name: format_weight(value) for name, value in named}
        metrics |= self.measures
        if self.accuracy is not None and not self.measures:
            metrics["probe"] = f"{self.accuracy:.1f}%"
        return metrics

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        # Every process reads it here: reading synchronises, and only the first process has a bar.
        found = trainer.callback_metrics.get("val_acc1")
        self.accuracy = None if found is None else found.item()
        self.measures = head_measures(trainer, pl_module)

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)  # One bar is enough: it shows the validation accuracy.


def head_measures(trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, str]:
    """The newest measure of each downstream head as a text, by its name; empty without a
    ``downstream:`` block."""
    assert isinstance(model, CompositeMethod)
    heads, shown = model.heads_downstream, {}
    if heads is None:
        return {}
    for name in heads.names:
        measure = heads.head(name).measure
        found = trainer.callback_metrics.get(f"val_{name}_{measure}")
        if found is not None:
            value = f"{found.item():.3f}" if measure == "r2" else f"{found.item():.1f}%"
            shown[name] = f"{measure} {value}"
    return shown


class SafeWandbLogger(WandbLogger):
    """A W&B logger that never stops a run. Its first failure gives a warning and disables it; the
    CSV files are written as before."""

    failed = False

    def _guard(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            method(*args, **kwargs)
        except Exception as error:  # A logger's failure must not stop the run.
            self.failed = True
            warnings.warn(
                f"W&B failed and is left out from here on ({error}); metrics.csv is still "
                "written. Set wandb.offline=True or wandb.enabled=False to run without its server",
                stacklevel=2,
            )

    def start(self, hparams: dict[str, Any]) -> bool:
        """Opens the run and logs the configuration. Returns False if that failed."""
        self._guard(lambda: self.experiment)
        self.log_hyperparams(hparams)
        return not self.failed

    def log_hyperparams(self, params: Any) -> None:
        self._guard(super().log_hyperparams, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._guard(super().log_metrics, metrics, step)

    def save(self) -> None:
        self._guard(super().save)

    def finalize(self, status: str) -> None:
        self._guard(super().finalize, status)


class ResumableCSVLogger(CSVLogger):
    """Lightning's ``metrics.csv``. A resumed run keeps the rows from before its checkpoint.

    Args:
        folder: the run's folder.
        steps: the optimiser steps before the checkpoint; 0 starts a new file.
    """

    def __init__(self, folder: Path, steps: int = 0) -> None:
        super().__init__(str(folder), name="", version="")
        # Lightning removes the file when it starts. A copy keeps the rows until they are back.
        self.copy = folder / f"{METRICS_FILE}.copy"
        path = self.copy if self.copy.exists() else folder / METRICS_FILE
        rows: list[dict[str, str]] = []
        if steps and path.exists():
            table = csv.DictReader(io.StringIO(read_text(path)))
            rows = [row for row in table if int(row["step"]) < steps]
        self.earlier = rows

    @property
    def experiment(self) -> Any:
        begun = self._experiment is not None or not isinstance(self.earlier, list)
        if begun or not is_first_process():
            return super().experiment
        rows, self.earlier = self.earlier, []
        keys = sorted({key for row in rows for key, value in row.items() if value})
        if rows:
            with whole_file(self.copy) as file:
                table = csv.DictWriter(file, keys, extrasaction="ignore")
                table.writeheader()
                table.writerows(rows)
        else:
            self.copy.unlink(missing_ok=True)  # Of an earlier run.
        writer = super().experiment
        if rows:
            os.replace(self.copy, writer.metrics_file_path)
            writer.metrics_keys = keys
        return writer


def wandb_logger(cfg: DictConfig, directory: Path) -> SafeWandbLogger | None:
    """Makes W&B's logger and opens its run. Returns None, with a warning, if that fails.

    A resumed run continues its W&B run, unless a sweep's agent sets ``WANDB_RUN_ID``.
    """
    known = {"id": os.environ.get("WANDB_RUN_ID")}
    if known["id"] is None:
        known = read_json(directory / WANDB_FILE) or {"id": secrets.token_hex(4)}
        if is_first_process():
            write_json(directory / WANDB_FILE, known)
    try:
        logger = SafeWandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            offline=cfg.wandb.offline,
            save_dir=str(directory),
            id=known["id"],
        )
    except ModuleNotFoundError:
        warnings.warn(
            'W&B failed and is left out: it is not installed (pip install "grap-solo[wandb]"); '
            "metrics.csv is still written",
            stacklevel=2,
        )
        return None
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return logger if logger.start(container) else None


@contextlib.contextmanager
def wandb_run() -> Iterator[None]:
    """Ends W&B's run with the training, so that the next training in this process starts its own
    W&B run."""
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            with contextlib.suppress(Exception):  # A logger's failure must not stop the run.
                wandb.finish(int(failed))
