"""Curves over a training: smoothed, and averaged over runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

Series = tuple[np.ndarray, np.ndarray]
"""The epoch of each of a run's steps and a value at each, both (N,)."""

POINTS = 400  # The most points that a curve is drawn from.


def step_epochs(epochs: np.ndarray) -> np.ndarray:
    """Places each step on an axis of epochs: 0.5 is the step after which half an epoch is done.

    Args:
        epochs: the epoch of each step, ascending, (N,).
    """
    done = np.arange(len(epochs)) - np.searchsorted(epochs, epochs) + 1
    return epochs + done / np.bincount(epochs).max()


def last_epoch_median(series: Series) -> float:
    """Takes the median of the last epoch's values; NaN if there are none."""
    epochs, values = series
    last = values[(epochs > epochs[-1] - 1) & np.isfinite(values)]
    return float(np.median(last)) if len(last) else np.nan


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Takes the median of the ``width`` values around each place, fewer at the ends.

    The window has a middle: an even width is made one longer. A NaN makes its windows' medians
    NaN.
    """
    half = width // 2
    window = pd.Series(values).rolling(2 * half + 1, center=True, min_periods=1)
    medians = window.median().to_numpy(copy=True)
    # pandas leaves NaN and infinity out: take numpy's median of the windows that hold any.
    broken = pd.Series(~np.isfinite(values), dtype=float)
    touched = broken.rolling(2 * half + 1, center=True, min_periods=1).max()
    for place in np.flatnonzero(touched):
        medians[place] = np.median(values[max(0, place - half) : place + half + 1])
    return medians


@dataclass(frozen=True)
class Curve:
    """Mean and standard deviation over runs, at each place on the axis of epochs; all (N,)."""

    epochs: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def draw(self, axes: Axes, color: str, width: float, style: Any = "-") -> None:
        axes.plot(self.epochs, self.mean, color=color, linewidth=width, linestyle=style)

    def draw_band(self, axes: Axes, color: str) -> None:
        low, high = self.mean - self.std, self.mean + self.std
        axes.fill_between(self.epochs, low, high, color=color, alpha=0.18, linewidth=0)


def mean_curve(runs: Sequence[Series]) -> Curve:
    """Smooths each run and averages the runs."""
    start, end = min(epochs[0] for epochs, _ in runs), max(epochs[-1] for epochs, _ in runs)
    grid = np.linspace(start, end, min(POINTS, max(len(epochs) for epochs, _ in runs)))
    return Curve(grid, *mean_and_std([epoch_medians(run, grid) for run in runs]))


def epoch_medians(series: Series, grid: np.ndarray) -> np.ndarray:
    """Takes the median of the values within half an epoch of each place; NaN without values.

    Args:
        series: the epochs and the values of a run, both (N,).
        grid: the places, in epochs, (M,).
    """
    epochs, values = series
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(grid), np.nan)
    epochs, values = epochs[known], values[known]
    first, last = np.searchsorted(epochs, grid - 0.5), np.searchsorted(epochs, grid + 0.5, "right")
    counts = last - first
    places = first[:, None] + np.arange(max(1, counts.max()))
    around = np.where(places < last[:, None], values[places.clip(max=len(values) - 1)], np.nan)
    around.sort(axis=1)  # NaN, beyond the window, sorts to the end.
    rows = np.arange(len(grid))
    return (around[rows, (counts - 1) // 2] + around[rows, counts // 2]) / 2


def mean_and_std(runs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Takes mean and sample standard deviation over runs, leaving out NaN.

    The mean is NaN where no run has a value; the deviation where fewer than two have one.
    """
    table = np.ma.masked_invalid(np.stack(runs))
    return table.mean(axis=0).filled(np.nan), table.std(axis=0, ddof=1).filled(np.nan)
