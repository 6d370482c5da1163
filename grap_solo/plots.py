"""Pictures of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from grap_solo.trajectory import median_weights, read_weights

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
        ConfigError: see :func:`~grap_solo.trajectory.read_weights`.
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
        label = f"{term}: median {medians[term]:.2f}"
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
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(terms), frameon=False, fontsize=9)
    figure.savefig(target, dpi=150)


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the ``width`` values around each place, fewer at the ends."""
    half = width // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(each) for each in around])
