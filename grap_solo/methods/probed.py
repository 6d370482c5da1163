"""The online evaluations of a method: the online probe or the downstream heads, and k-NN, in
training and validation, and in validation whether the embeddings collapse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grap_solo.distributed import mean_over_ranks
from grap_solo.evaluation.moments import EmbeddingMoments
from grap_solo.evaluation.online import WeightedKNNClassifier, top1_and_top5
from grap_solo.methods.downstream import DownstreamHeads, no_targets_given
from grap_solo.methods.losses import Views, probe_loss
from grap_solo.records.collapse import RANKME, SPREAD
from grap_solo.solo import BaseMethod, BaseMomentumMethod

OF_THE_CLASSIFIER = ("train_class_loss", "train_acc1", "train_acc5")
"""Metrics that the base classes log in training."""


class ProbedMethod(BaseMethod):
    """A method with online evaluations that ignore labels of -1 and count every image once.

    With a ``downstream:`` block the heads of its entries take the place of the online probe. A
    batch then has, in place of labels, each head's targets by its name.

    Each validation also measures the embeddings' RankMe and spread, see
    :class:`~grap_solo.evaluation.moments.EmbeddingMoments`.

    Args:
        cfg: solo-learn's configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        # solo-learn's k-NN metric fails under torchmetrics 1: disable it in the base, build ours.
        knn = OmegaConf.select(cfg, "knn_eval.enabled", default=False)
        OmegaConf.update(cfg, "knn_eval.enabled", False, force_add=True)
        super().__init__(cfg)
        entries = self.cfg.get("downstream")
        if entries is not None:
            self.classifier: nn.Module = DownstreamHeads(self.features_dim, entries)
        self.cfg.knn_eval.enabled = cfg.knn_eval.enabled = self.knn_eval = knn
        if knn:
            block = self.cfg.knn_eval
            self.knn = WeightedKNNClassifier(k=block.k, distance_fx=block.distance_func)
        self.validated: list[Tensor] = []
        self.moments = EmbeddingMoments()

    @property
    def heads_downstream(self) -> DownstreamHeads | None:
        """The heads of the ``downstream:`` block; None without one."""
        return self.classifier if isinstance(self.classifier, DownstreamHeads) else None

    @property
    def online_probe(self) -> nn.Module | None:
        """The online probe; with a ``downstream:`` block the first head that classifies, if any."""
        heads = self.heads_downstream
        return self.classifier if heads is None else heads.classifier

    def labels_of(self, targets: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The labels (B,) of a batch's labels or targets; -1 if no head classifies.

        Raises:
            ConfigError: the batch has labels alone, but there is a ``downstream:`` block.
        """
        heads = self.heads_downstream
        if heads is None:
            assert isinstance(targets, Tensor)
            return targets
        if isinstance(targets, Tensor):
            raise no_targets_given()
        return heads.labels(targets)

    def downstream_loss(self, embeddings: Views, targets: Any) -> Tensor:
        """The probe's loss or, with a ``downstream:`` block, its heads', shape ().

        Args:
            embeddings: one (B, D) for each view.
            targets: labels (B,), or the heads' targets.
        """
        heads = self.heads_downstream
        if heads is not None:
            return heads.loss(embeddings, targets)
        return torch.stack(
            [probe_loss(self.classifier(each), targets) for each in embeddings]
        ).mean()

    def log_dict(self, dictionary: Any, *args: Any, **options: Any) -> None:
        """Leaves out the metrics of a classifier if there is none."""
        if self.online_probe is None:
            dictionary = {k: v for k, v in dictionary.items() if k not in OF_THE_CLASSIFIER}
        super().log_dict(dictionary, *args, **options)

    def base_training_step(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns ``feats`` (B, D) of one view and the probe's metrics. Runs no heads."""
        feats = self.multicrop_forward(X)["feats"]
        if self.online_probe is None:
            nothing = {key: feats.new_zeros(()) for key in ("loss", "acc1", "acc5")}
            return {"feats": feats, **nothing}  # Not logged.
        with torch.no_grad():
            return {"feats": feats, **_measure_probe(self.online_probe, feats, targets)}

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        assert isinstance(self, BaseMomentumMethod)  # Only that base calls this method.
        out: dict[str, Tensor] = self.momentum_forward(X)
        if self.momentum_classifier is not None:
            out.update(_measure_probe(self.momentum_classifier, out["feats"], targets))
        return out

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measures the probe on a batch ``[images, labels]``, and keeps the features for k-NN."""
        images, targets = batch
        labels, heads = self.labels_of(targets), self.heads_downstream
        out = self.base_training_step(images, labels)
        metrics = {}
        if heads is None:
            metrics = {f"val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
        else:
            heads.keep(out["feats"], targets)
        if not self.trainer.sanity_checking:
            self.moments.update(out["feats"])
        if self.knn_eval and not self.trainer.sanity_checking:
            self.knn.update(test_features=out["feats"].detach(), test_targets=labels)
        if getattr(self, "momentum_classifier", None) is not None:
            out = self._shared_step_momentum(images, labels)
            metrics |= {f"momentum_val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
        if metrics:
            means = torch.cat([each.reshape(1) for each in metrics.values()])
            self.validated.append(torch.cat([means, torch.ones_like(means[:1])]) * len(labels))
        self.validated_names = tuple(metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the images of all ranks. Neither solo-learn nor Lightning computes
        them: solo-learn takes the mean of the ranks' means, and Lightning truncates a rank's number
        of images to a whole number."""
        found: dict[str, Any] = {}
        if self.validated:
            *sums, images = mean_over_ranks(torch.stack(self.validated).sum(0))
            self.validated.clear()
            found = {
                name: each / images for name, each in zip(self.validated_names, sums, strict=True)
            }
        if self.heads_downstream is not None:
            found |= self.heads_downstream.measure()
        if self.knn_eval and not self.trainer.sanity_checking:
            acc1, acc5 = self.knn.compute()
            found |= {"val_knn_acc1": acc1, "val_knn_acc5": acc5}
        if not self.trainer.sanity_checking:
            found[RANKME], found[SPREAD] = self.moments.compute()
        self.log_dict(found, sync_dist=True)


def _measure_probe(classifier: nn.Module, feats: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = classifier(feats)
    acc1, acc5 = top1_and_top5(logits, targets)
    return {
        "logits": logits,
        "loss": probe_loss(logits, targets),
        "acc1": acc1,
        "acc5": acc5,
    }
