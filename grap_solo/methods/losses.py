"""The loss functions that the terms and the probe are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.nn import functional as F

from grap_solo.distributed import rank, world_size

Views = Sequence[Tensor]
"""A tensor for each view."""

Projections = Mapping[str, Views]
"""The projections of both views, (B, D) each, that a term looks at, by the term's name."""


# ---- what processes share, with its gradient ----------------------------------------------------


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """All processes' tensors joined along the first dimension."""
    return tensor if world_size() == 1 else torch.cat(all_gather(tensor))


def mean_with_gradient(tensor: Tensor) -> Tensor:
    """The mean of all processes' tensors."""
    return tensor if world_size() == 1 else all_reduce(tensor) / world_size()


# ---- the probe ----------------------------------------------------------------------------------


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples, shape (); 0 where none is labelled.

    Args:
        logits: (B, classes).
        labels: (B,); -1 marks an unlabelled sample.
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels != -1).sum().clamp(min=1)


# ---- All4One's ----------------------------------------------------------------------------------


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
    start = rank() * len(predictions)
    predictions = gather_with_gradient(predictions)
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
        diagonal, rest = _split(matrix)
        diagonals.append((diagonal - 1).square().mean())
        rests.append(rest.square().sum() / (matrix.numel() - len(matrix)))
    return torch.stack(diagonals).mean().sqrt(), torch.stack(rests).mean().sqrt()


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A square matrix's diagonal, and the matrix with 0 there, in float32 or better: the squares of
    a half-precision one underflow."""
    matrix = _wide(matrix)
    diagonal = matrix.diagonal()
    return diagonal, matrix - torch.diag(diagonal)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- VICReg's and VIbCReg's ---------------------------------------------------------------------


def vicreg_terms(
    projections: Projections, covariance: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The terms ``invariance``, ``variance`` and ``covariance`` (Bardes et al. 2022, Eq. 1 to 6),
    those of them that have projections, each shape ().

    Invariance is the mean squared difference of the views; the others are sums over both views.
    Over several processes, variance and covariance are those of the joined batch, as in solo-learn.

    Args:
        projections: of each term, of both views, (B, D).
        covariance: one view's covariance term, from its projections.
    """
    losses: dict[str, Tensor] = {}
    if "invariance" in projections:
        first, second = projections["invariance"]
        losses["invariance"] = F.mse_loss(_wide(first), _wide(second))
    joined: dict[int, Views] = {}  # Terms that share their projections gather them once.
    for name, term in (("variance", variance), ("covariance", covariance)):
        if name in projections:
            views = projections[name]
            if id(views) not in joined:
                joined[id(views)] = [gather_with_gradient(each) for each in views]
            losses[name] = torch.stack([term(each) for each in joined[id(views)]]).sum()
    return losses


def variance(projections: Tensor) -> Tensor:
    """``mean_j max(0, 1 - sqrt(var_j + 1e-4))`` over the features, shape ().

    Args:
        projections: (B, D).
    """
    return F.relu(1 - (_wide(projections).var(dim=0) + 1e-4).sqrt()).mean()


def covariance(projections: Tensor) -> Tensor:
    """``sum_ij cov_ij^2 / D`` for ``i != j``, shape ().

    Args:
        projections: (B, D).
    """
    wide = _wide(projections)
    centred = (wide - wide.mean(dim=0)) / (len(wide) - 1) ** 0.5
    _, rest = _split(centred.T @ centred)
    return rest.square().sum() / len(rest)


def normalized_covariance(projections: Tensor) -> Tensor:
    """VIbCReg's (Lee & Aune 2021, Eq. 4): the mean of all ``c_ij^2``, with 0 for ``i = j``, of the
    features' correlations, shape ().

    Args:
        projections: (B, D).
    """
    wide = _wide(projections)
    centred = F.normalize(wide - wide.mean(dim=0), dim=0)
    _, rest = _split(centred.T @ centred)
    return rest.square().mean()


# ---- Barlow Twins' ------------------------------------------------------------------------------


def standardize(projections: Tensor) -> Tensor:
    """Each feature with mean 0 and variance 1, as a batch-norm without parameters makes it, of the
    joined batch of all processes, (B, D).

    Args:
        projections: (B, D).
    """
    wide = _wide(projections)
    centred = wide - mean_with_gradient(wide.mean(dim=0))
    return centred / (mean_with_gradient(centred.square().mean(dim=0)) + 1e-5).sqrt()


def barlow_twins_losses(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """How far the cross-correlation of both views is from the identity: ``sum_i (c_ii - 1)^2`` and
    ``sum_ij c_ij^2`` for ``i != j``, each shape () (Zbontar et al. 2021, Eq. 1).

    Over several processes the correlation is that of the joined batch.

    Args:
        first: the first view's projections, standardised, (B, D).
        second: the second view's.
    """
    diagonal, rest = _split(mean_with_gradient(first.T @ second / len(first)))
    return (diagonal - 1).square().sum(), rest.square().sum()
