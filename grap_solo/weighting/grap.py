"""GraP: weights that align the composite gradient with the downstream one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.weighting.base import (
    CAUSES,
    Statistics,
    Weighting,
    composite_norm,
    treatment_keys,
)

NORMALIZATIONS = ("gradient", "sum", "none")
WEIGHT_OPTIMIZERS = ("adam", "sgd")


def objective(weights: Tensor, gramian: Tensor, products: Tensor, normalization: str) -> Tensor:
    """The objective that GraP maximises, shape (): ``p^T w`` with ``w`` divided by its normaliser.

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

    For ``gradient``, with ``n = sqrt(w^T C w)``: ``p / n - (w^T p) C w / n^3``. The code writes it
    with ``u = w / n``, which avoids powers of a small norm.
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

    Each step in training mode moves ``w`` so that the composite gradient ``w^T G`` aligns better
    with the downstream gradient ``g_down``. A step uses the weights from before its own update.
    ``w`` starts at 1 and is clipped at 0 from below.

    ``g_down`` enters with unit norm, as in the authors' code. The objective is then the cosine of
    the two gradients, and the learning rate means the same from the first epoch to the last.
    ``scale`` alone sets the norm of the composite gradient; ``normalization`` changes only the
    path that ``w`` takes.

    A step is not learned from when its batch has no labels, when a statistic is not finite, when
    the composite gradient vanishes, or when it would set every weight to 0; ``cause`` says which.

    In Alg. 1 each head gets its own unweighted gradient (``heads: unweighted``). The authors' code
    multiplies it by the reference weights when it rescales the composite (``heads: reference``).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "lr": Key(
            float,
            above=0,
            default=0.1,
            doc="How far one step moves the terms' weights. It is not scaled with the batch size "
            "and has no schedule.",
        ),
        "optimizer": Key(
            str,
            choices=WEIGHT_OPTIMIZERS,
            default="adam",
            doc="The optimiser of the weights. Adam has betas 0.9 and 0.999 and eps 1e-8, as "
            "torch's.",
        ),
        "normalization": Key(
            str,
            choices=NORMALIZATIONS,
            default="gradient",
            doc="What the objective p^T w is divided by: `gradient`, the composite gradient's norm "
            "sqrt(w^T C w); `sum`, the sum of the weights; `none`, 1 (arXiv 2605.07756, Table 5).",
        ),
        "ema": Key(
            float,
            least=0,
            below=1,
            default=0.0,
            doc="The share of the past in the moving averages of Gramian and products that the "
            "weights learn from (arXiv 2605.07756, Appendix A), bias-corrected as in Adam. 0 "
            "learns from each step's own.",
        ),
        "warmup_epochs": Key(
            int,
            least=0,
            default=0,
            doc="Epochs for which the weights stay at their start. During them grap-solo "
            "keeps the rule in eval mode; in a loop of your own, call `weighting.eval()`.",
        ),
        **treatment_keys(scale="reference", heads="unweighted"),
    }
    uses_gradients = True
    needs_labels = True
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor
    average: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.lr: float = self.options["lr"]
        self.optimizer: str = self.options["optimizer"]
        self.normalization: str = self.options["normalization"]
        self.ema: float = self.options["ema"]
        self.warmup_epochs = self.options["warmup_epochs"]
        # Buffers hold the optimiser's state: they are saved with the model, and a step that must
        # not be learned from is masked out on the device, without a synchronisation.
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
        """Takes one ascent step on the objective. The class says which steps are left out."""
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

        # Finds the first cause that applies, in the order of CAUSES, without a synchronisation.
        # A batch without labels has norm 0, so its gradient is 0 / 0 and not finite either.
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
