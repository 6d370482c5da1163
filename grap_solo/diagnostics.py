"""What the gradients of one step say about each other: cheap, from its K x K statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.balance import Step
from grap_solo.distributed import mean_over_processes
from grap_solo.weighting.grap import objective_gradient


def diagnostic_names(terms: Sequence[str]) -> list[str]:
    """What :func:`diagnose` returns, in its order:

    - ``alignment``: the cosine of the composite and the downstream embedding gradient;
    - ``alignment/<term>``: that of the term's gradient and the downstream one;
    - ``norm/<term>``: the Euclidean norm of the term's embedding gradient;
    - ``gramian/<a>/<b>``: the cosine of two terms' gradients, for each pair.

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
    """One number for each name of :func:`diagnostic_names`, on the step's device; None for a
    step without gradients. A cosine with a gradient that is 0 is NaN.
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
    """How well the embedding stands for the backbone's parameters (arXiv 2605.07756, Eq. 12, 15).

    The cosine, shape (), of two gradients of the alignment by the weights: with the terms' and
    the downstream gradients by the backbone's parameters, and with those by the embeddings. It
    costs K + 1 backward passes through the backbone and as many copies of its gradients: a
    yardstick for small networks.

    Args:
        step: of a weighting that needs gradients, before its backward.
        down: the downstream loss's gradient by each view of the embeddings, (B, D).
        embeddings: the views' embeddings as the backbone returned them, (B, D).
        backbone: where they come from.
    """
    parameters = [each for each in backbone.parameters() if each.requires_grad]
    rows = torch.stack([_by_parameters(embeddings, g, parameters) for g in (*step.gradients, down)])
    gramian = rows @ rows.T
    weights = step.weights.to(gramian)
    statistics = step.statistics
    assert statistics.gramian is not None and statistics.products is not None
    in_parameters = objective_gradient(weights, gramian[:-1, :-1], gramian[:-1, -1], "gradient")
    in_embeddings = objective_gradient(
        weights.to(statistics.gramian), statistics.gramian, statistics.products, "gradient"
    )
    return F.cosine_similarity(in_parameters, in_embeddings.to(gramian), dim=0)


def _by_parameters(
    embeddings: Sequence[Tensor], gradients: Iterable[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """The gradient by all parameters in one vector, from that by the embeddings; the mean over
    all processes."""
    outputs = [g.to(z.dtype) for z, g in zip(embeddings, gradients, strict=True)]
    found = torch.autograd.grad(
        list(embeddings), parameters, outputs, retain_graph=True, materialize_grads=True
    )
    return mean_over_processes(torch.cat([each.flatten() for each in found]).float())
