"""Constant weights: the reference weights, or the median weights of a GraP run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grap_solo.weighting.base import (
    WEIGHTS,
    Statistics,
    Weighting,
    check_weights,
    treatment_keys,
)


class Fixed(Weighting):
    """Constant weights: ``loss = sum_k w_k L_k``, heads included.

    A term of weight 0 is not computed, and its head is not trained. With ``heads: unweighted`` or
    ``reference`` it is: it still trains its own head and what the heads share.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {"weights": WEIGHTS, **treatment_keys()}
    weights: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        weights = self.options["weights"]
        chosen = self.reference if weights is None else self.vector(weights)
        self.register_buffer("weights", chosen.clone(), persistent=False)
        counts = (chosen + self.head_weights(chosen)).tolist()
        self._active = tuple(term for term, each in zip(self.terms, counts, strict=True) if each)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], terms: Sequence[str]) -> None:
        """Refuses weights that are not those of the terms. See :func:`check_weights`."""
        if options["weights"] is not None:
            check_weights(options["weights"], terms, "weighting.weights")

    @property
    def active(self) -> tuple[str, ...]:
        return self._active

    def direction(self, statistics: Statistics) -> Tensor:
        return self.weights
