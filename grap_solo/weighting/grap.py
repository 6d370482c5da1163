"""GraP: weights that align the composite gradient with the downstream one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grap_solo.errors import ConfigError
from grap_solo.weighting.base import CAUSES, Statistics, Weighting, composite_norm
from grap_solo.weighting.grap_keys import GRAP_KEYS, PINNED, apply_recipe, refuse_bare_lr
from grap_solo.weighting.smoothing import average_on, to_cosines, with_norms

State = list[tuple[Tensor, Tensor]]

BALANCED_STEPS = 20
"""Steps over which ``start: balanced`` averages the norms of the terms' gradients."""
LEAST_NORM = 1e-6
"""``start: balanced`` takes a norm for nothing below this share of the largest one."""
WIDEST = 20.0
"""``parametrization: exp`` keeps the learned numbers between minus this and this: factors of up to
exp(40) between two weights."""


class BalancedStart(NamedTuple):
    """Where ``start: balanced`` lets the weights start.

    Attributes:
        weights: the learned weights are factors of these, shape (K,). Their geometric mean is 1. A
            term without a gradient has 1.
        norms: of the terms' gradients, averaged over the steps so far, shape (K,).
    """

    weights: Tensor
    norms: Tensor


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


def pull_gradient(weights: Tensor, gramian: Tensor) -> Tensor:
    """The gradient of ``(|u| - 1)^2`` by the weights, shape (K,), with ``u_k = w_k sqrt(C_kk)``.

    Args:
        weights: ``w``, shape (K,).
        gramian: ``C``, shape (K, K).
    """
    norms = gramian.diagonal().sqrt()
    size = (weights * norms).norm().clamp(min=torch.finfo(norms.dtype).tiny)
    return 2 * (size - 1) * (weights * norms / size) * norms


class GraP(Weighting):
    """Gradient-aligned pretraining (Karpukhin & Savchenko 2026, arXiv 2605.07756).

    Each step in training mode moves ``w`` so that the composite gradient ``w^T G`` aligns better
    with the downstream gradient ``g_down``. A step uses the weights from before its own update.

    ``g_down`` enters with unit norm, as in the authors' code. The objective is then the cosine of
    the two gradients, and the learning rate means the same from the first epoch to the last.
    ``scale`` alone sets the norm of the composite gradient; ``normalization`` changes only the
    path that ``w`` takes.

    A step is not learned from when its batch has no labels, when a statistic is not finite, when
    the composite gradient vanishes, or when it would set every weight to 0; ``cause`` says which.

    By default ``w`` starts where every term's gradient has the same norm, and a step multiplies it:
    in a run, however long, each weight can change by a factor of about exp(2). The heads are
    trained by the weighted terms. In the paper's Alg. 1 (``recipe: alg1``) ``w`` starts at 1, a
    step adds to it, and each head gets its own unweighted gradient. The authors' code multiplies
    that gradient by the reference weights when it rescales the composite (``heads: reference``).
    The keys name what else their optimiser has, ``AlignedHPOptimizer`` of
    github.com/ivan-chai/aligned-hpo; ``recipe: paper`` is their vision setting.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.

    Raises:
        ConfigError: see :class:`~grap_solo.weighting.base.Weighting`; or ``lr`` and
            ``lr_per_run`` are both given.
    """

    keys = GRAP_KEYS
    uses_gradients = True
    needs_labels = True
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor
    average: Tensor
    norms: Tensor
    start_norms: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.lr: float | None = self.options["lr"]
        self.follows_schedule = self.options["lr_schedule"] == "optimizer"
        self.optimizer: str = self.options["optimizer"]
        self.normalization: str = self.options["normalization"]
        self.parametrization: str = self.options["parametrization"]
        self.balanced: bool = self.options["start"] == "balanced"
        self.ema: float = self.options["ema"]
        self.average_first: int = self.options["average_first"]
        self.norm_ema: float | None = self.options["norm_ema"]
        self.regularization: float = self.options["regularization"]
        self.warmup_epochs = self.options["warmup_epochs"]
        # Buffers hold the optimiser's state: they are saved with the model, and a step that must
        # not be learned from is masked out on the device, without a synchronisation.
        first = 0.0 if self.parametrization == "exp" else 1.0
        self.register_buffer("weights", torch.full((len(self.terms),), first))
        self.register_buffer("exp_avg", torch.zeros(len(self.terms)))
        self.register_buffer("exp_avg_sq", torch.zeros(len(self.terms)))
        self.register_buffer("updates", torch.zeros(()))
        if self.ema or self.average_first:
            count = len(self.terms)
            self.register_buffer("average", torch.zeros(count * count + count))
        if self.norm_ema is not None:
            self.register_buffer("norms", torch.zeros(len(self.terms)))
        if self.balanced:
            self.register_buffer("start_norms", torch.ones(len(self.terms)))

    @classmethod
    def read_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`Weighting.read_options`, with the recipe's values. One of ``lr`` and
        ``lr_per_run`` is None."""
        options = super().read_options(apply_recipe(given))
        refuse_bare_lr(given)
        return options

    @classmethod
    def keep_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`Weighting.keep_options`: also the keys whose defaults have changed once."""
        options = cls.read_options(given)
        pinned = {name: options[name] for name in PINNED if options[name] is not None}
        return {name: value for name, value in given.items() if value is not None} | pinned

    @classmethod
    def kept_options(cls, kept: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`Weighting.kept_options`: a run that does not say ``parametrization`` is of a
        version whose defaults were those of Alg. 1."""
        own = {name: value for name, value in kept.items() if value is not None}
        return own if {"parametrization", "recipe"} & set(own) else {"recipe": "alg1"} | own

    def set_total_steps(self, steps: float) -> None:
        if self.options["lr_per_run"] is None:
            return
        if not 1 <= steps < math.inf:
            raise ConfigError(
                f"weighting.lr_per_run: needs a run of a known length, got {steps:g} batches: set "
                "max_epochs, or give weighting.lr and weighting.parametrization"
            )
        self.lr = self.options["lr_per_run"] / steps

    def direction(self, statistics: Statistics) -> Tensor:
        assert statistics.gramian is not None
        raw = self.weights.to(statistics.gramian.dtype, copy=True)
        weights = self._to_weights(raw)
        start = self._start(statistics) if self.balanced else None
        if self.training:
            self._update(raw, start, statistics)
        else:
            self.cause = torch.full_like(raw[0], CAUSES.index("held"), dtype=torch.long)
        return weights if start is None else weights * start.weights

    def _to_weights(self, raw: Tensor) -> Tensor:
        """The weights, shape (K,), that the learned numbers stand for."""
        if self.parametrization == "exp":
            return raw.exp()
        return raw.abs() if self.parametrization == "abs" else raw

    def _to_raw_gradient(self, gradient: Tensor, raw: Tensor) -> Tensor:
        """The gradient by the learned numbers, from that by the weights, both (K,)."""
        if self.parametrization == "exp":
            return gradient * raw.exp()
        if self.parametrization == "abs":
            return torch.where(raw >= 0, gradient, -gradient)
        return gradient

    def _keep_in_range(self, raw: Tensor) -> Tensor:
        """The learned numbers after a step, brought back to where they are allowed, shape (K,)."""
        if self.parametrization == "exp":  # The objective depends on the weights' ratios alone.
            raw = raw - (raw.max() - WIDEST).clamp(min=0)
            return raw.clamp(min=-WIDEST)
        return raw if self.parametrization == "abs" else raw.clamp(min=0)

    def _start(self, statistics: Statistics) -> BalancedStart:
        """The start that ``start: balanced`` gives the weights, as far as it is known.

        The first steps' own norms count at once, so that nothing depends on the losses' units."""
        assert statistics.gramian is not None
        norms = self.start_norms.to(statistics.gramian)
        if self.training:
            own = statistics.gramian.diagonal().sqrt()
            mean = average_on(norms, own, self.updates, 1.0, first=BALANCED_STEPS)
            norms = torch.where(mean.isfinite().all() & mean.any(), mean, norms)
        there = norms > LEAST_NORM * norms.max()
        logs = torch.where(there, norms, 1).log()
        center = (logs * there).sum() / there.sum().clamp(min=1)
        return BalancedStart(torch.where(there, center - logs, 0).exp(), norms)

    def scale_gramian(self, statistics: Statistics) -> Tensor:
        assert statistics.gramian is not None
        return statistics.gramian if self.norm_ema is None else self._smooth(statistics)[0]

    def _smooth(self, statistics: Statistics) -> tuple[Tensor, Tensor, State]:
        """The Gramian, the products with a ``g_down`` of norm 1, and the averages' new state."""
        norm = statistics.downstream_norm
        assert statistics.gramian is not None and statistics.products is not None
        assert norm is not None
        gramian, products = statistics.gramian, statistics.products / norm
        state: State = []
        norms = None
        if self.norm_ema is not None:
            cosines = to_cosines(gramian, products)
            gramian, products = cosines.gramian, cosines.products
            norms = average_on(self.norms, cosines.norms, self.updates, self.norm_ema, first=1)
            state.append((self.norms, norms))
        if self.ema or self.average_first:
            current = torch.cat([gramian.flatten(), products])
            if self.average_first:
                first = self.average_first
                average = average_on(self.average, current, self.updates, self.ema, first)
                smooth = average
            else:
                average = torch.lerp(self.average.to(current), current, 1 - self.ema)
                smooth = average / (1 - self.ema ** (self.updates + 1))
            state.append((self.average, average))
            gramian = smooth[: gramian.numel()].view_as(gramian)
            products = smooth[gramian.numel() :]
        if norms is not None:
            gramian, products = with_norms(gramian, products, norms)
        return gramian, products, state

    @torch.no_grad()
    def _update(self, raw: Tensor, start: BalancedStart | None, statistics: Statistics) -> None:
        """Takes one ascent step on the objective. The class says which steps are left out.

        Args:
            raw: the learned numbers, shape (K,): see ``parametrization``.
            start: what the weights are factors of; None if they are factors of 1.
            statistics: the step's.
        """
        if self.lr is None:
            raise ConfigError(
                "weighting.lr_per_run: the number of steps of the run is not known: call "
                "weighting.set_total_steps(N) before the first step, or give lr and parametrization"
            )
        norm = statistics.downstream_norm
        assert statistics.gramian is not None and norm is not None
        weights = self._to_weights(raw)
        effective = weights if start is None else weights * start.weights
        composite = effective @ statistics.gramian @ effective
        updates = self.updates + 1
        gramian, products, new_state = self._smooth(statistics)
        if start is not None:  # From here on, a term is the loss times its weight at the start.
            gramian, products = with_norms(gramian, products, start.weights)
            new_state.append((self.start_norms, start.norms))
        gradient = objective_gradient(weights, gramian, products, self.normalization)
        if self.regularization:
            gradient = gradient - self.regularization * pull_gradient(weights, gramian)
        gradient = self._to_raw_gradient(gradient, raw)
        step = gradient
        if self.optimizer == "adam":
            exp_avg = self.exp_avg.lerp(gradient.to(self.exp_avg.dtype), 0.1)
            exp_avg_sq = self.exp_avg_sq.lerp(gradient.square().to(self.exp_avg.dtype), 0.001)
            new_state += [(self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)]
            mean = exp_avg / (1 - 0.9**updates)
            deviation = (exp_avg_sq / (1 - 0.999**updates)).sqrt()
            step = mean / (deviation + 1e-8)
        moved = self._keep_in_range(raw + self.lr * self.lr_factor * step)
        new_state += [(self.weights, moved), (self.updates, updates)]

        # Finds the first cause that applies, in the order of CAUSES, without a synchronisation.
        # A batch without labels has norm 0, so its gradient is 0 / 0 and not finite either.
        causes = torch.stack(
            [
                norm == 0,
                ~(gradient.isfinite().all() & composite.isfinite() & norm.isfinite()),
                composite <= 0,
                ~self._to_weights(moved).any(),
            ]
        )
        first = CAUSES.index("unlabelled") + causes.to(torch.int8).argmax()
        usable = ~causes.any()
        self.cause = torch.where(usable, 0, first)
        for state, new in new_state:
            state.copy_(torch.where(usable, new.to(state.dtype), state))
