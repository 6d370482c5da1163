"""The table and the picture of a search."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from optuna.trial import FrozenTrial

from grap_solo.records.files import read_json
from grap_solo.records.runs import RESULT_FILE
from grap_solo.records.trajectory import MEDIAN_FILE, read_median
from grap_solo.report.plots import COLORS
from grap_solo.report.tables import markdown
from grap_solo.training.config import terms_of

REPORT_FILES = ("search.md", "search.csv", "search.png")


@dataclass(frozen=True)
class SearchRow:
    """One run.

    Attributes:
        name: its folder.
        weights: the weight of each term; the median for GraP.
        accuracy: the online probe's top-1 in percent: the last, also of a pruned trial.
        state: ``complete``, ``pruned`` or ``fail``.
        reason: why it failed.
        seconds: what its training took.
        runs: how many runs it has taken to get there, this one among them.
        total: how many seconds of training that was.
    """

    name: str
    weights: dict[str, float]
    accuracy: float | None
    state: str
    reason: str
    seconds: float
    runs: int
    total: float


def trial_name(place: int) -> str:
    """The name of a trial's folder and row, from its place in the history."""
    return f"trial-{place:03d}"


def _trial_rows(history: Sequence[FrozenTrial]) -> list[SearchRow]:
    seconds = [trial.user_attrs["seconds"] for trial in history]
    return [
        SearchRow(
            trial_name(place),
            trial.params,
            trial.value,
            trial.state.name.lower(),
            trial.user_attrs["reason"],
            seconds[place],
            place + 1,
            total,
        )
        for place, (trial, total) in enumerate(zip(history, accumulate(seconds), strict=True))
    ]


def _grap_rows(directory: Path) -> list[SearchRow]:
    """``grap`` and ``grap_tuned``, as far as they have finished; tuning needs both."""
    rows: list[SearchRow] = []
    for name in ("grap", "grap_tuned"):
        result = read_json(directory / name / RESULT_FILE)
        if result is None:
            break
        seconds = result["seconds"]
        total = sum(row.seconds for row in rows) + seconds
        weights = read_median(directory / name / MEDIAN_FILE)
        runs = len(rows) + 1
        rows.append(
            SearchRow(name, weights, result["accuracy"], "complete", "", seconds, runs, total)
        )
    return rows


def _best_complete(rows: Sequence[SearchRow]) -> SearchRow | None:
    """The best complete trial: a pruned one was trained for less. The earliest of equals."""
    complete = [row for row in rows if row.state == "complete"]
    return max(complete, key=lambda row: row.accuracy or 0.0, default=None)


def write_report(
    history: Sequence[FrozenTrial], settings: Mapping[str, Any], directory: Path, cfg: DictConfig
) -> str:
    """Writes ``search.csv``, ``search.md`` and ``search.png`` from what has been recorded.

    Returns:
        The text of ``search.md``.
    """
    trials, grap = _trial_rows(history), _grap_rows(directory)
    terms = list(terms_of(cfg))
    _write_csv(directory / "search.csv", [*trials, *grap], terms)
    text = f"{_table(trials, grap, terms)}\n\n{_reading_notes(trials, settings, cfg)}"
    (directory / "search.md").write_text(f"{text}\n")
    _plot(directory / "search.png", trials, grap)
    return text


def _write_csv(file: Path, rows: Sequence[SearchRow], terms: Sequence[str]) -> None:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        header = ["name", *terms, "accuracy", "state", "reason", "seconds", "cumulative_seconds"]
        writer.writerow(header)
        for row in rows:
            weights = [f"{row.weights[term]:.6g}" for term in terms]
            accuracy = "" if row.accuracy is None else f"{row.accuracy:.4f}"
            cost = [f"{row.seconds:.2f}", f"{row.total:.2f}"]
            writer.writerow([row.name, *weights, accuracy, row.state, row.reason, *cost])


def _table(trials: Sequence[SearchRow], grap: Sequence[SearchRow], terms: Sequence[str]) -> str:
    """The best trial so far after 1, 2, 4, ... trials, and GraP's rows, in Markdown."""
    cells = [["run", "cost: runs", "cost: seconds", "online probe", *terms]]
    budgets = [2**n for n in range(len(trials).bit_length()) if 2**n < len(trials)]
    for budget in [*budgets, len(trials)]:
        name = f"best of {budget} trial{'s' * (budget > 1)}"
        cells.append(_cells(name, trials[budget - 1], _best_complete(trials[:budget]), terms))
    cells += [_cells(row.name, row, row, terms) for row in grap]
    return markdown(cells)


def _cells(name: str, cost: SearchRow, found: SearchRow | None, terms: Sequence[str]) -> list[str]:
    """One line: what has been spent by the end of ``cost``, and the best that it has found."""
    spent = [name, str(cost.runs), f"{cost.total:.0f}"]
    if found is None:
        return [*spent, "-", *("-" for _ in terms)]
    return [*spent, f"{found.accuracy:.2f}", *(f"{found.weights[term]:.3g}" for term in terms)]


def _reading_notes(
    trials: Sequence[SearchRow], settings: Mapping[str, Any], cfg: DictConfig
) -> str:
    """How to read the table."""
    states = [row.state for row in trials]
    return (
        f"Top-1 of the online probe on the validation images of {cfg.data.dataset} in percent, "
        f"after {cfg.max_epochs} epochs. The weights are the best trial's; GraP's are the median "
        f"of those that it learned. All runs have one training seed ({cfg.seed}), and one seed is "
        "no ranking; the search's best was also chosen on these very images. "
        f"Sampler {settings['sampler']}, pruner {settings['pruner']}, seed {settings['seed']}; "
        f"of {len(trials)} trials {states.count('pruned')} were pruned and "
        f"{states.count('fail')} failed."
    )


def _plot(file: Path, trials: Sequence[SearchRow], grap: Sequence[SearchRow]) -> None:
    """The best accuracy so far against what has been spent on training."""
    longest = max(row.total for row in [*trials, *grap])
    unit, divisor = ("hours", 3600) if longest > 7200 else ("seconds", 1)
    figure = Figure(figsize=(7, 4.2), layout="constrained")  # Without pyplot: no global state.
    axes = figure.subplots()
    best = [_best_complete(trials[: place + 1]) for place in range(len(trials))]
    spent = [row.total / divisor for row in trials]
    heights = [_height(row) for row in best]
    label = f"search: best of {len(trials)} trials so far"
    axes.plot(spent, heights, color=COLORS[0], drawstyle="steps-post", marker=".", label=label)
    for row, color in zip(grap, (COLORS[4], COLORS[2]), strict=False):
        label = f"{row.name}: {row.runs} run{'s' * (row.runs > 1)}"
        axes.plot(row.total / divisor, _height(row), "o", color=color, label=label)
    axes.set_xlabel(f"{unit} of training in all")
    axes.set_ylabel("online probe, top-1 in percent")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def _height(row: SearchRow | None) -> float:
    """Where a row is drawn; nowhere as long as no trial is complete."""
    return np.nan if row is None or row.accuracy is None else row.accuracy
