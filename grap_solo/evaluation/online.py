"""Metrics of the online evaluations: accuracy of the probe, and k-NN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


def top1_and_top5(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5 accuracy in percent, each shape (1,), over the labelled samples.

    Args:
        logits: (B, classes). With fewer than 5 classes, top-5 counts all of them.
        targets: (B,); -1 marks an unlabelled sample. If no sample is labelled, both are 0.
    """
    best = logits.detach().float().topk(min(5, logits.size(1)), dim=1).indices
    # Counts over all samples: selecting the labelled ones would make the host wait for a GPU.
    hits, labelled = best == targets[:, None], (targets != -1).sum().clamp(min=1)
    return 100 * hits[:, :1].sum() / labelled[None], 100 * hits.sum() / labelled[None]


class WeightedKNNClassifier(Metric):
    """Accuracy of weighted k-NN on accumulated train and test features (Wu et al. 2018).

    A neighbour votes with ``exp(cosine / T)``, or with the inverse of its Euclidean distance.

    Args:
        k: the number of neighbours.
        T: the temperature of cosine votes.
        distance_fx: ``cosine`` or ``euclidean``.
        max_distance_matrix_size: the largest number of elements of a distance matrix.
    """

    full_state_update = False
    train_features: list[Tensor]
    train_targets: list[Tensor]
    test_features: list[Tensor]
    test_targets: list[Tensor]

    def __init__(
        self,
        k: int = 20,
        T: float = 0.07,
        distance_fx: str = "cosine",
        max_distance_matrix_size: int = 5_000_000,
    ) -> None:
        super().__init__()
        self.k, self.T, self.distance_fx = k, T, distance_fx
        self.max_distance_matrix_size = max_distance_matrix_size
        for name in (
            "train_features",
            "train_targets",
            "test_features",
            "test_targets",
        ):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, **features: Tensor) -> None:
        """Adds ``train_features`` (N, D) with ``train_targets`` (N,), or the test ones."""
        for name, value in features.items():
            getattr(self, name).append(value.detach())

    @torch.no_grad()
    def compute(self) -> tuple[Any, Any]:
        """Returns top-1 and top-5 accuracy in percent, and forgets the features.

        Train features that are not finite are left out. Both are -1 if train or test features are
        missing.
        """
        if not any(map(len, self.train_features)) or not any(map(len, self.test_features)):
            return -1.0, -1.0
        train, test = _concatenate(self.train_features), _concatenate(self.test_features)
        labels, targets = _concatenate(self.train_targets), _concatenate(self.test_targets)
        finite = train.isfinite().all(1)  # NaN would be every image's nearest neighbour.
        train, labels = train[finite], labels[finite]
        if not len(train):
            self.reset()
            return -1.0, -1.0
        if self.distance_fx == "cosine":
            train, test = F.normalize(train), F.normalize(test)
        k = min(self.k, len(train))
        classes = int(torch.cat([labels, targets]).max()) + 1
        correct = torch.zeros(2, device=test.device)
        chunk = max(1, self.max_distance_matrix_size // len(train))
        for features, truth in zip(test.split(chunk), targets.split(chunk), strict=True):
            if self.distance_fx == "cosine":
                votes, neighbours = (features @ train.T).topk(k)
                votes = (votes / self.T).exp()
            else:
                votes, neighbours = (1 / (torch.cdist(features, train) + 1e-5)).topk(k)
            tally = votes.new_zeros(len(features), classes)
            tally.scatter_add_(1, labels[neighbours], votes)
            hits = tally.topk(min(5, k, classes)).indices == truth[:, None]
            correct += torch.stack([hits[:, 0].sum(), hits.sum()])
        acc1, acc5 = (100 * correct / len(test)).tolist()
        self.reset()
        return acc1, acc5


def _concatenate(parts: Any) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)
