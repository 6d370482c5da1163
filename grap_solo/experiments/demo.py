"""The demonstration: default, GraP and tuned GraP on scikit-learn's digits, in one table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from omegaconf import DictConfig

from grap_solo.compose import CONFIGS, compose
from grap_solo.data import evaluation_loader, load_both
from grap_solo.errors import ConfigError
from grap_solo.evaluation.offline import Evaluation, device_of, evaluate
from grap_solo.experiments.retrain import retrain
from grap_solo.methods import CompositeMethod, find_method
from grap_solo.records.files import (
    MEDIAN_FILE,
    PICTURE_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
    make_folder,
)
from grap_solo.records.weights import median_weights
from grap_solo.report.tables import format_number, format_weights, markdown, write_csv, write_text
from grap_solo.training.run import Run, pretrain


@dataclass(frozen=True)
class DemoRow:
    """One method of the table; accuracies are in percent.

    Attributes:
        method: its name.
        online: the online probe's top-1 after the last epoch; None if there was no training.
        offline: top-1 of the offline evaluations.
        weights: each term's constant weight, or the median of the learned ones; None if there was
            no training.
    """

    method: str
    online: float | None
    offline: Evaluation
    weights: dict[str, float] | None

    def cells(self) -> list[str]:
        """Formats the columns of :data:`HEADER`, then one for each of :data:`TERMS`."""
        accuracies = (self.online, self.offline.linear, self.offline.knn)
        return [
            self.method,
            *(format_number(accuracy, ".2f") for accuracy in accuracies),
            *format_weights(self.weights, TERMS, ".2f"),
        ]


HEADER = ("method", "online probe", "linear probe", "k-NN")
TERMS = ("nnclr", "attn_nnclr", "byol", "barlow")


def demo(directory: Path, overrides: Sequence[str] = ()) -> list[DemoRow]:
    """Trains three methods and writes ``summary.md`` and ``summary.csv`` beside their runs.

    Args:
        directory: the folder for the runs. An existing one is moved aside.
        overrides: hydra overrides for all three, such as ``max_epochs=2``.

    Raises:
        ConfigError: the package was installed without its ``configs`` folder.
    """
    if not CONFIGS.is_dir():
        raise ConfigError(f"{CONFIGS}: no such folder: run the demo from a clone of the repository")
    make_folder(directory.parent, "demo")
    if directory.exists():
        aside = next(
            path
            for n in range(1, 10_000)
            if not (path := directory.with_name(f"{directory.name}.{n}")).exists()
        )
        directory.rename(aside)
        print(f"{directory} was there already: moved to {aside}")

    def configuration(file: str, name: str) -> DictConfig:
        changes = [*overrides, f"name={name}", f"checkpoint.dir={directory}"]
        return compose(CONFIGS / "digits" / f"{file}.yaml", changes)

    start = time.monotonic()
    default = pretrain(configuration("all4one", "default"))
    grap = pretrain(configuration("grap", "grap"))
    tuned = retrain([grap.directory], lambda _: configuration("grap", "grap_tuned"))
    seconds = time.monotonic() - start

    rows = [DemoRow("untrained", None, _evaluate_untrained(default), None)]
    rows += [_row("default", default), _row("grap", grap), _row("grap_tuned", tuned)]
    _write_summary(rows, directory, seconds, default)
    return rows


def _evaluate(run: Run, model: CompositeMethod) -> Evaluation:
    train, validation = load_both(run.cfg.data)
    return evaluate(
        model.backbone,
        evaluation_loader(run.cfg, train),
        evaluation_loader(run.cfg, validation),
        device_of(run.cfg),
    )


def _evaluate_untrained(run: Run) -> Evaluation:
    """Evaluates the backbone with which ``run`` started."""
    pl.seed_everything(run.cfg.seed, verbose=False)
    return _evaluate(run, find_method(run.cfg.method)(run.cfg))


def _row(method: str, run: Run) -> DemoRow:
    weights = median_weights(run.directory / WEIGHTS_FILE, run.model.weighting.warmup_epochs)
    return DemoRow(method, run.accuracy, _evaluate(run, run.model), weights)


def _write_summary(rows: Sequence[DemoRow], directory: Path, seconds: float, run: Run) -> None:
    cells = [[*HEADER, *TERMS], *(row.cells() for row in rows)]
    write_csv(directory / SUMMARY_FILE, cells)
    notes = (
        f"Top-1 on digits' validation images in percent (one seed, {run.cfg.seed}; "
        f"{run.cfg.max_epochs} epochs). The weights are All4One's own, the median of those that "
        f"GraP learned, and that median held constant. Training took {seconds:.0f} s."
    )
    text = write_text(directory / "summary.md", markdown(cells), notes)
    files = ("summary.md", SUMMARY_FILE, f"grap/{PICTURE_FILE}", f"grap/{MEDIAN_FILE}")
    print(f"\n{text}")
    print("files:", ", ".join(str(directory / file) for file in files))
