"""Many losses into one scalar whose ordinary backward is GraP's step (arXiv 2605.07756, Alg. 1).

Works in any PyTorch loop: it needs neither Lightning nor solo-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.gradients import measure, stack_by_view, take_gradient
from grap_solo.weighting.base import Statistics, Weighting

Rows = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Step:
    """One step's scalar and what it was made of. All but ``loss`` and ``returned`` is detached.

    Attributes:
        loss: the scalar to call ``backward()`` on, shape (). Its gradients are the step; where
            the weighting uses gradients, its value means nothing.
        losses: the plain value of each term that is not left out, shape ().
        downstream: the downstream head's loss, shape ().
        weights: the effective weights, shape (K,), in the order of ``weighting.terms``.
        statistics: what the weighting has looked at: of the held-out batch, if there was one.
        finite: whether all of this is finite, in every process, shape (): else leave the step out.
        gradients: of each term by each view of the embeddings; empty where none were needed.
        downstream_gradients: of the downstream loss by each view of the embeddings that it was
            called with, shapes (B, D); empty where none were needed.
        returned: the mapping that ``terms`` returned, as it is, with its graph.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    downstream: Tensor
    weights: Tensor
    statistics: Statistics
    finite: Tensor
    gradients: Rows = ()
    downstream_gradients: tuple[Tensor, ...] = ()
    returned: Mapping[str, Tensor] = field(default_factory=dict)

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
    returns. The values pass through; on the way back each term's gradient is multiplied so that
    the module gets the effectively weighted sum of the terms' gradients, as the backbone does.
    Without it the module gets the sum of what the terms' heads get.

    Args:
        terms: the names of the K terms.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.index = {name: k for k, name in enumerate(terms)}
        self.scales: Tensor | None = None

    def __call__(self, output: Tensor, term: str) -> Tensor:
        k = self.index[term]
        return _scaled_gradient(output, lambda: 1.0 if self.scales is None else self.scales[k])

    def reset(self, scales: Tensor | None = None) -> None:
        """Multiply by ``scales``, shape (K,), from now on; by 1 when None."""
        self.scales = None if scales is None else scales.detach()


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by what ``scale`` returns at that time."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scale: Callable[[], Tensor | float]) -> Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        scale = ctx.scale()
        return gradient * (scale.to(gradient) if isinstance(scale, Tensor) else scale), None


def _scaled_gradient(output: Tensor, scale: Callable[[], Tensor | float]) -> Tensor:
    scaled: Tensor = _ScaledGradient.apply(output, scale)
    return scaled


@dataclass(frozen=True)
class HeldOut:
    """A labelled batch that the pretraining losses are not trained on.

    Attributes:
        embeddings: the backbone's output for it, as ``balance`` takes them, without gradient.
        terms: the terms' losses on it, as ``balance`` takes them.
    """

    embeddings: Sequence[Tensor]
    terms: Callable[..., Mapping[str, Tensor]]


def balance(
    embeddings: Tensor | Sequence[Tensor],
    terms: Callable[..., Mapping[str, Tensor]],
    downstream: Callable[..., Tensor],
    weighting: Weighting,
    shared: SharedHead | None = None,
    held_out: HeldOut | None = None,
) -> Step:
    """One scalar whose backward gives backbone, heads and downstream head their gradients.

    With a weighting that needs gradients (Alg. 1), where ``z'`` is the detached embedding, ``G``
    the terms' gradients by ``z'``, ``e`` the effective weights and ``h`` the heads' own, it is

        <z, e^T G> + sum_k h_k L_k(z') + L_down(z')

    so that the backbone gets the weighted composite gradient, every head its own (``h`` is 1 in
    Alg. 1), and the downstream head its own; the downstream loss reaches the backbone through
    ``e``, and with ``weighting.downstream_weight``, which is 0 unless a rule says otherwise. With
    any other weighting it is ``sum_k e_k L_k(z) + L_down(z')``: plain training.

    The inner gradients are taken by ``z'`` only, so the hooks of parameters (DDP's among them)
    fire once, in the one real backward. In a process group the Gramian and the products are those
    of the joined batch, at the cost of one all-reduce (two with ``held_out``): K*K + K numbers, the
    downstream norm, whether all is finite, and K more for a rule that looks at the losses.

    Where the heads run in float16, the inner gradients are multiplied by ``weighting.inner_scale``
    on their way, and divided by it in float32: below 6e-8 they would be 0. A step for which the
    scale was too large is not finite; the next one has half of it. It has nothing to do with the
    trainer's own scale.

    Args:
        embeddings: the backbone's output, (B, D), or a sequence of them, one for each view.
        terms: called with the embeddings, one argument each; returns every term's loss, shape
            (), by name. Those that are not in ``weighting.active`` may be left out.
        downstream: called likewise; returns the downstream head's loss, shape (). For a batch
            without labels it must be 0 rather than NaN.
        weighting: turns the step's statistics into effective weights; it learns from them while
            it is in training mode.
        shared: see :class:`SharedHead`; the one that ``terms`` applies, if any.
        held_out: a labelled batch that takes this one's place for the weighting and for
            ``downstream``, which is then called with its embeddings.

    Raises:
        ConfigError: ``terms`` returned other names than the weighting has, ``held_out`` is given
            to a weighting whose downstream loss trains the backbone, or a head was compiled so
            that no more than one gradient can pass it.
    """
    views = (embeddings,) if isinstance(embeddings, Tensor) else tuple(embeddings)
    labelled = views if held_out is None else tuple(held_out.embeddings)
    if held_out is not None and weighting.downstream_weight:
        raise ConfigError("held_out: the downstream loss trains the backbone: leave it out")
    if shared is not None:
        shared.reset()
    if weighting.needs_gradients:
        step = _from_gradients(views, labelled, terms, downstream, weighting, shared, held_out)
    else:
        step = _plain(views, labelled, terms, downstream, weighting)
    extra = weighting.extra_loss(step.statistics.losses)
    return replace(
        step,
        loss=step.loss if extra is None else step.loss + extra,
        losses={name: step.losses[name].detach() for name in weighting.active},
        downstream=step.downstream.detach(),
        weights=step.weights.detach(),
        finite=step.finite & step.weights.detach().isfinite().all(),
    )


def _plain(
    views: Sequence[Tensor],
    labelled: Sequence[Tensor],
    terms: Callable[..., Mapping[str, Tensor]],
    downstream: Callable[..., Tensor],
    weighting: Weighting,
) -> Step:
    """``sum_k e_k L_k(z) + L_down(z')``; nothing of it is detached yet."""
    returned = terms(*views)
    losses = _in_order(returned, weighting, views[0])
    part = weighting.downstream_weight
    down = downstream(
        *(_scaled_gradient(each, lambda: part) if part else each.detach() for each in labelled)
    )
    measured = measure(weighting, losses, down)
    weights = weighting(measured.statistics)
    return Step(
        loss=sum(w * each for w, each in zip(weights, losses, strict=True)) + down,
        losses=dict(zip(weighting.terms, losses, strict=True)),
        downstream=down,
        weights=weights,
        statistics=measured.statistics,
        finite=measured.finite,
        returned=returned,
    )


def _from_gradients(
    views: Sequence[Tensor],
    labelled: Sequence[Tensor],
    terms: Callable[..., Mapping[str, Tensor]],
    downstream: Callable[..., Tensor],
    weighting: Weighting,
    shared: SharedHead | None,
    held_out: HeldOut | None,
) -> Step:
    """``<z, e^T G> + sum_k h_k L_k(z') + L_down(z')``; its losses are not detached yet."""
    leaves = tuple(view.detach().requires_grad_() for view in views)
    returned = terms(*leaves)
    losses = _in_order(returned, weighting, views[0])
    seen_leaves, seen = leaves, losses
    if held_out is not None:
        seen_leaves = tuple(each.detach().requires_grad_() for each in labelled)
        seen = _in_order(held_out.terms(*seen_leaves), weighting, views[0])
    down = downstream(*seen_leaves)
    half = _is_half(views[0])
    scale = weighting.inner_scale if half else None
    with torch.autocast(views[0].device.type, enabled=False):
        rows = stack_by_view([take_gradient(each, leaves, scale) for each in losses])
        target = take_gradient(down, seen_leaves, scale)
        if held_out is None:
            measured = measure(weighting, losses, down, rows, target)
            weights, finite = weighting(measured.statistics), measured.finite
        else:
            seen_rows = stack_by_view([take_gradient(each, seen_leaves, scale) for each in seen])
            measured = measure(weighting, seen, down, seen_rows, target)
            own = measure(weighting, losses, down, rows)
            finite = measured.finite & own.finite
            weights = weighting(own.statistics, measured.statistics)
        if half:
            weighting.adapt_inner_scale(finite)
        heads = weighting.head_weights(weights)
        loss = sum(h * each for h, each in zip(heads, losses, strict=True)) + down
        for view, matrix, down_row in zip(views, rows, target, strict=True):
            composite = torch.tensordot(weights.to(matrix.dtype), matrix, 1)
            if weighting.downstream_weight:
                composite = composite + weighting.downstream_weight * down_row
            loss = loss + (view.to(composite.dtype) * composite).sum()
    if shared is not None and weighting.shared_heads == "weights":
        shared.reset((weights / heads).nan_to_num(posinf=0.0))
    return Step(
        loss=loss,
        losses=dict(zip(weighting.terms, losses, strict=True)),
        downstream=down,
        weights=weights,
        statistics=measured.statistics,
        finite=finite,
        gradients=tuple(zip(*(matrix.unbind() for matrix in rows), strict=True)),
        downstream_gradients=target,
        returned=returned,
    )


def _in_order(losses: Mapping[str, Tensor], weighting: Weighting, like: Tensor) -> list[Tensor]:
    """The losses in the order of the weighting's terms, with 0 for a term that it leaves out."""
    if not set(weighting.active) <= set(losses) <= set(weighting.terms):
        raise ConfigError(
            f"terms: the weighting is for {', '.join(weighting.active)}, "
            f"but the losses given are {', '.join(losses)}: make the names agree"
        )
    zero = torch.zeros((), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return [losses.get(name, zero) for name in weighting.terms]


def _is_half(embedding: Tensor) -> bool:
    """Whether the heads run in float16."""
    device = embedding.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.float16 in (embedding.dtype, autocast)
