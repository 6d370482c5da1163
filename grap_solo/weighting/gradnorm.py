"""GradNorm: weights under which every term trains at a similar rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.weighting.base import Statistics, Weighting, treatment_keys


class GradNorm(Weighting):
    """Gradient normalisation (Chen et al. 2018, arXiv 1711.02257, Eq. 2 and Alg. 1).

    Each step moves ``w`` down the gradient of ``sum_k | w_k |g_k| - target_k |``. ``g_k`` is the
    term's gradient, and the target is held constant:

        target_k = mean_j(w_j |g_j|) r_k^alpha,   r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0))

    Then ``w`` is divided so that it adds up to K. The norms are taken at the embedding; the source
    takes them at the last shared layer. As in Alg. 1 the weights multiply the losses, for backbone
    and heads alike (``scale: none``, ``heads: weighted``). A step uses the weights from before its
    own update.

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
            doc="The learning rate of the weights, for plain gradient descent. The source has "
            "0.025.",
        ),
        "alpha": Key(
            float,
            least=0,
            default=1.5,
            doc="How strongly terms that train slowly are pushed. The source has 0.12 to 1.5.",
        ),
        **treatment_keys(),
    }
    uses_gradients = True
    uses_losses = True
    weights: Tensor
    initial: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.lr: float = self.options["lr"]
        self.alpha: float = self.options["alpha"]
        self.register_buffer("weights", torch.ones(len(self.terms)))
        self.register_buffer("initial", torch.zeros(len(self.terms)))

    def direction(self, statistics: Statistics) -> Tensor:
        assert statistics.gramian is not None
        weights = self.weights.to(statistics.gramian.dtype, copy=True)
        if self.training:
            self._update(weights, statistics)
        return weights

    @torch.no_grad()
    def _update(self, weights: Tensor, statistics: Statistics) -> None:
        """Takes one descent step, or none if a statistic is not finite."""
        assert statistics.gramian is not None
        norms = statistics.gramian.diagonal().clamp(min=0).sqrt()
        losses = statistics.losses.to(norms.dtype)
        initial = torch.where(self.initial.any(), self.initial.to(norms.dtype), losses)
        targets = self.targets(weights, norms, losses, initial)
        gradient = (weights * norms - targets).sign() * norms
        moved = (weights - self.lr * gradient).clamp(min=0)
        moved = moved * len(moved) / moved.sum()
        # Targets and losses are checked too: the sign of NaN is 0, and NaN to the power 0 is 1.
        usable = torch.stack([moved, targets, losses]).isfinite().all()
        for state, new in ((self.weights, moved), (self.initial, initial)):
            state.copy_(torch.where(usable, new.to(state.dtype), state))

    def targets(self, weights: Tensor, norms: Tensor, losses: Tensor, initial: Tensor) -> Tensor:
        """``target_k``, shape (K,), from weights, gradient norms, losses and the first losses."""
        ratio = losses / initial
        return (weights * norms).mean() * (ratio / ratio.mean()) ** self.alpha
