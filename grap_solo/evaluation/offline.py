"""Offline evaluation of a backbone on its frozen embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from grap_solo.evaluation.moments import effective_rank


@dataclass(frozen=True)
class Evaluation:
    """The results of a backbone's offline evaluation.

    Attributes:
        linear: top-1 accuracy on the validation set in percent, of multinomial logistic regression
            trained to convergence.
        knn: top-1 accuracy of k-NN with k = 20 and cosine distance.
        rankme: the effective rank of the training embeddings; see :func:`rankme`.
    """

    linear: float
    knn: float
    rankme: float


def device_of(cfg: DictConfig) -> torch.device:
    """Returns the device that a configuration's ``accelerator`` names."""
    found = None if cfg.accelerator == "cpu" else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


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
    """Measures a linear probe, k-NN and RankMe on the embeddings of a frozen backbone.

    Args:
        backbone: computes embeddings, (B, D).
        train: a loader of (images, labels) to fit on. Unlabelled samples (-1) are left out.
        validation: a loader of (images, labels) to score on.
        device: the device that computes the embeddings.

    Raises:
        ConvergenceWarning: if the logistic regression does not converge.
    """
    x, y = embed(backbone, train, device)
    x, y = x[y >= 0], y[y >= 0]
    x_val, y_val = embed(backbone, validation, device)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # Treats non-convergence as an error.
        linear.fit(x, y)
    knn = KNeighborsClassifier(n_neighbors=min(20, len(x)), metric="cosine").fit(x, y)
    linear_score, knn_score = (100 * each.score(x_val, y_val) for each in (linear, knn))
    return Evaluation(linear_score, knn_score, rankme(x))


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
