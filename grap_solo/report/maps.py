"""The picture of accuracy over the weights of two terms."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from grap_solo.records.runs import MEASURES
from grap_solo.report.layout import DARK, SMALL, tick_text
from grap_solo.report.plots import COLORS

HALO = [patheffects.withStroke(linewidth=3.5, foreground="white")]
"""A white edge, which keeps a line or a text readable on any colour."""


@dataclass(frozen=True)
class MapPoint:
    """Weights that are no cell of the map.

    Attributes:
        name: what has these weights.
        path: the two weights, relative to the unit term's, over the training; one pair if they do
            not move; empty if none is known.
        accuracies: top-1 by the keys of :data:`~grap_solo.records.runs.MEASURES`, in percent.
    """

    name: str
    path: Sequence[tuple[float, float]]
    accuracies: Mapping[str, float]


def plot_weight_map(
    table: pd.DataFrame,
    terms: tuple[str, str],
    unit: str,
    points: Sequence[MapPoint],
    target: str | os.PathLike[str],
) -> None:
    """Draws accuracy over the weights of two terms as heat maps, one for each measure.

    Paths that leave the map are drawn along its edge.

    Args:
        table: a row for each run, with a column for each of the two terms and for the measures.
        terms: the terms of the x-axis and the y-axis.
        unit: the term whose weight is 1.
        points: drawn above the map; all have the same measures.
        target: the PNG file to write.
    """
    measures = list(points[0].accuracies)
    figure = Figure(figsize=(5.2 * len(measures), 5.0), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        cells = table.pivot_table(index=terms[1], columns=terms[0], values=measure, aggfunc="mean")
        xs, ys = cells.columns.to_numpy(float), cells.index.to_numpy(float)
        _draw_cells(axes, xs, ys, cells.to_numpy(float))
        for color, point in zip((DARK, COLORS[4], *COLORS), points, strict=False):
            _draw_map_point(axes, point, measure, color, _edges(xs), _edges(ys))
        axes.set_title(f"{MEASURES[measure]}, top-1 in %", fontsize=9.5, color=DARK, loc="left")
        axes.set_xlabel(f"weight of {terms[0]} / weight of {unit}", fontsize=9, color=DARK)
        axes.set_ylabel(f"weight of {terms[1]} / weight of {unit}", fontsize=9, color=DARK)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=1, frameon=False,
            fontsize=SMALL, labelcolor=DARK,
        )  # fmt: skip
    figure.savefig(target, dpi=200, facecolor="white", metadata={"Software": None})


def _edges(values: np.ndarray) -> np.ndarray:
    """The borders of cells (N + 1,) around N centres, at equal distances on a logarithmic axis."""
    logs = np.log(values)
    middles = (logs[1:] + logs[:-1]) / 2
    first, last = 2 * logs[0] - middles[0], 2 * logs[-1] - middles[-1]
    return np.exp(np.array([first, *middles, last]))


def _draw_cells(axes: Axes, xs: np.ndarray, ys: np.ndarray, accuracies: np.ndarray) -> None:
    """Draws the cells with their accuracies; failed ones stay white."""
    known = accuracies[np.isfinite(accuracies)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    span = max(high - low, 1e-9)
    axes.pcolormesh(
        _edges(xs), _edges(ys), accuracies, cmap="Blues", vmin=low - 0.15 * span,
        vmax=high + 0.25 * span, edgecolors="white", linewidth=0.8,
    )  # fmt: skip
    lefts, tops = _edges(xs)[:-1], _edges(ys)[1:]
    for (row, column), value in np.ndenumerate(accuracies):
        finite = bool(np.isfinite(value))
        axes.annotate(
            f"{value:.1f}" if finite else "failed",
            (float(lefts[column]), float(tops[row])),
            xytext=(4, -4),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=SMALL,
            color="white" if finite and (value - low) / span > 0.75 else DARK,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        axis.set_major_locator(FixedLocator(list(values)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(tick_text))
    axes.tick_params(labelsize=SMALL, colors=DARK, length=0)
    axes.spines[:].set_visible(False)


def _draw_map_point(
    axes: Axes, point: MapPoint, measure: str, color: str, x_edges: np.ndarray, y_edges: np.ndarray
) -> None:
    """Draws a star for weights that stay, and a line from a ring to a dot for a path."""
    label = f"{point.name}: {point.accuracies[measure]:.1f} %"
    path = np.array(point.path, dtype=float).reshape(-1, 2)
    if not len(path):
        axes.plot([], [], " ", label=label)
        return
    x = np.clip(path[:, 0], x_edges[0], x_edges[-1])
    y = np.clip(path[:, 1], y_edges[0], y_edges[-1])
    if len(path) == 1:
        axes.plot(
            x, y, "*", markersize=15, color=color, markeredgecolor="white", clip_on=False,
            label=label, zorder=4,
        )  # fmt: skip
        return
    axes.plot(
        x, y, color=color, linewidth=1.8, path_effects=HALO, clip_on=False, zorder=5,
        solid_capstyle="round",
    )  # fmt: skip
    axes.plot(
        x[:1], y[:1], "o", markersize=8, markerfacecolor="white", markeredgecolor=color,
        markeredgewidth=1.8, clip_on=False, zorder=6, label=f"{point.name}: start",
    )  # fmt: skip
    axes.plot(
        x[-1:], y[-1:], "o", markersize=8, color=color, markeredgecolor="white",
        clip_on=False, zorder=7, label=f"{label} (end of its path)",
    )  # fmt: skip
