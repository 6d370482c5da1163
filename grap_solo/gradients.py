"""Embedding gradients of the losses, and their statistics over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from grap_solo.distributed import world_size
from grap_solo.errors import ConfigError
from grap_solo.weighting.base import Statistics, Weighting


def take_gradient(
    loss: Tensor, leaves: Sequence[Tensor], scale: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradient of a loss by each leaf, in float32 or better.

    It is 0 for a leaf that the loss does not depend on.

    Args:
        loss: shape ().
        leaves: the detached embeddings of the views, (B, D).
        scale: a factor for the backward pass, shape (), that keeps float16 gradients from
            underflowing. The result is divided by it.

    Raises:
        ConfigError: ``torch.compile`` made a head that lets only one gradient through.
    """
    gradients: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if loss.requires_grad:
        try:
            gradients = torch.autograd.grad(
                loss,
                leaves,
                None if scale is None else scale.to(loss).expand_as(loss),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            if "donated buffers" not in str(error):
                raise
            raise ConfigError(
                "terms: a head that torch.compile has compiled lets only one gradient through: "
                "do not compile it, or set torch._functorch.config.donated_buffer = False first"
            ) from error
    wide = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in gradients)
    return tuple(each if scale is None else each / scale for each in wide)


def check_loss(loss: object, where: str) -> None:
    """Refuses a loss that is not a number with a graph.

    Args:
        loss: what a function of losses returned.
        where: its name, for the error.

    Raises:
        ConfigError: if it is no tensor of floating point, or its shape is not ().
    """
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"{where}: expected a tensor of shape (), got {type(loss).__name__}: return the loss "
            "as torch computes it"
        )
    if loss.shape or not loss.is_floating_point():
        kind = f"shape {tuple(loss.shape)}" if loss.shape else f"dtype {loss.dtype}"
        fix = "take its mean or sum" if loss.shape else "make it floating point"
        raise ConfigError(f"{where}: expected a tensor of shape (), got one of {kind}: {fix}")


def find_bypass(losses: Mapping[str, Tensor], views: Sequence[Tensor]) -> str | None:
    """The first term that reaches the backbone other than through the detached embedding.

    It walks the graphs of the losses and of the embedding, without a pass through them. A common
    node is a tensor or a parameter of the backbone.

    Args:
        losses: the losses by term, each shape (), computed from the detached embedding.
        views: the backbone's output, one (B, D) a view, with its graph.
    """
    backbone = _reachable(views)
    return next((term for term, loss in losses.items() if backbone & _reachable([loss])), None)


def _reachable(tensors: Iterable[Tensor]) -> set[Any]:
    """The nodes of the graphs behind some tensors."""
    found: set[Any] = set()
    waiting: list[Any] = [get_gradient_edge(each).node for each in tensors if each.requires_grad]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(next_node for next_node, _ in node.next_functions)
    return found


def stack_by_view(rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Stacks the terms' gradients by view: one (K, B, D) a view.

    Args:
        rows: for each of the K terms, its gradient by each view's embedding, (B, D).
    """
    return [torch.stack(view) for view in zip(*rows, strict=True)]


def gramian_of_mean(rows: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The Gramian of the terms' gradients by shared parameters, shape (K, K).

    On several ranks it is that of the gradients' means, which are the gradients of the joined
    batch. This costs one all-reduce of K times the parameters' number.

    Args:
        rows: for each of the K terms, its gradient by each parameter.
    """
    matrix = torch.stack([torch.cat([each.flatten() for each in row]) for row in rows])
    size = world_size()
    if size > 1:
        dist.all_reduce(matrix)
        matrix /= size
    return matrix @ matrix.T


class Measured(NamedTuple):
    """The statistics of a batch.

    Attributes:
        statistics: of the joined batch of all ranks.
        finite: whether the losses and the statistics are finite on every rank, shape ().
    """

    statistics: Statistics
    finite: Tensor


def measure(
    weighting: Weighting,
    losses: Sequence[Tensor],
    downstream: Tensor,
    rows: Sequence[Tensor] = (),
    down: Sequence[Tensor] | None = None,
) -> Measured:
    """The losses, the Gramian, the products and the downstream norm, summed over all views.

    On N ranks the loss of the joined batch is the mean of the ranks' losses. The gradient by an
    embedding is therefore 1/N of the gradient on its own rank: the sums of products are divided by
    N^2, and the losses by N.

    Args:
        weighting: says whether the losses are needed from all ranks.
        losses: of the K terms, each shape ().
        downstream: the downstream loss, shape ().
        rows: the terms' gradients, one (K, B, D) a view; empty if none are needed.
        down: the downstream gradient, one (B, D) a view.
    """
    values = torch.stack(list(losses)).detach()
    bad = ~(values.isfinite().all() & downstream.detach().isfinite())
    parts: list[Tensor] = []  # The Gramian, the products, the squared norm: those that exist.
    if rows:
        matrices = [each.flatten(1) for each in rows]
        parts.append(torch.stack([each @ each.T for each in matrices]).sum(0))
        if down is not None:
            targets = [each.flatten() for each in down]
            pairs = zip(matrices, targets, strict=True)
            parts.append(torch.stack([each @ target for each, target in pairs]).sum(0))
            parts.append(torch.stack([each @ each for each in targets]).sum(0))
    size = world_size()
    shared = [each / size**2 for each in parts] + [values / size] * weighting.uses_losses
    shared.append(bad.to(shared[0] if shared else values))
    if size > 1:
        flat = torch.cat([each.flatten() for each in shared])
        dist.all_reduce(flat)
        sums = flat.split([each.numel() for each in shared])
        shared = [new.view_as(old) for new, old in zip(sums, shared, strict=True)]
        values = shared[-2] if weighting.uses_losses else values
    parts = shared[: len(parts)]
    finite = torch.stack([each.isfinite().all() for each in parts] + [shared[-1] == 0]).all()
    statistics = Statistics(
        losses=values,
        gramian=parts[0] if parts else None,
        products=parts[1] if len(parts) > 1 else None,
        downstream_norm=parts[2].sqrt() if len(parts) > 1 else None,
    )
    return Measured(statistics, finite)
