"""VICReg (Bardes et al. 2022, arXiv 2105.04906): its three terms."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.methods.composite import CompositeMethod
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
        "proj_hidden_dim": Key(int, least=1, doc="The width of the projector's hidden layers."),
        "proj_output_dim": Key(int, least=1, doc="The dimension of the projections."),
        "sim_loss_weight": Key(
            float, least=0, default=25.0, doc="The reference weight of `invariance`."
        ),
        "var_loss_weight": Key(
            float, least=0, default=25.0, doc="The reference weight of `variance`."
        ),
        "cov_loss_weight": Key(
            float, least=0, default=1.0, doc="The reference weight of `covariance`."
        ),
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
