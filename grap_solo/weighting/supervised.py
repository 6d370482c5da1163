"""The downstream loss in the backbone: beside the terms, or alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.weighting.base import Statistics, Weighting, number
from grap_solo.weighting.fixed import Fixed


class Auxiliary(Fixed):
    """Multi-task training: the downstream loss is one more term of constant weight
    (arXiv 2605.07756, Table 6).

    The backbone gets ``sum_k w_k dL_k/dz + downstream_weight dL_down/dz``; each term's head gets
    its own weighted loss and the downstream head its own unweighted one. ``scale`` is about the
    terms' part alone.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        downstream_weight: of the downstream gradient at the embedding.
        weights: see :class:`~grap_solo.weighting.fixed.Fixed`.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.

    Raises:
        ConfigError: a weight that is not above 0.
    """

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        downstream_weight: float = 1.0,
        weights: Mapping[str, float] | None = None,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, weights=weights, **treatment)
        self.downstream_weight = number(
            downstream_weight, "weighting.downstream_weight", above_zero=True
        )


class Supervised(Weighting):
    """The downstream loss alone trains backbone and downstream head; no term is computed.

    From scratch it is supervised training; from a pretrained backbone it is fine-tuning ("Tuned"
    in arXiv 2605.07756, Table 6).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`; each gets weight 0.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
    """

    downstream_weight = 1.0

    def __init__(self, terms: Sequence[str], reference: Mapping[str, float] | None = None) -> None:
        super().__init__(terms, reference)

    @property
    def active(self) -> tuple[str, ...]:
        return ()

    def direction(self, statistics: Statistics) -> Tensor:
        return torch.zeros_like(statistics.losses)
