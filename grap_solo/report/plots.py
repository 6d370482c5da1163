"""Pictures of a run, and of a report on many."""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from grap_solo.records.runs import mean_and_std
from grap_solo.records.weights import format_weight, median_weights, read_weights

# Okabe & Ito's colours, which colour-blind readers can tell apart.
COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#F0E442",
    "#000000",
)


def plot_weights(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    reference: Mapping[str, float] | None = None,
    warmup_epochs: int = 0,
) -> None:
    """Draws a ``weights.csv``: each term's effective weight at every step (thin), and the median
    of an epoch's steps around it.

    Args:
        source: the ``weights.csv``.
        target: the PNG file to write.
        reference: each term's reference weight, drawn as a dashed line.
        warmup_epochs: leading epochs that the medians in the legend leave out.

    Raises:
        ConfigError: see :func:`~grap_solo.records.weights.read_weights`.
    """
    terms, steps, weights = read_weights(source)
    medians = median_weights(source, warmup_epochs)
    per_epoch = np.bincount(steps[:, 1]).max()
    epochs = steps[:, 0] / per_epoch
    figure = Figure(figsize=(9, 4.2), layout="constrained")  # Without pyplot: no global state.
    axes = figure.subplots()
    for k, term in enumerate(terms):
        color, values = COLORS[k % len(COLORS)], weights[:, k]
        axes.plot(epochs, values, color=color, alpha=0.3, linewidth=0.8)
        label = f"{term}: median {format_weight(medians[term])}"
        axes.plot(epochs, _running_median(values, int(per_epoch)), color=color, label=label)
    for value in sorted(set((reference or {}).values())):
        named = ", ".join(term for term in terms if (reference or {}).get(term) == value)
        axes.axhline(value, color="0.45", linestyle="--", linewidth=0.9)
        axes.annotate(
            f"reference\n{named}",
            (epochs[-1], value),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="0.35",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("effective weight")
    axes.set_xlim(0, epochs[-1])
    axes.set_ylim(bottom=min(0.0, weights.min()))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(terms), frameon=False, fontsize=9)
    figure.savefig(target, dpi=150)


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the ``width`` values around each place, fewer at the ends."""
    half = width // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(each) for each in around])


# ---- what a report draws of many runs ---------------------------------------------------------

Series = tuple[np.ndarray, np.ndarray]
"""The epoch of each of a run's steps and a value at each, both (N,)."""

Panels = Mapping[str, Mapping[str, Sequence[Series]]]
"""For each method, for each of its terms, the series of each of its runs."""

COMPOSITE = "composite loss"
"""In place of a term: the weighted sum of all terms."""

# Tol's muted ones, for losses of more than eight terms.
MORE_COLORS = (
    "#332288",
    "#882255",
    "#999933",
    "#AA4499",
    "#88CCEE",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#44AA99",
    "#661100",
)
DECADES = 3  # Of the logarithmic part of the axis of weights that are all below 1.
WIDTH = 9.0  # Of a figure, in inches.
PER_ROW = 4
POINTS = 400  # At most so many of a curve are computed.
SMALL = 8.0
DARK, GREY, PALE = "#222222", "#666666", "#d4d4d4"


@dataclass(frozen=True)
class Point:
    """A method among others, by what it costs and what it reaches.

    Attributes:
        label: its name.
        cost: the time of its steps, in those of another method, and the least and the most of it;
            the two may be nan.
        accuracies: for each evaluation, its mean and standard deviation in percent; either may be
            nan.
    """

    label: str
    cost: tuple[float, float, float]
    accuracies: Mapping[str, tuple[float, float]]


def term_colors(terms: Sequence[str]) -> dict[str, str]:
    """A colour for each term, which it keeps in every figure."""
    palette = COLORS + MORE_COLORS
    return {term: palette[i % len(palette)] for i, term in enumerate(dict.fromkeys(terms))}


def step_epochs(epochs: np.ndarray) -> np.ndarray:
    """Where each step stands in its run, in epochs: 0.5 once half of the first one is done.

    Args:
        epochs: the epoch of each step, ascending, (N,).
    """
    done = np.arange(len(epochs)) - np.searchsorted(epochs, epochs) + 1
    return epochs + done / np.bincount(epochs).max()


def last_epoch_median(series: Series) -> float:
    """The median of the last epoch's values, nan where there are none."""
    epochs, values = series
    last = values[(epochs > epochs[-1] - 1) & np.isfinite(values)]
    return float(np.median(last)) if len(last) else np.nan


def plot_weight_panels(
    panels: Panels,
    target: str | os.PathLike[str],
    colors: Mapping[str, str],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws each method's effective weights: per term the mean over its runs, each smoothed by the
    median of an epoch's steps, with a band of one standard deviation, on a symmetric-log axis.

    Args:
        panels: the weights.
        target: the PNG file to write.
        colors: of each term.
        references: for each method, its terms' reference weights, drawn dashed.
    """
    figure, grid = _small_multiples(panels)
    for axes, (method, terms) in zip(grid, panels.items(), strict=True):
        curves = {term: _mean_curve(runs) for term, runs in terms.items()}
        _dash_references(axes, references.get(method, {}), colors)
        for term, curve in curves.items():
            same = [each for each in curves if np.array_equal(curve.mean, curves[each].mean)]
            curve.draw_band(axes, colors[term])
            curve.draw(axes, colors[term], 1.7, _turns(same.index(term), len(same)))
        _title(axes, method, _count(len(next(iter(terms.values())))))
    _log_above(grid)
    drawn = dict.fromkeys(term for terms in panels.values() for term in terms)
    handles = [Line2D([], [], color=colors[term], linewidth=2, label=term) for term in drawn]
    if any(references.values()):
        dashed: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1.1}
        handles.append(Line2D([], [], **dashed, label="reference weight"))
    _finish(figure, handles, "epoch", "effective weight")
    _save(figure, target)


def plot_alignment(
    panels: Panels, target: str | os.PathLike[str], colors: Mapping[str, str]
) -> None:
    """Draws, for each method, the cosine between the composite and the downstream gradient
    (:data:`COMPOSITE`: black, with a band of one standard deviation over its runs, and grey in the
    other methods' panels) and those between each term's gradient and the downstream one. Curves
    are means over the runs, each smoothed by the median of an epoch's steps.

    Args:
        panels: the cosines.
        target: the PNG file to write.
        colors: of each term.
    """
    figure, grid = _small_multiples(panels)
    composites = {method: _mean_curve(terms[COMPOSITE]) for method, terms in panels.items()}
    for axes, (method, terms) in zip(grid, panels.items(), strict=True):
        axes.axhline(0, color=GREY, linewidth=0.7)
        for other, curve in composites.items():
            if other != method:
                curve.draw(axes, PALE, 0.9)
        for term, runs in terms.items():
            if term != COMPOSITE:
                _mean_curve(runs).draw(axes, colors[term], 1.1)
        composites[method].draw_band(axes, DARK)
        composites[method].draw(axes, DARK, 2.0)
        _title(axes, method, _spread([last_epoch_median(run) for run in terms[COMPOSITE]]))
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    drawn = dict.fromkeys(term for terms in panels.values() for term in terms)
    handles = [Line2D([], [], color=DARK, linewidth=2, label=COMPOSITE)]
    handles += [
        Line2D([], [], color=colors[term], linewidth=1.4, label=term)
        for term in drawn
        if term != COMPOSITE
    ]
    if len(panels) > 1:
        handles.append(Line2D([], [], color=PALE, linewidth=1.4, label="that of the other methods"))
    _finish(figure, handles, "epoch", "cosine with the downstream gradient")
    _save(figure, target)


def plot_gramians(
    matrices: Mapping[str, tuple[Sequence[str], np.ndarray]], target: str | os.PathLike[str]
) -> None:
    """Draws a heat map for each method, of the cosines between its terms' gradients.

    Args:
        matrices: each method's K terms and cosines (K, K), nan where one is not known.
        target: the PNG file to write.
    """
    widest = max(len(terms) for terms, _ in matrices.values())
    columns = max(1, min(3, len(matrices), 14 // widest))
    rows = -(-len(matrices) // columns)
    side = max(1.9, 0.5 * widest)
    size = (side + 0.85) * columns + 0.7, (side + 0.8) * rows + 0.1
    figure = Figure(figsize=size, layout="constrained")
    axes_grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    image = None
    for axes, (method, (terms, matrix)) in zip(axes_grid, matrices.items(), strict=False):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(matrix):
            known = bool(np.isfinite(value))
            axes.text(
                column,
                row,
                _signed(value) if known else "\N{EN DASH}",
                ha="center",
                va="center",
                fontsize=SMALL,
                color="white" if known and abs(value) > 0.6 else DARK,
            )
        axes.set_xticks(range(len(terms)), terms, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(terms)), terms)
        axes.tick_params(length=0, labelsize=SMALL, colors=DARK)
        axes.spines[:].set_visible(False)
        axes.set_title(textwrap.fill(method, 30), fontsize=9.5, color=DARK)
    for axes in axes_grid[len(matrices) :]:
        axes.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=axes_grid, shrink=0.8, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, colors=DARK, length=2)
    bar.set_label("cosine", fontsize=9, color=DARK)
    _save(figure, target)


def plot_accuracy_cost(points: Sequence[Point], target: str | os.PathLike[str]) -> None:
    """Draws, in one panel for each evaluation, the methods by cost (whiskers: least to most) and
    accuracy (whiskers: one standard deviation), each with its name.

    Args:
        points: the methods.
        target: the PNG file to write.
    """
    evaluations = list(dict.fromkeys(name for point in points for name in point.accuracies))
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(1, len(evaluations), squeeze=False)[0]
    costs = np.array([point.cost[0] for point in points])
    for axes, evaluation in zip(panels, evaluations, strict=True):
        drawn = [point for point in points if evaluation in point.accuracies]
        axes.axvline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
        for point in drawn:
            _draw_point(axes, point.cost, point.accuracies[evaluation])
        if costs.max() > 6 * costs.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.margins(0.16, 0.14)
        axes.set_ylabel(f"{evaluation}, top-1 in %", fontsize=9, color=DARK)
        axes.set_xlabel("cost of training, relative to fixed weights", fontsize=9, color=DARK)
        axes.grid(color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        _tidy(axes)
    figure.draw_without_rendering()  # The layout is known from here on.
    for axes, evaluation in zip(panels, evaluations, strict=True):
        drawn = [point for point in points if evaluation in point.accuracies]
        _label_points(axes, drawn, evaluation)
    _save(figure, target)


def _small_multiples(panels: Panels) -> tuple[Figure, list[Axes]]:
    """A figure with a place for each method, at most four in a row, on common axes."""
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
        _tidy(axes)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
    runs = [run for terms in panels.values() for each in terms.values() for run in each]
    every[0].set_xlim(0, max(epochs[-1] for epochs, _ in runs))
    return figure, every[:count]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(labelsize=SMALL, colors=DARK, length=3, color=GREY)


def _title(axes: Axes, left: str, right: str) -> None:
    """The panel's name, and in grey what is to be known of it: beside it, or below a long one."""
    if len(left) + len(right) > 24:
        left = textwrap.fill(left, 24) + "\n "
    axes.set_title(left, loc="left", fontsize=9.5, color=DARK)
    axes.set_title(right, loc="right", fontsize=SMALL, color=GREY)


def _finish(figure: Figure, handles: Sequence[Line2D], x: str, y: str) -> None:
    """The legend above the panels and the names of their axes."""
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
    """As many columns as fit side by side into so many inches."""
    lengths = np.array([len(each) for each in labels])
    for columns in range(len(labels), 1, -1):
        longest = [part.max() for part in np.array_split(lengths, columns)]
        if sum(0.65 + 0.08 * each for each in longest) <= width:
            return -(-len(labels) // -(-len(labels) // columns))  # Rows of one length.
    return 1


def _save(figure: Figure, target: str | os.PathLike[str]) -> None:
    figure.savefig(target, dpi=200, facecolor="white", metadata={"Software": None})


def _count(runs: int) -> str:
    return f"{runs} run" + ("s" if runs > 1 else "")


def _signed(value: float, digits: int = 2) -> str:
    """With a minus sign that is as wide as a plus, and none before 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as text; nothing where no value is known."""
    mean, std = (float(each[0]) for each in mean_and_std([np.array([v]) for v in values]))
    if np.isnan(mean):
        return ""
    return _signed(mean, 3) + ("" if np.isnan(std) else f" ± {std:.3f}")


@dataclass(frozen=True)
class _Curve:
    """The mean of runs and their standard deviation, over epochs, each (N,)."""

    epochs: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def draw(self, axes: Axes, color: str, width: float, style: Any = "-") -> None:
        axes.plot(self.epochs, self.mean, color=color, linewidth=width, linestyle=style)

    def draw_band(self, axes: Axes, color: str) -> None:
        low, high = self.mean - self.std, self.mean + self.std
        axes.fill_between(self.epochs, low, high, color=color, alpha=0.18, linewidth=0)


def _mean_curve(runs: Sequence[Series]) -> _Curve:
    """Of the runs, each smoothed."""
    start, end = min(epochs[0] for epochs, _ in runs), max(epochs[-1] for epochs, _ in runs)
    grid = np.linspace(start, end, min(POINTS, max(len(epochs) for epochs, _ in runs)))
    return _Curve(grid, *mean_and_std([_epoch_medians(run, grid) for run in runs]))


def _epoch_medians(series: Series, grid: np.ndarray) -> np.ndarray:
    """The median of the values within half an epoch of each place of ``grid``, nan if none is."""
    epochs, values = series
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(grid), np.nan)
    epochs, values = epochs[known], values[known]
    first, last = np.searchsorted(epochs, grid - 0.5), np.searchsorted(epochs, grid + 0.5, "right")
    counts = last - first
    places = first[:, None] + np.arange(max(1, counts.max()))
    around = np.where(places < last[:, None], values[places.clip(max=len(values) - 1)], np.nan)
    around.sort(axis=1)  # What is beyond a window is nan, and so behind its values.
    rows = np.arange(len(grid))
    return (around[rows, (counts - 1) // 2] + around[rows, counts // 2]) / 2


def _turns(turn: int, of: int, gap: float = 0) -> Any:
    """The line style of one of several lines in one place, which take turns with their dashes."""
    dash = 4.0
    if of == 1 and not gap:
        return "-"
    return (-turn * (dash + gap), (dash, gap + (of - 1) * (dash + gap)))


def _dash_references(axes: Axes, reference: Mapping[str, float], colors: Mapping[str, str]) -> None:
    """A dashed line for each weight; terms that share one take turns."""
    for term, value in reference.items():
        sharing = [each for each in reference if reference[each] == value]
        style = _turns(sharing.index(term), len(sharing), gap=2)
        axes.axhline(
            value, color=colors[term], linestyle=style, linewidth=1.0, alpha=0.8, zorder=1.5
        )


def _log_above(grid: Sequence[Axes]) -> None:
    """The y-axis of weights: linear near 0, which is a weight too, and logarithmic above 0.1, or
    above less where every weight is below 1."""
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
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, position: int | None = None) -> str:
    return f"{value:g}"


def _draw_point(
    axes: Axes, cost: tuple[float, float, float], accuracy: tuple[float, float]
) -> None:
    middle, low, high = cost
    mean, std = accuracy
    x_whisker = np.nan_to_num([[middle - low], [high - middle]])
    axes.errorbar(
        middle,
        mean,
        xerr=np.maximum(x_whisker, 0),
        yerr=np.nan_to_num(std),
        fmt="o",
        markersize=5.5,
        color=COLORS[0],
        ecolor="#8fb8d3",
        elinewidth=1.2,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )


# Where a name may stand: the direction from its point, and the part of its box that is nearest.
DIRECTIONS = (
    (1.0, 0.0, "left", "center"),
    (0.7, 0.7, "left", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-1.0, 0.0, "right", "center"),
    (-0.7, 0.7, "right", "bottom"),
    (-0.7, -0.7, "right", "top"),
    (0.0, 1.0, "center", "bottom"),
    (0.0, -1.0, "center", "top"),
)
DISTANCES = (6.0, 14.0, 24.0, 36.0, 50.0)  # In points of the page; the longer have a line.


def _label_points(axes: Axes, points: Sequence[Point], evaluation: str) -> None:
    """Writes each point's name where it covers the least of the points, whiskers and names."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixel, renderer = figure.dpi / 72, FigureCanvasAgg(figure).get_renderer()
    places = [(point.cost[0], point.accuracies[evaluation][0]) for point in points]
    centres = axes.transData.transform(places)
    markers = [_box(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in centres]
    whiskers = [box for point in points for box in _whiskers(axes, point, evaluation)]
    names: list[Bbox] = []
    solid = list(markers)
    for i in sorted(range(len(points)), key=lambda i: places[i]):
        text = axes.annotate(
            points[i].label,
            places[i],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=SMALL,
            color=DARK,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkB": 4},
        )
        text.set_in_layout(False)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = Text.get_window_extent(text, renderer)
        least, taken = np.inf, [size]
        for distance, (x, y, ha, va) in itertools.product(DISTANCES, DIRECTIONS):
            offset = np.array([x, y]) * distance
            box = _box_beside(centres[i] + offset * pixel, size, ha, va)
            line = _line(centres[i], box) if distance > DISTANCES[0] else []
            cost = 4 * pixel * distance + 5 * (size.width * size.height - _overlap(box, axes.bbox))
            cost += 4 * sum(_overlap(box, each) for each in solid)
            cost += 3 * sum(_overlap(box, each) for each in whiskers)
            crossed = [each for each in (*markers, *names) if each is not markers[i]]
            cost += 8 * sum(_overlap(part, each) for part in line for each in crossed)
            if cost < least:
                least, taken = cost, [box, *line]
                text.set(horizontalalignment=ha, verticalalignment=va)
                text.xyann = tuple(offset)
                assert text.arrow_patch is not None
                text.arrow_patch.set_visible(bool(line))
        names.append(taken[0])
        solid += taken


def _line(start: np.ndarray, box: Bbox) -> list[Bbox]:
    """Small boxes along the line from a point to the middle of its name, up to the name."""
    end = np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])
    along = [start + (end - start) * part for part in np.linspace(0, 1, 25)[1:]]
    return [_box(x - 1.5, y - 1.5, 3, 3) for x, y in along if not box.contains(x, y)]


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x, y, width, height)


def _box_beside(place: np.ndarray, size: Bbox, ha: str, va: str) -> Bbox:
    """Where a text of that size stands if it is aligned at ``place``."""
    left = place[0] - size.width * {"left": 0, "center": 0.5, "right": 1}[ha]
    bottom = place[1] - size.height * {"bottom": 0, "center": 0.5, "top": 1}[va]
    return _box(left, bottom, size.width, size.height)


def _whiskers(axes: Axes, point: Point, evaluation: str) -> list[Bbox]:
    """A point's two whiskers, two pixels wide."""
    (middle, low, high), (mean, std) = point.cost, point.accuracies[evaluation]
    std = float(np.nan_to_num(std))
    low, high = (middle if np.isnan(each) else each for each in (low, high))
    corners = [(low, mean), (high, mean), (middle, mean - std), (middle, mean + std)]
    a, b, c, d = axes.transData.transform(corners)
    return [_box(a[0], a[1] - 1, b[0] - a[0], 2), _box(c[0] - 1, c[1], 2, d[1] - c[1])]


def _overlap(one: Bbox, other: Bbox) -> float:
    """The area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
