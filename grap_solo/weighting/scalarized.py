"""Rules that look at the losses alone, from torchjd's scalarizers.

A scalarizer makes one scalar of the losses; the weights are its derivatives by them. As in the
sources they stand before the losses, for backbone and heads alike, and no gradients are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchjd import scalarization

from grap_solo.weighting.base import Statistics, Weighting, number, whole


def derivatives(scalarizer: scalarization.Scalarizer, losses: Tensor) -> Tensor:
    """The scalarizer's derivatives by the losses, shape (K,)."""
    with torch.enable_grad():
        values = losses.detach().clone().requires_grad_()
        (weights,) = torch.autograd.grad(scalarizer(values), [values])
    return weights


class Uncertainty(Weighting):
    """Homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115, Eq. 10):
    ``sum_k exp(-s_k) L_k / 2 + s_k / 2``.

    The log-variances ``s_k`` are parameters of this module. As in the source the model's optimiser
    trains them: give it this module's parameters too.

    The keys are those of :class:`~grap_solo.weighting.base.Weighting`.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.
    """

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        self.scalarizer = scalarization.UW(len(self.terms))

    def direction(self, statistics: Statistics) -> Tensor:
        return derivatives(self.scalarizer, statistics.losses)

    def extra_loss(self, losses: Tensor) -> Tensor | None:
        return self.scalarizer(losses)


class FAMO(Weighting):
    """Fast adaptive multi-task optimisation (Liu et al. 2023, arXiv 2306.03792, Alg. 1): weights
    under which the logarithms of all losses fall at the same rate.

    It learns from how the same batch's losses change with the step, so each step has one more
    forward pass; the losses must be positive. Its small state is kept on the CPU.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        lr: of the logits, with Adam; the source has 0.025.
        weight_decay: of the logits; the source's Alg. 2 has 0.001.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.

    Raises:
        ConfigError: a number out of range.
    """

    uses_losses = True
    needs_losses_after = True
    scalarizer: scalarization.FAMO

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        self.lr = number(lr, "weighting.lr", above_zero=True)
        self.weight_decay = number(weight_decay, "weighting.weight_decay")
        self._start()

    def _start(self) -> None:
        # Not a submodule: its logits have an optimiser of their own and are no parameters here.
        scalarizer = scalarization.FAMO(len(self.terms), lr=self.lr, weight_decay=self.weight_decay)
        object.__setattr__(self, "scalarizer", scalarizer)

    def direction(self, statistics: Statistics) -> Tensor:
        weights = derivatives(self.scalarizer, statistics.losses.float().cpu())
        return weights.to(statistics.losses)

    def after_step(self, losses: Tensor) -> None:
        losses = losses.float().cpu()
        before = self.scalarizer._prev_losses
        both = losses if before is None else torch.stack([before, losses])
        # One logarithm that is not finite would stay in the logits for ever.
        if self.training and both.isfinite().all() and both.min() >= 0:
            self.scalarizer.update(losses)

    def get_extra_state(self) -> dict[str, Any]:
        optimizer, before = self.scalarizer._optimizer, self.scalarizer._prev_losses
        state = {
            "logits": self.scalarizer._w.detach(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "losses": before,
        }
        return copy.deepcopy(state)  # Loading an optimiser's state does not copy it.

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._start()
        if (
            state["optimizer"] is not None
        ):  # It is made by the first update: undone by what follows.
            ones = torch.ones(len(self.terms))
            self.scalarizer(ones)
            self.scalarizer.update(ones)
            assert self.scalarizer._optimizer is not None
            self.scalarizer._optimizer.load_state_dict(state["optimizer"])
        self.scalarizer._prev_losses = state.get("losses")
        with torch.no_grad():
            self.scalarizer._w.copy_(state["logits"])


class Random(Weighting):
    """A new draw at each step, ``softmax`` of K normal numbers (Lin et al. 2022, arXiv 2111.10603,
    Alg. 2): the baseline that every learned rule must beat. The draws are given by ``seed`` and
    the number of the step, so that every process has the same.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        seed: of the draws; torch's own, as it was set last, when None.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.

    Raises:
        ConfigError: a seed that is not a whole number.
    """

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        seed: int | None = None,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        self.seed = torch.initial_seed() if seed is None else whole(seed, "weighting.seed")
        self.calls = 0
        self.scalarizer = scalarization.Random()

    def direction(self, statistics: Statistics) -> Tensor:
        self.calls += self.training
        with torch.random.fork_rng(devices=[]):
            # Its generator looks at 32 bits: a product keeps the streams of near seeds apart.
            torch.default_generator.manual_seed((self.seed * 1_000_003 + self.calls) % 2**32)
            weights = derivatives(self.scalarizer, torch.ones(len(self.terms)))
        return weights.to(statistics.losses)

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state
