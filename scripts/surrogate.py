#!/usr/bin/env python
"""Draws the surrogate of one step and where its gradients go: scripts/surrogate.py [PNG]"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from grap_solo.report.plots import COLORS

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "surrogate.png"
BACKBONE, HEADS, PROBE = COLORS[4], COLORS[0], COLORS[1]
GREY = "0.35"
Point = tuple[float, float]


def surrogate() -> Figure:
    """Forward arrows are grey and point right; gradients are coloured and point left."""
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 12.4), ylim=(-0.1, 6.0), aspect="equal")
    axes.axis("off")
    _box(axes, 1.3, 3.35, 2.1, 1.5, "backbone", BACKBONE)
    _node(axes, 4.6, 4.1, "$z$")
    _node(axes, 6.0, 4.1, "$z'$")
    rows = ((5.4, "head $1$", "$L_1$"), (4.1, "head $K$", "$L_K$"))
    for y, name, loss in rows:
        _box(axes, 7.6, y - 0.4, 1.9, 0.8, name, HEADS)
        _node(axes, 10.8, y, loss)
        _arrow(axes, (6.3, 4.1 + (y - 4.1) * 0.25), (7.55, y), GREY)
        _arrow(axes, (9.55, y + 0.12), (10.45, y + 0.12), GREY)
        _arrow(axes, (10.45, y - 0.14), (9.55, y - 0.14), HEADS, width=2.2)
    axes.text(8.55, 4.75, "\N{VERTICAL ELLIPSIS}", ha="center", va="center", fontsize=14)
    axes.text(11.2, 4.75, "$h_k\\nabla L_k$", color=HEADS, ha="left", va="center", fontsize=12)
    _box(axes, 7.6, 2.4, 1.9, 0.8, "probe", PROBE)
    _node(axes, 10.8, 2.8, "$L_{down}$")
    _arrow(axes, (6.25, 3.85), (7.55, 2.85), GREY)
    _arrow(axes, (9.55, 2.92), (10.4, 2.92), GREY)
    _arrow(axes, (10.4, 2.66), (9.55, 2.66), PROBE, width=2.2)
    axes.text(11.3, 2.8, "$\\nabla L_{down}$", color=PROBE, ha="left", va="center", fontsize=12)
    axes.text(0.55, 4.1, "two\nviews", ha="center", va="center", fontsize=11)
    _arrow(axes, (0.95, 4.1), (1.25, 4.1), GREY)
    _arrow(axes, (3.45, 4.22), (4.25, 4.22), GREY)
    _arrow(axes, (4.25, 3.96), (3.45, 3.96), BACKBONE, width=2.2)
    axes.text(3.85, 3.62, "$e^{\\top}G$", color=BACKBONE, ha="center", va="center", fontsize=12)
    _arrow(axes, (4.9, 4.1), (5.65, 4.1), GREY)
    axes.plot([5.25, 5.25], [3.3, 5.0], color="0.2", linestyle=(0, (3, 2)), linewidth=1.4)
    axes.text(5.25, 5.1, "detached: no\ngradient passes", ha="center", va="bottom", fontsize=9.5)
    _box(axes, 3.0, 0.55, 4.4, 1.35, "", "0.25")
    axes.text(5.2, 1.5, "weighting (GraP, \N{HORIZONTAL ELLIPSIS})", ha="center", va="center")
    axes.text(
        5.2, 0.93, "$C = GG^{\\top}$,  $p = Gg$   $\\to$   weights $e$", ha="center", va="center"
    )
    _arrow(axes, (6.0, 3.75), (6.0, 1.95), "0.25", width=1.6)
    axes.text(6.12, 2.18, "rows of $G$, $g$", ha="left", va="center", fontsize=10.5)
    _arrow(axes, (4.6, 1.95), (4.6, 3.75), BACKBONE, width=2.2)
    axes.text(4.48, 2.6, "constants", color=BACKBONE, ha="right", va="center", fontsize=10.5)
    axes.text(
        7.75, 1.2, "$G$: the terms' gradients at $z'$, one row each\n$g$: the probe's gradient "
        "at $z'$", ha="left", va="center", fontsize=9.5, linespacing=1.5,
    )  # fmt: skip
    axes.text(
        6.2, 0.1, "surrogate  $=\\;\\langle z,\\,e^{\\top}G\\rangle\\;+\\;\\sum_k h_k L_k(z')\\;"
        "+\\;L_{down}(z')$", ha="center", va="center", fontsize=12.5,
    )  # fmt: skip
    return figure


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor="white",
            edgecolor=color, linewidth=1.8,
        )
    )  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=12)


def _node(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=13)


def _arrow(axes: Axes, start: Point, end: Point, color: str, width: float = 1.1) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0, color=color,
            linewidth=width,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the surrogate of one step.")
    parser.add_argument("target", nargs="?", type=Path, default=IMAGE, help="the PNG to write")
    target = parser.parse_args().target
    surrogate().savefig(target, dpi=160, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
