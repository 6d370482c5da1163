"""What runs and comparisons have left in their folders, read for a report."""

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
from grap_solo.records.files import (
    CONFIG_FILE,
    DIAGNOSTICS_FILE,
    RESULT_FILE,
    TERMS_FILE,
    WEIGHTS_FILE,
)
from grap_solo.records.tables import read_steps
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


def absolute(path: Path) -> Path:
    """With a name and a parent, whatever is given; a link stays where it is."""
    return Path(os.path.abspath(path))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, RESULT_FILE))


def find_runs(folder: Path) -> tuple[list[Path], list[Path]]:
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


def _read_weights(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Reads terms, epochs (N,) and weights (N, K); empty ones where no step was recorded."""
    if path.is_file():
        terms, steps, weights = read_weights(path, allow_no_rows=True)
        if len(weights):
            return tuple(terms), _ascending(path, steps[:, 1]), weights
    return (), np.zeros(0, dtype=int), np.zeros((0, 0))


def _read_diagnostics(path: Path) -> Diagnostics | None:
    if not path.is_file():
        return None
    names, steps, numbers, skipped = read_steps(path, text="skipped", allow_empty=True)
    if not len(steps):
        return None
    columns = dict(zip(names, numbers.T, strict=True))
    return Diagnostics(_ascending(path, steps[:, 1]), columns, skipped)


def _ascending(path: Path, epochs: np.ndarray) -> np.ndarray:
    if epochs[0] < 0 or (np.diff(epochs) < 0).any():
        raise ConfigError(
            f"{path}: damaged: its epochs do not ascend: remove the rows out of order"
        )
    return epochs


def read_mapping(path: Path) -> dict[str, Any]:
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
    result = read_mapping(path)
    for key in MEASURES:
        value = result.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{path}: damaged: '{key}' is {value!r}, not a number: run again")
    return result


def _read_terms(path: Path) -> tuple[str, dict[str, float]]:
    """The name of the weighting and the reference weights; nothing without the file."""
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
    config = read_mapping(folder / CONFIG_FILE)
    result = _read_result(folder / RESULT_FILE)
    name = absolute(folder).name
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
