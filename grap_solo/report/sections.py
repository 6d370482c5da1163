"""The sections of a report: what each one shows, and what it leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grap_solo.records.collapse import LEAST_PART, LEAST_RANKME, LEAST_SPREAD, RANKME, Validations
from grap_solo.records.files import DIAGNOSTICS_FILE, METRICS_FILE, PICTURE_FILE, WEIGHTS_FILE
from grap_solo.records.runs import MEASURES, RunFiles
from grap_solo.report.curves import Series, step_epochs
from grap_solo.report.groups import Group, Summary, folder_names, to_float
from grap_solo.report.plots import (
    COMPOSITE,
    plot_accuracy_cost,
    plot_alignment,
    plot_collapse,
    plot_gramians,
    plot_weight_panels,
    term_colors,
)
from grap_solo.report.point_names import Point

DRAWN_MEASURES = ("linear", "knn")  # Against the cost.

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """A table of texts, with a caption if its section has several."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Section:
    """A section of the page: a picture or tables, their caption, notes on what is missing, and
    alerts, which come first."""

    key: str
    title: str
    caption: str = ""
    picture: Path | None = None
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)


def weights_section(groups: Sequence[Group], colors: dict[str, str], output: Path) -> Section:
    section = Section("weights", "Effective weights")
    panels = {
        group.label: {
            term: [(step_epochs(run.epochs), run.weights[:, k]) for run in group.runs]
            for k, term in enumerate(group.terms)
        }
        for group in groups
        if group.terms
    }
    if not panels:
        section.notes.append(f"Left out: no run has steps in its {WEIGHTS_FILE}.")
        return section
    references = {group.label: group.runs[0].reference for group in groups}
    section.picture = output / PICTURE_FILE
    plot_weight_panels(panels, section.picture, colors, references)
    dashed = "; dashed, the method's reference weights" if any(references.values()) else ""
    section.caption = (
        "The effective weight of each term during training, one panel for each method: "
        f"the median of an epoch's steps around each point{_over_runs(groups)}{dashed}; the "
        "vertical axis is logarithmic, and linear near 0."
    )
    section.notes += _absent(groups, panels, "No weights")
    return section


def _over_runs(groups: Sequence[Group], of: str = "") -> str:
    """Returns the part of a caption on means and bands; empty if each method has one run."""
    if all(len(group.runs) == 1 for group in groups):
        return ""
    whose = f" of {of}" if of else ""
    return (
        ", as a mean over the method's runs (line) with one standard deviation to either side "
        f"(band{whose})"
    )


def _absent(groups: Sequence[Group], shown: Mapping[str, Any], what: str) -> list[str]:
    """Returns a note that names the methods that are not shown; empty if all are."""
    missing = [group.label for group in groups if group.label not in shown]
    return [f"{what} recorded: {', '.join(missing)}."] if missing else []


def alignment_section(groups: Sequence[Group], colors: dict[str, str], output: Path) -> Section:
    section = Section("alignment", "Alignment with the downstream task")
    panels: dict[str, dict[str, list[Series]]] = {}
    for group in groups:
        columns = {f"alignment/{term}": term for term in group.terms} | {"alignment": COMPOSITE}
        series = {name: _series(group, column) for column, name in columns.items()}
        if series[COMPOSITE]:
            panels[group.label] = {name: runs for name, runs in series.items() if runs}
    if not panels:
        section.notes.append(
            f"Left out: no run has cosines with the downstream gradient in a {DIAGNOSTICS_FILE}."
        )
        return section
    section.picture = output / "alignment.png"
    plot_alignment(panels, section.picture, colors)
    others = ", pale in the other methods' panels" if len(panels) > 1 else ""
    section.caption = (
        "Cosine, at the embedding, between the downstream gradient and that of the composite loss "
        f"(black{others}) and of each term (coloured): the median of an epoch's steps around each "
        f"point{_over_runs(groups, 'the composite loss')}; the number beside a method is its "
        "composite loss's median over the last epoch."
    )
    section.notes += _absent(groups, panels, "No cosines")
    return section


def _series(group: Group, column: str) -> list[Series]:
    """Selects a column of the diagnostics, for each run with values in it."""
    return [
        (step_epochs(each.epochs), each.columns[column])
        for each in group.diagnostics
        if column in each.columns and np.isfinite(each.columns[column]).any()
    ]


def gramian_section(groups: Sequence[Group], output: Path) -> Section:
    section = Section("gramian", "Cosines between the terms' gradients")
    matrices = {group.label: (group.terms, _gramian(group)) for group in groups if group.terms}
    matrices = {
        label: (terms, matrix)
        for label, (terms, matrix) in matrices.items()
        if np.isfinite(matrix).sum() > len(terms)
    }
    if not matrices:
        section.notes.append(
            f"Left out: no run has cosines between gradients of its last epoch in a "
            f"{DIAGNOSTICS_FILE}."
        )
        return section
    section.picture = output / "gramian.png"
    plot_gramians(matrices, section.picture)
    section.caption = (
        "Cosine, at the embedding, between the gradients of each pair of terms, averaged over the "
        "steps of the last epoch of all of a method's runs; a dash stands where none was recorded."
    )
    section.notes += _absent(groups, matrices, "No cosines")
    return section


def _gramian(group: Group) -> np.ndarray:
    """Averages the cosines over the last epoch's steps of all runs, (K, K); NaN without any."""
    matrix = np.eye(len(group.terms))
    for i, first in enumerate(group.terms):
        for j, second in enumerate(group.terms[:i]):
            column = f"gramian/{second}/{first}"
            last = [
                each.columns[column][each.epochs == each.epochs[-1]]
                for each in group.diagnostics
                if column in each.columns
            ]
            values = np.concatenate([*last, np.zeros(0)])
            values = values[np.isfinite(values)]
            matrix[i, j] = matrix[j, i] = values.mean() if len(values) else np.nan
    return matrix


def collapse_section(groups: Sequence[Group], output: Path) -> Section:
    section = Section("collapse", "Rank and spread of the embeddings")
    runs: dict[str, list[tuple[RunFiles, Validations]]] = {}
    for group in groups:
        known = [(run, run.validations) for run in group.runs if run.validations is not None]
        if known:
            runs[group.label] = known
    if not runs:
        section.notes.append(f"Left out: no run has {RANKME} in its {METRICS_FILE}.")
        return section
    limits = {"RankMe": LEAST_RANKME, "spread": LEAST_SPREAD}
    measures: dict[str, dict[str, list[Series]]] = {measure: {} for measure in limits}
    crosses: dict[str, list[tuple[str, float, float]]] = {measure: [] for measure in limits}
    for label, each in runs.items():
        for run, found in each:
            epochs, values = step_epochs(found.epochs), {"RankMe": found.rankme}
            values["spread"] = found.spread
            for measure in limits:
                measures[measure].setdefault(label, []).append((epochs, values[measure]))
            if run.collapse is not None:
                at = run.collapse.validation
                for measure in limits:
                    crosses[measure].append((label, epochs[at], values[measure][at]))
                section.alerts.append(f"{_run_name(label, run)}: {run.collapse.describe()}.")
    section.picture = output / "collapse.png"
    plot_collapse(measures, section.picture, term_colors(list(runs)), limits, crosses)
    section.caption = (
        "The effective rank of the validation embeddings (RankMe), and the standard deviation of "
        "the normalised embeddings' features times the square root of their number (spread: near "
        "1 if the embeddings point in all directions alike, 0 if they are all the same), at each "
        f"validation{_over_runs(groups)}. A run has collapsed when, at two validations in a row, "
        "either is below its dashed line, or RankMe below "
        f"{LEAST_PART:g} of the largest value that the run had."
    )
    section.notes += _absent(groups, runs, "No rank")
    return section


def _run_name(label: str, run: RunFiles) -> str:
    return label if run.seed is None else f"{label}, seed {run.seed}"


def accuracy_section(summaries: Sequence[Summary], output: Path) -> Section:
    section = Section("accuracy-cost", "Accuracy and cost")
    points = _points(summaries)
    drawn = [each for each in points if each.accuracies and each.cost[0] > 0]
    if not drawn:
        section.notes.append("Left out: no method has both an accuracy and a cost.")
        return section
    section.picture = output / "accuracy_cost.png"
    plot_accuracy_cost(drawn, section.picture)
    section.caption = (
        "Top-1 accuracy of frozen embeddings on the validation images (mean over the runs, "
        "whiskers of one standard deviation) against the time of training relative to that with "
        "fixed weights, including the run that a method starts from (median of steps timed in "
        "turns, whiskers from minimum to maximum); the dashed line marks fixed weights."
    )
    missing = [each.label for each in points if each.accuracies and each not in drawn]
    if missing:
        section.notes.append(f"No cost measured: {', '.join(missing)}.")
    return section


def _points(summaries: Sequence[Summary]) -> list[Point]:
    """Collects the methods of all tables."""
    names = Counter(row.get("method", "") for each in summaries for row in each.rows)
    titles = folder_names(each.folder for each in summaries)
    points = []
    for summary in summaries:
        for row in summary.rows:
            accuracies = {
                MEASURES[key]: (to_float(row.get(f"{key}_mean")), to_float(row.get(f"{key}_std")))
                for key in DRAWN_MEASURES
            }
            known = {name: each for name, each in accuracies.items() if not np.isnan(each[0])}
            label = row.get("method", "")
            if names[label] > 1:
                label = f"{label} ({titles[summary.folder]})"
            low, high = to_float(row.get("cost_min")), to_float(row.get("cost_max"))
            points.append(Point(label, (to_float(row.get("cost")), low, high), known))
    return points


def skipped_section(groups: Sequence[Group]) -> Section:
    section = Section("skipped", "Skipped steps")
    recorded = {group.label: group.diagnostics for group in groups if group.diagnostics}
    if not recorded:
        section.notes.append(f"Left out: no run has a {DIAGNOSTICS_FILE}.")
        return section
    counts = {
        label: Counter(cause for each in diagnostics for cause in each.skipped)
        for label, diagnostics in recorded.items()
    }
    causes = sorted({cause for each in counts.values() for cause in each if cause})
    rows = []
    for label, count in counts.items():
        steps = count.total()
        shares = [_share(steps - count[""], steps), *(_share(count[c], steps) for c in causes)]
        rows.append([label, str(steps), *shares])
    section.tables.append(Table(["method", "steps", "skipped", *causes], rows))
    section.caption = (
        "The steps that the rule did not learn from: their share of all steps of a method's "
        "runs, and their number in parentheses, in total and by cause."
    )
    section.notes += _absent(groups, recorded, "No steps")
    return section


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} % ({part})" if part else "0"
