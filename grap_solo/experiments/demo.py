"""The demonstration: two methods on scikit-learn's digits, with default, equal and learned
weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

import grap_solo
from grap_solo.compose import compose
from grap_solo.data import evaluation_loader, load_both
from grap_solo.errors import ConfigError
from grap_solo.evaluation.offline import Evaluation, device_of, evaluate
from grap_solo.experiments.retrain import retrain
from grap_solo.experiments.verdicts import describe_accuracies, describe_approach
from grap_solo.methods import CompositeMethod, find_method
from grap_solo.packaged import find_packaged
from grap_solo.records.files import PICTURE_FILE, SUMMARY_FILE, WEIGHTS_FILE, make_folder
from grap_solo.records.runs import read_run
from grap_solo.records.weights import format_weight, median_of_rows, median_weights, read_weights
from grap_solo.report.curves import step_epochs
from grap_solo.report.plots import plot_weight_panels, term_colors
from grap_solo.report.tables import MISSING, format_number, markdown, write_text
from grap_solo.training.config import prepare
from grap_solo.training.run import Run, pretrain


@dataclass(frozen=True)
class DemoPlan:
    """One table of the demo: a method, trained with several weightings.

    Attributes:
        title: the method's name in texts.
        method: its name in ``method:``, and of its file in ``configs/digits``.
        epochs: of each training, so that all together fit into :data:`MINUTES`.
        runs: names of :data:`RUNS`, in the order of the training.
        untrained: whether the table has a row for the backbone before training.
    """

    title: str
    method: str
    epochs: int
    runs: tuple[str, ...]
    untrained: bool = False

    def folder(self, run: str) -> str:
        """Names the folder of a run."""
        return f"{self.method}_{run}"


PLANS = (
    DemoPlan("All4One", "all4one", 10, ("default", "equal", "grap", "grap_tuned"), untrained=True),
    DemoPlan("VICReg", "vicreg", 10, ("default", "equal", "grap")),
)
RUNS = {
    "default": "the weights that its authors chose by hand",
    "equal": "weight 1 for every term",
    "grap": "GraP learns the weights while it trains",
    "grap_tuned": "a new training with the median of GraP's weights, held constant",
}
"""The runs of a method, and what is announced of each."""

SETTING = ("data.batched=True",)
"""Keys of all runs: views made a batch at a time take less time."""
MINUTES = 6
"""How long the demo takes on two cores, if nothing is overridden."""
OWN_KEYS = ("name", "method", "checkpoint.dir", "fast_dev_run")
"""Keys that cannot be overridden: the demo tells its runs apart by them, and reads their files."""

MOMENTS = {"first step": 0.0, "after a quarter": 0.25, "halfway": 0.5, "last epoch": 1.0}
"""The places in a run at which the table of GraP's weights looks, as shares of its steps."""
FIRST, LAST = "first step", "last epoch"


@dataclass(frozen=True)
class DemoRow:
    """One run of a table; accuracies are in percent.

    Attributes:
        name: a name of :data:`RUNS`, or ``untrained``.
        online: the online probe's top-1 after the last epoch; None if there was no training.
        offline: top-1 of the offline evaluations.
        weights: each term's constant weight, or the median of the learned ones; None if there was
            no training.
    """

    name: str
    online: float | None
    offline: Evaluation
    weights: dict[str, float] | None

    def cells(self, terms: Sequence[str]) -> list[str]:
        """Formats the columns of :data:`HEADER`, then one for each term."""
        accuracies = (self.online, self.offline.linear, self.offline.knn)
        return [
            DEFAULT_LABEL if self.name == "default" else self.name,
            *(format_number(accuracy, ".2f") for accuracy in accuracies),
            *_weight_cells(self.weights, terms),
        ]


DEFAULT_LABEL = "default (hand-tuned)"
HEADER = ("method", "online probe", "linear probe", "k-NN")


@dataclass(frozen=True)
class DemoTable:
    """The figures of a method.

    Attributes:
        plan: which method.
        rows: its runs.
        path: GraP's weights at each of :data:`MOMENTS`.
        images: the number of validation images.
        epochs: of each run.
        seed: of each run.
    """

    plan: DemoPlan
    rows: list[DemoRow]
    path: dict[str, dict[str, float]]
    images: int
    epochs: int
    seed: int

    def row(self, name: str) -> DemoRow:
        return next(row for row in self.rows if row.name == name)

    def texts(self) -> list[str]:
        """Returns the table, GraP's weights over the run, and the sentences on both."""
        terms = list(self.path[FIRST])
        default = self.row("default").weights
        assert default is not None
        accuracies = [[*HEADER, *terms], *(row.cells(terms) for row in self.rows)]
        weights = [["GraP's weights, % of their sum", *terms]]
        compared = {**self.path, DEFAULT_LABEL: default}
        weights += [[name, *_weight_cells(_shares(each), terms)] for name, each in compared.items()]
        linear = {row.name: row.offline.linear for row in self.rows}
        return [
            f"## {self.plan.title}",
            markdown(accuracies),
            describe_accuracies(linear, self.images),
            markdown(weights),
            describe_approach(self.path[FIRST], self.path[LAST], default),
        ]


def demo(directory: Path, overrides: Sequence[str] = ()) -> list[DemoTable]:
    """Trains two methods with several weightings each, and writes ``summary.md``, ``summary.csv``
    and ``weights.png`` beside their runs.

    Args:
        directory: the folder for the runs. An existing one is moved aside.
        overrides: hydra overrides for all runs, such as ``max_epochs=2``.

    Raises:
        ConfigError: an override that one of the runs cannot take.
    """
    start = time.monotonic()
    configs = _configurations(directory, overrides)
    make_folder(directory.parent, "demo")
    _move_aside(directory)
    how = f"with {' '.join(overrides)}" if overrides else f"about {MINUTES} minutes on 2 cores"
    print(f"{len(configs)} trainings on scikit-learn's digits, {how}; results go to {directory}")
    number = itertools.count(1)
    tables = [_train_all(plan, configs, number) for plan in PLANS]
    _draw(directory)
    _write_summary(tables, directory, time.monotonic() - start)
    return tables


def _configurations(directory: Path, overrides: Sequence[str]) -> dict[str, DictConfig]:
    """Composes and checks the configurations of all runs, by folder, before the first training."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in OWN_KEYS:
            raise ConfigError(f"{key}: the demo sets it for each of its runs: leave it out")
    found = {}
    for plan in PLANS:
        for run in plan.runs:
            changes = [*SETTING, f"max_epochs={plan.epochs}", *overrides]
            changes += [f"name={plan.folder(run)}", f"checkpoint.dir={directory}"]
            if run != "default":
                rule = "equal" if run == "equal" else "grap"
                changes += [f"method=grap_{plan.method}", f"+weighting.name={rule}"]
            cfg = compose(find_packaged(f"digits/{plan.method}"), changes)
            prepare(cfg)
            found[plan.folder(run)] = cfg
    return found


def _move_aside(directory: Path) -> None:
    if directory.exists():
        aside = next(
            path
            for n in range(1, 10_000)
            if not (path := directory.with_name(f"{directory.name}.{n}")).exists()
        )
        directory.rename(aside)
        print(f"{directory} was there already: moved to {aside}")


def _train_all(
    plan: DemoPlan, configs: Mapping[str, DictConfig], number: Iterator[int]
) -> DemoTable:
    """Trains and evaluates the runs of a table, and says of each that it starts."""
    runs: dict[str, Run] = {}
    rows: list[DemoRow] = []
    for name in plan.runs:
        say = f"[{next(number)}/{len(configs)}] {plan.title}, {name}: {RUNS[name]}"
        print(f"\n{say}", flush=True)
        parent = runs["grap"].directory if name == "grap_tuned" else None
        run = runs[name] = _train_run(configs[plan.folder(name)], parent)
        weights = median_weights(run.directory / WEIGHTS_FILE, run.model.weighting.warmup_epochs)
        rows.append(DemoRow(name, run.accuracy, _evaluate(run, run.model), weights))
    default = runs["default"].cfg
    if plan.untrained:
        rows.insert(0, DemoRow("untrained", None, _evaluate_untrained(runs["default"]), None))
    return DemoTable(
        plan,
        rows,
        path_of_weights(runs["grap"].directory / WEIGHTS_FILE),
        images=len(load_both(default.data)[1]),
        epochs=default.max_epochs,
        seed=default.seed,
    )


def _train_run(cfg: DictConfig, parent: Path | None) -> Run:
    return pretrain(cfg) if parent is None else retrain([parent], lambda _: cfg)


def _evaluate(run: Run, model: CompositeMethod) -> Evaluation:
    train, validation = load_both(run.cfg.data, run.cfg.labels)
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


def path_of_weights(file: Path) -> dict[str, dict[str, float]]:
    """Takes the effective weights at each of :data:`MOMENTS`: the median over the epoch of steps
    that ends there, since single steps are noisy. The first moment is the first step alone.

    Args:
        file: a ``weights.csv``.
    """
    terms, steps, weights = read_weights(file)
    per_epoch = int(np.bincount(steps[:, 1]).max())
    path = {}
    for moment, share in MOMENTS.items():
        end = max(1, round(share * len(weights)))
        path[moment] = median_of_rows(terms, weights[max(0, end - per_epoch) : end])
    return path


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights in percent of their sum: a common factor means nothing."""
    total = sum(weights.values()) or 1.0
    return {term: 100 * weight / total for term, weight in weights.items()}


def _weight_cells(weights: Mapping[str, float] | None, terms: Sequence[str]) -> list[str]:
    return [MISSING if weights is None else format_weight(weights[term]) for term in terms]


def _draw(directory: Path) -> None:
    """Draws the weights of both GraP runs, with the default weights dashed."""
    runs = {plan.title: read_run(directory / plan.folder("grap")) for plan in PLANS}
    panels = {
        title: {
            term: [(step_epochs(run.epochs), run.weights[:, k])] for k, term in enumerate(run.terms)
        }
        for title, run in runs.items()
    }
    colors = term_colors([term for run in runs.values() for term in run.terms])
    references = {title: run.reference for title, run in runs.items()}
    plot_weight_panels(panels, directory / PICTURE_FILE, colors, references)


def _write_summary(tables: Sequence[DemoTable], directory: Path, seconds: float) -> None:
    records = [
        {
            "method": table.plan.folder(row.name),
            "online": row.online,
            "linear": row.offline.linear,
            "knn": row.offline.knn,
            **{f"weight/{term}": weight for term, weight in (row.weights or {}).items()},
        }
        for table in tables
        for row in table.rows
    ]
    pd.DataFrame(records).to_csv(directory / SUMMARY_FILE, index=False, float_format="%.6g")
    trained = ", ".join(f"{table.epochs} ({table.plan.title})" for table in tables)
    notes = (
        f"Accuracies are top-1 on digits' {tables[0].images} validation images in percent. A "
        "weight is the constant one or, of grap, the median over the run's steps; the rows of "
        "GraP's weights after the first are medians over an epoch's steps. One seed "
        f"({tables[0].seed}); epochs: {trained}; grap-solo {grap_solo.__version__}, torch "
        f"{torch.__version__}. The demo took {seconds:.0f} s."
    )
    text = write_text(
        directory / "summary.md", *(text for table in tables for text in table.texts()), notes
    )
    print(f"\n{text}")
    files = ("summary.md", SUMMARY_FILE, PICTURE_FILE)
    print("files:", ", ".join(str(directory / file) for file in files))
