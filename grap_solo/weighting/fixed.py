"""Constant weights: the method's own defaults, or those that a GraP run has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from grap_solo.weighting.base import Statistics, Weighting


class Fixed(Weighting):
    """Constant weights on the plain path: ``loss = sum_k w_k L_k``, heads included.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        weights: the weight of each term; the reference weights when None.

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
    ) -> None:
        super().__init__(terms, reference)
        chosen = self.reference if weights is None else self.vector(weights, "weighting.weights")
        self.register_buffer("weights", chosen.clone(), persistent=False)

    def forward(self, statistics: Statistics) -> Tensor:
        return self.weights
