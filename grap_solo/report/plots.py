"""The pictures of a run and of a report."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from grap_solo.records.weights import after_warmup, format_weight, median_of_rows, read_weights
from grap_solo.report.curves import (
    Series,
    last_epoch_median,
    mean_and_std,
    mean_curve,
    running_median,
)
from grap_solo.report.layout import (
    DARK,
    GREY,
    PALE,
    SMALL,
    WIDTH,
    Panels,
    add_legend,
    dash_references,
    set_weight_scale,
    small_multiples,
    take_turns,
    tick_text,
    tidy,
    write_title,
)
from grap_solo.report.point_names import Point, label_points

# Okabe & Ito's colours: colour-blind readers can tell them apart.
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
    """Draws a ``weights.csv``: each term's effective weight at every step, as a thin line, and the
    median of the epoch's steps around it, as a bold one.

    Args:
        source: the ``weights.csv``.
        target: the PNG file to write.
        reference: each term's reference weight, drawn as a dashed line.
        warmup_epochs: the leading epochs that the legend's medians leave out.

    Raises:
        ConfigError: see :func:`~grap_solo.records.weights.read_weights`.
    """
    figure = weights_figure(source, reference or {}, warmup_epochs)
    figure.savefig(target, dpi=150)


def weights_figure(
    source: str | os.PathLike[str], reference: Mapping[str, float], warmup_epochs: int
) -> Figure:
    """Returns the figure that :func:`plot_weights` writes."""
    terms, steps, weights = read_weights(source)
    medians = median_of_rows(terms, after_warmup(steps[:, 1], weights, warmup_epochs))
    per_epoch = np.bincount(steps[:, 1]).max()
    epochs = steps[:, 0] / per_epoch
    figure = Figure(figsize=(9, 4.2), layout="constrained")  # Without pyplot: no global state.
    axes = figure.subplots()
    for k, term in enumerate(terms):
        color, values = COLORS[k % len(COLORS)], weights[:, k]
        axes.plot(epochs, values, color=color, alpha=0.3, linewidth=0.8)
        label = f"{term}: median {format_weight(medians[term])}"
        axes.plot(epochs, running_median(values, int(per_epoch)), color=color, label=label)
    for value in sorted(set(reference.values())):
        named = ", ".join(term for term in terms if reference.get(term) == value)
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
    return figure


# ---- what a report draws of many runs ---------------------------------------------------------


COMPOSITE = "composite loss"
"""Stands among the terms for their weighted sum."""

# Tol's muted colours, for losses of more than eight terms.
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


def term_colors(terms: Sequence[str]) -> dict[str, str]:
    """Gives each term a colour for all pictures of a report."""
    palette = COLORS + MORE_COLORS
    return {term: palette[i % len(palette)] for i, term in enumerate(dict.fromkeys(terms))}


def plot_weight_panels(
    panels: Panels,
    target: str | os.PathLike[str],
    colors: Mapping[str, str],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws each method's effective weights in a panel, on a symmetric-log axis.

    A term's line is the mean over the runs, each smoothed by the median of an epoch's steps. Its
    band is one standard deviation.

    Args:
        panels: the weights.
        target: the PNG file to write.
        colors: each term's colour.
        references: each method's reference weights by term, drawn dashed.
    """
    figure, grid = small_multiples(panels)
    for axes, (method, terms) in zip(grid, panels.items(), strict=True):
        curves = {term: mean_curve(runs) for term, runs in terms.items()}
        dash_references(axes, references.get(method, {}), colors)
        for term, curve in curves.items():
            same = [each for each in curves if np.array_equal(curve.mean, curves[each].mean)]
            curve.draw_band(axes, colors[term])
            curve.draw(axes, colors[term], 1.7, take_turns(same.index(term), len(same)))
        write_title(axes, method, _count(len(next(iter(terms.values())))))
    set_weight_scale(grid)
    drawn = dict.fromkeys(term for terms in panels.values() for term in terms)
    handles = [Line2D([], [], color=colors[term], linewidth=2, label=term) for term in drawn]
    if any(references.values()):
        dashed: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1.1}
        handles.append(Line2D([], [], **dashed, label="reference weight"))
    add_legend(figure, handles, "epoch", "effective weight")
    _save(figure, target)


def plot_alignment(
    panels: Panels, target: str | os.PathLike[str], colors: Mapping[str, str]
) -> None:
    """Draws the cosines with the downstream gradient, one panel for each method.

    The composite gradient's cosine (:data:`COMPOSITE`) is black with a band of one standard
    deviation over the runs, and pale in the other methods' panels. Those of the terms' gradients
    are coloured. Lines are means over the runs, each smoothed by the median of an epoch's steps.

    Args:
        panels: the cosines.
        target: the PNG file to write.
        colors: each term's colour.
    """
    figure, grid = small_multiples(panels)
    composites = {method: mean_curve(terms[COMPOSITE]) for method, terms in panels.items()}
    for axes, (method, terms) in zip(grid, panels.items(), strict=True):
        axes.axhline(0, color=GREY, linewidth=0.7)
        for other, curve in composites.items():
            if other != method:
                curve.draw(axes, PALE, 0.9)
        for term, runs in terms.items():
            if term != COMPOSITE:
                mean_curve(runs).draw(axes, colors[term], 1.1)
        composites[method].draw_band(axes, DARK)
        composites[method].draw(axes, DARK, 2.0)
        write_title(axes, method, _spread([last_epoch_median(run) for run in terms[COMPOSITE]]))
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
    add_legend(figure, handles, "epoch", "cosine with the downstream gradient")
    _save(figure, target)


def plot_collapse(
    measures: Mapping[str, Mapping[str, Sequence[Series]]],
    target: str | os.PathLike[str],
    colors: Mapping[str, str],
    limits: Mapping[str, float],
    crosses: Mapping[str, Sequence[tuple[str, float, float]]],
) -> None:
    """Draws the measures of collapse over the epochs, one panel for each.

    A method's line is the mean over its runs. Its band is one standard deviation.

    Args:
        measures: by measure and by method, the series of each run.
        target: the PNG file to write.
        colors: each method's colour.
        limits: each measure's value below which a run collapses, drawn dashed.
        crosses: by measure, a method with the epoch and the value at which a run had collapsed.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    grid = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, (measure, methods) in zip(grid, measures.items(), strict=True):
        axes.axhline(limits[measure], color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1.5)
        for method, runs in methods.items():
            curve = mean_curve(runs)
            curve.draw_band(axes, colors[method])
            curve.draw(axes, colors[method], 1.7)
            if len(curve.epochs) == 1:  # A line of one point is invisible.
                axes.plot(curve.epochs, curve.mean, "o", color=colors[method], markersize=4)
        for method, epoch, value in crosses[measure]:
            axes.plot(epoch, value, "X", color=colors[method], markersize=9, markeredgecolor=DARK)
        axes.set_ylabel(measure, fontsize=9, color=DARK)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        tidy(axes)
    drawn = dict.fromkeys(method for methods in measures.values() for method in methods)
    handles = [Line2D([], [], color=colors[each], linewidth=2, label=each) for each in drawn]
    if any(crosses.values()):
        cross: dict[str, Any] = {"color": "white", "markeredgecolor": DARK, "linestyle": "none"}
        handles.append(Line2D([], [], **cross, marker="X", label="a run collapsed"))
    add_legend(figure, handles, "epoch", "")
    _save(figure, target)


def plot_gramians(
    matrices: Mapping[str, tuple[Sequence[str], np.ndarray]], target: str | os.PathLike[str]
) -> None:
    """Draws the cosines between the terms' gradients as a heat map for each method.

    Args:
        matrices: each method's K terms and cosines, (K, K); NaN where none was recorded.
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
    """Draws the methods by cost and accuracy, one panel for each evaluation.

    Whiskers show the cost from minimum to maximum, and one standard deviation of the accuracy.

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
            axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.margins(0.16, 0.14)
        axes.set_ylabel(f"{evaluation}, top-1 in %", fontsize=9, color=DARK)
        axes.set_xlabel("cost of training, relative to fixed weights", fontsize=9, color=DARK)
        axes.grid(color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        tidy(axes)
    figure.draw_without_rendering()  # Fixes the layout, which the labels need.
    for axes, evaluation in zip(panels, evaluations, strict=True):
        drawn = [point for point in points if evaluation in point.accuracies]
        label_points(axes, drawn, evaluation)
    _save(figure, target)


def _save(figure: Figure, target: str | os.PathLike[str]) -> None:
    figure.savefig(target, dpi=200, facecolor="white", metadata={"Software": None})


def _count(runs: int) -> str:
    return f"{runs} run" + ("s" if runs > 1 else "")


def _signed(value: float, digits: int = 2) -> str:
    """Formats a number with a true minus sign, and 0 without a sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _spread(values: Sequence[float]) -> str:
    """Formats mean and standard deviation; empty if no value is known."""
    mean, std = (float(each[0]) for each in mean_and_std([np.array([v]) for v in values]))
    if np.isnan(mean):
        return ""
    return _signed(mean, 3) + ("" if np.isnan(std) else f" ± {std:.3f}")


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
