"""Weights that follow a given course, such as the one that a GraP run has learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.keys import Key
from grap_solo.weighting.base import Statistics, Weighting, check_weights, treatment_keys


class Scheduled(Weighting):
    """Weights that move on a given course, whatever the gradients: ``retrain --schedule`` replays
    the weights that a run has learned.

    The course has P points for each term. A point stands in the middle of its P-th of the run;
    between two points the weights are interpolated, before the first and after the last they stay.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "weights": Key(
            dict,
            least=0,
            optional=True,
            each=list,
            doc="The weights of each term in the course of the run, at equal distances: as many "
            "for each term. Left out, the reference weights.",
        ),
        **treatment_keys(),
    }
    course: Tensor
    steps: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        weights = self.options["weights"]
        points = self.reference[:, None]
        if weights is not None:
            points = torch.tensor([[float(each) for each in weights[name]] for name in self.terms])
        self.register_buffer("course", points.clone(), persistent=False)
        self.register_buffer("steps", torch.zeros(()))
        self.total_steps: float | None = None

    @classmethod
    def check_options(cls, options: Mapping[str, Any], terms: Sequence[str]) -> None:
        """Refuses a course that has not as many points for each of the terms."""
        weights = options["weights"]
        if weights is None:
            return
        lengths = {name: len(each) for name, each in weights.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"weighting.weights: as many for each term are needed, got {lengths}")
        for point in range(next(iter(lengths.values()), 0)):
            at = {name: each[point] for name, each in weights.items()}
            check_weights(at, terms, "weighting.weights")
        if not weights:
            check_weights({}, terms, "weighting.weights")

    def set_total_steps(self, steps: float) -> None:
        if not 1 <= steps < math.inf:
            raise ConfigError(
                f"weighting.weights: needs a run of a known length, got {steps:g} batches: set "
                "max_epochs"
            )
        self.total_steps = steps

    def direction(self, statistics: Statistics) -> Tensor:
        count = self.course.shape[1]
        if count == 1:
            return self.course[:, 0].clone()
        if self.total_steps is None:
            raise ConfigError(
                "weighting.weights: the number of steps of the run is not known: call "
                "weighting.set_total_steps(N) before the first step"
            )
        place = ((self.steps + 0.5) / self.total_steps * count - 0.5).clamp(0, count - 1)
        first = place.floor().clamp(max=count - 2)
        pair = self.course[:, torch.stack([first, first + 1]).long()]
        if self.training:
            self.steps += 1
        return torch.lerp(pair[:, 0], pair[:, 1], place - first)
