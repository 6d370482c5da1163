"""Collapse of a run's embeddings: when it happened, and the term whose weight fell before it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grap_solo.errors import ConfigError
from grap_solo.records.files import read_text
from grap_solo.records.tables import check_ascending

RANKME, SPREAD = "val_rankme", "val_spread"
"""The metrics of a validation that tell of a collapse."""

LEAST_SPREAD = 0.1
LEAST_RANKME = 2.0
LEAST_PART = 0.25
LEAST_FALL = 0.1


@dataclass(frozen=True)
class Validations:
    """RankMe and the spread of a run's validation embeddings.

    Attributes:
        epochs: the epoch of each validation, (N,).
        rankme: RankMe at each, (N,).
        spread: the spread at each, (N,); see
            :class:`~grap_solo.evaluation.moments.EmbeddingMoments`.
    """

    epochs: np.ndarray
    rankme: np.ndarray
    spread: np.ndarray

    def collapsed_at(self) -> int | None:
        """Finds the validation at which the embeddings have collapsed; None if they have not.

        It is the second of two in a row at which one of three holds:

        - the spread is below 0.1: all images have nearly the same embedding, up to its length;
        - RankMe is below 2: the embeddings lie almost on a line;
        - RankMe is below a quarter of its largest value so far: most dimensions are lost. In the
          project's own studies the runs with the least RankMe and an accuracy near that of the
          reference weights had 0.4 of the latter's.

        One validation is not enough: early in a run, batch-norm's running statistics lag behind,
        and embeddings look alike that are not. Numbers that are not finite tell nothing.
        """
        largest = np.fmax.accumulate(self.rankme)
        low = self.spread < LEAST_SPREAD
        low |= self.rankme < np.maximum(LEAST_RANKME, LEAST_PART * largest)
        twice = low[1:] & low[:-1]
        return int(twice.argmax()) + 1 if twice.any() else None


@dataclass(frozen=True)
class Fall:
    """The term whose weight fell most, and its share of all weights before and after."""

    term: str
    before: float
    after: float


@dataclass(frozen=True)
class Collapse:
    """The collapse of a run's embeddings.

    Attributes:
        validation: the place of the validation that found it among all, from 0.
        epoch: its epoch, from 0.
        rankme: RankMe then.
        spread: the spread then.
        fall: the term whose weight fell most since the run's start; None if none fell.
    """

    validation: int
    epoch: int
    rankme: float
    spread: float
    fall: Fall | None

    def describe(self) -> str:
        """Says in one line what happened, and which term's weight fell."""
        cause = "no term's share of the weights has fallen: it did so with the weights given"
        if self.fall is not None:
            before, after = (f"{100 * each:.3g} %" for each in (self.fall.before, self.fall.after))
            cause = f"the weight of {self.fall.term} fell most, from {before} to {after} of the sum"
        found = f"RankMe {self.rankme:.1f}, spread {self.spread:.2f}"
        time = "1 epoch" if self.epoch == 0 else f"{self.epoch + 1} epochs"
        return f"the representation collapsed within {time} ({found}); {cause}"


def find_fall(
    terms: Sequence[str], epochs: np.ndarray, weights: np.ndarray, epoch: int
) -> Fall | None:
    """Finds the term whose share of all weights fell most, relative to its share at the run's first
    step. Its later share is the median over the steps of an epoch.

    Args:
        terms: the K terms.
        epochs: the epoch of each step, (N,).
        weights: the effective weights, (N, K). A weight below 0 has a share below 0.
        epoch: the epoch, or the last one before it that has steps.

    Returns:
        The term; None if no share fell by a tenth.
    """
    known = epochs[epochs <= epoch]
    if not len(known):
        return None
    rows = np.concatenate([weights[:1], weights[epochs == known[-1]]])
    sums = np.abs(rows).sum(axis=1, keepdims=True)
    shares = np.divide(rows, sums, out=np.full_like(rows, np.nan), where=sums > 0)
    before, after = shares[0], np.median(shares[1:], axis=0)
    left = np.divide(after, before, out=np.full_like(before, np.inf), where=before > 0)
    k = int(np.argmin(np.nan_to_num(left, nan=np.inf)))
    if not left[k] < 1 - LEAST_FALL:
        return None
    return Fall(terms[k], float(before[k]), float(after[k]))


def find_collapse(
    validations: Validations | None, terms: Sequence[str], epochs: np.ndarray, weights: np.ndarray
) -> Collapse | None:
    """Finds a run's collapse; None if there was none.

    Without weights the labels alone train the backbone. It then has as many dimensions as there are
    classes, which is no collapse.

    Args:
        validations: of the run; None if none is recorded.
        terms: see :func:`find_fall`.
        epochs: see :func:`find_fall`.
        weights: see :func:`find_fall`.
    """
    at = None if validations is None else validations.collapsed_at()
    if validations is None or at is None or not weights.any():
        return None
    epoch = int(validations.epochs[at])
    measures = float(validations.rankme[at]), float(validations.spread[at])
    return Collapse(at, epoch, *measures, find_fall(terms, epochs, weights, epoch))


def read_validations(path: Path) -> Validations | None:
    """Reads RankMe and the spread from a ``metrics.csv``; None without the file or the columns.

    Raises:
        ConfigError: a damaged file.
    """
    if not path.is_file():
        return None
    try:
        table = list(csv.DictReader(io.StringIO(read_text(path))))
    except csv.Error:
        raise ConfigError(f"{path}: damaged: not a CSV file: remove it or run again") from None
    # A row that is being written, or that a killed run has left, has no cell in the last columns.
    rows = [row for row in table if row.get(RANKME) and row.get(SPREAD) and row.get("epoch")]
    if not rows:
        return None
    epochs, rankme, spread = (_read_numbers(path, rows, key) for key in ("epoch", RANKME, SPREAD))
    return Validations(check_ascending(path, epochs.astype(int)), rankme, spread)


def _read_numbers(path: Path, rows: Sequence[dict[str, str]], column: str) -> np.ndarray:
    """Reads the cells of a column, (N,); those of the epochs are finite."""
    values = []
    for row in rows:
        try:
            values.append(float(int(row[column]) if column == "epoch" else row[column]))
        except ValueError:
            raise ConfigError(
                f"{path}: damaged: {column} is {row[column]!r}, not a number: remove that row"
            ) from None
    return np.array(values)
