"""The table and the picture of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from optuna.trial import FrozenTrial

from grap_solo.records.files import MEDIAN_FILE, RESULT_FILE, read_json
from grap_solo.records.runs import counted
from grap_solo.records.weights import read_median
from grap_solo.report.plots import COLORS
from grap_solo.report.tables import format_number, format_weights, markdown, write_csv, write_text
from grap_solo.training.config import terms_of

GRAP_RUNS = ("grap", "grap_tuned")
"""The runs beside the trials; the second starts from the first."""

REPORT_FILES = ("search.md", "search.csv", "search.png")


@dataclass(frozen=True)
class SearchRow:
    """One run of a search.

    Attributes:
        name: its folder.
        weights: the weight of each term; for GraP, the median of the learned ones.
        score: the online probe's last top-1 in percent on the half of the validation images that
            the search climbs, also of a pruned trial; None if the run failed.
        accuracy: the same on the other half, which the search reports.
        state: ``complete``, ``pruned`` or ``fail``.
        reason: why it failed; else empty.
        seconds: the seconds of its training.
        runs: the number of runs up to and including this one.
        total: the seconds of training of those runs.
    """

    name: str
    weights: dict[str, float]
    score: float | None
    accuracy: float | None
    state: str
    reason: str
    seconds: float
    runs: int
    total: float


def trial_name(place: int) -> str:
    """The name of a trial's folder and row, from its place in the history: that of its start."""
    return f"trial-{place:03d}"


def _trial_rows(history: Sequence[FrozenTrial]) -> list[SearchRow]:
    seconds = [trial.user_attrs["seconds"] for trial in history]
    return [
        SearchRow(
            trial_name(trial.user_attrs["place"]),
            trial.params,
            trial.value,
            trial.user_attrs["accuracy"],
            trial.state.name.lower(),
            trial.user_attrs["reason"],
            seconds[place],
            place + 1,
            total,
        )
        for place, (trial, total) in enumerate(zip(history, accumulate(seconds), strict=True))
    ]


def _grap_rows(directory: Path) -> list[SearchRow]:
    """Makes the rows of ``grap`` and ``grap_tuned``, if finished; the second costs both runs."""
    rows: list[SearchRow] = []
    for name in GRAP_RUNS:
        result = read_json(directory / name / RESULT_FILE)
        if result is None:
            break
        seconds = result["seconds"]
        total = sum(row.seconds for row in rows) + seconds
        weights = read_median(directory / name / MEDIAN_FILE)
        runs = len(rows) + 1
        found = (result["score"], result["accuracy"])
        rows.append(SearchRow(name, weights, *found, "complete", "", seconds, runs, total))
    return rows


def _best_complete(rows: Sequence[SearchRow]) -> SearchRow | None:
    """Finds the complete trial of the best score, the earliest of equals. Pruned ones were trained
    for less."""
    complete = [row for row in rows if row.state == "complete"]
    return max(complete, key=lambda row: row.score or 0.0, default=None)


def write_report(
    history: Sequence[FrozenTrial], settings: Mapping[str, Any], directory: Path, cfg: DictConfig
) -> str:
    """Writes ``search.csv``, ``search.md`` and ``search.png``.

    Args:
        history: the finished trials, in order.
        settings: the search's ``sampler``, ``pruner`` and ``seed``.
        directory: the search's folder, which holds the runs.
        cfg: the prepared configuration of the runs.

    Returns:
        The text of ``search.md``.
    """
    trials, grap = _trial_rows(history), _grap_rows(directory)
    terms = list(terms_of(cfg))
    costs = ["seconds", "cumulative_seconds"]
    header = ["name", *terms, "score", "accuracy", "state", "reason", *costs]
    rows = [_csv_row(row, terms) for row in [*trials, *grap]]
    write_csv(directory / "search.csv", [header, *rows])
    notes = _reading_notes(trials, settings, cfg)
    text = write_text(directory / "search.md", _table(trials, grap, terms), notes)
    _plot(directory / "search.png", trials, grap)
    return text


def _csv_row(row: SearchRow, terms: Sequence[str]) -> list[str]:
    found = [format_number(each, ".4f", missing="") for each in (row.score, row.accuracy)]
    cost = [f"{row.seconds:.2f}", f"{row.total:.2f}"]
    weights = format_weights(row.weights, terms, ".6g")
    return [row.name, *weights, *found, row.state, row.reason, *cost]


def _table(trials: Sequence[SearchRow], grap: Sequence[SearchRow], terms: Sequence[str]) -> str:
    """Formats the best trial after 1, 2, 4, ... trials, and GraP's rows, in Markdown."""
    cells = [["run", "cost: runs", "cost: seconds", "online probe", "climbed score", *terms]]
    budgets = [2**n for n in range(len(trials).bit_length()) if 2**n < len(trials)]
    for budget in [*budgets, len(trials)]:
        name = f"best of {counted(budget, 'trial')}"
        cells.append(_cells(name, trials[budget - 1], _best_complete(trials[:budget]), terms))
    cells += [_cells(row.name, row, row, terms) for row in grap]
    return markdown(cells)


def _cells(name: str, cost: SearchRow, found: SearchRow | None, terms: Sequence[str]) -> list[str]:
    """Formats one line: the runs and seconds spent up to ``cost``, and the best run they found."""
    weights = None if found is None else found.weights
    measured = (None, None) if found is None else (found.accuracy, found.score)
    return [
        name,
        str(cost.runs),
        f"{cost.total:.0f}",
        *(format_number(each, ".2f") for each in measured),
        *format_weights(weights, terms, ".3g"),
    ]


def _reading_notes(
    trials: Sequence[SearchRow], settings: Mapping[str, Any], cfg: DictConfig
) -> str:
    """Says how to read the table."""
    states = [row.state for row in trials]
    return (
        f"Top-1 of the online probe on the validation images of {cfg.data.dataset} in percent, "
        f"after {counted(cfg.max_epochs, 'epoch')}. The images are split into two "
        f"halves, every class evenly, by seed {settings['seed']}. The search climbs the score, "
        "on the first half, and its best trial is the one of the best score. The online "
        "probe's figures, and the picture's, are of the other half, which has chosen nothing. The "
        "weights are the best trial's; GraP's are the median of those that it learned. All runs "
        f"have one training seed ({cfg.seed}), and one seed is no ranking. "
        f"Sampler {settings['sampler']}, pruner {settings['pruner']}, seed {settings['seed']}; "
        f"of {counted(len(trials), 'trial')} {states.count('pruned')} were pruned and "
        f"{states.count('fail')} failed."
    )


def _plot(file: Path, trials: Sequence[SearchRow], grap: Sequence[SearchRow]) -> None:
    """Plots the best accuracy so far against the time spent on training."""
    longest = max(row.total for row in [*trials, *grap])
    unit, divisor = ("hours", 3600) if longest > 7200 else ("seconds", 1)
    figure = Figure(figsize=(7, 4.2), layout="constrained")  # pyplot keeps global state.
    axes = figure.subplots()
    best = [_best_complete(trials[: place + 1]) for place in range(len(trials))]
    spent = [row.total / divisor for row in trials]
    heights = [_height(row) for row in best]
    label = f"search: best of {counted(len(trials), 'trial')} so far"
    axes.plot(spent, heights, color=COLORS[0], drawstyle="steps-post", marker=".", label=label)
    for row, color in zip(grap, (COLORS[4], COLORS[2]), strict=False):
        label = f"{row.name}: {counted(row.runs, 'run')}"
        axes.plot(row.total / divisor, _height(row), "o", color=color, label=label)
    axes.set_xlabel(f"{unit} of training in all")
    axes.set_ylabel("online probe, top-1 in percent")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def _height(row: SearchRow | None) -> float:
    """The row's accuracy; NaN, which is not drawn, as long as no trial is complete."""
    return np.nan if row is None or row.accuracy is None else row.accuracy
