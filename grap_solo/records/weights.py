"""The effective weights of a run: read back, and their median."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grap_solo.errors import ConfigError
from grap_solo.records.files import MEDIAN_FILE


def read_weights(
    path: str | os.PathLike[str],
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The terms, the steps and epochs (N, 2), and the weights (N, K) of a ``weights.csv``.

    Raises:
        ConfigError: no such file, no rows, or rows that are not a trajectory's.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file: give the folder of a run that has been trained")
    with open(path, newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header[:2] != ["step", "epoch"] or len(header) < 3 or not rows:
        raise ConfigError(f"{path}: not a record of weights: expected 'step,epoch,TERM...' rows")
    try:
        table = np.array(rows, dtype=float)
    except ValueError:
        raise ConfigError(f"{path}: a row is cut short or not numeric: remove it") from None
    return header[2:], table[:, :2].astype(int), table[:, 2:]


def format_weight(value: float) -> str:
    """A weight with two decimals, or with two digits if it is below 0.01."""
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def median_weights(path: str | os.PathLike[str], warmup_epochs: int = 0) -> dict[str, float]:
    """The median effective weight of each term over the steps after the warm-up.

    Args:
        path: a ``weights.csv``.
        warmup_epochs: leading epochs to leave out, since the weights were held there. All steps
            count where the run was no longer than that.

    Raises:
        ConfigError: see :func:`read_weights`.
    """
    return pooled_weights([path], [warmup_epochs])


def pooled_weights(
    paths: Sequence[str | os.PathLike[str]],
    warmup_epochs: Sequence[int],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
) -> dict[str, float]:
    """One weight of each term from the effective weights of one or several runs' steps.

    Args:
        paths: the runs' ``weights.csv``.
        warmup_epochs: each run's leading epochs to leave out, unless ``epochs`` is given.
        epochs: the first and last epoch, counted from 0, whose steps' median to take.
        last: take the mean of so many last steps of each run instead of the median.

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
        if terms != first_terms:
            raise ConfigError(
                f"{path}: its terms are {', '.join(terms)}, the first run's "
                f"{', '.join(first_terms)}: give runs of the same terms"
            )
        epoch = steps[:, 1]
        if epochs is not None:
            weights = weights[(epoch >= epochs[0]) & (epoch <= epochs[1])]
        elif last is not None:
            weights = weights[-last:]
        elif (epoch >= warmup).any():
            weights = weights[epoch >= warmup]
        chosen.append(weights)
    rows = np.concatenate(chosen)
    if not len(rows):
        assert epochs is not None
        raise ConfigError(f"retrain: no step in the epochs {epochs[0]} to {epochs[1]}: give others")
    pooled = np.median(rows, axis=0) if last is None else rows.mean(axis=0)
    return {term: float(f"{value:.6g}") for term, value in zip(first_terms, pooled, strict=True)}


def write_median(path: Path, warmup_epochs: int) -> None:
    """Writes the median beside a ``weights.csv``, as a block to train with."""
    block: dict[str, Any] = {"name": "fixed", "weights": median_weights(path, warmup_epochs)}
    text = "# Median of the effective weights over the run's steps, as a block to train with.\n"
    if min(block["weights"].values()) < 0 or not any(block["weights"].values()):
        text += "# Not as it stands: fixed weights are 0 or more, and not all 0.\n"
    text += yaml.safe_dump({"weighting": block}, sort_keys=False)
    (path.parent / MEDIAN_FILE).write_text(text)


def read_median(path: str | os.PathLike[str]) -> dict[str, float]:
    """The weights in a ``median_weights.yaml``.

    Raises:
        ConfigError: no such file, or one without the block.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file: give the folder of a run that has been trained")
    try:
        weights: Sequence[Any] | dict[str, float]
        weights = yaml.safe_load(Path(path).read_text())["weighting"]["weights"]
    except (yaml.YAMLError, KeyError, TypeError):
        raise ConfigError(f"{path}: expected a block 'weighting: weights:'") from None
    if not isinstance(weights, dict):
        raise ConfigError(f"{path}: expected a weight for each term under 'weights:'")
    return weights
