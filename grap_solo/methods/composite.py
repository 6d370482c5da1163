"""One training step of a composite method, whatever its terms are.

A method's own file holds its terms and nothing else: see :class:`CompositeMethod`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from grap_solo.balance import HeldOut, SharedHead, Step, balance
from grap_solo.diagnostics import diagnose, diagnostic_names, parameter_space_cosine
from grap_solo.distributed import mean_over_processes
from grap_solo.errors import ConfigError, RunStopped
from grap_solo.evaluation.online import accuracy_at_k
from grap_solo.keys import Key
from grap_solo.methods.losses import Projections, Views, probe_loss
from grap_solo.methods.probed import ProbedMethod
from grap_solo.records.trajectory import TrajectoryRecorder
from grap_solo.solo import BaseMethod, BaseMomentumMethod, register_backbone
from grap_solo.solo.base import MomentumUpdater, lars
from grap_solo.weighting import CAUSES, DEFAULT_WEIGHTING, build_weighting

CONFIG_KEYS: dict[str, dict[str, Key]] = {
    "performance": {
        "compile": Key(
            bool,
            default=False,
            doc="Whether `torch.compile` compiles the backbone and the momentum networks. Heads "
            "stay as they are: a compiled head computes its parameters' gradients in each of the "
            "K inner passes too.",
        ),
    },
    "diagnostics": {
        "parameter_space_every": Key(
            int,
            least=0,
            default=0,
            doc="Steps between two measurements of the alignment in the backbone's parameter "
            "space; 0 measures none.",
        ),
        "max_skipped_steps": Key(
            int,
            least=1,
            default=100,
            doc="How many steps in a row may be skipped because their loss or gradients are not "
            "finite, before the run is stopped.",
        ),
    },
}
"""The keys that a composite method reads besides solo-learn's, by block."""


class CompositeMethod(ProbedMethod, ABC):
    """A self-supervised method of two views whose loss is a weighted sum of terms.

    The weights come from a ``weighting:`` block. The downstream head is the online probe. Labels of
    -1 are ignored. A method of one's own derives from this class, or from it and
    :class:`~grap_solo.solo.BaseMomentumMethod` for one with a momentum network, and gives

    - :meth:`reference_weights`: the method's terms with the weights that it has by itself;
    - :meth:`compute_terms`: each term's loss from the projections of both views;
    - :meth:`build_networks`: its modules, in most cases a ``self.projector``;

    and where the method has such, :meth:`heads`, :meth:`make_targets`, :meth:`after_step` and
    :attr:`method_keys`. A configuration names it by ``method: package.module:Class``.

    Args:
        cfg: solo-learn's configuration of the method, and besides it a ``weighting`` block (see
            :func:`~grap_solo.weighting.build_weighting`; GraP when absent), the keys of
            :data:`CONFIG_KEYS`, and the keys of :meth:`all_keys` under ``method_kwargs``.

    Raises:
        ConfigError: a ``weighting`` block that cannot be used, or an unknown backbone.
    """

    _OPTIMIZERS = {**BaseMethod._OPTIMIZERS, "lars": lars}

    method_keys: ClassVar[Mapping[str, Key]] = {}
    """The keys of ``method_kwargs`` that this method reads."""

    loss_metric: ClassVar[str] = "train_loss"
    """The name under which the reference-weighted sum of the terms is logged."""

    term_metrics: ClassVar[Mapping[str, str]] = {}
    """The names under which terms are logged, if not ``train_<term>_loss``."""

    # ---- what a method gives ------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def reference_weights(cfg: DictConfig) -> dict[str, float]:
        """The terms, in order, with the weights that the method itself adds them up with.

        Args:
            cfg: the configuration, with the defaults of :attr:`method_keys`.
        """

    @abstractmethod
    def compute_terms(self, projections: Projections, targets: Any) -> dict[str, Tensor]:
        """The losses, each shape (), by name, of the terms that ``projections`` has.

        Over several processes a loss is that of this process; what is gathered from the others
        must be gathered with its gradient.

        Args:
            projections: for each term that is not left out, the projections of both views, each
                (B, proj_output_dim); embeddings, (B, D), of a method without a projector.
            targets: what :meth:`make_targets` returned.
        """

    def build_networks(self) -> None:
        """Makes the method's own modules, where its base class has not. ``self.features_dim`` is
        the embedding's dimension D; a ``self.projector`` is applied to each view's embedding."""

    def heads(self) -> dict[str, Sequence[nn.Module]]:
        """The modules that a term uses behind the projector, by the term's name. A module is not
        trained if every term that uses it is left out."""
        return {}

    def make_targets(self, outputs: Mapping[str, Any]) -> Any:
        """Returns the tensors that the terms compare with. Called without gradient, unless every
        term is left out: the targets are None then.

        Args:
            outputs: ``feats``, and of a method with a momentum network ``momentum_feats`` and
                whatever else its ``momentum_forward`` returns: a list of a tensor for each view.
        """
        return None

    def after_step(
        self, step: Step, outputs: Mapping[str, Any], targets: Any, batch: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Updates what the method keeps, such as a queue, and returns its own metrics, each shape
        (). Called without gradient, before the backward pass, unless the step is skipped.

        Args:
            step: what :func:`~grap_solo.balance.balance` made of the terms.
            outputs: see :meth:`make_targets`.
            targets: what :meth:`make_targets` returned.
            batch: ``[indexes, [view1, view2], labels]``.
        """
        return {}

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Refuses values of :attr:`method_keys` that do not fit each other, with a
        :class:`~grap_solo.errors.ConfigError`."""

    # ---- construction -------------------------------------------------------------------------

    def __init__(self, cfg: DictConfig) -> None:
        register_backbone(cfg.backbone.name)
        super().__init__(cfg)
        if isinstance(self, BaseMomentumMethod):
            momentum = self.cfg.momentum
            updater = MomentumUpdater(momentum.base_tau, momentum.final_tau)
            self.momentum_updater: MomentumUpdater = updater
        self.build_networks()
        self.balance: Callable[..., Step] = balance

        reference = self.reference_weights(self.cfg)
        rule: Any = OmegaConf.to_container(self.cfg.weighting, resolve=True)
        self.weighting = build_weighting(rule, tuple(reference), reference)
        self.separate: bool = self.cfg.method_kwargs.separate_projectors
        weighted = self.weighting.needs_gradients and self.weighting.shared_heads == "weights"
        shares = weighted and not self.separate
        self.shared = SharedHead(self.weighting.terms) if shares else None
        self.projectors = nn.ModuleDict()
        if self.separate:
            if self._own_projector is None:
                raise ConfigError(
                    f"method_kwargs.separate_projectors: {cfg.method} has no projector: leave the "
                    "key out"
                )
            for term in self.weighting.terms[1:]:
                self.projectors[term] = _fresh_copy(self._own_projector)
        self._freeze_what_no_term_uses()
        if self.cfg.performance.compile:  # In their place: state dicts keep their names.
            for name in ("backbone", "momentum_backbone", "momentum_projector"):
                if hasattr(self, name):
                    getattr(self, name).compile()
        self.parameter_space_every: int = self.cfg.diagnostics.parameter_space_every
        self.max_skipped_steps: int = self.cfg.diagnostics.max_skipped_steps
        self.skipped_in_a_row = 0
        self.last_step = 0
        self.effective_weights: Tensor = self.weighting.reference
        self.shown_weights: list[float] = self.weighting.reference.tolist()
        self.diagnostics: dict[str, Tensor] = {}
        self._last_batch: tuple[Views, Any] | None = None

    @property
    def _own_projector(self) -> nn.Module | None:
        """``self.projector``; None of a method without one."""
        return getattr(self, "projector", None)

    def _freeze_what_no_term_uses(self) -> None:
        """A head without a term gets no gradient: neither DDP nor the optimiser waits for one."""
        active, heads = self.weighting.active, self.heads()
        modules = {each for listed in heads.values() for each in listed}
        used = {each for term in active for each in heads.get(term, ())}
        unused = [*(modules - used), *(p for t, p in self.projectors.items() if t not in active)]
        first = self.weighting.terms[0]
        if self._own_projector is not None and not (
            first in active or (active and not self.separate)
        ):
            unused.append(self._own_projector)
        for each in unused:
            each.requires_grad_(False)

    @classmethod
    def all_keys(cls) -> dict[str, Key]:
        """The keys of ``method_kwargs``: those of every composite method, and the method's own."""
        doc = (
            "A projector for each term, as in GraP's paper, instead of one that the terms share. "
            "The first term has the method's own projector."
        )
        return {"separate_projectors": Key(bool, default=False, doc=doc), **cls.method_keys}

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Fills in the defaults of the base's keys, the method's and :data:`CONFIG_KEYS`."""
        cfg = super().add_and_assert_specific_cfg(cfg)
        cfg.setdefault("weighting", {"name": DEFAULT_WEIGHTING})
        for block, keys in {**CONFIG_KEYS, "method_kwargs": cls.all_keys()}.items():
            cfg.setdefault(block, {})
            for name, key in keys.items():
                if key.default is not None:
                    cfg[block].setdefault(name, key.default)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The base's parameter groups, the separate projectors', the weighting's, if any, and one
        of the trained parameters that are in none of these."""
        groups = [{**each, "params": list(each["params"])} for each in super().learnable_params]
        groups += [{"params": list(each.parameters())} for each in self.projectors.values()]
        learned = list(self.weighting.parameters())
        if learned:
            groups.append({"params": learned, "weight_decay": 0})
        known = {id(each) for group in groups for each in group["params"]}
        rest = [each for each in self.parameters() if each.requires_grad and id(each) not in known]
        return [*groups, {"name": "heads", "params": rest}] if rest else groups

    def configure_callbacks(self) -> list[Callback]:
        """Records the effective weights, whichever script trains."""
        return [TrajectoryRecorder()]

    # ---- one step -----------------------------------------------------------------------------

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
        # The base embeds both views and logs the probe's metrics; the loss of the method's own
        # class is left out.
        momentum = isinstance(self, BaseMomentumMethod)
        base: Any = BaseMomentumMethod if momentum else BaseMethod
        outputs: dict[str, Any] = base.training_step(self, batch, batch_idx)
        with torch.no_grad():
            targets = self.make_targets(outputs) if self.weighting.active else None
        held_out = None if labelled is None else self._held_out(labelled[1])

        self.weighting.train(self.current_epoch >= self.weighting.warmup_epochs)
        if batch_idx == 0 and self.current_epoch:
            self.weighting.end_epoch()  # Here, a checkpoint of the epoch before is without it.
        truth = (batch if labelled is None else labelled)[2]
        step = self._balance(outputs["feats"], targets, truth, held_out)
        if not self._is_usable(step):
            return None
        self._diagnose(step, outputs["feats"], held_out)
        if self.weighting.needs_losses_after:
            self._last_batch = (batch[1], targets)
        with torch.no_grad():
            metrics = self.after_step(step, outputs, targets, batch)
            self._log_step(step, metrics)
            if held_out is not None:
                self._log_labelled(step, held_out, truth)
        return step.loss + outputs.get("momentum_loss", 0)

    def _balance(
        self, embeddings: Views, targets: Any, labels: Tensor, held_out: HeldOut | None
    ) -> Step:
        """The step of a batch, from its embeddings, targets and the probe's labels."""

        def terms(*leaves: Tensor) -> _Terms:
            projections = self._project(leaves)
            return _Terms(self.compute_terms(projections, targets), projections)

        def downstream(*leaves: Tensor) -> Tensor:
            losses = [probe_loss(self.classifier(each), labels) for each in leaves]
            return torch.stack(losses).mean()

        return self.balance(embeddings, terms, downstream, self.weighting, self.shared, held_out)

    def _project(self, embeddings: Views) -> dict[str, Views]:
        """Each active term's projections of both views, (B, proj_output_dim)."""
        active = self.weighting.active
        common, projector = embeddings, self._own_projector
        if projector is not None and any(term not in self.projectors for term in active):
            common = [projector(each) for each in embeddings]
        views: dict[str, Views] = {}
        for term in active:
            if term in self.projectors:
                views[term] = [self.projectors[term](each) for each in embeddings]
            elif self.shared is not None:
                views[term] = [self.shared(each, term) for each in common]
            else:
                views[term] = common
        return views

    def _held_out(self, views: Views) -> HeldOut:
        """A labelled batch's embeddings and terms; no parameter, running statistic or queue entry
        comes to depend on it."""
        with torch.no_grad(), frozen_statistics(self):
            embeddings = [self.multicrop_forward(each)["feats"] for each in views]
            if not self.weighting.needs_gradients:
                return HeldOut(embeddings, lambda *leaves: {})  # They train the probe alone.
            outputs: dict[str, Any] = {"feats": embeddings}
            if isinstance(self, BaseMomentumMethod):
                momentum = [self.momentum_forward(each) for each in views]
                outputs |= {
                    f"momentum_{key}": [each[key] for each in momentum] for key in momentum[0]
                }
            targets = self.make_targets(outputs)

        def terms(*leaves: Tensor) -> dict[str, Tensor]:
            with frozen_statistics(self):
                return self.compute_terms(self._project(leaves), targets)

        return HeldOut(embeddings, terms)

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

    def _diagnose(self, step: Step, feats: Views, held_out: HeldOut | None) -> None:
        """Keeps the cosines and norms of the step's gradients for the recorder."""
        found = diagnose(step)
        if found is None:
            return
        self.diagnostics = dict(zip(diagnostic_names(self.weighting.terms), found, strict=True))
        every = self.parameter_space_every
        if every:
            cosine = found.new_tensor(torch.nan)
            if self.global_step % every == 0 and held_out is None:
                cosine = parameter_space_cosine(
                    step, step.downstream_gradients, feats, self.backbone
                )
            self.diagnostics["parameter_space"] = cosine

    def _log_step(self, step: Step, metrics: dict[str, Tensor]) -> None:
        """The active terms, their sum, the method's own metrics and the weighting's."""
        losses = step.losses
        logged = {
            self.term_metrics.get(term, f"train_{term}_loss"): each for term, each in losses.items()
        }
        if losses:
            reference = dict(zip(self.weighting.terms, self.weighting.reference, strict=True))
            parts = [reference[term] * each for term, each in losses.items()]
            logged[self.loss_metric] = torch.stack(parts).sum()
        if isinstance(step.returned, _Terms) and step.returned.projections:
            views = next(iter(step.returned.projections.values()))
            stds = [F.normalize(each, dim=-1).std(dim=0).mean() for each in views]
            logged["train_z_std"] = torch.stack(stds).mean()
        self.log_dict({**logged, **metrics}, on_epoch=True, sync_dist=True)
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

    def _log_labelled(self, step: Step, held_out: HeldOut, labels: Tensor) -> None:
        """The probe on a held-out batch."""
        logits = [self.classifier(each) for each in held_out.embeddings]
        accuracies = [accuracy_at_k(each, labels)[0] for each in logits]
        metrics = {
            "train_labelled_loss": step.downstream,
            "train_labelled_acc1": torch.cat(accuracies).mean(),
        }
        self.log_dict(metrics, on_epoch=True, sync_dist=True)

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if not self.weighting.active and self.momentum_classifier is None:
            return {}  # Nothing looks at the momentum networks.
        return super()._shared_step_momentum(X, targets)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lets the weighting learn from a step, once for each of the optimiser's."""
        if self.trainer.global_step > self.last_step:
            with self.trainer.precision_plugin.forward_context():
                self.update_weighting_after_step()
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.last_step = self.trainer.global_step

    @torch.no_grad()
    def update_weighting_after_step(self) -> None:
        """Gives the last batch's losses, computed again, to a weighting that asks for them."""
        if self._last_batch is None:
            return
        views, targets = self._last_batch
        with frozen_statistics(self):
            embeddings = [self.multicrop_forward(each)["feats"] for each in views]
            losses = self.compute_terms(self._project(embeddings), targets)
        values = torch.stack([losses[term] for term in self.weighting.terms])
        self.weighting.after_step(mean_over_processes(values))

    def on_train_start(self) -> None:
        """Continues the momentum schedule where a checkpoint left it."""
        super().on_train_start()
        # Recorded if the first steps are skipped: it must be on the device by then.
        self.effective_weights = self.weighting.reference
        self.last_step = self.trainer.global_step
        if self.last_step and isinstance(self, BaseMomentumMethod):
            self.momentum_updater.update_tau(
                self.last_step, int(self.trainer.estimated_stepping_batches)
            )


class _Terms(dict[str, Tensor]):
    """The terms' losses by name, with the projections that they were computed from."""

    def __init__(self, losses: Mapping[str, Tensor], projections: Projections) -> None:
        super().__init__(losses)
        self.projections = projections


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Layers with ``running_mean`` and ``momentum``, such as batch-norms, normalise by their batch,
    as in training, but keep their running statistics."""
    norms: list[Any] = [
        each
        for each in module.modules()
        if hasattr(each, "running_mean") and hasattr(each, "momentum")
    ]
    momenta = [each.momentum for each in norms]
    for each in norms:
        each.momentum = 0.0
    try:
        yield
    finally:
        for each, momentum in zip(norms, momenta, strict=True):
            each.momentum = momentum


def _fresh_copy(module: nn.Module) -> nn.Module:
    """The same architecture, initialised anew as far as its layers have ``reset_parameters``."""
    fresh = copy.deepcopy(module)
    for each in fresh.modules():
        reset: Any = getattr(each, "reset_parameters", None)
        if reset is not None:
            reset()
    return fresh
