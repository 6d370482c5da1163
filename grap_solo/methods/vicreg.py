"""VICReg (Bardes et al. 2022, arXiv 2105.04906): its three terms."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from grap_solo.methods.composite import CompositeMethod, Key
from grap_solo.methods.losses import Projections, covariance, vicreg_terms
from grap_solo.solo.projected import VICReg


class GrapVICReg(CompositeMethod, VICReg):
    """VICReg whose terms are weighted by a ``weighting:`` block instead of constants.

    The terms are computed from the projections of both views (D features):

    - ``invariance``: the mean squared difference of the views;
    - ``variance``: ``mean_j max(0, 1 - std_j)``, a hinge on each feature's standard deviation,
      summed over both views;
    - ``covariance``: ``sum_ij cov_ij^2 / D`` for ``i != j``, summed over both views.

    Args:
        cfg: see :class:`~grap_solo.methods.composite.CompositeMethod`.

    Raises:
        ConfigError: see :class:`~grap_solo.methods.composite.CompositeMethod`.
    """

    method_keys = {
        "proj_hidden_dim": Key(int, 1),
        "proj_output_dim": Key(int, 1),
        "sim_loss_weight": Key(float, 0, 25.0),
        "var_loss_weight": Key(float, 0, 25.0),
        "cov_loss_weight": Key(float, 0, 1.0),
    }
    loss_metric = "train_vicreg_loss"

    @staticmethod
    def reference_weights(cfg: DictConfig) -> dict[str, float]:
        """solo-learn's ``sim_loss_weight``, ``var_loss_weight`` and ``cov_loss_weight``."""
        kwargs = cfg.method_kwargs
        return {
            "invariance": kwargs.sim_loss_weight,
            "variance": kwargs.var_loss_weight,
            "covariance": kwargs.cov_loss_weight,
        }

    def compute_terms(self, projections: Projections, targets: Any) -> dict[str, Tensor]:
        return vicreg_terms(projections, covariance)
