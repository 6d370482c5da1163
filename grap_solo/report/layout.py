"""The look of a report's pictures: panels, axes, titles and legends."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from grap_solo.report.curves import Series

SMALL = 8.0  # The smaller font size, in points.
DARK, GREY, PALE = "#222222", "#666666", "#d4d4d4"

Panels = Mapping[str, Mapping[str, Sequence[Series]]]
"""The series of each run, by method and by term."""

DECADES = 3  # How many decades the axis of weights shows if all of them are below 1.

WIDTH = 9.0  # The width of a figure, in inches.

PER_ROW = 4  # The most panels in a row.


def small_multiples(panels: Panels) -> tuple[Figure, list[Axes]]:
    """Makes a figure with a panel for each method, at most four in a row, with common axes."""
    count = len(panels)
    columns = min(PER_ROW, count)
    rows = -(-count // columns)
    width = WIDTH if columns > 2 else 3.6 * columns + 1.2
    height = (2.0 if columns > 2 else 2.9) * rows + 0.8
    figure = Figure(figsize=(width, height), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in every[count:]:
        axes.set_visible(False)
    for axes in every[:count]:
        tidy(axes)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
    runs = [run for terms in panels.values() for each in terms.values() for run in each]
    every[0].set_xlim(0, max(epochs[-1] for epochs, _ in runs))
    return figure, every[:count]


def tidy(axes: Axes) -> None:
    """Removes the frame's upper and right sides and makes the rest grey."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(labelsize=SMALL, colors=DARK, length=3, color=GREY)


def write_title(axes: Axes, left: str, right: str) -> None:
    """Writes a panel's name on the left and a grey note on the right, or below a long name."""
    if len(left) + len(right) > 24:
        left = textwrap.fill(left, 24) + "\n "
    axes.set_title(left, loc="left", fontsize=9.5, color=DARK)
    axes.set_title(right, loc="right", fontsize=SMALL, color=GREY)


def add_legend(figure: Figure, handles: Sequence[Line2D], x: str, y: str) -> None:
    """Adds the legend above the panels, and the names of their axes."""
    figure.supxlabel(x, fontsize=9, color=DARK)
    figure.supylabel(y, fontsize=9, color=DARK)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=_legend_columns([str(each.get_label()) for each in handles], figure.get_figwidth()),
        frameon=False,
        fontsize=9,
        labelcolor=DARK,
    )


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Returns how many columns of a legend fit into a width in inches."""
    lengths = np.array([len(each) for each in labels])
    for columns in range(len(labels), 1, -1):
        longest = [part.max() for part in np.array_split(lengths, columns)]
        if sum(0.65 + 0.08 * each for each in longest) <= width:
            return -(-len(labels) // -(-len(labels) // columns))  # Fills the rows evenly.
    return 1


def take_turns(turn: int, of: int, gap: float = 0) -> Any:
    """Returns a dash pattern for one of several coinciding lines, so that each stays visible."""
    dash = 4.0
    if of == 1 and not gap:
        return "-"
    return (-turn * (dash + gap), (dash, gap + (of - 1) * (dash + gap)))


def dash_references(axes: Axes, reference: Mapping[str, float], colors: Mapping[str, str]) -> None:
    """Draws a dashed line for each reference weight; terms with the same one alternate."""
    for term, value in reference.items():
        sharing = [each for each in reference if reference[each] == value]
        style = take_turns(sharing.index(term), len(sharing), gap=2)
        axes.axhline(
            value, color=colors[term], linestyle=style, linewidth=1.0, alpha=0.8, zorder=1.5
        )


def set_weight_scale(grid: Sequence[Axes]) -> None:
    """Sets the y-axis of weights: logarithmic above 0.1, or lower if every weight is below 1.

    Below, the axis is linear, since a weight may be 0 or negative.
    """
    low, high = min(each.dataLim.y0 for each in grid), max(each.dataLim.y1 for each in grid)
    first = -1 if high >= 1 or high <= 0 else math.floor(math.log10(high)) - DECADES + 1
    linear_below = 10.0**first
    axes, steps = grid[0], [scale * 10.0**power for power in range(first, 7) for scale in (1, 3)]
    low = -0.1 * linear_below if low >= 0 else 1.1 * low
    high = max(high, linear_below)
    axes.set_yscale("symlog", linthresh=linear_below, linscale=0.4)
    axes.set_ylim(low, next((each for each in steps if high <= each <= 1.5 * high), 1.1 * high))
    axes.yaxis.set_major_locator(FixedLocator([*(-each for each in steps), 0, *steps]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))


def tick_text(value: float, position: int | None = None) -> str:
    """Formats a tick without trailing zeros."""
    return f"{value:g}"
