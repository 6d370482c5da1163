"""DWA: more weight for the terms that fall slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.weighting.base import Statistics, Weighting, treatment_keys


class DWA(Weighting):
    """Dynamic weight average (Liu et al. 2019, arXiv 1803.10704, Eq. 7).

        w_k = K softmax_k(r_k / T),   r_k = (mean L_k of the last epoch) / (that of the one before)

    and 1 for each term in the first two epochs. As in the source the weights multiply the losses,
    for backbone and heads alike. DWA needs no gradients, only :meth:`end_epoch`.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "temperature": Key(
            float,
            above=0,
            default=2.0,
            doc="T: the higher, the more even the weights. The source has 2.",
        ),
        **treatment_keys(),
    }
    uses_losses = True
    total: Tensor
    steps: Tensor
    last: Tensor
    before: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.temperature: float = self.options["temperature"]
        for name in ("total", "last", "before"):
            self.register_buffer(name, torch.zeros(len(self.terms)))
        self.register_buffer("steps", torch.zeros(()))

    def direction(self, statistics: Statistics) -> Tensor:
        if self.training:
            usable = statistics.losses.isfinite().all()
            self.total += torch.where(usable, statistics.losses.to(self.total.dtype), 0)
            self.steps += usable
        rates = self.last / self.before
        weights = len(self.terms) * torch.softmax(rates / self.temperature, dim=0)
        return torch.where(rates.isfinite().all(), weights, torch.ones_like(weights))

    def end_epoch(self) -> None:
        if self.training and self.steps:
            self.before.copy_(self.last)
            self.last.copy_(self.total / self.steps)
            self.total.zero_()
            self.steps.zero_()
