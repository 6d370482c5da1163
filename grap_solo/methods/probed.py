"""The online evaluations of a method: the online probe and k-NN, in training and validation, and in
validation whether the embeddings collapse."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grap_solo.distributed import mean_over_ranks
from grap_solo.evaluation.moments import EmbeddingMoments
from grap_solo.evaluation.online import WeightedKNNClassifier, top1_and_top5
from grap_solo.methods.losses import probe_loss
from grap_solo.records.collapse import RANKME, SPREAD
from grap_solo.solo import BaseMethod, BaseMomentumMethod


class ProbedMethod(BaseMethod):
    """A method with online evaluations that ignore labels of -1 and count every image once.

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
        self.cfg.knn_eval.enabled = cfg.knn_eval.enabled = self.knn_eval = knn
        if knn:
            block = self.cfg.knn_eval
            self.knn = WeightedKNNClassifier(k=block.k, distance_fx=block.distance_func)
        self.validated: list[Tensor] = []
        self.moments = EmbeddingMoments()

    def base_training_step(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns ``feats`` (B, D) of one view and the probe's metrics. Runs no heads."""
        feats = self.multicrop_forward(X)["feats"]
        with torch.no_grad():
            return {"feats": feats, **_measure_probe(self.classifier, feats, targets)}

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        assert isinstance(self, BaseMomentumMethod)  # Only that base calls this method.
        out: dict[str, Tensor] = self.momentum_forward(X)
        if self.momentum_classifier is not None:
            out.update(_measure_probe(self.momentum_classifier, out["feats"], targets))
        return out

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measures the probe on a batch ``[images, labels]``, and keeps the features for k-NN."""
        images, labels = batch
        out = self.base_training_step(images, labels)
        metrics = {f"val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
        if not self.trainer.sanity_checking:
            self.moments.update(out["feats"])
        if self.knn_eval and not self.trainer.sanity_checking:
            self.knn.update(test_features=out["feats"].detach(), test_targets=labels)
        if getattr(self, "momentum_classifier", None) is not None:
            out = self._shared_step_momentum(images, labels)
            metrics |= {f"momentum_val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
        means = torch.cat([each.reshape(1) for each in metrics.values()])
        self.validated.append(torch.cat([means, torch.ones_like(means[:1])]) * len(labels))
        self.validated_names = tuple(metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the images of all ranks. Neither solo-learn nor Lightning computes
        them: solo-learn takes the mean of the ranks' means, and Lightning truncates a rank's number
        of images to a whole number."""
        *sums, images = mean_over_ranks(torch.stack(self.validated).sum(0))
        self.validated.clear()
        found = {name: each / images for name, each in zip(self.validated_names, sums, strict=True)}
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
