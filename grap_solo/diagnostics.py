"""Cosines and norms of one step's gradients, computed cheaply from its K x K statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.balance import Step
from grap_solo.distributed import mean_over_ranks
from grap_solo.weighting.grap import objective_gradient


def diagnostic_names(terms: Sequence[str]) -> list[str]:
    """The names of the numbers that :func:`diagnose` returns, in its order:

    - ``alignment``: the cosine between the composite and the downstream embedding gradient;
    - ``alignment/<term>``: the cosine between the term's and the downstream embedding gradient;
    - ``norm/<term>``: the Euclidean norm of the term's embedding gradient;
    - ``gramian/<a>/<b>``: the cosine between two terms' embedding gradients, for each pair.

    Args:
        terms: the names of the K terms.
    """
    pairs = itertools.combinations(terms, 2)
    return [
        "alignment",
        *(f"alignment/{term}" for term in terms),
        *(f"norm/{term}" for term in terms),
        *(f"gramian/{a}/{b}" for a, b in pairs),
    ]


@torch.no_grad()
def diagnose(step: Step) -> Tensor | None:
    """Computes the cosines and norms of a step's gradients.

    Returns:
        One number for each name of :func:`diagnostic_names`, on the step's device, or None for a
        step without gradients. A cosine with a gradient of 0 is NaN.
    """
    gramian, products = step.statistics.gramian, step.statistics.products
    norm, alignment = step.statistics.downstream_norm, step.alignment
    if gramian is None or products is None or norm is None or alignment is None:
        return None
    norms = gramian.diagonal().clamp(min=0).sqrt()
    cosines = gramian / (norms[:, None] * norms)
    first, second = torch.triu_indices(len(norms), len(norms), offset=1, device=norms.device)
    return torch.cat([alignment[None], products / (norms * norm), norms, cosines[first, second]])


def parameter_space_cosine(
    step: Step, down: Sequence[Tensor], embeddings: Sequence[Tensor], backbone: nn.Module
) -> Tensor:
    """Measures how well embedding gradients stand in for gradients by the backbone's parameters
    (arXiv 2605.07756, Eq. 12 and 15).

    GraP moves the weights along the gradient of the alignment. This function computes that
    gradient twice, from gradients by the backbone's parameters and from embedding gradients, and
    compares the two. It costs K + 1 backward passes through the backbone and as many copies of its
    gradients: use it for small networks.

    Args:
        step: a step of a weighting that needs gradients, before its backward pass.
        down: the downstream gradient by each view's embedding, (B, D).
        embeddings: each view's embedding with its graph, as the backbone returned it, (B, D).
        backbone: the network that computed the embeddings.

    Returns:
        The cosine between the two gradients of the alignment by the weights, shape ().
    """
    parameters = [each for each in backbone.parameters() if each.requires_grad]
    rows = torch.stack(
        [_take_parameter_gradient(embeddings, g, parameters) for g in (*step.gradients, down)]
    )
    gramian = rows @ rows.T
    weights = step.weights.to(gramian)
    statistics = step.statistics
    assert statistics.gramian is not None and statistics.products is not None
    in_parameters = objective_gradient(weights, gramian[:-1, :-1], gramian[:-1, -1], "gradient")
    in_embeddings = objective_gradient(
        weights.to(statistics.gramian), statistics.gramian, statistics.products, "gradient"
    )
    return F.cosine_similarity(in_parameters, in_embeddings.to(gramian), dim=0)


def _take_parameter_gradient(
    embeddings: Sequence[Tensor], gradients: Iterable[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """Carries a gradient by the embeddings back to the parameters: one vector, the mean over all
    ranks."""
    outputs = [g.to(z.dtype) for z, g in zip(embeddings, gradients, strict=True)]
    found = torch.autograd.grad(
        list(embeddings), parameters, outputs, retain_graph=True, materialize_grads=True
    )
    return mean_over_ranks(torch.cat([each.flatten() for each in found]).float())
