"""Reads run folders: one, or all that a folder holds."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grap_solo.errors import ConfigError
from grap_solo.records.collapse import (
    Collapse,
    Validations,
    find_collapse,
    read_validations,
)
from grap_solo.records.files import (
    CONFIG_FILE,
    DIAGNOSTICS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    TERMS_FILE,
    WEIGHTS_FILE,
    read_text,
)
from grap_solo.records.tables import check_ascending, read_steps
from grap_solo.records.weights import read_weights

MEASURES = {
    "online": "online probe",
    "linear": "linear probe",
    "knn": "k-NN",
    "rankme": "RankMe",
}
"""The measures in ``result.json``, by key, and their names in tables."""


@dataclass(frozen=True)
class Diagnostics:
    """The rows of a ``diagnostics.csv``.

    Attributes:
        epochs: the epoch of each row, (N,).
        columns: the numbers of each column, (N,); NaN where none was recorded.
        skipped: for each row, why the weights did not learn from the step; empty if they did.
    """

    epochs: np.ndarray
    columns: dict[str, np.ndarray]
    skipped: list[str]


@dataclass(frozen=True)
class RunFiles:
    """The content of one run folder.

    Attributes:
        folder: its path.
        method: the run's method.
        seed: the seed, if a file or the folder's name gives it.
        config: the content of ``config.yaml``; empty without the file.
        rule: the name of the weighting; empty if no file gives it.
        terms: the K terms, in order; empty without recorded weights.
        reference: the method's reference weights for these terms; empty if no file gives them.
        epochs: the epoch of each step, (N,).
        weights: the effective weights, (N, K).
        diagnostics: the recorded diagnostics; None without any.
        validations: RankMe and the spread at each validation; None without any.
        collapse: when the embeddings collapsed; None if they did not.
        result: the content of ``result.json``; empty without the file.
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
    validations: Validations | None
    collapse: Collapse | None
    result: dict[str, Any]

    def setting(self) -> tuple[str, str, str]:
        """Returns data set, number of epochs and terms as texts: equal for all runs of a group."""
        data, epochs = self.config.get("data") or {}, self.config.get("max_epochs")
        dataset = data.get("dataset") if isinstance(data, dict) else None
        return (
            str(dataset or ""),
            "" if epochs is None else counted(epochs, "epoch"),
            ", ".join(self.terms),
        )


def counted(count: int, noun: str) -> str:
    """Says how many there are: ``1 epoch``, ``2 epochs``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def absolute(path: Path) -> Path:
    """Makes a path absolute, so that it has a name and a parent. Links are not followed."""
    return Path(os.path.abspath(path))


def is_run(folder: Path) -> bool:
    """Tells whether a folder is a run folder."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, RESULT_FILE))


def find_runs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Finds runs: the folder itself, or the run folders in it.

    Returns:
        The runs, and the folders of runs that have not recorded a step yet.

    Raises:
        ConfigError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder: give a run folder, or a folder of runs")
    if is_run(folder):
        return [folder], []
    inside = sorted(each for each in folder.iterdir() if each.is_dir())
    runs = [each for each in inside if is_run(each)]
    if not runs:
        raise ConfigError(
            f"{folder}: no run in it: give a folder with a {WEIGHTS_FILE}, or a folder of runs"
        )
    started = [each for each in inside if each not in runs and (each / CONFIG_FILE).is_file()]
    return runs, started


def _read_weights(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Reads terms, epochs (N,) and weights (N, K); empty ones where no step was recorded."""
    if path.is_file():
        terms, steps, weights = read_weights(path, allow_no_rows=True)
        if len(weights):
            return tuple(terms), check_ascending(path, steps[:, 1]), weights
    return (), np.zeros(0, dtype=int), np.zeros((0, 0))


def _read_diagnostics(path: Path) -> Diagnostics | None:
    if not path.is_file():
        return None
    names, steps, numbers, skipped = read_steps(path, text="skipped", allow_empty=True)
    if not len(steps):
        return None
    columns = dict(zip(names, numbers.T, strict=True))
    return Diagnostics(check_ascending(path, steps[:, 1]), columns, skipped)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads the keys and values of a JSON or YAML file; empty without the file.

    Raises:
        ConfigError: a damaged file, or one that is not UTF-8.
    """
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: damaged: expected keys and values: remove it or run again")
    return content


def _read_result(path: Path) -> dict[str, Any]:
    result = read_mapping(path)
    for key in MEASURES:
        value = result.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{path}: damaged: '{key}' is {value!r}, not a number: run again")
    return result


def _read_terms(path: Path) -> tuple[str, dict[str, float]]:
    """Reads the name of the weighting and the reference weights; both empty without the file."""
    content = read_mapping(path)
    reference = content.get("reference_weights") or {}
    numbers = isinstance(reference, dict) and all(
        isinstance(each, int | float) for each in reference.values()
    )
    if not numbers:
        raise ConfigError(
            f"{path}: damaged: 'reference_weights' holds no weight for each term: remove the file"
        )
    return str(content.get("weighting") or ""), reference


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder.

    Raises:
        ConfigError: a damaged file; the line names it.
    """
    config = read_mapping(folder / CONFIG_FILE)
    result = _read_result(folder / RESULT_FILE)
    name = absolute(folder).name
    found = re.fullmatch(r"(.+)-seed(\d+)", name)
    method, seed = found.groups() if found else (name, None)
    seed = str(result.get("seed", config.get("seed", seed)))
    terms, epochs, weights = _read_weights(folder / WEIGHTS_FILE)
    validations = read_validations(folder / METRICS_FILE)
    rule, reference = _read_terms(folder / TERMS_FILE)
    block = config.get("weighting")
    if not rule and isinstance(block, dict):  # An older run has no terms.yaml.
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
        validations=validations,
        collapse=find_collapse(validations, terms, epochs, weights),
        result=result,
    )
