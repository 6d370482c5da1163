"""What a weighting is: a rule that turns one step's statistics into K effective weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from grap_solo.errors import ConfigError, unknown_name

SCALES = ("none", "reference", "unit")
HEADS = ("weighted", "unweighted", "reference")
SHARED_HEADS = ("sum", "weights")

CAUSES = ("", "held", "unlabelled", "not finite", "no composite gradient", "every weight 0")
"""Why a step was not learned from; the first stands for a step that was."""

FIRST_INNER_SCALE = 2.0**14
STEPS_TO_GROW = 2000


@dataclass(frozen=True)
class Statistics:
    """What a weighting may look at. Everything is detached, and across processes that of the
    joined batch.

    Attributes:
        losses: the K terms' values, shape (K,); those of this process alone for a weighting that
            does not use them.
        gramian: ``C = G G^T`` of the embedding gradients, shape (K, K); None where the weighting
            needs no gradients.
        products: ``p = G g_down``, shape (K,); None likewise.
        downstream_norm: the Euclidean norm of ``g_down``, shape (); None likewise. It is 0 for
            a batch without labels.
    """

    losses: Tensor
    gramian: Tensor | None = None
    products: Tensor | None = None
    downstream_norm: Tensor | None = None


class Weighting(nn.Module, ABC):
    """Base of all weightings. In ``eval()`` mode a weighting that learns holds its weights.

    A rule gives a *direction*, K weights; three keys, which every rule takes, say what is done
    with them. Each rule's own defaults are those of its source.

    Args:
        terms: the names of the K terms, in the order in which every K-vector here stands.
        reference: the method's own default weight of each term; 1 for each when None.
        scale: the norm of the composite gradient ``w^T G`` at the embedding: ``none`` leaves the
            rule's weights as they are; ``reference``, the norm that the reference weights would
            give it at this step; ``unit``, 1; or a positive number.
        heads: what each term's own head is trained by: ``weighted``, its term times the effective
            weight, as in ``loss = sum_k w_k L_k``; ``unweighted``, the term alone; ``reference``,
            the term times its reference weight.
        shared_heads: what a module that several terms share (a projector, say) gets: ``sum``,
            the sum of what the terms' heads get, or ``weights``, the same weighted sum as the
            backbone.

    Raises:
        ConfigError: no terms, a name twice, reference weights that do not fit the terms, or an
            unknown ``scale``, ``heads`` or ``shared_heads``.
    """

    uses_gradients = False
    """Whether the rule looks at the Gramian or the products."""

    uses_losses = False
    """Whether the rule looks at the losses' values, which are then those of the joined batch."""

    default_scale: str = "none"
    default_heads: str = "weighted"

    warmup_epochs = 0
    """Epochs for which a training loop that counts epochs keeps the weighting in eval mode."""

    downstream_weight = 0.0
    """With which weight the downstream loss reaches the backbone."""

    inner_scale: Tensor
    """What the inner gradients are multiplied by within heads in float16, shape ()."""

    cause: Tensor | None = None
    """Why the last step was not learned from, an index into :data:`CAUSES`, shape (); None for a
    rule that leaves no step out."""

    reference: Tensor
    finite_steps: Tensor

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        scale: str | float | None = None,
        heads: str | None = None,
        shared_heads: str = "sum",
    ) -> None:
        super().__init__()
        self.terms = tuple(terms)
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise ConfigError(f"terms: expected one or more different names, got {list(terms)}")
        given = dict.fromkeys(self.terms, 1.0) if reference is None else reference
        self.register_buffer("reference", self.vector(given, "reference weights"), persistent=False)
        self.scale = self.default_scale if scale is None else scale
        self.heads = self.default_heads if heads is None else heads
        self.shared_heads = shared_heads
        if isinstance(self.scale, str):
            if self.scale not in SCALES:
                raise unknown_name("weighting.scale", scale, (*SCALES, "a number"))
        elif not _is_number(self.scale) or self.scale <= 0:
            raise ConfigError(f"weighting.scale: expected a number above 0, got {scale!r}")
        if self.heads not in HEADS:
            raise unknown_name("weighting.heads", heads, HEADS)
        if shared_heads not in SHARED_HEADS:
            raise unknown_name("weighting.shared_heads", shared_heads, SHARED_HEADS)
        saved = self.needs_gradients  # Else a state dict is solo-learn's.
        self.register_buffer("inner_scale", torch.tensor(FIRST_INNER_SCALE), persistent=saved)
        self.register_buffer("finite_steps", torch.zeros((), dtype=torch.int32), persistent=saved)

    @property
    def needs_gradients(self) -> bool:
        """Whether the embedding gradients must be computed: for the rule, or for its keys."""
        return self.uses_gradients or self.scale != "none" or self.heads != "weighted"

    @property
    def active(self) -> tuple[str, ...]:
        """The terms that can get weight. The others need not be computed."""
        return self.terms

    def vector(self, weights: Mapping[str, float], where: str) -> Tensor:
        """The weights as a (K,) tensor: every term once, finite, not negative, not all zero."""
        if not isinstance(weights, Mapping):
            raise ConfigError(
                f"{where}: expected one weight for each of {', '.join(self.terms)}, got {weights!r}"
            )
        for name in weights:
            if name not in self.terms:
                raise unknown_name(where, name, self.terms)
        missing = [name for name in self.terms if name not in weights]
        if missing:
            raise ConfigError(f"{where}: no weight for {', '.join(missing)}: add it")
        for name, value in weights.items():
            number(value, f"{where}.{name}")
        vector = torch.tensor([float(weights[name]) for name in self.terms])
        if not vector.any():
            raise ConfigError(f"{where}: every weight is 0: give at least one term some weight")
        return vector

    @abstractmethod
    def direction(self, statistics: Statistics) -> Tensor:
        """The rule's weights, shape (K,). In training mode it learns from the statistics."""

    def forward(self, statistics: Statistics, evidence: Statistics | None = None) -> Tensor:
        """The effective weights of this step, shape (K,): multipliers of the plain losses.

        Args:
            statistics: of the batch that the weights are for. With a ``scale`` they are
                ``e = s w / sqrt(w^T C w)``, where ``s`` is the norm that it asks for.
            evidence: what the rule looks at instead, where that is another batch.
        """
        weights = self.direction(statistics if evidence is None else evidence)
        if self.scale == "none":
            return weights
        gramian = statistics.gramian
        assert gramian is not None
        weights = weights.to(gramian.dtype)
        unit = weights / composite_norm(weights, gramian)
        if self.scale == "reference":
            return unit * composite_norm(self.reference.to(gramian.dtype), gramian)
        return unit if self.scale == "unit" else unit * float(self.scale)

    def head_weights(self, effective: Tensor) -> Tensor:
        """What each term is multiplied by for its own head, shape (K,)."""
        if self.heads == "weighted":
            return effective
        reference = self.reference.to(effective)
        return reference if self.heads == "reference" else torch.ones_like(reference)

    def extra_loss(self, losses: Tensor) -> Tensor | None:
        """What the weighting's own parameters are trained by, shape (); None if it has none.

        Args:
            losses: the terms' values, shape (K,), detached.
        """
        return None

    def end_epoch(self) -> None:
        """To be called at the end of each epoch."""

    @torch.no_grad()
    def adapt_inner_scale(self, finite: Tensor) -> None:
        """Halves the scale of the inner gradients after a step that is not finite, and doubles it
        after 2000 in a row that are, as torch's ``GradScaler`` does with the trainer's.

        Args:
            finite: whether the step was, shape ().
        """
        steps = torch.where(finite, self.finite_steps + 1, 0)
        grow = steps == STEPS_TO_GROW
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.finite_steps.copy_(torch.where(grow, 0, steps))
        self.inner_scale.mul_(factor).clamp_(1.0, FIRST_INNER_SCALE)

    needs_losses_after = False
    """Whether :meth:`after_step` is to be called."""

    def after_step(self, losses: Tensor) -> None:
        """To be called with the same batch's losses, shape (K,), after the optimiser's step."""


def number(value: object, key: str, above_zero: bool = False) -> float:
    """The value again if it is a finite number of 0 or more, or above 0.

    Raises:
        ConfigError: it is not.
    """
    if _is_number(value) and (value > 0 if above_zero else value >= 0):
        return float(value)
    least = "a number above 0" if above_zero else "a finite number of 0 or more"
    raise ConfigError(f"{key}: expected {least}, got {value!r}")


def whole(value: object, key: str) -> int:
    """The value again if it is a whole number of 0 or more.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(f"{key}: expected a whole number of 0 or more, got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def composite_norm(weights: Tensor, gramian: Tensor) -> Tensor:
    """``sqrt(w^T C w)``: the norm of the composite gradient ``w^T G``, shape ().

    Never 0: the smallest normal number stands for it, so that a step on which every gradient
    vanishes divides by it without a NaN.
    """
    tiny = torch.finfo(gramian.dtype).tiny
    return (weights @ gramian @ weights).clamp(min=tiny).sqrt()
