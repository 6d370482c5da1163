"""A report on runs: pictures and one page that shows them, for reading without a network."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grap_solo.errors import ConfigError
from grap_solo.methods.all4one import JOINED_REFERENCE, REFERENCE
from grap_solo.plots import (
    COMPOSITE,
    Point,
    Series,
    mean_and_std,
    plot_accuracy_cost,
    plot_alignment,
    plot_gramians,
    plot_weight_panels,
    step_epochs,
    term_colors,
)
from grap_solo.trajectory import DIAGNOSTICS_FILE, WEIGHTS_FILE, read_weights

PAGE_FILE = "report.html"
TEMPLATE = "report.html.j2"
CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
SUMMARY_FILE = "summary.csv"
COST_FILE = "cost.json"

MEASURES = {
    "online": "online probe",
    "linear": "linear probe",
    "knn": "k-NN",
    "rankme": "RankMe",
}
"""What ``result.json`` holds, and how a table names it."""

EVALUATIONS = ("linear", "knn")  # Those drawn against the cost.
DASH = "\N{EN DASH}"


# ---- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnostics:
    """A ``diagnostics.csv``.

    Attributes:
        epochs: the epoch of each row, (N,).
        columns: its numbers by column, each (N,), nan where there is none.
        skipped: why the row's step was not learned from, or an empty text.
    """

    epochs: np.ndarray
    columns: dict[str, np.ndarray]
    skipped: list[str]


@dataclass(frozen=True)
class RunFiles:
    """What is read of one run.

    Attributes:
        folder: where it is.
        method: the method that it is a run of.
        seed: its seed, if any file or the folder's name says.
        config: its ``config.yaml``; empty without one.
        terms: its terms, in order; none without weights.
        epochs: the epoch of each step, (N,).
        weights: the effective weights, (N, K).
        diagnostics: what was recorded of its gradients, if anything was.
        result: its ``result.json``; empty without one.
    """

    folder: Path
    method: str
    seed: int | None
    config: dict[str, Any]
    terms: tuple[str, ...]
    epochs: np.ndarray
    weights: np.ndarray
    diagnostics: Diagnostics | None
    result: dict[str, Any]

    def setting(self) -> tuple[str, str, str]:
        """What all runs of one group have in common, in words."""
        data, epochs = self.config.get("data") or {}, self.config.get("max_epochs")
        dataset = data.get("dataset") if isinstance(data, dict) else None
        return (
            str(dataset or ""),
            "" if epochs is None else f"{epochs} epochs",
            ", ".join(self.terms),
        )


@dataclass(frozen=True)
class Summary:
    """The table of a folder of runs.

    Attributes:
        folder: where its runs are.
        columns: the names of its columns, those of a ``summary.csv``.
        rows: the texts of each row, by column.
        written: whether it was read from a ``summary.csv``.
    """

    folder: Path
    columns: list[str]
    rows: list[dict[str, str]]
    written: bool


@dataclass(eq=False)
class Group:
    """The runs of one method in one folder; its label is unlike every other group's."""

    method: str
    folder: Path
    runs: list[RunFiles]
    label: str

    @property
    def terms(self) -> tuple[str, ...]:
        return self.runs[0].terms

    @property
    def diagnostics(self) -> list[Diagnostics]:
        return [run.diagnostics for run in self.runs if run.diagnostics is not None]


def _absolute(path: Path) -> Path:
    """With a name and a parent, whatever is given; a link stays where it is."""
    return Path(os.path.abspath(path))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, RESULT_FILE))


def _find_runs(folder: Path) -> tuple[list[Path], list[Path]]:
    """The runs in a folder, itself or those that it holds, and the folders that hold none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder: give that of a run, or one that holds runs")
    if _is_run(folder):
        return [folder], []
    inside = sorted(each for each in folder.iterdir() if each.is_dir())
    runs = [each for each in inside if _is_run(each)]
    if not runs:
        raise ConfigError(
            f"{folder}: no run in it: give a folder with a {WEIGHTS_FILE}, or one that holds such"
        )
    started = [each for each in inside if each not in runs and (each / CONFIG_FILE).is_file()]
    return runs, started


def _read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file in which every row is complete."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path}: damaged: not a CSV file: remove it or run again") from None
    if not header:
        raise ConfigError(f"{path}: damaged: it is empty: remove it or run again")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ConfigError(
                f"{path}: damaged: row {number} has {len(row)} values for {len(header)} columns: "
                "remove it"
            )
    return header, rows


def _read_weights(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Terms, epochs (N,) and weights (N, K); nothing where no step was recorded."""
    nothing = (), np.zeros(0, dtype=int), np.zeros((0, 0))
    if not path.is_file():
        return nothing
    header, rows = _read_table(path)
    if header[:2] == ["step", "epoch"] and not rows:
        return nothing
    terms, steps, weights = read_weights(path)
    return tuple(terms), _ascending(path, steps[:, 1]), weights


def _read_diagnostics(path: Path) -> Diagnostics | None:
    if not path.is_file():
        return None
    header, rows = _read_table(path)
    if header[:2] != ["step", "epoch"]:
        raise ConfigError(f"{path}: damaged: its columns do not start with 'step,epoch'")
    if not rows:
        return None
    numbers = [i for i, name in enumerate(header) if name != "skipped"]
    try:
        table = np.array([[row[i] or "nan" for i in numbers] for row in rows], dtype=float)
        epochs = table[:, 1].astype(int)
    except ValueError:
        raise ConfigError(f"{path}: damaged: a value is not numeric: remove its row") from None
    columns = {header[i]: table[:, place] for place, i in enumerate(numbers)}
    place = header.index("skipped") if "skipped" in header else None
    skipped = ["" if place is None else row[place].strip() for row in rows]
    return Diagnostics(_ascending(path, epochs), columns, skipped)


def _ascending(path: Path, epochs: np.ndarray) -> np.ndarray:
    if epochs[0] < 0 or (np.diff(epochs) < 0).any():
        raise ConfigError(
            f"{path}: damaged: its epochs do not ascend: remove the rows out of order"
        )
    return epochs


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's keys, or none without the file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: damaged: expected keys and values: remove it or run again")
    return content


def _read_result(path: Path) -> dict[str, Any]:
    result = _read_mapping(path)
    for key in MEASURES:
        value = result.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{path}: damaged: '{key}' is {value!r}, not a number: run again")
    return result


def _read_costs(path: Path) -> dict[str, dict[str, float]]:
    costs = _read_mapping(path)
    for method, each in costs.items():
        if not isinstance(each, dict) or not all(
            isinstance(value, int | float) for value in each.values() if value is not None
        ):
            raise ConfigError(f"{path}: damaged: '{method}' holds no median, min and max")
    return costs


def _read_run(folder: Path) -> RunFiles:
    config = _read_mapping(folder / CONFIG_FILE)
    result = _read_result(folder / RESULT_FILE)
    name = _absolute(folder).name
    found = re.fullmatch(r"(.+)-seed(\d+)", name)
    method, seed = found.groups() if found else (name, None)
    seed = str(result.get("seed", config.get("seed", seed)))
    terms, epochs, weights = _read_weights(folder / WEIGHTS_FILE)
    return RunFiles(
        folder=folder,
        method=str(result.get("method") or method),
        seed=int(seed) if seed.isdigit() else None,
        config=config,
        terms=terms,
        epochs=epochs,
        weights=weights,
        diagnostics=_read_diagnostics(folder / DIAGNOSTICS_FILE),
        result=result,
    )


def _read_summary(folder: Path) -> Summary | None:
    """A comparison's table, with the costs that it lacks from the file beside it."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return None
    columns, cells = _read_table(path)
    if "method" not in columns:
        raise ConfigError(f"{path}: damaged: it has no column 'method': remove it or run again")
    rows = [dict(zip(columns, each, strict=True)) for each in cells]
    costs = _read_costs(folder / COST_FILE)
    for row in rows:
        if np.isnan(_float(row.get("cost"))):
            row.update(_cost_cells(costs.get(row.get("method", ""), {})))
    if costs and "cost" not in columns:
        columns = [*columns, "cost"]
    return Summary(folder, columns, rows, written=True)


def _cost_cells(cost: Mapping[str, float]) -> dict[str, str]:
    names = {"median": "cost", "min": "cost_min", "max": "cost_max"}
    return {name: _text(cost.get(key)) for key, name in names.items()}


def _text(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.9g}"


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan


# ---- grouping ---------------------------------------------------------------------------------


def _group(runs: Sequence[RunFiles], summaries: Mapping[Path, Summary]) -> list[Group]:
    """The runs by method; those of different folders or settings are not thrown together.

    The methods of a folder are in the order of its summary, or of their names.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for run in runs:
        folder = _absolute(run.folder).parent
        key = (folder, run.method, run.setting())
        group = groups.setdefault(key, Group(run.method, folder, [], run.method))
        group.runs.append(run)
    folders = list(dict.fromkeys(group.folder for group in groups.values()))

    def place(group: Group) -> tuple[int, int]:
        summary = summaries.get(group.folder)
        listed = [row.get("method") for row in summary.rows] if summary else []
        at = listed.index(group.method) if group.method in listed else len(listed)
        return folders.index(group.folder), at

    ordered = sorted(groups.values(), key=place)
    for group in ordered:
        group.label = _label(group, [each for each in ordered if each.method == group.method])
    return ordered


def _label(group: Group, namesakes: Sequence[Group]) -> str:
    """The method and, if other groups are of the same one, what this group differs by."""
    names = _folder_names(each.folder for each in namesakes)
    counted = len({len(each.terms) for each in namesakes}) == len({e.terms for e in namesakes})
    traits = []
    for each in namesakes:
        dataset, epochs, terms = each.runs[0].setting()
        terms = f"{len(each.terms)} terms" if counted else terms
        traits.append((names[each.folder], dataset, epochs, terms))
    mine = traits[namesakes.index(group)]
    values = [len({each[i] for each in traits}) for i in range(len(mine))]
    differing = [i for i, count in enumerate(values) if count > 1]
    if differing and len(traits) in values:  # One trait is enough to tell them all apart.
        differing = [values.index(len(traits))]
    words = [mine[i] for i in differing if mine[i]]
    return f"{group.method} ({', '.join(words)})" if words else group.method


def _folder_names(folders: Iterable[Path]) -> dict[Path, str]:
    """The last part of each folder's path, or all of it if two would be called the same."""
    different = dict.fromkeys(folders)
    short = len({folder.name for folder in different}) == len(different)
    return {folder: folder.name if short else str(folder) for folder in different}


def _build_summary(folder: Path, groups: Sequence[Group]) -> Summary:
    """The table of runs without a ``summary.csv``, from their results and their weights."""
    costs = _read_costs(folder / COST_FILE)
    rows = []
    for group in groups:
        row = {"method": group.label, "runs": str(len(group.runs))}
        for key in MEASURES:
            values = [run.result[key] for run in group.runs if run.result.get(key) is not None]
            if values:
                mean, std = _mean_and_std(values)
                row |= {f"{key}_mean": _text(mean), f"{key}_std": _text(std)}
        if group.method in costs:
            row |= _cost_cells(costs[group.method])
        medians = [np.median(run.weights, axis=0) for run in group.runs if len(run.weights)]
        if medians:
            means = np.mean(medians, axis=0)
            row |= {f"weight/{t}": _text(w) for t, w in zip(group.terms, means, strict=True)}
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = sorted(names, key=lambda name: name.startswith("weight/"))
    return Summary(folder, columns, rows, written=False)


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean, std = mean_and_std([np.array([value], dtype=float) for value in values])
    return float(mean[0]), float(std[0])


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
    references = {group.label: _reference(group.terms) for group in groups}
    section.picture = output / "weights.png"
    plot_weight_panels(panels, section.picture, colors, references)
    dashed = "; dashed, All4One's own weights" if any(references.values()) else ""
    section.caption = (
        "The effective weight of each term in the course of training, one panel for each method: "
        f"the median of an epoch's steps around each point{_over_runs(groups)}{dashed}; the "
        "vertical axis is logarithmic above 0.1 and linear below."
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


def _reference(terms: Sequence[str]) -> dict[str, float]:
    known = (each for each in (REFERENCE, JOINED_REFERENCE) if set(each) == set(terms))
    return next(known, {})


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
    titles = _folder_names(each.folder for each in summaries)
    points = []
    for summary in summaries:
        for row in summary.rows:
            accuracies = {
                MEASURES[key]: (_float(row.get(f"{key}_mean")), _float(row.get(f"{key}_std")))
                for key in EVALUATIONS
            }
            known = {name: each for name, each in accuracies.items() if not np.isnan(each[0])}
            label = row.get("method", "")
            if names[label] > 1:
                label = f"{label} ({titles[summary.folder]})"
            low, high = _float(row.get("cost_min")), _float(row.get("cost_max"))
            points.append(Point(label, (_float(row.get("cost")), low, high), known))
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
    titles = _folder_names(each.folder for each in summaries)
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
    value = _float(text)
    if text in ("", "nan", "None"):
        return DASH
    measured = column.endswith("_mean") or column == "cost" or column.startswith("weight/")
    if np.isnan(value) or (text.isdigit() and not measured):
        return text
    if column == "p_value":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    spread = _float(row.get(column.removesuffix("_mean") + "_std"))
    if column.endswith("_mean") and not np.isnan(spread):
        return f"{value:.2f} ± {spread:.2f}"
    low, high = _float(row.get("cost_min")), _float(row.get("cost_max"))
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
    if not folders:
        raise ConfigError("report: give at least one folder of a run, or one that holds runs")
    found = [_find_runs(folder) for folder in folders]
    paths = {_absolute(path): path for inside, _ in found for path in inside}
    runs = [_read_run(path) for path in paths.values()]
    empty = [run.folder for run in runs if not run.terms and not run.result]
    empty += [path for _, started in found for path in started]
    runs = [run for run in runs if run.terms or run.result]
    if not runs:
        raise ConfigError(f"{folders[0]}: no run in it has recorded a step: train one first")

    read = (_read_summary(_absolute(folder)) for folder in dict.fromkeys(folders))
    written = {each.folder: each for each in read if each is not None}
    groups = _group(runs, written)
    summaries = list(written.values())
    for folder in dict.fromkeys(group.folder for group in groups):
        if folder not in written:
            inside_it = [group for group in groups if group.folder == folder]
            summaries.append(_build_summary(folder, inside_it))

    _make_output(output)
    terms = dict.fromkeys(term for group in groups for term in group.terms)
    own = [term for term in (*REFERENCE, *JOINED_REFERENCE) if term in terms]
    colors = term_colors([*own, *terms])
    sections = [
        _weights_section(groups, colors, output),
        _alignment_section(groups, colors, output),
        _gramian_section(groups, output),
        _accuracy_section(summaries, output),
        _skipped_section(groups),
        _summary_section(summaries),
    ]
    page = output / PAGE_FILE
    page.write_text(_render(folders, groups, sections, empty), encoding="utf-8")
    files = [*(each.picture for each in sections if each.picture is not None), page]
    print("files:", ", ".join(str(file) for file in files))
    return files


def _make_output(output: Path) -> None:
    if _is_run(output):
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
                _rule(group.runs[0].config),
                dataset or DASH,
                epochs.removesuffix(" epochs") or DASH,
                terms or DASH,
                str(len(group.runs)),
                ", ".join(map(str, seeds)) or DASH,
            ]
        )
    columns = ["method", "weighting", "data", "epochs", "terms", "runs", "seeds"]
    return Table(columns, rows)


def _rule(config: Mapping[str, Any]) -> str:
    """The name in the ``weighting:`` block; All4One without one has fixed weights."""
    block = config.get("weighting")
    if isinstance(block, dict) and block.get("name"):
        return str(block["name"])
    return "fixed" if config.get("method") == "all4one" else DASH


def _embed(picture: Path) -> str:
    """A picture as the text that an ``img`` takes in place of an address."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _css_width(picture: Path) -> int:
    """The width at which it is shown, half of its own: a PNG file has that behind 16 bytes."""
    return int.from_bytes(picture.read_bytes()[16:20], "big") // 2
