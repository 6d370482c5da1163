"""Offline evaluation of a backbone on its frozen embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from grap_solo.evaluation.moments import effective_rank
from grap_solo.evaluation.online import WeightedKNNClassifier
from grap_solo.evaluation.ranks import ROUNDING, Degenerate, alpha_req

REGULARISERS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""The inverse strengths ``C`` of the linear probe's L2 regulariser that are tried."""

FOR_CHOICE = 10_000
"""The most training images on which the regulariser is chosen."""

HELD_OUT = 5
"""One training image of this many scores the regularisers; it is not fitted to."""

MOST_ITERATIONS = 10_000

ALL_MEASURES = ("linear", "knn", "rankme", "alpha_req")
"""The measures of :func:`measure_embeddings`."""


@dataclass(frozen=True)
class Evaluation:
    """The results of a backbone's offline evaluation; None for a measure that has no value.

    Attributes:
        linear: top-1 accuracy on the validation set in percent, of multinomial logistic regression
            trained to convergence; see :func:`linear_probe`.
        knn: top-1 accuracy of weighted k-NN, as the online metric's defaults compute it; see
            :class:`~grap_solo.evaluation.online.WeightedKNNClassifier`.
        rankme: the effective rank of the training embeddings; see :func:`rankme`.
        alpha_req: how fast their eigenvalues fall; see
            :func:`~grap_solo.evaluation.ranks.alpha_req`.
        regulariser: the linear probe's inverse strength ``C``, as chosen.
        notes: by measure, why it has no value, or what to know about it.
    """

    linear: float | None = None
    knn: float | None = None
    rankme: float | None = None
    alpha_req: float | None = None
    regulariser: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


def device_of(cfg: DictConfig) -> torch.device:
    """Returns the device that a configuration's ``accelerator`` names, or the CPU if this machine
    has no other."""
    if cfg.accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


@torch.no_grad()
def embed(
    backbone: nn.Module, loader: Iterable[Any], device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the embeddings (N, D) of a loader's images in eval mode. Returns them and the labels
    (N,)."""
    backbone = backbone.to(device).eval()
    dtype = next(backbone.parameters()).dtype
    embeddings: list[Tensor] = []
    labels: list[Tensor] = []
    for images, targets in loader:
        embeddings.append(backbone(images.to(device, dtype)).float().cpu())
        labels.append(targets)
    return torch.cat(embeddings).numpy(), torch.cat(labels).numpy()


def evaluate(
    backbone: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measures a linear probe, k-NN, RankMe and alpha-ReQ on the embeddings of a frozen backbone.

    Args:
        backbone: computes embeddings, (B, D).
        train: a loader of (images, labels) to fit on.
        validation: a loader of (images, labels) to score on.
        device: the device that computes the embeddings.
    """
    return measure_embeddings(embed(backbone, train, device), embed(backbone, validation, device))


def measure_embeddings(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    wanted: Iterable[str] = ALL_MEASURES,
) -> Evaluation:
    """Measures embeddings. A measure that they do not allow is None, and its note says why.

    The linear probe and k-NN leave unlabelled samples (-1) out.

    Args:
        train: embeddings (N, D) and labels (N,) to fit on.
        validation: embeddings (M, D) and labels (M,) to score on.
        wanted: some of :data:`ALL_MEASURES`.
    """
    labelled = [(each[0][each[1] >= 0], each[1][each[1] >= 0]) for each in (train, validation)]
    computed: dict[str, Callable[[], dict[str, Any]]] = {
        "linear": lambda: linear_probe(*labelled[0], *labelled[1]),
        "knn": lambda: {"knn": nearest_neighbours(*labelled[0], *labelled[1])},
        "rankme": lambda: {"rankme": rankme(train[0])},
        "alpha_req": lambda: {"alpha_req": alpha_req(train[0])},
    }
    unusable = find_degenerate(train[0], validation[0])
    found: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name in (each for each in ALL_MEASURES if each in wanted):
        try:
            if unusable is not None:
                raise Degenerate(unusable)
            if name in ("linear", "knn") and not all(len(each[1]) for each in labelled):
                raise Degenerate("no labelled images")
            values = computed[name]()
        except Degenerate as error:
            values = {name: None, "note": str(error)}
        note = values.pop("note", None)
        found |= values
        if note is not None:
            notes[name] = note
    return Evaluation(**found, notes=notes)


def find_degenerate(*parts: np.ndarray) -> str | None:
    """Says why embeddings cannot be measured; None if they can.

    Args:
        parts: embeddings (N, D), the first of them those to fit on.
    """
    embeddings = np.concatenate(parts)
    bad = int((~np.isfinite(embeddings).all(1)).sum())
    if bad:
        return f"embeddings are not finite ({bad} of {len(embeddings)} images)"
    spread = np.ptp(parts[0], axis=0).max()
    return "embeddings are constant" if spread <= ROUNDING * np.abs(parts[0]).max() else None


# ---- the measures ---------------------------------------------------------------------------


def linear_probe(
    x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray
) -> dict[str, Any]:
    """Fits multinomial logistic regression with L2 regulariser to standardised embeddings.

    The regulariser is chosen on a split of the training embeddings: the one of
    :data:`REGULARISERS` with the best top-1 on a fifth of each class that was not fitted to, and
    of equal ones that nearest to 1. At most 10,000 training embeddings, drawn with a fixed seed,
    take part in the choice. The probe is then fitted to all of them.

    Args:
        x: training embeddings, (N, D).
        y: their labels, (N,).
        x_val: validation embeddings, (M, D).
        y_val: their labels, (M,).

    Returns:
        ``linear``, the top-1 on the validation set in percent, ``regulariser``, and ``note``, None
        unless the fit did not converge.

    Raises:
        Degenerate: all training labels are the same.
    """
    if len(np.unique(y)) < 2:
        raise Degenerate("all training images have the same label")
    fitted, held = split_by_class(y)
    scores = {
        strength: fit_probe(x[fitted], y[fitted], strength)[0].score(x[held], y[held])
        for strength in (REGULARISERS if len(held) else ())
        if len(np.unique(y[fitted])) > 1
    }
    chosen = max(scores, key=lambda c: (scores[c], -abs(np.log(c))), default=1.0)
    probe, converged = fit_probe(x, y, chosen)
    note = None if converged else f"not converged after {MOST_ITERATIONS} iterations"
    return {"linear": 100 * probe.score(x_val, y_val), "regulariser": chosen, "note": note}


def split_by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits training samples in equal proportion from each class, with a fixed seed. Returns the
    indexes to fit on and those to score on; a class of fewer than five samples has none there."""
    order = np.random.default_rng(0).permutation(len(labels))[:FOR_CHOICE]
    held = np.zeros(len(order), bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels[order] == label)[HELD_OUT - 1 :: HELD_OUT]] = True
    return order[~held], order[held]


def fit_probe(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[Pipeline, bool]:
    """Fits a linear probe, and says whether it has converged."""
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, max_iter=MOST_ITERATIONS)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe.fit(x, y)
    return probe, not any(issubclass(each.category, ConvergenceWarning) for each in caught)


def nearest_neighbours(x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray) -> float:
    """Top-1 of weighted k-NN in percent, with the defaults of the online metric. See
    :func:`linear_probe` for the arguments."""
    knn = WeightedKNNClassifier()
    knn.update(
        train_features=torch.from_numpy(x),
        train_targets=torch.from_numpy(y).long(),
        test_features=torch.from_numpy(x_val),
        test_targets=torch.from_numpy(y_val).long(),
    )
    top1, _ = knn.compute()
    return float(top1)


def rankme(embeddings: np.ndarray) -> float:
    """The effective rank of embeddings: see
    :func:`~grap_solo.evaluation.moments.effective_rank`.

    Args:
        embeddings: (N, D). Of more than 25,600, as many are drawn with a fixed seed.
    """
    if len(embeddings) > 25_600:
        drawn = np.random.default_rng(0).choice(len(embeddings), 25_600, replace=False)
        embeddings = embeddings[drawn]
    return effective_rank(np.linalg.svd(embeddings.astype(np.float64), compute_uv=False))
