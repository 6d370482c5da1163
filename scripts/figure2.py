#!/usr/bin/env python
"""Draws the paper's Figure 2, the effect of GraP's normalisations: scripts/figure2.py [PNG]

Shows two terms' gradients and a downstream gradient in the plane. The three vectors are given; the
project's objective and its GraP rule compute everything else.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Polygon
from torch import Tensor

from grap_solo.report.plots import COLORS
from grap_solo.weighting.base import Statistics
from grap_solo.weighting.grap import GraP, objective, objective_gradient
from grap_solo.weighting.grap_keys import NORMALIZATIONS

TARGET = Path(__file__).parents[1] / "docs" / "images" / "figure2.png"


def polar(length: float, degrees: float) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) * length


# A short gradient near the downstream one and a long one far from it.
G = torch.stack([polar(0.55, 88), polar(1.4, 4)])
G_DOWN = polar(1.0, 60)
STEPS = 400
LEARNING_RATE = 0.05

FORMULAS = {
    "gradient": r"$w^{\!\top}\!G\,/\,\|w^{\!\top}\!G\|$",
    "sum": r"$w^{\!\top}\!G\,/\,\Sigma_k w_k$",
    "none": r"$w^{\!\top}\!G$",
}
XLIM, YLIM = (-0.22, 2.2), (-0.2, 1.25)
BLUE, PINK, BLACK, GREEN, RED = (COLORS[i] for i in (0, 3, 7, 2, 4))


def normalized(weights: Tensor, normalization: str) -> Tensor:
    """Returns the normalised composite gradient ``w^T G``, for weights (..., 2)."""
    composite = weights @ G
    if normalization == "gradient":
        return composite / composite.norm(dim=-1, keepdim=True)
    return composite / weights.sum(-1, keepdim=True) if normalization == "sum" else composite


def cosine(weights: Tensor) -> float:
    """Returns the cosine of the composite and the downstream gradient."""
    return torch.cosine_similarity(weights @ G, G_DOWN, dim=0).item()


def trajectory(normalization: str, steps: int = STEPS) -> Tensor:
    """Returns GraP's weights at each step of gradient ascent from (1, 1), (steps + 1, 2)."""
    keys = {"lr": LEARNING_RATE, "optimizer": "sgd", "normalization": normalization}
    rule = GraP(["1", "2"], recipe="alg1", **keys)
    statistics = Statistics(torch.zeros(2), G @ G.T, G @ G_DOWN, G_DOWN.norm())
    path = [rule.weights.double()]
    for _ in range(steps):
        rule(statistics)
        path.append(rule.weights.double())
    return torch.stack(path)


def maximum(normalization: str) -> Tensor | None:
    """Returns the weights >= 0 that maximise the objective, (2,); None if it has no maximum,
    because it grows with the weights."""
    if normalization == "none":
        return None
    share = torch.linspace(0, 1, 100_001, dtype=torch.float64)  # Their length does not matter.
    candidates = torch.stack([share, 1 - share], dim=1)
    gramian, products = G @ G.T, G @ G_DOWN
    values = torch.func.vmap(lambda w: objective(w, gramian, products, normalization))(candidates)
    return candidates[values.argmax()]


def figure2() -> Figure:
    figure = Figure(figsize=(9, 2.75), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, normalization in zip(panels, NORMALIZATIONS, strict=True):
        _panel(axes, normalization)
    handles = [
        Patch(color=GREEN, alpha=0.3, linewidth=0, label="reachable with $w\\geq 0$"),
        Line2D([], [], color=RED, linewidth=1.8, label="path of GraP"),
        Line2D([], [], color=RED, marker="o", mfc="white", linestyle="", label="start: $w=(1,1)$"),
        Line2D(
            [], [], color=RED, marker="*", ms=11, linestyle="", label="maximum of the objective"
        ),
        Line2D([], [], color="0.45", linestyle=(0, (4, 3)), linewidth=1, label="equal objective"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9,
        handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, normalization: str) -> None:
    weights = trajectory(normalization)
    path = normalized(weights, normalization).numpy()
    best = maximum(normalization)
    _draw_set(axes, normalization)
    for vector, color, label, place, offset in (
        (G[0], BLUE, "$g_1$", 0.5, (-6, -3)),
        (G[1], PINK, "$g_2$", 0.6, (0, -12)),
        (G_DOWN, BLACK, r"$g_{\mathrm{down}}$", 0.72, (5, -6)),
    ):
        axes.add_patch(_arrow(np.zeros(2), vector.numpy(), color))
        x, y = (place * vector).tolist()
        side = "left" if offset[0] > 0 else "right"
        axes.annotate(label, (x, y), offset, textcoords="offset points", color=color, ha=side)
    end = weights[-1]
    if best is None:
        end = objective_gradient(
            end, G @ G.T, G @ G_DOWN, normalization
        )  # The direction of its limit.
        path = path[path[:, 0] < XLIM[1] - 0.1]
        x, y = path[-1]
        axes.text(x, y + 0.12, "no maximum:\n$w$ grows", color=RED, ha="right", fontsize=9)
    else:
        point = normalized(best, normalization).numpy()
        _level(axes, point)
        axes.plot(*point, "*", color=RED, markeredgecolor="white", markersize=14, zorder=7)
    axes.plot(*path.T, color=RED, linewidth=1.8, zorder=4)
    axes.plot(*path[0], "o", color=RED, markerfacecolor="white", markersize=6, zorder=6)
    travelled = np.linalg.norm(path - path[0], axis=1)
    tip = travelled[-1] if best is None else travelled[-1] * 0.6
    near, far = np.searchsorted(travelled, [tip - 0.06, tip - 1e-6])
    axes.add_patch(_arrow(path[near], path[far], RED))
    axes.set_title(f"{normalization}:  {FORMULAS[normalization]}", fontsize=10)
    change = f"{cosine(weights[0]):.2f} \N{RIGHTWARDS ARROW} {cosine(end):.2f}"
    axes.set_xlabel(r"cosine with $g_{\mathrm{down}}$: " + change, fontsize=9)
    axes.set(xlim=XLIM, ylim=YLIM, aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_color("0.8")


def _draw_set(axes: Axes, normalization: str) -> None:
    """Draws the normalised composite gradients of all weights >= 0."""
    if normalization == "none":
        corners = [(0, 0), *(20 * G).tolist()]
        axes.add_patch(Polygon(corners, color=GREEN, alpha=0.13, linewidth=0, zorder=1))
        axes.add_patch(
            Polygon(corners, fill=False, edgecolor=GREEN, alpha=0.13, hatch="//", linewidth=0)
        )
        return
    share = torch.linspace(0, 1, 201, dtype=torch.float64)
    points = normalized(torch.stack([share, 1 - share], dim=1), normalization).numpy()
    axes.plot(*points.T, color=GREEN, alpha=0.3, linewidth=7, solid_capstyle="butt", zorder=1)


def _level(axes: Axes, point: np.ndarray) -> None:
    """Draws the line of equal objective, which is perpendicular to g_down."""
    along = np.array([-G_DOWN[1].item(), G_DOWN[0].item()])
    ends = np.stack([point - 0.42 * along, point + 0.42 * along])
    axes.plot(*ends.T, color="0.45", linestyle=(0, (4, 3)), linewidth=1, zorder=2)


def _arrow(start: np.ndarray, end: np.ndarray, color: str) -> FancyArrowPatch:
    (x0, y0), (x1, y1) = start, end
    return FancyArrowPatch(
        (x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0,
        color=color, linewidth=1.8, zorder=3,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the paper's Figure 2.")
    parser.add_argument("target", nargs="?", type=Path, default=TARGET, help="the PNG to write")
    target = parser.parse_args().target
    figure2().savefig(target, dpi=200, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
