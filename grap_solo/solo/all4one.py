"""The project's own All4One (Estepa et al. 2023, arXiv 2303.09417): its modules and its queue.

Submodule and buffer names are solo-learn's, so that state dicts move both ways. The terms that
train the modules are in :mod:`grap_solo.methods.all4one`.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.solo import BaseMomentumMethod, prefer_solo_learn
from grap_solo.solo.base import copy_parameters
from grap_solo.solo.projected import build_projector

NEIGHBOURS = 5


def build_predictor(features: int, hidden: int) -> nn.Sequential:
    """Builds two linear layers with batch-norm and a ReLU between them."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, features),
    )


class PositionalEncoding(nn.Module):
    """Adds solo-learn's sinusoids to sequences of ``length`` tokens of ``dim`` features.

    solo-learn exchanges the roles of features and tokens: the feature's number is the position, and
    the tokens are the channels. The buffer ``inv_freq`` has the name that it has in solo-learn.

    Args:
        length: the number of tokens in a sequence.
        dim: the number of features of a token.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        channels = length + length % 2
        self.penc = nn.Module()
        self.penc.penc = nn.Module()
        self.penc.penc.register_buffer(
            "inv_freq",
            1.0 / (10000 ** (torch.arange(0, channels, 2).float() / channels)),
        )
        self.length, self.dim = length, dim
        self._encoding: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodes tokens of shape (B, length, dim); the shape stays."""
        inv_freq: Tensor = self.get_buffer("penc.penc.inv_freq")
        cached = self._encoding
        if cached is None or cached.device != inv_freq.device or cached.dtype != inv_freq.dtype:
            angles = torch.outer(torch.arange(self.dim, device=inv_freq.device), inv_freq)
            pairs = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
            self._encoding = cached = pairs[:, : self.length].T.contiguous()
        return tokens + cached.to(tokens.dtype)


@prefer_solo_learn("all4one")
class All4One(BaseMomentumMethod):
    """The momentum method with All4One's heads and queue.

    Args:
        cfg: see :class:`~grap_solo.solo.base.BaseMomentumMethod`; ``method_kwargs`` holds
            ``temperature``, ``queue_size``, ``proj_hidden_dim``, ``proj_output_dim`` and
            ``pred_hidden_dim``.
    """

    queue: Tensor
    queue_y: Tensor
    queue_ptr: Tensor
    queue_index: Tensor

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        kwargs = self.cfg.method_kwargs
        self.temperature: float = kwargs.temperature
        self.queue_size: int = kwargs.queue_size
        hidden, out = kwargs.proj_hidden_dim, kwargs.proj_output_dim

        self.projector, self.momentum_projector = (
            build_projector(self.features_dim, hidden, out).append(nn.BatchNorm1d(out))
            for _ in range(2)
        )
        copy_parameters(self.projector, self.momentum_projector)
        self.predictor = build_predictor(out, kwargs.pred_hidden_dim)
        self.predictor2 = build_predictor(out, kwargs.pred_hidden_dim)
        layer = nn.TransformerEncoderLayer(
            d_model=out, nhead=8, dim_feedforward=out * 2, dropout=0.1, batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers=3)
        self.pos_enc = PositionalEncoding(NEIGHBOURS, out)

        size = self.queue_size
        self.register_buffer("queue", F.normalize(torch.randn(size, out), dim=1))
        self.register_buffer("queue_y", torch.full((size,), -1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_index", torch.full((size,), -1))

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in solo-learn's defaults."""
        cfg = BaseMomentumMethod.add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs.setdefault("queue_size", 65536)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds the heads' groups. The transformer's learning rate is 0.1 for any batch size."""
        return [
            *super().learnable_params,
            {"params": self.projector.parameters()},
            {"params": self.predictor.parameters()},
            {"params": self.predictor2.parameters()},
            {"params": self.transformer_encoder.parameters(), "lr": 0.1},
        ]

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Adds the projections ``z`` and predictions ``p``, each (B, proj_output_dim)."""
        out = super().forward(X)
        z = self.projector(out["feats"])
        return {**out, "z": z, "p": self.predictor(z)}

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Tensor]:
        """Adds the normalised momentum projections ``z``, (B, proj_output_dim)."""
        out = super().momentum_forward(X)
        return {**out, "z": F.normalize(self.momentum_projector(out["feats"]), dim=-1)}
