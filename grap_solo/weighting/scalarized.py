"""Rules that read the losses alone, from torchjd's scalarizers.

A scalarizer turns the losses into one scalar; the weights are the scalar's derivatives by the
losses. As in the sources the weights multiply the losses, for backbone and heads alike. No
gradients are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.weighting.base import Statistics, Weighting, treatment_keys

if TYPE_CHECKING:
    from torchjd import scalarization

NEEDS = ("train", "torchjd")
"""The extra that brings torchjd."""


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

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    needs = NEEDS

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        from torchjd.scalarization import UW

        self.scalarizer = UW(len(self.terms))

    def direction(self, statistics: Statistics) -> Tensor:
        return derivatives(self.scalarizer, statistics.losses)

    def extra_loss(self, losses: Tensor) -> Tensor | None:
        return self.scalarizer(losses)


class FAMO(Weighting):
    """Fast adaptive multi-task optimisation (Liu et al. 2023, arXiv 2306.03792, Alg. 1): weights
    under which the logarithms of all losses fall at the same rate.

    FAMO learns from the change that a step makes to its own batch's losses, so each step has one
    more forward pass. The losses must be positive. The small state is kept on the CPU.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "lr": Key(
            float,
            above=0,
            default=0.025,
            doc="The learning rate of the logits, with Adam. The source has 0.025.",
        ),
        "weight_decay": Key(
            float,
            least=0,
            default=1e-3,
            doc="The weight decay of the logits. The source's Alg. 2 has 0.001.",
        ),
        **treatment_keys(),
    }
    needs = NEEDS
    uses_losses = True
    needs_losses_after = True
    scalarizer: scalarization.FAMO

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.lr: float = self.options["lr"]
        self.weight_decay: float = self.options["weight_decay"]
        self._start()

    def _start(self) -> None:
        from torchjd.scalarization import FAMO as Scalarizer

        # Not a submodule: its logits have their own optimiser, so they are not parameters here.
        scalarizer = Scalarizer(len(self.terms), lr=self.lr, weight_decay=self.weight_decay)
        object.__setattr__(self, "scalarizer", scalarizer)

    def direction(self, statistics: Statistics) -> Tensor:
        weights = derivatives(self.scalarizer, statistics.losses.float().cpu())
        return weights.to(statistics.losses)

    def after_step(self, losses: Tensor) -> None:
        losses = losses.float().cpu()
        before = self.scalarizer._prev_losses
        both = losses if before is None else torch.stack([before, losses])
        # A logarithm that is not finite would spoil the logits for good.
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
        if state["optimizer"] is not None:  # The first update makes it; its effects are undone.
            ones = torch.ones(len(self.terms))
            self.scalarizer(ones)
            self.scalarizer.update(ones)
            assert self.scalarizer._optimizer is not None
            self.scalarizer._optimizer.load_state_dict(state["optimizer"])
        self.scalarizer._prev_losses = state.get("losses")
        with torch.no_grad():
            self.scalarizer._w.copy_(state["logits"])


class Random(Weighting):
    """Weights drawn anew at each step, ``softmax`` of K normal numbers (Lin et al. 2022, arXiv
    2111.10603, Alg. 2): the baseline that every learned rule must beat. ``seed`` and the number of
    the step determine each draw, so every process draws the same.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "seed": Key(
            int,
            least=0,
            optional=True,
            doc="The seed of the draws; the run's seed when left out.",
        ),
        **treatment_keys(),
    }
    needs = NEEDS

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        from torchjd.scalarization import Random as Scalarizer

        seed: int | None = self.options["seed"]
        self.seed = torch.initial_seed() if seed is None else seed
        self.calls = 0
        self.scalarizer = Scalarizer()

    def direction(self, statistics: Statistics) -> Tensor:
        self.calls += self.training
        with torch.random.fork_rng(devices=[]):
            # The generator reads 32 bits: the product keeps the streams of near seeds apart.
            torch.default_generator.manual_seed((self.seed * 1_000_003 + self.calls) % 2**32)
            weights = derivatives(self.scalarizer, torch.ones(len(self.terms)))
        return weights.to(statistics.losses)

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state
