"""GraP: weights that align the composite gradient with the downstream one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.weighting.base import (
    CAUSES,
    Statistics,
    Weighting,
    composite_norm,
    number,
    whole,
)

NORMALIZATIONS = ("gradient", "sum", "none")
OPTIMIZERS = ("adam", "sgd")


def objective(weights: Tensor, gramian: Tensor, products: Tensor, normalization: str) -> Tensor:
    """What the weights climb, shape (): ``p^T w`` with ``w`` divided by its normaliser.

    Args:
        weights: ``w``, shape (K,).
        gramian: ``C``, shape (K, K).
        products: ``p``, shape (K,).
        normalization: ``gradient`` divides by ``sqrt(w^T C w)``, ``sum`` by ``sum_k w_k`` and
            ``none`` by 1 (arXiv 2605.07756, Table 5).
    """
    if normalization == "gradient":
        return weights @ products / composite_norm(weights, gramian)
    return weights @ products / (weights.sum() if normalization == "sum" else 1)


def objective_gradient(
    weights: Tensor, gramian: Tensor, products: Tensor, normalization: str
) -> Tensor:
    """The gradient of :func:`objective` by the weights in closed form, shape (K,).

    For ``gradient``, with ``n = sqrt(w^T C w)``: ``p / n - (w^T p) C w / n^3``, written with
    ``u = w / n`` so that no power of a small norm is taken.
    """
    if normalization == "gradient":
        norm = composite_norm(weights, gramian)
        unit = weights / norm
        return (products - (unit @ products) * (gramian @ unit)) / norm
    if normalization == "sum":
        total = weights.sum()
        return products / total - (weights @ products) / total**2
    return products


class GraP(Weighting):
    """Gradient-aligned pretraining (Karpukhin & Savchenko 2026, arXiv 2605.07756, Alg. 1).

    Each step in training mode moves ``w`` up the alignment of the composite gradient ``w^T G``
    with the downstream gradient ``g_down``; the weights that a step is given are those from
    before its own update. ``w`` starts at 1 and is clipped at 0 from below.

    ``g_down`` enters with unit norm, as in the authors' code: the objective is then the cosine of
    the two gradients, and the learning rate means the same from the first epoch to the last.
    ``scale`` alone sets the norm of the composite gradient, whatever ``normalization`` is, so that
    the three normalisations differ in the path that ``w`` takes and in nothing else.

    A step is not learned from when its batch has no labels, when a statistic is not finite, when
    the composite gradient vanishes, or when it would set every weight to 0; ``cause`` says which.

    By Alg. 1 each head gets its own unweighted gradient (``heads: unweighted``); the authors' code
    weights it by the reference weights when it rescales the composite (``heads: reference``).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        lr: the learning rate of the weights.
        optimizer: ``adam`` (betas 0.9 and 0.999, eps 1e-8, as torch's) or ``sgd``.
        normalization: see :func:`objective`.
        ema: the share of the past in the moving averages of Gramian and products that are
            learned from (Appendix A), bias-corrected as Adam's; 0 learns from each step's own.
        warmup_epochs: epochs for which the weights are held at their start. It is up to the
            training loop to count them, and to call ``eval()`` meanwhile.
        treatment: ``scale``, ``heads``, ``shared_heads``: see
            :class:`~grap_solo.weighting.base.Weighting`.

    Raises:
        ConfigError: a name or number out of range.
    """

    uses_gradients = True
    default_scale = "reference"
    default_heads = "unweighted"
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor
    average: Tensor

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        lr: float = 0.1,
        optimizer: str = "adam",
        normalization: str = "gradient",
        ema: float = 0.0,
        warmup_epochs: int = 0,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        if optimizer not in OPTIMIZERS:
            raise unknown_name("weighting.optimizer", optimizer, OPTIMIZERS)
        if normalization not in NORMALIZATIONS:
            raise unknown_name("weighting.normalization", normalization, NORMALIZATIONS)
        self.lr = number(lr, "weighting.lr", above_zero=True)
        self.ema = number(ema, "weighting.ema")
        if self.ema >= 1:
            raise ConfigError(f"weighting.ema: expected a number of 0 or more below 1, got {ema!r}")
        self.warmup_epochs = whole(warmup_epochs, "weighting.warmup_epochs")
        self.optimizer = optimizer
        self.normalization = normalization
        # The state of the optimiser lies in buffers: it is saved with the model, and a step that
        # must not be learned from is masked out on the device, without a synchronisation.
        self.register_buffer("weights", torch.ones(len(self.terms)))
        self.register_buffer("exp_avg", torch.zeros(len(self.terms)))
        self.register_buffer("exp_avg_sq", torch.zeros(len(self.terms)))
        self.register_buffer("updates", torch.zeros(()))
        if self.ema:
            count = len(self.terms)
            self.register_buffer("average", torch.zeros(count * count + count))

    def direction(self, statistics: Statistics) -> Tensor:
        assert statistics.gramian is not None
        weights = self.weights.to(statistics.gramian.dtype, copy=True)
        if self.training:
            self._update(weights, statistics)
        else:
            self.cause = torch.full_like(weights[0], CAUSES.index("held"), dtype=torch.long)
        return weights

    @torch.no_grad()
    def _update(self, weights: Tensor, statistics: Statistics) -> None:
        """One ascent step on the objective; see the class for the steps that it leaves out."""
        norm = statistics.downstream_norm
        assert statistics.gramian is not None and statistics.products is not None
        assert norm is not None
        gramian, products = statistics.gramian, statistics.products / norm
        composite = weights @ gramian @ weights
        updates = self.updates + 1
        new_state: list[tuple[Tensor, Tensor]] = []
        if self.ema:
            current = torch.cat([gramian.flatten(), products])
            average = torch.lerp(self.average.to(current), current, 1 - self.ema)
            new_state.append((self.average, average))
            smooth = average / (1 - self.ema**updates)
            gramian = smooth[: gramian.numel()].view_as(gramian)
            products = smooth[gramian.numel() :]
        gradient = objective_gradient(weights, gramian, products, self.normalization)
        step = gradient
        if self.optimizer == "adam":
            exp_avg = self.exp_avg.lerp(gradient.to(self.exp_avg.dtype), 0.1)
            exp_avg_sq = self.exp_avg_sq.lerp(gradient.square().to(self.exp_avg.dtype), 0.001)
            new_state += [(self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)]
            mean = exp_avg / (1 - 0.9**updates)
            deviation = (exp_avg_sq / (1 - 0.999**updates)).sqrt()
            step = mean / (deviation + 1e-8)
        moved = (weights + self.lr * step).clamp(min=0)
        new_state += [(self.weights, moved), (self.updates, updates)]

        # The first cause in the order of CAUSES that holds, found without a synchronisation. A
        # batch without labels has norm 0, so its gradient is 0 / 0 and not finite either.
        causes = torch.stack(
            [
                norm == 0,
                ~(gradient.isfinite().all() & composite.isfinite() & norm.isfinite()),
                composite <= 0,
                ~moved.any(),
            ]
        )
        first = CAUSES.index("unlabelled") + causes.to(torch.int8).argmax()
        usable = ~causes.any()
        self.cause = torch.where(usable, 0, first)
        for state, new in new_state:
            state.copy_(torch.where(usable, new.to(state.dtype), state))
