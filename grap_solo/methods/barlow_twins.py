"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): its two terms."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from grap_solo.keys import Key
from grap_solo.methods.composite import CompositeMethod
from grap_solo.methods.losses import Projections, barlow_twins_losses, standardize
from grap_solo.solo.projected import BarlowTwins


class GrapBarlowTwins(CompositeMethod, BarlowTwins):
    """Barlow Twins whose terms are weighted by a ``weighting:`` block instead of constants.

    The terms are computed from the cross-correlation ``c`` of both views' projections:

    - ``on_diagonal``: invariance, ``sum_i (c_ii - 1)^2``;
    - ``off_diagonal``: redundancy reduction, ``sum_ij c_ij^2`` for ``i != j``.

    On several ranks ``c`` is computed from the joined batch, as in the authors' code. solo-learn
    differs: it standardises each rank's batch separately, and its gradient is divided by the number
    of ranks, because no gradient passes its all-reduce.

    Args:
        cfg: see :class:`~grap_solo.methods.composite.CompositeMethod`.

    Raises:
        ConfigError: see :class:`~grap_solo.methods.composite.CompositeMethod`.
    """

    method_keys = {
        "proj_hidden_dim": Key(int, least=1, doc="The width of the projector's hidden layers."),
        "proj_output_dim": Key(int, least=1, doc="The dimension of the projections."),
        "scale_loss": Key(
            float, least=0, default=0.024, doc="The reference weight of `on_diagonal`."
        ),
        "lamb": Key(
            float,
            least=0,
            default=0.0051,
            doc="The reference weight of `off_diagonal`, divided by `scale_loss`.",
        ),
    }
    loss_metric = "train_barlow_loss"

    @staticmethod
    def reference_weights(cfg: DictConfig) -> dict[str, float]:
        """``scale_loss``, and ``scale_loss * lamb``."""
        scale, lamb = cfg.method_kwargs.scale_loss, cfg.method_kwargs.lamb
        return {"on_diagonal": scale, "off_diagonal": scale * lamb}

    def compute_terms(self, projections: Projections, targets: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for k, term in enumerate(("on_diagonal", "off_diagonal")):
            if term in projections and term not in losses:
                views = [standardize(each) for each in projections[term]]
                found = barlow_twins_losses(*views)
                losses[term] = found[k]
                if k == 0 and projections.get("off_diagonal") is projections[term]:
                    losses["off_diagonal"] = found[1]
        return losses
