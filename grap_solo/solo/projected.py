"""The networks of VICReg, VIbCReg and Barlow Twins: a backbone and a projector.

Submodule names are solo-learn's, so that state dicts move both ways.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from grap_solo.solo import BaseMethod, prefer_solo_learn


def build_projector(
    features: int, hidden: int, out: int, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Builds three linear layers with batch-norm and an activation between them."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        activation(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        activation(),
        nn.Linear(hidden, out),
    )


class ProjectedMethod(BaseMethod):
    """A backbone and a projector.

    Args:
        cfg: see :class:`~grap_solo.solo.base.BaseMethod`; ``method_kwargs`` holds
            ``proj_hidden_dim`` and ``proj_output_dim``.
    """

    activation: type[nn.Module] = nn.ReLU

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        kwargs = self.cfg.method_kwargs
        hidden, out = kwargs.proj_hidden_dim, kwargs.proj_output_dim
        self.projector = build_projector(self.features_dim, hidden, out, self.activation)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds the projector's group."""
        projector = {"name": "projector", "params": self.projector.parameters()}
        return [*super().learnable_params, projector]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Adds the projections ``z``, (B, proj_output_dim)."""
        out: dict[str, Tensor] = super().forward(X)
        return {**out, "z": self.projector(out["feats"])}


@prefer_solo_learn("vicreg")
class VICReg(ProjectedMethod):
    """The network of VICReg (Bardes et al. 2022, arXiv 2105.04906)."""


@prefer_solo_learn("barlow_twins")
class BarlowTwins(ProjectedMethod):
    """The network of Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230)."""
