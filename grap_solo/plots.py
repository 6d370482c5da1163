"""Pictures of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping

import matplotlib
import numpy as np

from grap_solo.trajectory import read_weights

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

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
) -> None:
    """Draws a ``weights.csv``: each term's effective weight over the epochs, and its median.

    Args:
        source: the ``weights.csv``.
        target: the PNG file to write.
        reference: each term's reference weight, drawn as a dashed line.

    Raises:
        ConfigError: see :func:`~grap_solo.trajectory.read_weights`.
    """
    terms, steps, weights = read_weights(source)
    per_epoch = np.bincount(steps[:, 1]).max()
    epochs = steps[:, 0] / per_epoch
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for k, term in enumerate(terms):
        color = COLORS[k % len(COLORS)]
        median = np.median(weights[:, k])
        axes.plot(epochs, weights[:, k], color=color, alpha=0.25, linewidth=0.8)
        smooth = _running_median(weights[:, k], int(per_epoch))
        axes.plot(
            epochs,
            smooth,
            color=color,
            linewidth=1.8,
            label=f"{term}  (median {median:.2f})",
        )
        if reference is not None:
            axes.axhline(reference[term], color=color, linestyle="--", linewidth=0.9, alpha=0.7)
    axes.set_xlabel("epoch")
    axes.set_ylabel("effective weight")
    axes.set_xlim(0, epochs[-1])
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    title = "Effective weights: each step, and the median of an epoch's steps"
    axes.set_title(title + ("; dashed: reference" if reference is not None else ""), fontsize=10)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the last ``width`` values at each place."""
    return np.array([np.median(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))])
