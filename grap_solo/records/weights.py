"""The effective weights of a run: read back, and their median."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grap_solo.errors import ConfigError
from grap_solo.records.files import MEDIAN_FILE, read_text
from grap_solo.records.tables import read_steps

COURSE_POINTS = 100
"""The points of a course of weights: steps beyond them are noise of single batches."""


def read_weights(
    path: str | os.PathLike[str], allow_no_rows: bool = False
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads a ``weights.csv``.

    Args:
        path: the file.
        allow_no_rows: accept a file in which no step is recorded yet.

    Returns:
        The K terms, the step and epoch of each row, (N, 2), and the effective weights, (N, K).

    Raises:
        ConfigError: no such file, no rows, or a damaged file.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file: give the folder of a run that has been trained")
    terms, steps, weights, _ = read_steps(Path(path))
    if not terms:
        raise ConfigError(f"{path}: not a record of weights: expected columns 'step,epoch,TERM...'")
    if not len(weights) and not allow_no_rows:
        raise ConfigError(f"{path}: no step is recorded in it: give the folder of a trained run")
    return terms, steps, weights


def format_weight(value: float) -> str:
    """Formats a weight with two decimals, or with two digits if it is below 0.01."""
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def median_weights(path: str | os.PathLike[str], warmup_epochs: int = 0) -> dict[str, float]:
    """Takes the median effective weight of each term over the steps after the warm-up.

    Args:
        path: a ``weights.csv``.
        warmup_epochs: leading epochs to leave out, in which the weights did not move. If a run has
            no later step, all its steps count.

    Raises:
        ConfigError: see :func:`read_weights`.
    """
    return pooled_weights([path], [warmup_epochs])


def median_of_rows(terms: Sequence[str], rows: np.ndarray) -> dict[str, float]:
    """Takes the median of weights (N, K) by term, with the six digits that are written."""
    return _by_term(terms, np.median(rows, axis=0))


def after_warmup(epochs: np.ndarray, weights: np.ndarray, warmup_epochs: int) -> np.ndarray:
    """Selects the rows of weights (N, K) after the warm-up; all rows if there is none after it."""
    chosen = epochs >= warmup_epochs
    return weights[chosen] if chosen.any() else weights


def pooled_weights(
    paths: Sequence[str | os.PathLike[str]],
    warmup_epochs: Sequence[int],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
) -> dict[str, float]:
    """Takes one weight for each term from the steps of one or several runs.

    Args:
        paths: the runs' ``weights.csv``.
        warmup_epochs: each run's leading epochs to leave out, unless ``epochs`` is given.
        epochs: take the median over the steps from this first to this last epoch, counted from 0.
        last: take the mean of this many last steps of each run instead of the median.

    Returns:
        The median, or mean, over the chosen steps of all runs together.

    Raises:
        ConfigError: see :func:`read_weights`; runs with other terms, no step in the range, or
            both ``epochs`` and ``last``.
    """
    if epochs is not None and last is not None:
        raise ConfigError("retrain: epochs and the last steps are two choices: give one")
    chosen = []
    first_terms: list[str] = []
    for path, warmup in zip(paths, warmup_epochs, strict=True):
        terms, steps, weights = read_weights(path)
        first_terms = first_terms or terms
        _check_same_terms(path, terms, first_terms)
        epoch = steps[:, 1]
        if epochs is not None:
            weights = weights[(epoch >= epochs[0]) & (epoch <= epochs[1])]
        elif last is not None:
            weights = weights[-last:]
        else:
            weights = after_warmup(epoch, weights, warmup)
        chosen.append(weights)
    rows = np.concatenate(chosen)
    if not len(rows):
        assert epochs is not None
        raise ConfigError(f"retrain: no step in the epochs {epochs[0]} to {epochs[1]}: give others")
    return (
        median_of_rows(first_terms, rows) if last is None else _by_term(first_terms, rows.mean(0))
    )


def course_of_weights(
    paths: Sequence[str | os.PathLike[str]], points: int = COURSE_POINTS
) -> dict[str, list[float]]:
    """Takes each term's effective weights in the course of one or several runs, at equal distances.

    A point is the median over its share of a run's steps, and then the mean over the runs.

    Args:
        paths: the runs' ``weights.csv``.
        points: how many points; at most the steps of the shortest run.

    Raises:
        ConfigError: see :func:`read_weights`; or runs with other terms.
    """
    first_terms: list[str] = []
    found = [read_weights(path) for path in paths]
    points = min(points, *(len(weights) for _, _, weights in found))
    courses = []
    for path, (terms, _, weights) in zip(paths, found, strict=True):
        first_terms = first_terms or terms
        _check_same_terms(path, terms, first_terms)
        shares = np.array_split(weights, points)
        courses.append([np.median(share, axis=0) for share in shares])
    mean = np.mean(courses, axis=0).T
    return {
        term: [float(f"{value:.6g}") for value in row]
        for term, row in zip(first_terms, mean, strict=True)
    }


def _check_same_terms(
    path: str | os.PathLike[str], terms: Sequence[str], first_terms: Sequence[str]
) -> None:
    if list(terms) != list(first_terms):
        raise ConfigError(
            f"{path}: its terms are {', '.join(terms)}, the first run's "
            f"{', '.join(first_terms)}: give runs of the same terms"
        )


def _by_term(terms: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {term: float(f"{value:.6g}") for term, value in zip(terms, values, strict=True)}


def write_median(path: Path, warmup_epochs: int) -> None:
    """Writes the median beside a ``weights.csv``, as a block of a configuration."""
    block: dict[str, Any] = {"name": "fixed", "weights": median_weights(path, warmup_epochs)}
    text = "# Median of the effective weights over the run's steps, as a block to train with.\n"
    if min(block["weights"].values()) < 0 or not any(block["weights"].values()):
        text += "# Not as it stands: fixed weights are 0 or more, and not all 0.\n"
    text += yaml.safe_dump({"weighting": block}, sort_keys=False)
    (path.parent / MEDIAN_FILE).write_text(text, encoding="utf-8")


def read_median(path: str | os.PathLike[str]) -> dict[str, float]:
    """Reads the weights in a ``median_weights.yaml``.

    Raises:
        ConfigError: no such file, one that is not UTF-8, or one without the block.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file: give the folder of a run that has been trained")
    try:
        weights: Sequence[Any] | dict[str, float]
        weights = yaml.safe_load(read_text(Path(path)))["weighting"]["weights"]
    except (yaml.YAMLError, KeyError, TypeError):
        raise ConfigError(f"{path}: expected a block 'weighting: weights:'") from None
    if not isinstance(weights, dict):
        raise ConfigError(f"{path}: expected a weight for each term under 'weights:'")
    return weights
