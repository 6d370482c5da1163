"""torchjd's Gramian weightings, on the Gramian of the embedding gradients.

There each of them costs K x K algebra, since the Gramian is small and is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchjd import aggregation

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.weighting.base import Statistics, Weighting, number


class GramianWeighting(Weighting):
    """Base of the rules that torchjd has as a function from a Gramian to weights.

    In their sources the shared parameters get the combination as it is (``scale: none``) and
    task-specific parameters their own unweighted gradient (``heads: unweighted``), as in torchjd's
    ``mtl_backward``. The embedding stands for the shared parameters. Weights may be negative.

    The algebra is done on the CPU in float64. A rule that draws random numbers draws them from a
    stream of its own, given by the number of the step, so that it changes nothing else and is the
    same in every process. A Gramian that is not finite, or 0, gives equal weights. A gradient whose
    squared norm is too small for a normal number counts as 0: what little is left of its products
    with the others need not go with it, and the solvers divide by it.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.
    """

    uses_gradients = True
    default_heads = "unweighted"
    rule: Callable[[Tensor], Tensor]

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        self.calls = 0

    def direction(self, statistics: Statistics) -> Tensor:
        assert statistics.gramian is not None
        gramian = statistics.gramian.double().cpu()
        self.calls += self.training
        gone = gramian.diagonal() < torch.finfo(statistics.gramian.dtype).tiny
        gramian = gramian.masked_fill(gone | gone[:, None], 0)
        size = gramian.trace()
        if not gramian.isfinite().all() or size <= 0:
            return torch.full_like(statistics.gramian[0], 1 / len(self.terms))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.calls)
            weights = self.rule(gramian / size)  # Their solvers have absolute tolerances.
        return self.unscaled(weights, size.item()).to(statistics.gramian)

    def unscaled(self, weights: Tensor, size: float) -> Tensor:
        """The weights for a Gramian, from those for the Gramian divided by ``size``."""
        return weights

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state


class PCGrad(GramianWeighting):
    """Gradient surgery: each gradient loses its part against every other one that it conflicts
    with, in random order, and the rests are added up (Yu et al. 2020, arXiv 2001.06782, Alg. 1).

    The keys are those of :class:`~grap_solo.weighting.base.Weighting`.
    """

    rule = aggregation.PCGradWeighting()


class AlignedMTL(GramianWeighting):
    """Independent component alignment: the gradients' principal components are brought to one
    size (Senushkin et al. 2023, arXiv 2305.19000, Alg. 1).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        scale_mode: which singular value that size is: ``min``, ``median`` or ``rmse``.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.

    Raises:
        ConfigError: an unknown ``scale_mode``.
    """

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        scale_mode: Literal["min", "median", "rmse"] = "min",
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        if scale_mode not in ("min", "median", "rmse"):
            raise unknown_name("weighting.scale_mode", scale_mode, ("min", "median", "rmse"))
        self.rule = aggregation.AlignedMTLWeighting(scale_mode=scale_mode)


class IMTLG(GramianWeighting):
    """Impartial multi-task learning: the combination has equal projections onto every gradient's
    direction (Liu et al. 2021, "Towards Impartial Multi-task Learning", Eq. 3).

    The keys are those of :class:`~grap_solo.weighting.base.Weighting`.
    """

    rule = aggregation.IMTLGWeighting()


class UPGrad(GramianWeighting):
    """The mean of the gradients, each projected onto the cone that conflicts with none (Quinton &
    Rey 2024, arXiv 2406.16232, Section 3).

    The keys are those of :class:`~grap_solo.weighting.base.Weighting`.
    """

    rule = aggregation.UPGradWeighting()


class DualProj(GramianWeighting):
    """The mean gradient projected onto the cone that conflicts with none (Lopez-Paz & Ranzato
    2017, arXiv 1706.08840, as in arXiv 2406.16232).

    The keys are those of :class:`~grap_solo.weighting.base.Weighting`.
    """

    rule = aggregation.DualProjWeighting()


class FairGrad(GramianWeighting):
    """Alpha-fair utility: ``C w = w^(-1/alpha)`` (Ban & Ji 2024, arXiv 2402.15638, Eq. 4).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        alpha: the fairness, from 0 (plain sum) over 1 (proportional) to infinity (max-min).
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.

    Raises:
        ConfigError: an ``alpha`` that is not above 0.
    """

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        alpha: float = 1.0,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        self.alpha = number(alpha, "weighting.alpha", above_zero=True)
        self.rule = aggregation.FairGradWeighting(self.alpha)

    def unscaled(self, weights: Tensor, size: float) -> Tensor:
        return weights * size ** (-self.alpha / (self.alpha + 1))


class CAGrad(GramianWeighting):
    """Conflict-averse gradient: the best worst-case term within a ball around the mean gradient
    (Liu et al. 2021, arXiv 2110.14048, Alg. 1). It needs cvxpy.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        c: the ball's radius by the mean gradient's norm.
        treatment: see :class:`~grap_solo.weighting.fixed.Fixed`.

    Raises:
        ConfigError: a negative ``c``, or no cvxpy.
    """

    def __init__(
        self,
        terms: Sequence[str],
        reference: Mapping[str, float] | None = None,
        *,
        c: float = 0.5,
        **treatment: Any,
    ) -> None:
        super().__init__(terms, reference, **treatment)
        c = number(c, "weighting.c")
        try:
            self.rule = aggregation.CAGradWeighting(c)
        except ImportError as error:
            line = str(error).splitlines()[0]
            raise ConfigError(f"weighting.name: cagrad: {line}: pip install cvxpy") from None
