"""Offline evaluation of a backbone's frozen embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn


@dataclass(frozen=True)
class Accuracies:
    """Top-1 accuracies on the validation set, in percent.

    Attributes:
        linear: multinomial logistic regression, trained to convergence.
        knn: k-NN with k = 20 and cosine distance.
    """

    linear: float
    knn: float


@torch.no_grad()
def embed(
    backbone: nn.Module, loader: Iterable[Any], device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings (N, D) of a loader's images, in eval mode, and their labels (N,)."""
    backbone = backbone.to(device).eval()
    embeddings: list[Tensor] = []
    labels: list[Tensor] = []
    for images, targets in loader:
        embeddings.append(backbone(images.to(device)).float().cpu())
        labels.append(targets)
    return torch.cat(embeddings).numpy(), torch.cat(labels).numpy()


def evaluate(
    backbone: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    device: torch.device | str = "cpu",
) -> Accuracies:
    """Linear probe and k-NN on the embeddings of a frozen backbone.

    Args:
        backbone: gives (B, D) embeddings.
        train: loader of (images, labels) to fit on; unlabelled samples (-1) are left out.
        validation: loader of (images, labels) to score on.
        device: where to embed.
    """
    x, y = embed(backbone, train, device)
    x, y = x[y >= 0], y[y >= 0]
    x_val, y_val = embed(backbone, validation, device)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # A figure short of convergence is none.
        linear.fit(x, y)
    knn = KNeighborsClassifier(n_neighbors=min(20, len(x)), metric="cosine").fit(x, y)
    return Accuracies(100 * linear.score(x_val, y_val), 100 * knn.score(x_val, y_val))
