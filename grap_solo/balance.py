"""Turns K losses into one scalar whose ordinary backward pass is GraP's step (arXiv 2605.07756,
Alg. 1).

Works in any PyTorch loop: it needs neither Lightning nor solo-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.gradients import (
    check_loss,
    find_bypass,
    gramian_of_mean,
    measure,
    stack_by_view,
    take_gradient,
)
from grap_solo.weighting.base import Statistics, Weighting
from grap_solo.weighting.gramian import combine_aligned

Rows = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Step:
    """One step: the scalar to train on, and the tensors that it was computed from.

    All tensors but ``loss`` and ``returned`` are detached.

    Attributes:
        loss: the scalar to call ``backward()`` on, shape (). If the weighting needs gradients,
            only its gradients mean something, not its value.
        losses: the unweighted loss of each active term, shape ().
        downstream: the downstream head's loss, shape ().
        weights: the effective weights, shape (K,), in the order of ``weighting.terms``.
        statistics: the statistics that the weighting was given. They are those of the held-out
            batch, if there was one.
        finite: whether losses, statistics and weights are finite on every rank, shape (). If not,
            skip the step.
        gradients: for each term, its gradient by each view's embedding, (B, D); empty if the
            weighting needs no gradients.
        downstream_gradients: the downstream loss's gradient by each view's embedding, (B, D), of
            the held-out batch if there was one; empty if the weighting needs no gradients.
        returned: the mapping that ``terms`` returned, unchanged and with its graph.
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
        """The cosine between the composite and the downstream embedding gradient, shape ().

        None if the weighting needs no gradients; NaN for a batch without labels.
        """
        gramian, products = self.statistics.gramian, self.statistics.products
        norm = self.statistics.downstream_norm
        if gramian is None or products is None or norm is None:
            return None
        weights = self.weights.to(gramian.dtype)
        return weights @ products / ((weights @ gramian @ weights).sqrt() * norm)


class SharedHead:
    """Weights the gradients that reach a module which several terms share, such as a projector.

    Call it with the module's output, once for each term, and compute the term from the result.
    The forward pass changes nothing. The backward pass multiplies each term's gradient, so that
    the module is trained with the effective weights, as the backbone is. Without it the module is
    trained with the weights of the terms' heads.

    Args:
        terms: the names of the K terms.
        parameters: the module's. Only ``shared_heads: aligned_mtl`` needs them.
    """

    def __init__(self, terms: Sequence[str], parameters: Iterable[Tensor] = ()) -> None:
        self.index = {name: k for k, name in enumerate(terms)}
        self.parameters = tuple(parameters)
        self.scales: Tensor | None = None

    def __call__(self, output: Tensor, term: str) -> Tensor:
        k = self.index[term]
        return _scaled_gradient(output, lambda: 1.0 if self.scales is None else self.scales[k])

    def reset(self, scales: Tensor | None = None) -> None:
        """Sets the factors of the terms' gradients, shape (K,); None stands for 1."""
        self.scales = None if scales is None else scales.detach()


class _ScaledGradient(torch.autograd.Function):
    """The identity. Its backward pass calls ``scale()`` and multiplies the gradient by the result:
    the factors are only known after the forward pass."""

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
    """A labelled batch that the terms are not trained on.

    Attributes:
        embeddings: its embeddings, one (B, D) for each view, without gradient.
        terms: like :func:`balance`'s ``terms``, but computes the losses of this batch.
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
    """Returns a scalar whose backward pass trains the backbone, the heads and the downstream head.

    For a weighting that needs gradients, the scalar is

        <z, e^T G> + sum_k h_k L_k(z') + L_down(z')

    where ``z`` is the embedding and ``z'`` the same detached, ``G`` holds the terms' gradients by
    ``z'``, ``e`` are the effective weights, and ``h`` the weights of the heads (1 in Alg. 1). The
    backbone gets the composite gradient ``e^T G``; every head gets the gradient of its own term,
    and the downstream head that of its own loss. The downstream loss changes the backbone only
    through ``e``, unless the rule sets ``weighting.downstream_weight``, which is 0 by default.

    For any other weighting the scalar is ``sum_k e_k L_k(z) + L_down(z')``: plain training.

    The gradients ``G`` are taken by ``z'`` only. The hooks of parameters, such as DDP's, therefore
    fire once, in the real backward pass. In a process group the Gramian and the products are those
    of the joined batch. This costs one all-reduce (two with ``held_out``) of K*K + K + 2 numbers,
    and K more for a rule that uses the losses.

    If the heads run in float16, gradients below 6e-8 would vanish. The losses are therefore
    multiplied by ``weighting.inner_scale`` before ``G`` is taken, and ``G`` is divided by it in
    float32. If the scale is too large, the step is not finite and the scale is halved. It is
    independent of the trainer's gradient scaler.

    Args:
        embeddings: the backbone's output, (B, D), or a sequence with one such tensor a view.
        terms: called with one embedding a view; returns the loss of every term, shape (), by name.
            Terms that are not in ``weighting.active`` may be missing.
        downstream: called with one embedding a view; returns the downstream head's loss, shape ().
            For a batch without labels it must return 0, not NaN.
        weighting: turns the step's statistics into effective weights. It learns from them while
            it is in training mode.
        shared: the :class:`SharedHead` that ``terms`` applies, if any.
        held_out: a labelled batch to take the weighting's statistics from, in place of this batch.
            ``downstream`` is then called with the embeddings of the held-out batch.

    Raises:
        ConfigError: if ``terms`` returned other names than the weighting has, or a loss that is
            not of shape (); if a term of a weighting that needs gradients reaches the backbone
            other than through the embedding (found in the weighting's first step); if ``held_out``
            is given although the downstream loss trains the backbone; or if ``torch.compile`` made
            a head that lets only one gradient through.
    """
    views = (embeddings,) if isinstance(embeddings, Tensor) else tuple(embeddings)
    labelled = views if held_out is None else tuple(held_out.embeddings)
    if held_out is not None and weighting.downstream_weight:
        raise ConfigError(
            "held_out: the downstream loss trains the backbone, so labels cannot be held out: "
            "leave held_out out"
        )
    if shared is not None:
        shared.reset()
    if weighting.needs_gradients:
        step = _step_with_gradients(views, labelled, terms, downstream, weighting, shared, held_out)
    else:
        step = _step_without_gradients(views, labelled, terms, downstream, weighting)
    extra = weighting.extra_loss(step.statistics.losses)
    return replace(
        step,
        loss=step.loss if extra is None else step.loss + extra,
        losses={name: step.losses[name].detach() for name in weighting.active},
        downstream=step.downstream.detach(),
        weights=step.weights.detach(),
        finite=step.finite & step.weights.detach().isfinite().all(),
    )


def _step_without_gradients(
    views: Sequence[Tensor],
    labelled: Sequence[Tensor],
    terms: Callable[..., Mapping[str, Tensor]],
    downstream: Callable[..., Tensor],
    weighting: Weighting,
) -> Step:
    """Plain training, ``sum_k e_k L_k(z) + L_down(z')``. The caller detaches the results."""
    returned = terms(*views)
    losses = _order_losses(returned, weighting, views[0])
    part = weighting.downstream_weight
    down = downstream(
        *(_scaled_gradient(each, lambda: part) if part else each.detach() for each in labelled)
    )
    check_loss(down, "downstream")
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


def _step_with_gradients(
    views: Sequence[Tensor],
    labelled: Sequence[Tensor],
    terms: Callable[..., Mapping[str, Tensor]],
    downstream: Callable[..., Tensor],
    weighting: Weighting,
    shared: SharedHead | None,
    held_out: HeldOut | None,
) -> Step:
    """Alg. 1, ``<z, e^T G> + sum_k h_k L_k(z') + L_down(z')``. The caller detaches the results."""
    leaves = tuple(view.detach().requires_grad_() for view in views)
    returned = terms(*leaves)
    losses = _order_losses(returned, weighting, views[0])
    if not weighting.bypass_checked:  # Once: the terms of later steps have the same graph.
        _refuse_bypass(returned, views)
        weighting.bypass_checked = True
    seen_leaves, seen = leaves, losses
    if held_out is not None:
        seen_leaves = tuple(each.detach().requires_grad_() for each in labelled)
        seen = _order_losses(held_out.terms(*seen_leaves), weighting, views[0])
    down = downstream(*seen_leaves)
    check_loss(down, "downstream")
    half = _run_in_float16(views[0])
    scale = weighting.inner_scale if half else None
    aligned = shared is not None and weighting.shared_heads == "aligned_mtl"
    inputs = leaves
    if shared is not None and aligned:
        inputs += tuple(each for each in shared.parameters if each.requires_grad)
    with torch.autocast(views[0].device.type, enabled=False):
        taken = [take_gradient(each, inputs, scale) for each in losses]
        rows = stack_by_view([each[: len(leaves)] for each in taken])
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
    if shared is not None and weighting.shared_heads != "sum":
        wanted = weights
        if aligned:
            wanted = combine_aligned(gramian_of_mean([each[len(leaves) :] for each in taken]))
        shared.reset((wanted / heads).nan_to_num(posinf=0.0, neginf=0.0))
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


def _order_losses(losses: Mapping[str, Tensor], weighting: Weighting, like: Tensor) -> list[Tensor]:
    """The losses in the order of ``weighting.terms``; 0 for a term that is not active."""
    if not set(weighting.active) <= set(losses) <= set(weighting.terms):
        raise ConfigError(
            f"terms: the weighting is for {', '.join(weighting.active)}, "
            f"but the losses are {', '.join(losses)}: give both the same names"
        )
    for name, loss in losses.items():
        check_loss(loss, f"terms: '{name}'")
    zero = torch.zeros((), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return [losses.get(name, zero) for name in weighting.terms]


def _refuse_bypass(losses: Mapping[str, Tensor], views: Sequence[Tensor]) -> None:
    term = find_bypass(losses, views)
    if term is not None:
        raise ConfigError(
            f"terms: '{term}' reaches the backbone other than through the embedding that it is "
            "given, so its weight would not count there: compute it from the given embedding, and "
            "detach everything else"
        )


def _run_in_float16(embedding: Tensor) -> bool:
    """Whether the heads run in float16."""
    device = embedding.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.float16 in (embedding.dtype, autocast)
