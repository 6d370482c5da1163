"""What a weighting is: a rule that turns one step's statistics into K effective weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grap_solo.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Statistics:
    """What a weighting may look at. Everything is detached; across processes all but ``losses``
    is that of the joined batch.

    Attributes:
        losses: the K terms' values in this process, shape (K,).
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


class Weighting(nn.Module):
    """Base of all weightings. In ``eval()`` mode a weighting that learns holds its weights.

    Args:
        terms: the names of the K terms, in the order in which every K-vector here stands.
        reference: the method's own default weight of each term; 1 for each when None.

    Raises:
        ConfigError: no terms, a name twice, or reference weights that do not fit the terms.
    """

    needs_gradients = False
    """Whether the embedding gradients must be computed for it."""

    warmup_epochs = 0
    """Epochs for which a training loop that counts epochs keeps the weighting in eval mode."""

    reference: Tensor

    def __init__(self, terms: Sequence[str], reference: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.terms = tuple(terms)
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise ConfigError(f"terms: expected one or more different names, got {list(terms)}")
        given = dict.fromkeys(self.terms, 1.0) if reference is None else reference
        self.register_buffer("reference", self.vector(given, "reference weights"), persistent=False)

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
            if not _is_number(value) or value < 0:
                raise ConfigError(
                    f"{where}.{name}: expected a finite number of 0 or more, got {value!r}"
                )
        vector = torch.tensor([float(weights[name]) for name in self.terms])
        if not vector.any():
            raise ConfigError(f"{where}: every weight is 0: give at least one term some weight")
        return vector

    def forward(self, statistics: Statistics) -> Tensor:
        """The effective weights of this step, shape (K,): multipliers of the plain losses."""
        raise NotImplementedError


class GradientWeighting(Weighting):
    """Base of the weightings that look at the embedding gradients.

    A subclass gives weights ``w`` up to a factor; here they are scaled so that the composite
    gradient ``w^T G`` has a chosen norm. Every head is trained by its own unweighted loss.

    Args:
        terms: see :class:`Weighting`.
        reference: see :class:`Weighting`.
        scale: the norm of the composite gradient: ``reference``, the norm that the reference
            weights would give it at this step; ``unit``, 1; or a positive number.
        shared_heads: what a module that several terms share (All4One's projector) gets:
            ``sum``, the plain sum of the terms' gradients, or ``weights``, the same weighted sum
            as the backbone.

    Raises:
        ConfigError: an unknown ``scale`` or ``shared_heads``.
    """

    needs_gradients = True

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        scale: str | float = "reference",
        shared_heads: str = "sum",
    ) -> None:
        super().__init__(terms, reference)
        if isinstance(scale, str):
            if scale not in ("reference", "unit"):
                raise unknown_name("weighting.scale", scale, ("reference", "unit", "a number"))
        elif not _is_number(scale) or scale <= 0:
            raise ConfigError(f"weighting.scale: expected a number above 0, got {scale!r}")
        if shared_heads not in ("sum", "weights"):
            raise unknown_name("weighting.shared_heads", shared_heads, ("sum", "weights"))
        self.scale = scale
        self.shared_heads = shared_heads

    def direction(self, statistics: Statistics) -> Tensor:
        """The weights up to a factor, shape (K,), not negative."""
        raise NotImplementedError

    def forward(self, statistics: Statistics) -> Tensor:
        """``e = s w / sqrt(w^T C w)`` with the norm ``s`` that ``scale`` asks for, shape (K,)."""
        gramian = statistics.gramian
        assert gramian is not None, f"{type(self).__name__} needs gradients"
        weights = self.direction(statistics)
        unit = weights / composite_norm(weights, gramian)
        if self.scale == "reference":
            return unit * composite_norm(self.reference.to(gramian.dtype), gramian)
        return unit if self.scale == "unit" else unit * float(self.scale)


def _is_number(value: object) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


def composite_norm(weights: Tensor, gramian: Tensor) -> Tensor:
    """``sqrt(w^T C w)``: the norm of the composite gradient ``w^T G``, shape ().

    Never 0: the smallest normal number stands for it, so that a step on which every gradient
    vanishes divides by it without a NaN.
    """
    tiny = torch.finfo(gramian.dtype).tiny
    return (weights @ gramian @ weights).clamp(min=tiny).sqrt()
