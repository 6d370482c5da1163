"""Constant weights: the method's own defaults, or those that a GraP run has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grap_solo.weighting.base import Statistics, Weighting


class Fixed(Weighting):
    """Constant weights: ``loss = sum_k w_k L_k``, heads included. A term of weight 0 is left out,
    and its head with it.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        weights: the weight of each term; the reference weights when None.
        treatment: ``scale``, ``heads``, ``shared_heads``: see
            :class:`~grap_solo.weighting.base.Weighting`.

    Raises:
        ConfigError: weights that miss a term, name an unknown one, are negative or all zero.
    """

    weights: Tensor

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        chosen = self.reference if weights is None else self.vector(weights, "weighting.weights")
        self.register_buffer("weights", chosen.clone(), persistent=False)
        given = zip(self.terms, chosen.tolist(), strict=True)
        self._active = tuple(term for term, weight in given if weight)

    @property
    def active(self) -> tuple[str, ...]:
        return self._active

    def direction(self, statistics: Statistics) -> Tensor:
        return self.weights
