"""Rules by which the downstream loss trains the backbone: together with the terms, or alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.weighting.base import Statistics, Weighting
from grap_solo.weighting.fixed import Fixed


class Auxiliary(Fixed):
    """Multi-task training: the downstream loss is one more term of constant weight
    (arXiv 2605.07756, Table 6).

    The backbone gets ``sum_k w_k dL_k/dz + downstream_weight dL_down/dz``; each term's head gets
    its own weighted loss and the downstream head its own unweighted one. ``scale`` sets the norm of
    the terms' part alone.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "downstream_weight": Key(
            float,
            above=0,
            default=1.0,
            doc="The weight of the downstream gradient at the embedding.",
        ),
        **Fixed.keys,
    }
    needs_labels = True
    trains_on_labels = True

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.downstream_weight = self.options["downstream_weight"]


class Supervised(Weighting):
    """The downstream loss alone trains backbone and downstream head; no term is computed.

    From scratch this is supervised training. From a pretrained backbone it is fine-tuning ("Tuned"
    in arXiv 2605.07756, Table 6).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`; each gets weight 0.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
    """

    keys = {}
    needs_labels = True
    trains_on_labels = True
    downstream_weight = 1.0

    @property
    def active(self) -> tuple[str, ...]:
        return ()

    def direction(self, statistics: Statistics) -> Tensor:
        return torch.zeros_like(statistics.losses)
