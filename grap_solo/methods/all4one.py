"""All4One (Estepa et al. 2023, arXiv 2303.09417): its four terms, their targets and the queue."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.balance import Step
from grap_solo.distributed import gather
from grap_solo.errors import ConfigError
from grap_solo.keys import Key
from grap_solo.methods.composite import CompositeMethod
from grap_solo.methods.losses import Projections, Views, contrast, correlation_losses
from grap_solo.solo.all4one import NEIGHBOURS, All4One

ATTENTION_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Targets:
    """The targets of one step's terms, all without gradient.

    Attributes:
        neighbours: for each view, the 5 queue entries nearest to each sample,
            (B, 5, proj_output_dim); empty if no term needs neighbours.
        momentum: for each term with a momentum target, the normalised momentum projections of
            each view, (B, proj_output_dim).
        nearest: for each sample of the first view, the index in the queue of its nearest entry,
            (B,); None if no term needs neighbours.
    """

    neighbours: Views
    momentum: dict[str, Views]
    nearest: Tensor | None = None


class GrapAll4One(CompositeMethod, All4One):
    """All4One whose terms are weighted by a ``weighting:`` block instead of constants.

    The terms, each a mean over the batch and over both views:

    - ``nnclr``: contrasts the predictor's output with the nearest neighbour in the queue;
    - ``attn_nnclr``: runs the transformer over 5 neighbours, and over the sequence that the
      second predictor's output and 4 neighbours form, and contrasts the first tokens of the two;
    - ``byol``: invariance, the diagonal of the cross-correlation with the momentum projections,
      ``sqrt(mean (c_ii - 1)^2)``;
    - ``barlow``: redundancy reduction, the off-diagonal of the same, ``sqrt(mean c_ij^2)``;
    - ``feature``: ``(byol + barlow) / 2``, which replaces the two.

    Args:
        cfg: see :class:`~grap_solo.methods.composite.CompositeMethod`.
            ``method_kwargs.join_feature_loss`` replaces ``byol`` and ``barlow`` by ``feature``.
            With ``method_kwargs.separate_projectors``, ``nnclr`` uses All4One's own projector,
            which also fills the queue that both neighbour terms read; every other term gets a
            projector of its own, and all of these but ``attn_nnclr``'s a momentum copy.

    Raises:
        ConfigError: see :class:`~grap_solo.methods.composite.CompositeMethod`; or if projectors
            are separate and ``attn_nnclr`` has weight while ``nnclr`` has none.
    """

    method_keys = {
        "temperature": Key(float, above=0, doc="The temperature of the neighbour contrast."),
        "proj_hidden_dim": Key(int, least=1, doc="The width of the projector's hidden layers."),
        "proj_output_dim": Key(
            int, least=1, doc="The dimension of the projections; a multiple of 8."
        ),
        "pred_hidden_dim": Key(int, least=1, doc="The width of the predictors' hidden layer."),
        "queue_size": Key(
            int, least=NEIGHBOURS, default=65536, doc="The number of projections in the queue."
        ),
        "join_feature_loss": Key(
            bool,
            default=False,
            doc="Joins `byol` and `barlow` into one term, `feature`, as the authors of GraP do.",
        ),
    }
    loss_metric = "train_comb_loss"
    term_metrics = {"attn_nnclr": "train_att_nnclr_loss"}

    queue: Tensor
    queue_y: Tensor
    queue_ptr: Tensor
    queue_index: Tensor

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        for module in self.pos_enc.modules():
            # solo-learn's buffer has the shape of the last batch: it must not be saved or averaged.
            if hasattr(module, "cached_penc"):
                del module.cached_penc
                vars(module)["cached_penc"] = None
        if self.separate and {"nnclr", "attn_nnclr"} & set(self.weighting.active) == {"attn_nnclr"}:
            raise ConfigError(
                "weighting.weights.nnclr: with separate projectors, the queue that attn_nnclr "
                "reads is filled by nnclr's projector: give nnclr some weight, or attn_nnclr none"
            )
        self.momentum_projectors = nn.ModuleDict(
            {
                term: copy.deepcopy(projector).requires_grad_(False)
                for term, projector in self.projectors.items()
                if term != "attn_nnclr"
            }
        )

    @staticmethod
    def reference_weights(cfg: DictConfig) -> dict[str, float]:
        """The weights with which All4One sums its terms."""
        if cfg.method_kwargs.join_feature_loss:
            return {"nnclr": 0.5, "attn_nnclr": 0.5, "feature": 5.0}
        return {"nnclr": 0.5, "attn_nnclr": 0.5, "byol": 2.5, "barlow": 2.5}

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        dim = cfg.method_kwargs.proj_output_dim
        if dim % 8:
            raise ConfigError(
                f"method_kwargs.proj_output_dim: {dim} cannot be divided among the transformer's 8 "
                "attention heads: use a multiple of 8"
            )

    def heads(self) -> dict[str, Sequence[nn.Module]]:
        return {
            "nnclr": [self.predictor],
            "attn_nnclr": [self.predictor2, self.transformer_encoder],
        }

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        """The base's pairs, and the separate projectors with their momentum copies."""
        separate = [(self.projectors[k], m) for k, m in self.momentum_projectors.items()]
        return [*super().momentum_pairs, *separate]

    # ---- the terms ----------------------------------------------------------------------------

    def make_targets(self, outputs: Mapping[str, Any]) -> Targets:
        """Returns the momentum projections and, if a term needs them, the queue's neighbours."""
        views, feats = outputs["momentum_z"], outputs["momentum_feats"]
        momentum: dict[str, Views] = {
            term: [F.normalize(projector(each), dim=-1) for each in feats]
            for term, projector in self.momentum_projectors.items()
        }
        for term in ("byol", "barlow", "feature"):
            momentum.setdefault(term, list(views))
        if not {"nnclr", "attn_nnclr"} & set(self.weighting.active):
            return Targets([], momentum)
        found = (torch.cat(list(views)) @ self.queue.T).topk(NEIGHBOURS, dim=1).indices
        by_view = found.chunk(len(views))
        return Targets([self.queue[each] for each in by_view], momentum, by_view[0][:, 0])

    def compute_terms(self, projections: Projections, targets: Targets) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if "nnclr" in projections:
            first, second = targets.neighbours
            p1, p2 = (self.predictor(each) for each in projections["nnclr"])
            losses["nnclr"] = (
                contrast(first[:, 0], p2, self.temperature)
                + contrast(second[:, 0], p1, self.temperature)
            ) / 2
        if "attn_nnclr" in projections:
            losses["attn_nnclr"] = self._attention_term(
                projections["attn_nnclr"], targets.neighbours
            )
        if "feature" in projections:
            both = correlation_losses(projections["feature"], targets.momentum["feature"])
            losses["feature"] = (both[0] + both[1]) / 2
        for k, term in enumerate(("byol", "barlow")):
            if term in projections and term not in losses:
                found = correlation_losses(projections[term], targets.momentum[term])
                losses[term] = found[k]
                if k == 0 and projections.get("barlow") is projections[term]:
                    losses["barlow"] = found[1]
        return losses

    def _attention_term(self, projections: Views, neighbours: Views) -> Tensor:
        """Contrasts each view's centroid with the other view's shifted sequence, shape ()."""
        shifted = [
            torch.cat([self.predictor2(z)[:, None], near], dim=1)[:, :NEIGHBOURS]
            for z, near in zip(projections, neighbours, strict=True)
        ]
        tokens = [
            self.transformer_encoder(self.pos_enc(sequence))[:, 0]
            for sequence in (*neighbours, *shifted)
        ]
        centroid1, centroid2, shifted1, shifted2 = tokens
        return (
            contrast(centroid1, shifted2, ATTENTION_TEMPERATURE)
            + contrast(centroid2, shifted1, ATTENTION_TEMPERATURE)
        ) / 2

    # ---- after the step -----------------------------------------------------------------------

    def after_step(
        self, step: Step, outputs: Mapping[str, Any], targets: Targets | None, batch: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Fills the queue, and returns those of solo-learn's All4One metrics that the active terms
        allow."""
        if targets is None:
            return {}
        indexes, _, labels = batch
        losses, metrics = step.losses, {}
        if "feature" in losses:
            metrics["train_feature_loss"] = 10 * losses["feature"]
        elif "byol" in losses and "barlow" in losses:
            metrics["train_feature_loss"] = 5 * (losses["byol"] + losses["barlow"])
        if targets.nearest is not None:
            known = labels >= 0
            hits = known & (labels == self.queue_y[targets.nearest])
            metrics["train_nn_acc"] = hits.sum() / known.sum().clamp(min=1)
        self.dequeue_and_enqueue(outputs["momentum_z"][0], labels, indexes)
        return metrics

    @torch.no_grad()
    def dequeue_and_enqueue(self, z: Tensor, y: Tensor, idx: Tensor) -> None:
        """Replaces the oldest entries of the queue by a batch. Any two sizes work.

        Args:
            z: normalised momentum projections, (B, proj_output_dim).
            y: labels, (B,).
            idx: the samples' indexes in the dataset, (B,).
        """
        size = len(self.queue)
        z, y, idx = (gather(each)[-size:] for each in (z, y, idx))
        slots = (self.queue_ptr + torch.arange(len(z), device=z.device)) % size
        self.queue[slots] = z.to(self.queue.dtype)
        self.queue_y[slots] = y
        self.queue_index[slots] = idx
        self.queue_ptr.add_(len(z)).remainder_(size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the positional encoding of a batch, which solo-learn's checkpoints hold."""
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.endswith("cached_penc")]:
            del state[key]
