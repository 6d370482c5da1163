"""torchjd's Gramian weightings, on the Gramian of the embedding gradients.

Each costs K x K algebra only, since the step has computed the Gramian already.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.weighting.base import Statistics, Weighting, treatment_keys


class GramianWeighting(Weighting):
    """Base of the rules that torchjd has as a function from a Gramian to weights.

    In their sources the shared parameters get the combination as it is (``scale: none``) and
    task-specific parameters their own unweighted gradient (``heads: unweighted``), as in torchjd's
    ``mtl_backward``. The embedding stands for the shared parameters. Weights may be negative.

    The algebra is done on the CPU in float64. A rule that draws random numbers seeds its own stream
    by the number of the step: it changes no other random number, and every process draws the same.
    A Gramian that is not finite, or 0, gives equal weights. Underflowing gradients are zeroed,
    since the solvers divide by their norms.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = treatment_keys(heads="unweighted")
    needs: ClassVar[tuple[str, ...]] = ("train", "torchjd")
    uses_gradients = True

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__(terms, reference, **given)
        self.rule = self.make_rule()
        self.calls = 0

    @abstractmethod
    def make_rule(self) -> Callable[[Tensor], Tensor]:
        """Makes torchjd's function from a Gramian, (K, K), to weights, (K,)."""

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
    """Gradient surgery: projects each gradient off every other gradient that it conflicts with, in
    random order, and adds the results up (Yu et al. 2020, arXiv 2001.06782, Alg. 1)."""

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import PCGradWeighting

        return PCGradWeighting()


class AlignedMTL(GramianWeighting):
    """Independent component alignment: the gradients' principal components are brought to one
    size (Senushkin et al. 2023, arXiv 2305.19000, Alg. 1).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "scale_mode": Key(
            str,
            choices=("min", "median", "rmse"),
            default="min",
            doc="The singular value whose size every principal component gets.",
        ),
        **GramianWeighting.keys,
    }

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import AlignedMTLWeighting

        return AlignedMTLWeighting(scale_mode=self.options["scale_mode"])


def combine_aligned(gramian: Tensor) -> Tensor:
    """The weights of the terms' gradients whose sum has all principal components at the size of the
    least one, shape (K,) (Senushkin et al. 2023, arXiv 2305.19000, Alg. 1).

    They are 1 for a Gramian, (K, K), that is not finite or 0. Computed on the CPU in float64.
    """
    from torchjd.aggregation import AlignedMTLWeighting

    given = gramian.double().cpu()
    size = given.trace()
    if not given.isfinite().all() or size <= 0:
        return torch.ones_like(gramian[0])
    weights = AlignedMTLWeighting()(given / size)  # Of the mean, not of the sum.
    return (len(given) * weights).to(gramian)


class IMTLG(GramianWeighting):
    """Impartial multi-task learning: the combination has equal projections onto every gradient's
    direction (Liu et al. 2021, "Towards Impartial Multi-task Learning", Eq. 3)."""

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import IMTLGWeighting

        return IMTLGWeighting()


class UPGrad(GramianWeighting):
    """The mean of the gradients, each projected onto the cone that conflicts with none (Quinton &
    Rey 2024, arXiv 2406.16232, Section 3)."""

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import UPGradWeighting

        return UPGradWeighting()


class DualProj(GramianWeighting):
    """The mean gradient projected onto the cone that conflicts with none (Lopez-Paz & Ranzato
    2017, arXiv 1706.08840, as in arXiv 2406.16232)."""

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import DualProjWeighting

        return DualProjWeighting()


class FairGrad(GramianWeighting):
    """Alpha-fair utility: ``C w = w^(-1/alpha)`` (Ban & Ji 2024, arXiv 2402.15638, Eq. 4).

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.
    """

    keys = {
        "alpha": Key(
            float,
            above=0,
            default=1.0,
            doc="The fairness, from 0 (plain sum) over 1 (proportional) to infinity (max-min).",
        ),
        **GramianWeighting.keys,
    }

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import FairGradWeighting

        return FairGradWeighting(self.options["alpha"])

    def unscaled(self, weights: Tensor, size: float) -> Tensor:
        alpha: float = self.options["alpha"]
        return weights * size ** (-alpha / (alpha + 1))


class CAGrad(GramianWeighting):
    """Conflict-averse gradient: the best worst-case term within a ball around the mean gradient
    (Liu et al. 2021, arXiv 2110.14048, Alg. 1). It needs cvxpy.

    Args:
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.
        given: :attr:`keys`, by name.

    Raises:
        ConfigError: cvxpy is not installed; see also
            :class:`~grap_solo.weighting.base.Weighting`.
    """

    keys = {
        "c": Key(
            float,
            least=0,
            default=0.5,
            doc="The ball's radius, divided by the mean gradient's norm.",
        ),
        **GramianWeighting.keys,
    }
    needs = ("cagrad", "torchjd", "cvxpy")

    def make_rule(self) -> Callable[[Tensor], Tensor]:
        from torchjd.aggregation import CAGradWeighting

        return CAGradWeighting(self.options["c"])
