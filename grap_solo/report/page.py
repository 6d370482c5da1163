"""A report on runs: pictures and one page that shows them, for reading without a network."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grap_solo.errors import ConfigError
from grap_solo.records.files import DIAGNOSTICS_FILE, SUMMARY_FILE, WEIGHTS_FILE
from grap_solo.records.runs import (
    MEASURES,
    Group,
    Summary,
    folder_names,
    is_run,
    read_recorded,
    to_float,
)
from grap_solo.records.weights import format_weight
from grap_solo.report.plots import (
    COMPOSITE,
    Point,
    Series,
    plot_accuracy_cost,
    plot_alignment,
    plot_gramians,
    plot_weight_panels,
    step_epochs,
    term_colors,
)

PAGE_FILE = "report.html"
TEMPLATE = "report.html.j2"
EVALUATIONS = ("linear", "knn")  # Those drawn against the cost.
DASH = "\N{EN DASH}"


# ---- sections ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of texts; ``caption`` stands above it where a section has several."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Section:
    """A part of the page: a picture or tables, what they show, and what is left out of them."""

    key: str
    title: str
    caption: str = ""
    picture: Path | None = None
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _weights_section(groups: Sequence[Group], colors: dict[str, str], output: Path) -> Section:
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
    section.picture = output / "weights.png"
    plot_weight_panels(panels, section.picture, colors, references)
    dashed = "; dashed, the method's reference weights" if any(references.values()) else ""
    section.caption = (
        "The effective weight of each term in the course of training, one panel for each method: "
        f"the median of an epoch's steps around each point{_over_runs(groups)}{dashed}; the "
        "vertical axis is logarithmic, and linear near 0."
    )
    section.notes += _absent(groups, panels, "No weights")
    return section


def _over_runs(groups: Sequence[Group], of: str = "") -> str:
    """How a caption says that curves are of several runs, if any are."""
    if all(len(group.runs) == 1 for group in groups):
        return ""
    whose = f" of {of}" if of else ""
    return (
        ", as a mean over the method's runs (line) with one standard deviation to either side "
        f"(band{whose})"
    )


def _absent(groups: Sequence[Group], shown: Mapping[str, Any], what: str) -> list[str]:
    """A note that names the methods that are not shown, if there are any."""
    missing = [group.label for group in groups if group.label not in shown]
    return [f"{what} recorded: {', '.join(missing)}."] if missing else []


def _alignment_section(groups: Sequence[Group], colors: dict[str, str], output: Path) -> Section:
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
    """A column of the diagnostics of each run that has values there."""
    return [
        (step_epochs(each.epochs), each.columns[column])
        for each in group.diagnostics
        if column in each.columns and np.isfinite(each.columns[column]).any()
    ]


def _gramian_section(groups: Sequence[Group], output: Path) -> Section:
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
        "Cosine, at the embedding, between the gradients of each two terms, as a mean over the "
        "steps of the last epoch of all of a method's runs; a dash stands where none was recorded."
    )
    section.notes += _absent(groups, matrices, "No cosines")
    return section


def _gramian(group: Group) -> np.ndarray:
    """The mean cosines of the last epoch's steps of all runs, (K, K), nan where there are none."""
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


def _accuracy_section(summaries: Sequence[Summary], output: Path) -> Section:
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
        "fixed weights, with the run that a method starts from (median of steps timed in turns, "
        "whiskers from least to most); the dashed line marks fixed weights."
    )
    missing = [each.label for each in points if each.accuracies and each not in drawn]
    if missing:
        section.notes.append(f"No cost measured: {', '.join(missing)}.")
    return section


def _points(summaries: Sequence[Summary]) -> list[Point]:
    """Every method of every table."""
    names = Counter(row.get("method", "") for each in summaries for row in each.rows)
    titles = folder_names(each.folder for each in summaries)
    points = []
    for summary in summaries:
        for row in summary.rows:
            accuracies = {
                MEASURES[key]: (to_float(row.get(f"{key}_mean")), to_float(row.get(f"{key}_std")))
                for key in EVALUATIONS
            }
            known = {name: each for name, each in accuracies.items() if not np.isnan(each[0])}
            label = row.get("method", "")
            if names[label] > 1:
                label = f"{label} ({titles[summary.folder]})"
            low, high = to_float(row.get("cost_min")), to_float(row.get("cost_max"))
            points.append(Point(label, (to_float(row.get("cost")), low, high), known))
    return points


def _skipped_section(groups: Sequence[Group]) -> Section:
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
        "The steps that the rule did not learn weights from, as a share of all steps of a method's "
        "runs and as a number, in all and by cause."
    )
    section.notes += _absent(groups, recorded, "No steps")
    return section


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} % ({part})" if part else "0"


def _summary_section(summaries: Sequence[Summary]) -> Section:
    section = Section("summary", "Summary")
    titles = folder_names(each.folder for each in summaries)
    for each in summaries:
        section.tables += _tables(each, titles[each.folder] if len(summaries) > 1 else "")
    columns = {column for each in summaries for column in each.columns}
    said = {
        "linear_std": "accuracies (top-1 in percent) and RankMe are means ± standard deviations "
        "over the runs",
        "cost": "cost is the time of training relative to fixed weights, from steps timed in turns "
        "(median, and least to most), with the run that a method starts from",
        "p_value": "p is of Welch's t-test of the linear probe against fixed weights, two-sided "
        "and corrected by Holm",
    }
    parts = [words for column, words in said.items() if column in columns]
    if not any(each.written for each in summaries):
        parts.append("a weight is the mean over the runs of the median over their steps")
    source = f"as in {SUMMARY_FILE}" if all(each.written for each in summaries) else "as recorded"
    section.caption = f"The methods, {'; '.join([source, *parts])}."
    return section


def _tables(summary: Summary, title: str) -> list[Table]:
    """The table for people: a mean with its deviation, a cost with its range, and the weights,
    for which there is no room, in one of their own."""
    joined = {
        f"{column.removesuffix('_mean')}_std" for column in summary.columns if "_mean" in column
    }
    shown = [each for each in summary.columns if each not in {"cost_min", "cost_max", *joined}]
    weights = [each for each in shown if each.startswith("weight/")]
    measures = [each for each in shown if each not in weights]
    parts = [(measures, title)]
    if weights:
        parts.append(([measures[0], *weights], f"{title}: weights" if title else "Weights"))
    return [
        Table(
            [_column_name(column) for column in columns],
            [[_cell(row, column) for column in columns] for row in summary.rows],
            caption,
        )
        for columns, caption in parts
    ]


def _column_name(column: str) -> str:
    key = column.removesuffix("_mean")
    if column.startswith("weight/"):
        return column.removeprefix("weight/")
    return "p" if column == "p_value" else MEASURES.get(key, key)


def _cell(row: Mapping[str, str], column: str) -> str:
    """A cell's number with two digits behind the point, or its text as it is."""
    text = row.get(column, "")
    value = to_float(text)
    if text in ("", "nan", "None"):
        return DASH
    measured = column.endswith("_mean") or column == "cost" or column.startswith("weight/")
    if np.isnan(value) or (text.isdigit() and not measured):
        return text
    if column == "p_value":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    spread = to_float(row.get(column.removesuffix("_mean") + "_std"))
    if column.endswith("_mean") and not np.isnan(spread):
        return f"{value:.2f} ± {spread:.2f}"
    if column.startswith("weight/"):
        return format_weight(value)
    low, high = to_float(row.get("cost_min")), to_float(row.get("cost_max"))
    if column == "cost" and high > low:
        return f"{value:.2f} ({low:.2f}{DASH}{high:.2f})"
    return f"{value:.2f}"


# ---- the page ---------------------------------------------------------------------------------


def report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Draws runs and writes ``report.html``, one file with everything in it, beside the pictures.

    Args:
        folders: runs, and folders that hold runs, such as a comparison's.
        output: where to write. Made if it is not there.

    Returns:
        The files written.

    Raises:
        ConfigError: a folder without a run, a damaged file, or an output that cannot be written.
    """
    recorded = read_recorded(folders)
    groups, summaries = recorded.groups, recorded.summaries
    _make_output(output)
    colors = term_colors([term for group in groups for term in group.terms])
    sections = [
        _weights_section(groups, colors, output),
        _alignment_section(groups, colors, output),
        _gramian_section(groups, output),
        _accuracy_section(summaries, output),
        _skipped_section(groups),
        _summary_section(summaries),
    ]
    page = output / PAGE_FILE
    page.write_text(_render(folders, groups, sections, recorded.empty), encoding="utf-8")
    files = [*(each.picture for each in sections if each.picture is not None), page]
    print("files:", ", ".join(str(file) for file in files))
    return files


def _make_output(output: Path) -> None:
    if is_run(output):
        raise ConfigError(
            f"{output}: is a run's folder, whose {Path(WEIGHTS_FILE).stem}.png would be lost: "
            "give another for the report"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be made: {error.strerror}: give another") from None


def _render(
    folders: Sequence[Path],
    groups: Sequence[Group],
    sections: Sequence[Section],
    empty: Sequence[Path],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(embed=_embed, css_width=_css_width)
    count = sum(len(group.runs) for group in groups)
    return environment.get_template(TEMPLATE).render(
        lead=f"{_plural(len(groups), 'method')}, {_plural(count, 'run')}",
        folders=[str(folder) for folder in folders],
        overview=_overview(groups),
        sections=sections,
        runs=[str(run.folder) for group in groups for run in group.runs],
        empty=[str(path) for path in empty],
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _overview(groups: Sequence[Group]) -> Table:
    """What was run: a row for each group."""
    rows = []
    for group in groups:
        dataset, epochs, terms = group.runs[0].setting()
        seeds = sorted({run.seed for run in group.runs if run.seed is not None})
        rows.append(
            [
                group.label,
                group.runs[0].rule or DASH,
                dataset or DASH,
                epochs.removesuffix(" epochs") or DASH,
                terms or DASH,
                str(len(group.runs)),
                ", ".join(map(str, seeds)) or DASH,
            ]
        )
    columns = ["method", "weighting", "data", "epochs", "terms", "runs", "seeds"]
    return Table(columns, rows)


def _embed(picture: Path) -> str:
    """A picture as the text that an ``img`` takes in place of an address."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _css_width(picture: Path) -> int:
    """The width at which it is shown, half of its own: a PNG file has that behind 16 bytes."""
    return int.from_bytes(picture.read_bytes()[16:20], "big") // 2
