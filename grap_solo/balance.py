"""Many losses into one scalar whose ordinary backward is GraP's step (arXiv 2605.07756, Alg. 1).

Works in any PyTorch loop: it needs neither Lightning nor solo-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.weighting.base import GradientWeighting, Statistics, Weighting


@dataclass(frozen=True)
class Step:
    """One step's scalar and what it was made of. All but ``loss`` is detached.

    Attributes:
        loss: the scalar to call ``backward()`` on, shape (). Its gradients are the step; where
            the weighting uses gradients, its value means nothing.
        losses: each term's plain value, shape ().
        downstream: the downstream head's loss, shape ().
        weights: the effective weights, shape (K,), in the order of ``weighting.terms``.
        statistics: what the weighting was given.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    downstream: Tensor
    weights: Tensor
    statistics: Statistics

    @property
    def alignment(self) -> Tensor | None:
        """The cosine of the composite and the downstream embedding gradient, shape ().

        None where the weighting needs no gradients; NaN for a batch without labels.
        """
        gramian, products = self.statistics.gramian, self.statistics.products
        norm = self.statistics.downstream_norm
        if gramian is None or products is None or norm is None:
            return None
        weights = self.weights.to(gramian.dtype)
        return weights @ products / ((weights @ gramian @ weights).sqrt() * norm)


class SharedHead:
    """Weighs the gradients that reach a module which several terms share.

    Call it with the module's output, once for each term, and compute the term from what it
    returns. The values pass through; on the way back each term's gradient is multiplied by its
    effective weight, so that the module gets the weighted sum of the terms' gradients, as the
    backbone does. Without it the module gets the plain sum.

    Args:
        terms: the names of the K terms.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.index = {name: k for k, name in enumerate(terms)}
        self.scales = torch.ones(len(self.index))

    def __call__(self, output: Tensor, term: str) -> Tensor:
        scaled: Tensor = _ScaledGradient.apply(output, self, self.index[term])
        return scaled

    def reset(self, weights: Tensor | None = None) -> None:
        """Multiply by ``weights``, shape (K,), from now on; by 1 when None."""
        self.scales = torch.ones_like(self.scales) if weights is None else weights.detach()


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by what the head's scale is at that time."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, head: SharedHead, term: int) -> Tensor:
        ctx.head, ctx.term = head, term
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient * ctx.head.scales[ctx.term].to(gradient), None, None


def balance(
    embeddings: Tensor | Sequence[Tensor],
    terms: Callable[..., Mapping[str, Tensor]],
    downstream: Callable[..., Tensor],
    weighting: Weighting,
    shared: SharedHead | None = None,
) -> Step:
    """One scalar whose backward gives backbone, heads and downstream head their gradients.

    With a weighting that uses gradients (Alg. 1), where ``z'`` is the detached embedding, ``G``
    the terms' gradients by ``z'`` and ``e`` the effective weights, it is

        <z, e^T G> + sum_k L_k(z') + L_down(z')

    so that the backbone gets the weighted composite gradient, every head its own unweighted one,
    and the downstream head its own; the downstream loss reaches the backbone through ``e`` alone.
    With any other weighting it is ``sum_k e_k L_k(z) + L_down(z')``: plain training.

    The inner gradients are taken by ``z'`` only, so the hooks of parameters (DDP's among them)
    fire once, in the one real backward. In a process group the Gramian and the products are those
    of the joined batch, at the cost of one all-reduce of K*K + K + 1 numbers.

    Args:
        embeddings: the backbone's output, (B, D), or a sequence of them, one for each view.
        terms: called with the embeddings, one argument each; returns every term's loss, shape
            (), by name.
        downstream: called likewise; returns the downstream head's loss, shape (). For a batch
            without labels it must be 0 rather than NaN.
        weighting: turns the step's statistics into effective weights; it learns from them while
            it is in training mode.
        shared: see :class:`SharedHead`; the one that ``terms`` applies, if any.

    Raises:
        ConfigError: ``terms`` returned other names than the weighting has.
    """
    views = (embeddings,) if isinstance(embeddings, Tensor) else tuple(embeddings)
    if shared is not None:
        shared.reset()
    if not weighting.needs_gradients:
        losses = _in_order(terms(*views), weighting.terms)
        down = downstream(*(view.detach() for view in views))
        statistics = Statistics(losses=torch.stack(losses).detach())
        weights = weighting(statistics)
        loss = sum(w * each for w, each in zip(weights, losses, strict=True)) + down
    else:
        leaves = tuple(view.detach().requires_grad_() for view in views)
        losses = _in_order(terms(*leaves), weighting.terms)
        down = downstream(*leaves)
        with torch.autocast(views[0].device.type, enabled=False):
            gradients = [_gradient(each, leaves) for each in losses]
            statistics = _statistics(losses, gradients, _gradient(down, leaves))
            weights = weighting(statistics)
            loss = sum(losses) + down
            for view, rows in zip(views, zip(*gradients, strict=True), strict=True):
                composite = torch.tensordot(weights.to(rows[0].dtype), torch.stack(rows), 1)
                loss = loss + (view.to(composite.dtype) * composite).sum()
        if shared is not None and isinstance(weighting, GradientWeighting):
            shared.reset(weights if weighting.shared_heads == "weights" else None)
    return Step(
        loss=loss,
        losses=dict(zip(weighting.terms, statistics.losses, strict=True)),
        downstream=down.detach(),
        weights=weights.detach(),
        statistics=statistics,
    )


def _in_order(losses: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The losses in the order of ``names``."""
    if set(losses) != set(names):
        raise ConfigError(
            f"terms: the weighting is for {', '.join(names)}, "
            f"but the losses given are {', '.join(losses)}: make the names agree"
        )
    return [losses[name] for name in names]


def _gradient(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss's gradient by each leaf, in float32 or better; zeros where it does not reach."""
    gradients: Sequence[Tensor]
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    else:
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
    return tuple(each.to(torch.promote_types(each.dtype, torch.float32)) for each in gradients)


def _statistics(
    losses: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    down: Sequence[Tensor],
) -> Statistics:
    """Gramian, products and the downstream norm, summed over the views.

    Over N processes the joined batch's loss is the mean of theirs, so each process's embeddings
    have 1/N of their gradient here: the sums are divided by N^2.
    """
    count = len(gradients)
    sums = down[0].new_zeros(count * count + count + 1)
    for view, target in enumerate(down):
        rows = torch.stack([each[view].flatten() for each in gradients])
        target = target.flatten()
        sums += torch.cat([(rows @ rows.T).flatten(), rows @ target, (target @ target)[None]])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        sums /= dist.get_world_size() ** 2
    gramian, products, square = sums.split([count * count, count, 1])
    return Statistics(
        losses=torch.stack(list(losses)).detach(),
        gramian=gramian.view(count, count),
        products=products,
        downstream_norm=square[0].sqrt(),
    )
