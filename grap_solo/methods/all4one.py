"""All4One (Estepa et al. 2023, arXiv 2303.09417) with its four terms exposed.

Written once, above solo-learn's All4One or the project's own: :mod:`grap_solo.solo` decides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grap_solo.balance import HeldOut, SharedHead, Step, balance
from grap_solo.diagnostics import diagnose, diagnostic_names, parameter_space_cosine
from grap_solo.distributed import gather, mean_over_processes
from grap_solo.errors import ConfigError, RunStopped
from grap_solo.methods.losses import Views, contrast, correlation_losses, probe_loss
from grap_solo.metrics import WeightedKNNClassifier, accuracy_at_k
from grap_solo.solo import All4One, register_backbone
from grap_solo.solo.base import MomentumUpdater, lars
from grap_solo.trajectory import TrajectoryRecorder
from grap_solo.weighting import CAUSES, build_weighting

REFERENCE = {"nnclr": 0.5, "attn_nnclr": 0.5, "byol": 2.5, "barlow": 2.5}
"""The weights with which All4One adds its terms up."""

JOINED_REFERENCE = {"nnclr": 0.5, "attn_nnclr": 0.5, "feature": 5.0}
"""The same loss with three terms: ``feature`` is the mean of ``byol`` and ``barlow``."""

LOGGED = {"attn_nnclr": "att_nnclr"}
"""solo-learn's names of losses, where they are not the terms'."""

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
            - ``diagnostics.parameter_space_every``: steps between two measurements of
              :func:`~grap_solo.diagnostics.parameter_space_cosine`; 0, the default, for none;
            - ``diagnostics.max_skipped_steps``: how many steps in a row may be left out because
              their loss or gradients are not finite, before the run is stopped;
            - ``performance.compile``: whether ``torch.compile`` compiles the backbone and the
              momentum networks. The other heads are left as they are: a compiled one computes
              its parameters' gradients in each of the K inner passes too;
            - ``method_kwargs.join_feature_loss``: ``feature`` in place of ``byol``, ``barlow``;
            - ``method_kwargs.separate_projectors``: a projector for each term. ``nnclr`` has
              All4One's own, which feeds the queue that both neighbour terms read; ``attn_nnclr``
              has an online one; the others have an online one and its momentum copy.

    Raises:
        ConfigError: a ``weighting`` block that cannot be used, or an unknown backbone.
    """

    _OPTIMIZERS = {**All4One._OPTIMIZERS, "lars": lars}

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
        momentum = self.cfg.momentum
        self.momentum_updater = MomentumUpdater(momentum.base_tau, momentum.final_tau)
        if knn:
            block = self.cfg.knn_eval
            self.knn = WeightedKNNClassifier(k=block.k, distance_fx=block.distance_func)

        for module in self.pos_enc.modules():
            if hasattr(module, "cached_penc"):  # solo-learn's buffer, which would be saved and
                del module.cached_penc  # averaged, has the shape of the last batch.
                module.cached_penc = None

        kwargs = self.cfg.method_kwargs
        self.joined: bool = kwargs.join_feature_loss
        reference = JOINED_REFERENCE if self.joined else REFERENCE
        rule: Any = OmegaConf.to_container(self.cfg.weighting, resolve=True)
        self.weighting = build_weighting(rule, tuple(reference), reference)

        weighted = self.weighting.needs_gradients and self.weighting.shared_heads == "weights"
        shares = weighted and not kwargs.separate_projectors
        self.shared = SharedHead(self.weighting.terms) if shares else None
        self.projectors, self.momentum_projectors = nn.ModuleDict(), nn.ModuleDict()
        if kwargs.separate_projectors:
            for term in self.weighting.terms[1:]:
                self.projectors[term] = _fresh_copy(self.projector)
                if term != "attn_nnclr":
                    momentum = copy.deepcopy(self.projectors[term]).requires_grad_(False)
                    self.momentum_projectors[term] = momentum
        self._freeze_what_no_term_uses()
        if self.cfg.performance.compile:  # In their place: state dicts keep their names.
            for network in (self.backbone, self.momentum_backbone, self.momentum_projector):
                network.compile()
        self.parameter_space_every: int = self.cfg.diagnostics.parameter_space_every
        self.max_skipped_steps: int = self.cfg.diagnostics.max_skipped_steps
        self.skipped_in_a_row = 0
        self.validated: list[Tensor] = []
        self.effective_weights: Tensor = self.weighting.reference
        self.shown_weights: list[float] = self.weighting.reference.tolist()
        self.diagnostics: dict[str, Tensor] = {}
        self._losses_again: Callable[[], dict[str, Tensor]] | None = None

    def _freeze_what_no_term_uses(self) -> None:
        """A head without a term gets no gradient: neither DDP nor the optimiser waits for one."""
        active = self.weighting.active
        separate = self.cfg.method_kwargs.separate_projectors
        if separate and "nnclr" not in active and "attn_nnclr" in active:
            raise ConfigError(
                "weighting.weights.nnclr: with separate projectors its projector feeds the queue "
                "that attn_nnclr reads: give it some weight, or attn_nnclr none"
            )
        heads: dict[str, list[nn.Module]] = {
            "nnclr": [self.predictor],
            "attn_nnclr": [self.predictor2, self.transformer_encoder],
        }
        for term in self.weighting.terms:
            own = [self.projectors[term]] if term in self.projectors else []
            if term not in active:
                for module in [*heads.get(term, []), *own]:
                    module.requires_grad_(False)
        if not active or (separate and "nnclr" not in active):
            self.projector.requires_grad_(False)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in the defaults of both bases' keys and of those above."""
        cfg = All4One.add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs.setdefault("join_feature_loss", False)
        cfg.method_kwargs.setdefault("separate_projectors", False)
        cfg.setdefault("weighting", {"name": "grap"})
        cfg.setdefault("performance", {})
        cfg.performance.setdefault("compile", False)
        cfg.setdefault("diagnostics", {})
        cfg.diagnostics.setdefault("parameter_space_every", 0)
        cfg.diagnostics.setdefault("max_skipped_steps", 100)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The base's parameter groups, the separate projectors' and the weighting's, if any."""
        groups: list[dict[str, Any]] = [
            {"params": each.parameters()} for each in self.projectors.values()
        ]
        learned = list(self.weighting.parameters())
        if learned:
            groups.append({"params": learned, "weight_decay": 0})
        return [*super().learnable_params, *groups]

    @property
    def momentum_pairs(self) -> list[tuple[Any, Any]]:
        """The base's pairs and the separate projectors'."""
        separate = [(self.projectors[k], m) for k, m in self.momentum_projectors.items()]
        return [*super().momentum_pairs, *separate]

    def configure_callbacks(self) -> list[Callback]:
        """Records the effective weights, whichever script trains."""
        return [TrajectoryRecorder()]

    # ---- one step ---------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One step's scalar, whose backward is the weighting's step, from a batch of both views.

        None where it is not finite: the optimiser then changes nothing.

        Args:
            batch: ``[indexes, [view1, view2], labels]``; or one of these for ``train`` and one
                for ``labelled``, a batch that is held out from the terms' training.
            batch_idx: the batch's place in the epoch.

        Raises:
            RunStopped: too many steps in a row that are not finite.
        """
        labelled = None
        if isinstance(batch, Mapping):
            batch, labelled = batch["train"], batch["labelled"]
        indexes, views, labels = batch
        # The base embeds both views with both networks and logs the probe's metrics.
        out = super(All4One, self).training_step(batch, batch_idx)
        nearest, targets = self._targets(out.get("momentum_z", []), out.get("momentum_feats", []))
        held_out = None if labelled is None else self._held_out(labelled[1])
        projections: dict[str, Views] = {}
        down: list[Tensor] = []

        def terms(*embeddings: Tensor) -> dict[str, Tensor]:
            projections.update(self._project(embeddings))
            return self._terms(projections, targets)

        def downstream(*embeddings: Tensor) -> Tensor:
            truth = labels if labelled is None else labelled[2]
            losses = [probe_loss(self.classifier(each), truth) for each in embeddings]
            down[:] = [*embeddings, torch.stack(losses).mean()]
            return down[-1]

        self.weighting.train(self.current_epoch >= self.weighting.warmup_epochs)
        if batch_idx == 0 and self.current_epoch:
            self.weighting.end_epoch()  # Here, a checkpoint of the epoch before is without it.
        step = balance(out["feats"], terms, downstream, self.weighting, self.shared, held_out)
        if not self._is_usable(step):
            return None
        self._diagnose(step, down, out["feats"], labelled is not None)
        if self.weighting.needs_losses_after:
            self._losses_again = lambda: self._terms(
                self._project([self.multicrop_forward(each)["feats"] for each in views]), targets
            )
        nn_acc = None
        if nearest is not None:
            known = labels >= 0
            hits = known & (labels == self.queue_y[nearest])
            nn_acc = hits.sum() / known.sum().clamp(min=1)
        if targets.momentum:
            self.dequeue_and_enqueue(out["momentum_z"][0], labels, indexes)
        self._log_step(step, nn_acc, projections)
        if labelled is not None:
            self._log_labelled(down, labelled[2])
        return step.loss + out.get("momentum_loss", 0)

    def _is_usable(self, step: Step) -> bool:
        """Whether a step is finite in every process. Asking is the only wait for a GPU, if the rule
        is computed there: what else the host wants to know of the step comes along."""
        self.log("skipped/step", (~step.finite).float(), on_step=False, on_epoch=True, batch_size=1)
        finite, *weights = torch.cat([step.finite.to(step.weights)[None], step.weights]).tolist()
        if finite:
            self.skipped_in_a_row = 0
            self.effective_weights, self.shown_weights = step.weights, weights
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped_steps:
            losses = {**step.losses, "the probe's loss": step.downstream}
            bad = [name for name, each in losses.items() if not each.isfinite()]
            raise RunStopped(
                f"diagnostics.max_skipped_steps: {self.skipped_in_a_row} steps in a row were not "
                f"finite ({', '.join(bad) or 'gradients'}): the run is stopped, and its "
                "checkpoints are from before; try a lower optimizer.lr, or 32-true precision"
            )
        return False

    @torch.no_grad()
    def _targets(self, momentum_z: Views, momentum_feats: Views) -> tuple[Tensor | None, Targets]:
        """The nearest queue entry of each sample of the first view, (B,), and the targets.

        Nothing is searched for where no term needs neighbours.
        """
        if not momentum_z:
            return None, Targets([], {})
        momentum: dict[str, Views] = {
            term: [F.normalize(projector(each), dim=-1) for each in momentum_feats]
            for term, projector in self.momentum_projectors.items()
        }
        for term in ("byol", "barlow", "feature"):
            momentum.setdefault(term, list(momentum_z))
        if not {"nnclr", "attn_nnclr"} & set(self.weighting.active):
            return None, Targets([], momentum)
        found = (torch.cat(list(momentum_z)) @ self.queue.T).topk(NEIGHBOURS, dim=1).indices
        by_view = found.chunk(len(momentum_z))
        return by_view[0][:, 0], Targets([self.queue[each] for each in by_view], momentum)

    def _held_out(self, views: Views) -> HeldOut:
        """A labelled batch's embeddings and terms; no parameter, running statistic or queue entry
        comes to depend on it."""
        with torch.no_grad(), frozen_statistics(self):
            embeddings = [self.multicrop_forward(each)["feats"] for each in views]
            if not self.weighting.needs_gradients:
                return HeldOut(embeddings, lambda *leaves: {})  # They train the probe alone.
            momentum = [self.momentum_forward(each) for each in views]
            _, targets = self._targets(
                [each["z"] for each in momentum], [each["feats"] for each in momentum]
            )

        def terms(*leaves: Tensor) -> dict[str, Tensor]:
            with frozen_statistics(self):
                return self._terms(self._project(leaves), targets)

        return HeldOut(embeddings, terms)

    def _diagnose(self, step: Step, down: list[Tensor], feats: Views, held_out: bool) -> None:
        """What the gradients say about each other, for whoever records it."""
        found = diagnose(step)
        if found is None:
            return
        self.diagnostics = dict(zip(diagnostic_names(self.weighting.terms), found, strict=True))
        every = self.parameter_space_every
        if every:
            cosine = found.new_tensor(torch.nan)
            if self.global_step % every == 0 and not held_out:
                *leaves, loss = down
                target = torch.autograd.grad(loss, leaves, retain_graph=True)
                cosine = parameter_space_cosine(step, target, feats, self.backbone)
            self.diagnostics["parameter_space"] = cosine

    def _project(self, embeddings: Views) -> dict[str, Views]:
        """Each active term's projections of both views, (B, proj_output_dim)."""
        active = self.weighting.active
        common: Views = []
        if any(term not in self.projectors for term in active):
            common = [self.projector(each) for each in embeddings]
        views: dict[str, Views] = {}
        for term in active:
            if term in self.projectors:
                views[term] = [self.projectors[term](each) for each in embeddings]
            elif self.shared is not None:
                views[term] = [self.shared(each, term) for each in common]
            else:
                views[term] = common
        return views

    def _terms(self, projections: dict[str, Views], targets: Targets) -> dict[str, Tensor]:
        """The active terms' losses by name, each shape ()."""
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
    def _log_labelled(self, down: list[Tensor], labels: Tensor) -> None:
        """The probe on a held-out batch, from its embeddings and, last, its loss."""
        *embeddings, loss = down
        accuracies = [accuracy_at_k(self.classifier(each), labels)[0] for each in embeddings]
        metrics = {"train_labelled_loss": loss, "train_labelled_acc1": torch.cat(accuracies).mean()}
        self.log_dict(metrics, on_epoch=True, sync_dist=True)

    @torch.no_grad()
    def _log_step(self, step: Step, nn_acc: Tensor | None, projections: dict[str, Views]) -> None:
        """solo-learn's metrics of All4One, of the active terms, and the weighting's."""
        losses = step.losses
        metrics = {f"train_{LOGGED.get(term, term)}_loss": each for term, each in losses.items()}
        if "feature" in losses:
            metrics["train_feature_loss"] = 10 * losses["feature"]
        elif "byol" in losses and "barlow" in losses:
            metrics["train_feature_loss"] = 5 * (losses["byol"] + losses["barlow"])
        if losses:
            reference = dict(zip(self.weighting.terms, self.weighting.reference, strict=True))
            parts = [reference[term] * each for term, each in losses.items()]
            metrics["train_comb_loss"] = torch.stack(parts).sum()
            views = next(iter(projections.values()))
            stds = [F.normalize(each, dim=-1).std(dim=0).mean() for each in views]
            metrics["train_z_std"] = torch.stack(stds).mean()
        if nn_acc is not None:
            metrics["train_nn_acc"] = nn_acc
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        weighting = {
            f"weight/{term}": weight
            for term, weight in zip(self.weighting.terms, step.weights, strict=True)
        }
        names = ["alignment", *(f"alignment/{term}" for term in self.weighting.terms)]
        for name in names if self.diagnostics else ():
            weighting[name] = self.diagnostics[name].nan_to_num()
        self.log_dict(weighting)
        if step.gradients and self.weighting.cause is not None:
            skipped = {
                f"skipped/{cause.replace(' ', '_')}": (self.weighting.cause == index).float()
                for index, cause in enumerate(CAUSES)
                if cause
            }
            self.log_dict(skipped, on_step=False, on_epoch=True)

    # ---- what the base calls ----------------------------------------------------------------

    def base_training_step(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``feats`` (B, D) of one view and the probe's metrics, without the heads."""
        feats = self.multicrop_forward(X)["feats"]
        with torch.no_grad():
            return {"feats": feats, **_probe(self.classifier, feats, targets)}

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if not self.weighting.active and self.momentum_classifier is None:
            return {}
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

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lets the weighting learn from a step, once for each of the optimiser's."""
        if self.trainer.global_step > self.last_step:
            with self.trainer.precision_plugin.forward_context():
                self.update_weighting_after_step()
        super().on_train_batch_end(outputs, batch, batch_idx)

    @torch.no_grad()
    def update_weighting_after_step(self) -> None:
        """Gives the last batch's losses, computed again, to a weighting that asks for them."""
        if self._losses_again is None:
            return
        with frozen_statistics(self):
            losses = self._losses_again()
        values = torch.stack([losses[term] for term in self.weighting.terms])
        self.weighting.after_step(mean_over_processes(values))

    # ---- validation -------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The probe on a batch ``[images, labels]``, and the k-NN's features."""
        images, labels = batch
        out = self.base_training_step(images, labels)
        metrics = {f"val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
        if self.knn_eval and not self.trainer.sanity_checking:
            self.knn.update(test_features=out["feats"].detach(), test_targets=labels)
        if self.momentum_classifier is not None:
            out = self._shared_step_momentum(images, labels)
            metrics |= {f"momentum_val_{key}": out[key] for key in ("loss", "acc1", "acc5")}
        means = torch.cat([each.reshape(1) for each in metrics.values()])
        self.validated.append(torch.cat([means, torch.ones_like(means[:1])]) * len(labels))
        self.validated_names = tuple(metrics)

    def on_validation_epoch_end(self) -> None:
        """The means over all images of all processes. solo-learn takes the mean of the processes',
        Lightning cuts a process's number of images to a whole one."""
        *sums, images = mean_over_processes(torch.stack(self.validated).sum(0))
        self.validated.clear()
        found = {name: each / images for name, each in zip(self.validated_names, sums, strict=True)}
        if self.knn_eval and not self.trainer.sanity_checking:
            acc1, acc5 = self.knn.compute()
            found |= {"val_knn_acc1": acc1, "val_knn_acc5": acc5}
        self.log_dict(found, sync_dist=True)

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


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch-norms normalise by their batch, as in training, but keep their running mean and
    variance."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    momenta = [each.momentum for each in norms]
    for each in norms:
        each.momentum = 0.0
    try:
        yield
    finally:
        for each, momentum in zip(norms, momenta, strict=True):
            each.momentum = momentum


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
