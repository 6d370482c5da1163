"""What runs and comparisons have left in their folders, read for a report."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grap_solo.errors import ConfigError
from grap_solo.records.files import (
    CONFIG_FILE,
    COST_FILE,
    DIAGNOSTICS_FILE,
    RESULT_FILE,
    SUMMARY_FILE,
    TERMS_FILE,
    WEIGHTS_FILE,
)
from grap_solo.records.weights import read_weights

MEASURES = {
    "online": "online probe",
    "linear": "linear probe",
    "knn": "k-NN",
    "rankme": "RankMe",
}
"""What ``result.json`` holds, and how a table names it."""


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
        rule: the name of its weighting; empty if no file says.
        terms: its terms, in order; none without weights.
        reference: the method's reference weights of these terms; none if no file says.
        epochs: the epoch of each step, (N,).
        weights: the effective weights, (N, K).
        diagnostics: what was recorded of its gradients, if anything was.
        result: its ``result.json``; empty without one.
    """

    folder: Path
    method: str
    seed: int | None
    config: dict[str, Any]
    rule: str
    terms: tuple[str, ...]
    reference: dict[str, float]
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


@dataclass(frozen=True)
class Recorded:
    """What is read of all folders.

    Attributes:
        groups: the runs that have recorded something, by method.
        summaries: one for each folder that holds such runs.
        empty: the runs that have recorded nothing.
    """

    groups: list[Group]
    summaries: list[Summary]
    empty: list[Path]


def read_recorded(folders: Sequence[Path]) -> Recorded:
    """Reads runs, and folders that hold runs, such as a comparison's.

    Args:
        folders: of either kind.

    Raises:
        ConfigError: a folder without a run, or a damaged file.
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
    return Recorded(groups, summaries, empty)


def _absolute(path: Path) -> Path:
    """With a name and a parent, whatever is given; a link stays where it is."""
    return Path(os.path.abspath(path))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, RESULT_FILE))


def _find_runs(folder: Path) -> tuple[list[Path], list[Path]]:
    """The runs in a folder, itself or those that it holds, and the folders that hold none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder: give that of a run, or one that holds runs")
    if is_run(folder):
        return [folder], []
    inside = sorted(each for each in folder.iterdir() if each.is_dir())
    runs = [each for each in inside if is_run(each)]
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


def _read_terms(path: Path) -> tuple[str, dict[str, float]]:
    """The name of the weighting and the reference weights; nothing without the file."""
    content = _read_mapping(path)
    reference = content.get("reference_weights") or {}
    numbers = isinstance(reference, dict) and all(
        isinstance(each, int | float) for each in reference.values()
    )
    if not numbers:
        raise ConfigError(
            f"{path}: damaged: 'reference_weights' holds no weight for each term: remove the file"
        )
    return str(content.get("weighting") or ""), reference


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
    rule, reference = _read_terms(folder / TERMS_FILE)
    block = config.get("weighting")
    if not rule and isinstance(block, dict):  # A run of before there was such a file.
        rule = str(block.get("name") or "")
    return RunFiles(
        folder=folder,
        method=str(result.get("method") or method),
        seed=int(seed) if seed.isdigit() else None,
        config=config,
        rule=rule,
        terms=terms,
        reference=reference if set(reference) == set(terms) else {},
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
        if np.isnan(to_float(row.get("cost"))):
            row.update(_cost_cells(costs.get(row.get("method", ""), {})))
    if costs and "cost" not in columns:
        columns = [*columns, "cost"]
    return Summary(folder, columns, rows, written=True)


def _cost_cells(cost: Mapping[str, float]) -> dict[str, str]:
    names = {"median": "cost", "min": "cost_min", "max": "cost_max"}
    return {name: _text(cost.get(key)) for key, name in names.items()}


def _text(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.9g}"


def to_float(text: str | None) -> float:
    """A cell's number; nan where there is none."""
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
    if differing and len(traits) in values:  # One trait is enough to tell them all apart.
        differing = [values.index(len(traits))]
    words = [mine[i] for i in differing if mine[i]]
    return f"{group.method} ({', '.join(words)})" if words else group.method


def folder_names(folders: Iterable[Path]) -> dict[Path, str]:
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


def mean_and_std(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the runs that have a value, nan where none has one
    or, for the deviation, fewer than two have."""
    table = np.ma.masked_invalid(np.stack(runs))
    return table.mean(axis=0).filled(np.nan), table.std(axis=0, ddof=1).filled(np.nan)


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean, std = mean_and_std([np.array([value], dtype=float) for value in values])
    return float(mean[0]), float(std[0])
