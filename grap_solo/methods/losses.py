"""The loss functions of the terms and of the probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.nn import functional as F

from grap_solo.distributed import rank, world_size

Views = Sequence[Tensor]
"""One tensor a view."""

Projections = Mapping[str, Views]
"""By a term's name, the projections of both views that it is computed from, (B, D) each."""


# ---- communication between ranks, with gradient -------------------------------------------------


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """All ranks' tensors, joined along the first dimension."""
    return tensor if world_size() == 1 else torch.cat(all_gather(tensor))


def mean_with_gradient(tensor: Tensor) -> Tensor:
    """The mean of all ranks' tensors."""
    return tensor if world_size() == 1 else all_reduce(tensor) / world_size()


# ---- the probe ----------------------------------------------------------------------------------


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples, shape (); 0 if no sample is labelled.

    Args:
        logits: (B, classes).
        labels: (B,); -1 marks an unlabelled sample.
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels != -1).sum().clamp(min=1)


# ---- All4One's ----------------------------------------------------------------------------------


def contrast(anchors: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """InfoNCE of NNCLR (Dwibedi et al. 2021, Eq. 2) between anchors and all predictions, shape ().

    Args:
        anchors: (B, D).
        predictions: (B, D). On N ranks the anchors are compared with all N*B predictions.
        temperature: the temperature of the softmax.
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
    """The terms ``byol`` and ``barlow``: the distance of the cross-correlation ``c`` of the views
    from the identity.

    Args:
        projections: the projections of each view, (B, D).
        momentum: the momentum projections of each view, (B, D). Each is correlated with the other
            view's projections.

    Returns:
        The root mean squares of ``c_ii - 1`` and of ``c_ij`` for ``i != j``, each shape ().
    """
    diagonals, rests = [], []
    for online, target in zip(reversed(projections), momentum, strict=True):
        matrix = F.normalize(target, dim=0).T @ F.normalize(online, dim=0)
        diagonal, rest = _split(matrix)
        diagonals.append((diagonal - 1).square().mean())
        rests.append(rest.square().sum() / (matrix.numel() - len(matrix)))
    return torch.stack(diagonals).mean().sqrt(), torch.stack(rests).mean().sqrt()


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a square matrix into its diagonal and the matrix with a diagonal of 0.

    Both are float32 or better: squares of half-precision values would underflow."""
    matrix = _wide(matrix)
    diagonal = matrix.diagonal()
    return diagonal, matrix - torch.diag(diagonal)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- VICReg's and VIbCReg's ---------------------------------------------------------------------


def vicreg_terms(
    projections: Projections, covariance: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The terms ``invariance``, ``variance`` and ``covariance`` (Bardes et al. 2022, Eq. 1 to 6).

    Invariance is the mean squared difference of the views; the others are sums over both views.
    On several ranks, variance and covariance are computed from the joined batch, as in solo-learn.

    Args:
        projections: for each active term, the projections of both views, (B, D).
        covariance: computes the covariance term of one view from its projections.

    Returns:
        The loss of each term in ``projections``, each shape ().
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
        projections: one view's, (B, D).
    """
    return F.relu(1 - (_wide(projections).var(dim=0) + 1e-4).sqrt()).mean()


def covariance(projections: Tensor) -> Tensor:
    """``sum_ij cov_ij^2 / D`` for ``i != j``, shape ().

    Args:
        projections: one view's, (B, D).
    """
    wide = _wide(projections)
    centred = (wide - wide.mean(dim=0)) / (len(wide) - 1) ** 0.5
    _, rest = _split(centred.T @ centred)
    return rest.square().sum() / len(rest)


def normalized_covariance(projections: Tensor) -> Tensor:
    """VIbCReg's covariance term (Lee & Aune 2021, Eq. 4): ``sum_ij c_ij^2 / D^2`` for ``i != j``,
    where ``c`` are the correlations of the features, shape ().

    Args:
        projections: one view's, (B, D).
    """
    wide = _wide(projections)
    centred = F.normalize(wide - wide.mean(dim=0), dim=0)
    _, rest = _split(centred.T @ centred)
    return rest.square().mean()


# ---- Barlow Twins' ------------------------------------------------------------------------------


def standardize(projections: Tensor) -> Tensor:
    """Scales each feature to mean 0 and variance 1 over the joined batch of all ranks, (B, D).

    The result is that of a batch-norm without parameters.

    Args:
        projections: one view's, (B, D).
    """
    wide = _wide(projections)
    centred = wide - mean_with_gradient(wide.mean(dim=0))
    return centred / (mean_with_gradient(centred.square().mean(dim=0)) + 1e-5).sqrt()


def barlow_twins_losses(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of the views' cross-correlation ``c`` from the identity: ``sum_i (c_ii - 1)^2``
    and ``sum_ij c_ij^2`` for ``i != j``, each shape () (Zbontar et al. 2021, Eq. 1).

    On several ranks ``c`` is computed from the joined batch.

    Args:
        first: the first view's standardised projections, (B, D).
        second: the second view's standardised projections, (B, D).
    """
    diagonal, rest = _split(mean_with_gradient(first.T @ second / len(first)))
    return (diagonal - 1).square().sum(), rest.square().sum()
