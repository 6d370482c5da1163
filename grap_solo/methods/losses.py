"""The loss functions that the terms and the probe are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from grap_solo.distributed import world_size

Views = Sequence[Tensor]
"""A tensor for each view."""


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples, shape (); 0 where none is labelled.

    Args:
        logits: (B, classes).
        labels: (B,); -1 marks an unlabelled sample.
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels != -1).sum().clamp(min=1)


def contrast(anchors: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """NNCLR's InfoNCE (Dwibedi et al. 2021, Eq. 2), shape (): anchors against all predictions.

    Args:
        anchors: (B, D).
        predictions: (B, D); over N processes the anchors are compared with all N*B.
        temperature: of the softmax.
    """
    anchors, predictions = (
        F.normalize(anchors, dim=-1),
        F.normalize(predictions, dim=-1),
    )
    start = 0
    if world_size() > 1:
        start = dist.get_rank() * len(predictions)
        predictions = torch.cat(all_gather(predictions))
    logits = anchors @ predictions.T / temperature
    return F.cross_entropy(logits, start + torch.arange(len(anchors), device=logits.device))


def correlation_losses(projections: Views, momentum: Views) -> tuple[Tensor, Tensor]:
    """``byol`` and ``barlow``: how far the cross-correlation of the views is from the identity.

    Args:
        projections: of each view, (B, D).
        momentum: momentum projections of each view, (B, D); each meets the other view.

    Returns:
        The root mean square of ``c_ii - 1`` and that of ``c_ij``, ``i != j``, each shape ().
    """
    diagonals, rests = [], []
    for online, target in zip(reversed(projections), momentum, strict=True):
        matrix = F.normalize(target, dim=0).T @ F.normalize(online, dim=0)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # Squares underflow.
        diagonal = matrix.diagonal()
        rest = matrix - torch.diag(diagonal)
        diagonals.append((diagonal - 1).square().mean())
        rests.append(rest.square().sum() / (matrix.numel() - len(matrix)))
    return torch.stack(diagonals).mean().sqrt(), torch.stack(rests).mean().sqrt()
