"""VIbCReg (Lee & Aune 2021, arXiv 2109.00783): VICReg's terms, with a normalised covariance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from grap_solo.keys import Key
from grap_solo.methods.composite import CompositeMethod
from grap_solo.methods.losses import Projections, normalized_covariance, vicreg_terms
from grap_solo.methods.vicreg import GrapVICReg
from grap_solo.solo.vibcreg import IterNorm, VIbCReg


class GrapVIbCReg(CompositeMethod, VIbCReg):
    """VIbCReg whose terms are weighted by a ``weighting:`` block instead of constants.

    The terms are computed from the projections of both views. ``method_kwargs.iternorm`` whitens
    the projections first.

    - ``invariance`` and ``variance``: see :class:`~grap_solo.methods.vicreg.GrapVICReg`;
    - ``covariance``: the mean of the squared correlations of different features, summed over both
      views.

    Args:
        cfg: see :class:`~grap_solo.methods.composite.CompositeMethod`.

    Raises:
        ConfigError: see :class:`~grap_solo.methods.composite.CompositeMethod`.
    """

    method_keys = {
        **GrapVICReg.method_keys,
        "cov_loss_weight": replace(GrapVICReg.method_keys["cov_loss_weight"], default=200.0),
        "iternorm": Key(
            bool, default=False, doc="Whitens the projections by iterative normalisation."
        ),
    }
    loss_metric = "train_vibcreg_loss"
    reference_weights = staticmethod(GrapVICReg.reference_weights)

    def build_networks(self) -> None:
        """Replaces solo-learn's iterative normalisation by ours, which has the same state: theirs
        lets only one gradient through."""
        if self.cfg.method_kwargs.iternorm:
            self.projector[-1] = IterNorm(self.cfg.method_kwargs.proj_output_dim)

    def compute_terms(self, projections: Projections, targets: Any) -> dict[str, Tensor]:
        return vicreg_terms(projections, normalized_covariance)
