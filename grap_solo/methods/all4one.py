"""All4One (Estepa et al. 2023, arXiv 2303.09417) with its four terms exposed.

Written once, above solo-learn's All4One or the project's own: :mod:`grap_solo.solo` decides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.balance import SharedHead, Step, balance
from grap_solo.methods.losses import Views, contrast, correlation_losses, gather, probe_loss
from grap_solo.metrics import WeightedKNNClassifier, accuracy_at_k
from grap_solo.solo import All4One, register_backbone
from grap_solo.trajectory import TrajectoryRecorder
from grap_solo.weighting import build_weighting

REFERENCE = {"nnclr": 0.5, "attn_nnclr": 0.5, "byol": 2.5, "barlow": 2.5}
"""The weights with which All4One adds its terms up."""

JOINED_REFERENCE = {"nnclr": 0.5, "attn_nnclr": 0.5, "feature": 5.0}
"""The same loss with three terms: ``feature`` is the mean of ``byol`` and ``barlow``."""

NEIGHBOURS = 5
ATTENTION_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Targets:
    """What one step's terms compare with; no gradient flows into any of it.

    Attributes:
        neighbours: for each view, the queue's entries nearest to it, (B, 5, proj_output_dim).
        momentum: for each term that has a momentum target, its normalised projections of each
            view, (B, proj_output_dim).
    """

    neighbours: Views
    momentum: dict[str, Views]


class GrapAll4One(All4One):
    """All4One whose terms are weighted by a ``weighting:`` block instead of constants.

    The terms, each a mean over the batch and over both views:

    - ``nnclr``: contrasts the predictor's output with the nearest neighbour in the queue;
    - ``attn_nnclr``: contrasts the transformer's first token over 5 neighbours with that over the
      sequence shifted by the second predictor's output;
    - ``byol``: invariance, the diagonal of the cross-correlation with the momentum projections,
      ``sqrt(mean (c_ii - 1)^2)``;
    - ``barlow``: redundancy reduction, its off-diagonal, ``sqrt(mean c_ij^2)``;
    - ``feature``: ``(byol + barlow) / 2``, in place of the two.

    The downstream head is the online probe. Labels of -1 are ignored.

    Args:
        cfg: solo-learn's configuration of All4One, and besides it

            - ``weighting``: see :func:`~grap_solo.weighting.build_weighting`; GraP when absent;
            - ``method_kwargs.join_feature_loss``: ``feature`` in place of ``byol``, ``barlow``;
            - ``method_kwargs.separate_projectors``: a projector for each term. ``nnclr`` has
              All4One's own, which feeds the queue that both neighbour terms read; ``attn_nnclr``
              has an online one; the others have an online one and its momentum copy.

    Raises:
        ConfigError: a ``weighting`` block that cannot be used, or an unknown backbone.
    """

    queue: Tensor
    queue_y: Tensor
    queue_ptr: Tensor
    queue_index: Tensor

    def __init__(self, cfg: DictConfig) -> None:
        register_backbone(cfg.backbone.name)
        # solo-learn's own k-NN metric cannot be made with torchmetrics 1: neither base makes one.
        knn = OmegaConf.select(cfg, "knn_eval.enabled", default=False)
        OmegaConf.update(cfg, "knn_eval.enabled", False, force_add=True)
        super().__init__(cfg)
        self.cfg.knn_eval.enabled = cfg.knn_eval.enabled = self.knn_eval = knn
        if knn:
            block = self.cfg.knn_eval
            self.knn = WeightedKNNClassifier(k=block.k, distance_fx=block.distance_func)

        for module in self.pos_enc.modules():  # solo-learn's would save a batch's encoding.
            if hasattr(module, "cached_penc"):
                module.register_buffer("cached_penc", None, persistent=False)

        kwargs = self.cfg.method_kwargs
        self.joined: bool = kwargs.join_feature_loss
        reference = JOINED_REFERENCE if self.joined else REFERENCE
        block = OmegaConf.to_container(self.cfg.weighting, resolve=True)
        self.weighting = build_weighting(block, tuple(reference), reference)  # type: ignore[arg-type]

        weighted = getattr(self.weighting, "shared_heads", "sum") == "weights"
        shares = weighted and not kwargs.separate_projectors
        self.shared = SharedHead(self.weighting.terms) if shares else None
        self.projectors, self.momentum_projectors = nn.ModuleDict(), nn.ModuleDict()
        if kwargs.separate_projectors:
            for term in self.weighting.terms[1:]:
                self.projectors[term] = _fresh_copy(self.projector)
                if term != "attn_nnclr":
                    momentum = copy.deepcopy(self.projectors[term]).requires_grad_(False)
                    self.momentum_projectors[term] = momentum
        self.effective_weights: Tensor = self.weighting.reference

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in the defaults of both bases' keys and of those above."""
        cfg = All4One.add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs.setdefault("join_feature_loss", False)
        cfg.method_kwargs.setdefault("separate_projectors", False)
        cfg.setdefault("weighting", {"name": "grap"})
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The base's parameter groups and the separate projectors'."""
        separate = [{"params": each.parameters()} for each in self.projectors.values()]
        return [*super().learnable_params, *separate]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        """The base's pairs and the separate projectors'."""
        separate = [(self.projectors[k], m) for k, m in self.momentum_projectors.items()]
        return [*super().momentum_pairs, *separate]

    def configure_callbacks(self) -> list[Callback]:
        """Records the effective weights, whichever script trains."""
        return [TrajectoryRecorder()]

    # ---- one step ---------------------------------------------------------------------------

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """One step's scalar, whose backward is the weighting's step, from a batch of both views.

        Args:
            batch: ``[indexes, [view1, view2], labels]``.
            batch_idx: not used.
        """
        indexes, _, labels = batch
        # The base embeds both views with both networks and logs the probe's metrics.
        out = super(All4One, self).training_step(batch, batch_idx)
        projections: dict[str, Views] = {}
        nearest, targets = self._targets(out["momentum_z"], out["momentum_feats"])

        def terms(*embeddings: Tensor) -> dict[str, Tensor]:
            projections.update(self._project(embeddings))
            return self._terms(projections, targets)

        def downstream(*embeddings: Tensor) -> Tensor:
            losses = [probe_loss(self.classifier(each), labels) for each in embeddings]
            return torch.stack(losses).mean()

        self.weighting.train(self.current_epoch >= self.weighting.warmup_epochs)
        step = balance(out["feats"], terms, downstream, self.weighting, self.shared)
        self.effective_weights = step.weights
        nn_acc = (labels == self.queue_y[nearest]).sum() / len(labels)
        self.dequeue_and_enqueue(out["momentum_z"][0], labels, indexes)
        self._log_step(step, nn_acc, projections["nnclr"])
        return step.loss + out.get("momentum_loss", 0)

    @torch.no_grad()
    def _targets(self, momentum_z: Views, momentum_feats: Views) -> tuple[Tensor, Targets]:
        """The nearest queue entry of each sample of the first view, (B,), and the targets."""
        found = (torch.cat(list(momentum_z)) @ self.queue.T).topk(NEIGHBOURS, dim=1).indices
        by_view = found.chunk(len(momentum_z))
        momentum: dict[str, Views] = {
            term: [F.normalize(projector(each), dim=-1) for each in momentum_feats]
            for term, projector in self.momentum_projectors.items()
        }
        for term in ("byol", "barlow", "feature"):
            momentum.setdefault(term, list(momentum_z))
        return by_view[0][:, 0], Targets([self.queue[each] for each in by_view], momentum)

    def _project(self, embeddings: Views) -> dict[str, Views]:
        """Each term's projections of both views, (B, proj_output_dim)."""
        common = [self.projector(each) for each in embeddings]
        views: dict[str, Views] = {}
        for term in self.weighting.terms:
            if term in self.projectors:
                views[term] = [self.projectors[term](each) for each in embeddings]
            elif self.shared is not None:
                views[term] = [self.shared(each, term) for each in common]
            else:
                views[term] = common
        return views

    def _terms(self, projections: dict[str, Views], targets: Targets) -> dict[str, Tensor]:
        """The terms' losses by name, each shape ()."""
        first, second = targets.neighbours
        p1, p2 = (self.predictor(each) for each in projections["nnclr"])
        losses = {
            "nnclr": (
                contrast(first[:, 0], p2, self.temperature)
                + contrast(second[:, 0], p1, self.temperature)
            )
            / 2,
            "attn_nnclr": self._attention_term(projections["attn_nnclr"], targets.neighbours),
        }
        if self.joined:
            diagonal, off_diagonal = correlation_losses(
                projections["feature"], targets.momentum["feature"]
            )
            losses["feature"] = (diagonal + off_diagonal) / 2
        else:
            losses["byol"], losses["barlow"] = correlation_losses(
                projections["byol"], targets.momentum["byol"]
            )
            if projections["barlow"] is not projections["byol"]:
                _, losses["barlow"] = correlation_losses(
                    projections["barlow"], targets.momentum["barlow"]
                )
        return losses

    def _attention_term(self, projections: Views, neighbours: Views) -> Tensor:
        """Both views' centroids against the other view's shifted sequence, shape ()."""
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

    @torch.no_grad()
    def _log_step(self, step: Step, nn_acc: Tensor, projections: Views) -> None:
        """solo-learn's metrics of All4One, and the weighting's."""
        losses = step.losses
        if self.joined:
            feature = 10 * losses["feature"]
        else:
            feature = 5 * (losses["byol"] + losses["barlow"])
        stds = [F.normalize(each, dim=-1).std(dim=0).mean() for each in projections]
        metrics = {
            "train_comb_loss": step.statistics.losses @ self.weighting.reference.to(feature),
            "train_nnclr_loss": losses["nnclr"],
            "train_att_nnclr_loss": losses["attn_nnclr"],
            "train_feature_loss": feature,
            "train_nn_acc": nn_acc,
            "train_z_std": torch.stack(stds).mean(),
        }
        if not self.joined:
            metrics |= {f"train_{term}_loss": losses[term] for term in ("byol", "barlow")}
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        weighting = {
            f"weight/{term}": weight
            for term, weight in zip(self.weighting.terms, step.weights, strict=True)
        }
        if step.alignment is not None:
            weighting["alignment"] = step.alignment.nan_to_num()
        self.log_dict(weighting)

    # ---- what the base calls ----------------------------------------------------------------

    def base_training_step(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``feats`` (B, D) of one view and the probe's metrics, without the heads."""
        feats = self.multicrop_forward(X)["feats"]
        with torch.no_grad():
            return {"feats": feats, **_probe(self.classifier, feats, targets)}

    base_validation_step = base_training_step

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.momentum_forward(X)
        if self.momentum_classifier is not None:
            out.update(_probe(self.momentum_classifier, out["feats"], targets))
        return out

    @torch.no_grad()
    def dequeue_and_enqueue(self, z: Tensor, y: Tensor, idx: Tensor) -> None:
        """Puts a batch into the queue, whatever their sizes, in place of its oldest entries.

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

    # ---- checkpoints ------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Continues the momentum schedule where a checkpoint left it."""
        super().on_train_start()
        self.last_step = self.trainer.global_step
        if self.last_step:
            self.momentum_updater.update_tau(
                self.last_step, int(self.trainer.estimated_stepping_batches)
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes solo-learn's checkpoints too, which hold a batch's positional encoding."""
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.endswith("cached_penc")]:
            del state[key]


def _probe(classifier: nn.Module, feats: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = classifier(feats)
    acc1, acc5 = accuracy_at_k(logits, targets)
    return {
        "logits": logits,
        "loss": probe_loss(logits, targets),
        "acc1": acc1,
        "acc5": acc5,
    }


def _fresh_copy(module: nn.Module) -> nn.Module:
    """The same architecture with an initialisation of its own."""
    fresh = copy.deepcopy(module)
    for each in fresh.modules():
        reset: Any = getattr(each, "reset_parameters", None)
        if reset is not None:
            reset()
    return fresh
