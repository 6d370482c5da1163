"""The same weight for every term."""

from __future__ import annotations

import torch
from torch import Tensor

from grap_solo.weighting.base import Statistics, Weighting


class Equal(Weighting):
    """Weight 1 for every term: ``loss = sum_k L_k``, heads included."""

    def direction(self, statistics: Statistics) -> Tensor:
        return torch.ones_like(statistics.losses)
