"""The gradients of losses by the embedding, and their statistics over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grap_solo.distributed import world_size
from grap_solo.errors import ConfigError
from grap_solo.weighting.base import Statistics, Weighting


def take_gradient(
    loss: Tensor, leaves: Sequence[Tensor], scale: Tensor | None
) -> tuple[Tensor, ...]:
    """The loss's gradient by each leaf, in float32 or better; zeros where it does not reach.

    With a scale it is multiplied by that on its way."""
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
                "terms: a head that torch.compile has compiled lets a gradient through only once: "
                "leave it uncompiled, or set torch._functorch.config.donated_buffer = False first"
            ) from error
    wide = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in gradients)
    return tuple(each if scale is None else each / scale for each in wide)


def stack_by_view(rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """For each view the terms' gradients by it, (K, B, D)."""
    return [torch.stack(view) for view in zip(*rows, strict=True)]


class Measured(NamedTuple):
    """A batch's statistics, and whether all that they were taken from is finite, in every process,
    shape ()."""

    statistics: Statistics
    finite: Tensor


def measure(
    weighting: Weighting,
    losses: Sequence[Tensor],
    downstream: Tensor,
    rows: Sequence[Tensor] = (),
    down: Sequence[Tensor] | None = None,
) -> Measured:
    """The losses, and the Gramian, products and downstream norm of the gradients over all views.

    Over N processes the joined batch's loss is the mean of theirs, so each process's embeddings
    have 1/N of their gradient here: the sums are divided by N^2, the losses by N.
    """
    values = torch.stack(list(losses)).detach()
    bad = ~(values.isfinite().all() & downstream.detach().isfinite())
    parts: list[Tensor] = []  # Gramian, products, square of the norm: as many as there are.
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
