"""Groups the runs of a report by method, and reads or builds the table of each folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grap_solo.errors import ConfigError
from grap_solo.records.files import COST_FILE, SUMMARY_FILE
from grap_solo.records.runs import (
    MEASURES,
    Diagnostics,
    RunFiles,
    absolute,
    find_runs,
    read_mapping,
    read_run,
)
from grap_solo.records.tables import read_table
from grap_solo.records.weights import after_warmup
from grap_solo.report.curves import mean_and_std


@dataclass(frozen=True)
class Summary:
    """The table of a folder of runs.

    Attributes:
        folder: the folder of runs.
        columns: the names of the columns, as in a ``summary.csv``.
        rows: the cells of each row, by column.
        written: whether the table was read from a ``summary.csv`` and not built.
    """

    folder: Path
    columns: list[str]
    rows: list[dict[str, str]]
    written: bool


@dataclass(eq=False)
class Group:
    """The runs of one method in one folder, with a label that no other group has."""

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


@dataclass(frozen=True)
class Recorded:
    """All that a report shows.

    Attributes:
        groups: the runs that have recorded something, by method.
        summaries: the table of each folder of such runs.
        empty: the folders of runs that have recorded nothing.
    """

    groups: list[Group]
    summaries: list[Summary]
    empty: list[Path]


def read_recorded(folders: Sequence[Path]) -> Recorded:
    """Reads run folders, and folders of runs such as a comparison's.

    Args:
        folders: folders of either kind.

    Raises:
        ConfigError: a folder without a run, or a damaged file.
    """
    if not folders:
        raise ConfigError("report: give at least one folder: a run folder, or a folder of runs")
    found = [find_runs(folder) for folder in folders]
    paths = {absolute(path): path for inside, _ in found for path in inside}
    runs = [read_run(path) for path in paths.values()]
    empty = [run.folder for run in runs if not run.terms and not run.result]
    empty += [path for _, started in found for path in started]
    runs = [run for run in runs if run.terms or run.result]
    if not runs:
        raise ConfigError(f"{folders[0]}: no run in it has recorded a step: train one first")

    read = (_read_summary(absolute(folder)) for folder in dict.fromkeys(folders))
    written = {each.folder: each for each in read if each is not None}
    groups = _group(runs, written)
    summaries = list(written.values())
    for folder in dict.fromkeys(group.folder for group in groups):
        if folder not in written:
            inside_it = [group for group in groups if group.folder == folder]
            summaries.append(_build_summary(folder, inside_it))
    return Recorded(groups, summaries, empty)


def _group(runs: Sequence[RunFiles], summaries: Mapping[Path, Summary]) -> list[Group]:
    """Groups runs by folder, method and setting.

    The methods of a folder are in the order of its summary, or of their names.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for run in runs:
        folder = absolute(run.folder).parent
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
    """Names a group: its method and, if other groups share it, how this group differs."""
    names = folder_names(each.folder for each in namesakes)
    counted = len({len(each.terms) for each in namesakes}) == len({e.terms for e in namesakes})
    traits = []
    for each in namesakes:
        dataset, epochs, terms = each.runs[0].setting()
        terms = f"{len(each.terms)} terms" if counted else terms
        traits.append((names[each.folder], dataset, epochs, terms))
    mine = traits[namesakes.index(group)]
    values = [len({each[i] for each in traits}) for i in range(len(mine))]
    differing = [i for i, count in enumerate(values) if count > 1]
    if differing and len(traits) in values:  # One trait tells all of them apart.
        differing = [values.index(len(traits))]
    words = [mine[i] for i in differing if mine[i]]
    return f"{group.method} ({', '.join(words)})" if words else group.method


def folder_names(folders: Iterable[Path]) -> dict[Path, str]:
    """Names folders by the last part of their paths, or by the whole paths if two would clash."""
    different = dict.fromkeys(folders)
    short = len({folder.name for folder in different}) == len(different)
    return {folder: folder.name if short else str(folder) for folder in different}


def _read_summary(folder: Path) -> Summary | None:
    """Reads a ``summary.csv``, and the costs missing in it from the ``cost.json`` beside it."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return None
    columns, cells = read_table(path)
    if "method" not in columns:
        raise ConfigError(f"{path}: damaged: it has no column 'method': remove it or run again")
    rows = [dict(zip(columns, each, strict=True)) for each in cells]
    costs = _read_costs(folder / COST_FILE)
    for row in rows:
        if np.isnan(to_float(row.get("cost"))):
            row.update(_cost_cells(costs.get(row.get("method", ""), {})))
    if costs and "cost" not in columns:
        columns = [*columns, "cost"]
    return Summary(folder, columns, rows, written=True)


def _build_summary(folder: Path, groups: Sequence[Group]) -> Summary:
    """Builds the table of a folder without a ``summary.csv`` from its runs."""
    costs = _read_costs(folder / COST_FILE)
    rows = []
    for group in groups:
        row = {"method": group.label, "runs": str(len(group.runs))}
        for key in MEASURES:
            values = [run.result[key] for run in group.runs if run.result.get(key) is not None]
            if values:
                mean, std = (float(e[0]) for e in mean_and_std([np.array([v]) for v in values]))
                row |= {f"{key}_mean": _text(mean), f"{key}_std": _text(std)}
        if group.method in costs:
            row |= _cost_cells(costs[group.method])
        medians = [_median(run) for run in group.runs if len(run.weights)]
        if medians:
            means = np.mean(medians, axis=0)
            row |= {f"weight/{t}": _text(w) for t, w in zip(group.terms, means, strict=True)}
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = sorted(names, key=lambda name: name.startswith("weight/"))
    return Summary(folder, columns, rows, written=False)


def _median(run: RunFiles) -> np.ndarray:
    """The median weights (K,) of a run, without its warm-up as in its ``median_weights.yaml``."""
    block = run.config.get("weighting")
    warmup = block.get("warmup_epochs") if isinstance(block, dict) else 0
    return np.median(after_warmup(run.epochs, run.weights, warmup or 0), axis=0)


def _read_costs(path: Path) -> dict[str, dict[str, float]]:
    costs = read_mapping(path)
    for method, each in costs.items():
        if not isinstance(each, dict) or not all(
            isinstance(value, int | float) for value in each.values() if value is not None
        ):
            raise ConfigError(
                f"{path}: damaged: '{method}' holds no median, min and max: remove the file"
            )
    return costs


def _cost_cells(cost: Mapping[str, float]) -> dict[str, str]:
    names = {"median": "cost", "min": "cost_min", "max": "cost_max"}
    return {name: _text(cost.get(key)) for key, name in names.items()}


def _text(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.9g}"


def to_float(text: str | None) -> float:
    """Reads a cell's number; NaN if there is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan
