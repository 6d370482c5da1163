"""The training step of every composite method.

A method's own file holds only its terms: see "What a method gives" in :class:`CompositeMethod`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grap_solo.balance import HeldOut, SharedHead, Step, balance
from grap_solo.distributed import mean_over_ranks
from grap_solo.errors import ConfigError
from grap_solo.keys import Key
from grap_solo.lightning_module import count_batches, schedule_factor
from grap_solo.methods.guarded import GuardedMethod, Taken
from grap_solo.methods.losses import Projections, Views
from grap_solo.methods.modules import copy_and_reinitialize, frozen_statistics
from grap_solo.methods.recorded import TermLosses
from grap_solo.solo import BaseMethod, BaseMomentumMethod, register_backbone
from grap_solo.solo.base import MomentumUpdater
from grap_solo.solo.optimizers import lars
from grap_solo.weighting import DEFAULT_WEIGHTING, build_weighting

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


class CompositeMethod(GuardedMethod):
    """A self-supervised method of two views whose loss is a weighted sum of terms.

    The weights come from a ``weighting:`` block. The downstream head is the online probe, which
    ignores labels of -1, or the heads of a ``downstream:`` block.

    To write a method, derive from this class; for a method with a momentum network, from this class
    and :class:`~grap_solo.solo.BaseMomentumMethod`. Define

    - :meth:`reference_weights`: the names of the terms and their reference weights;
    - :meth:`compute_terms`: the loss of each term, from the projections of both views;
    - :meth:`build_networks`: the method's modules, usually a ``self.projector``;

    and, if the method needs them, :meth:`heads`, :meth:`make_targets`, :meth:`after_step`,
    :meth:`check_config` and :attr:`method_keys`. A configuration then names the class by
    ``method: package.module:Class``.

    Args:
        cfg: solo-learn's configuration of the method, and besides it a ``weighting`` block (see
            :func:`~grap_solo.weighting.build_weighting`; the default is GraP), the keys of
            :data:`CONFIG_KEYS`, and the keys of :meth:`all_keys` under ``method_kwargs``.

    Raises:
        ConfigError: if the ``weighting`` block cannot be used, or the backbone is unknown.
    """

    _OPTIMIZERS = {**BaseMethod._OPTIMIZERS, "lars": lars}

    method_keys: ClassVar[Mapping[str, Key]] = {}
    """The keys of ``method_kwargs`` that this method reads."""

    loss_metric: ClassVar[str] = "train_loss"
    """The name under which the reference-weighted sum of the terms is logged."""

    term_metrics: ClassVar[Mapping[str, str]] = {}
    """The names of terms that are not logged as ``train_<term>_loss``."""

    # ---- what a method gives ------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def reference_weights(cfg: DictConfig) -> dict[str, float]:
        """The terms, in order, with the weights that the method itself sums them with.

        Args:
            cfg: the configuration, with the defaults of :attr:`method_keys`.
        """

    @abstractmethod
    def compute_terms(self, projections: Projections, targets: Any) -> dict[str, Tensor]:
        """Returns the loss of each term in ``projections``, by name, each shape ().

        On several ranks, return the loss of this rank. A tensor gathered from the other ranks must
        keep its gradient: use :func:`~grap_solo.methods.losses.gather_with_gradient`.

        Args:
            projections: for each active term, the projections of both views, each
                (B, proj_output_dim). Without a projector they are the embeddings, (B, D).
            targets: the targets that :meth:`make_targets` returned.
        """

    def build_networks(self) -> None:
        """Builds the modules that the base class has not built.

        ``self.features_dim`` is the embedding's dimension D. If there is a ``self.projector``, it
        is applied to each view's embedding."""

    def heads(self) -> dict[str, Sequence[nn.Module]]:
        """The modules that each term applies to the projections, by the term's name.

        A module is frozen if no active term uses it."""
        return {}

    def make_targets(self, outputs: Mapping[str, Any]) -> Any:
        """Returns the targets of the terms: the tensors they compare projections with.

        Called without gradient. If no term is active, it is not called and the targets are None.

        Args:
            outputs: lists with one tensor a view: ``feats``, the embeddings; for a method with a
                momentum network also ``momentum_feats`` and the other outputs of its
                ``momentum_forward``, each with the prefix ``momentum_``.
        """
        return None

    def after_step(
        self, step: Step, outputs: Mapping[str, Any], targets: Any, batch: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Updates the method's state, such as a queue, and returns its own metrics, each shape ().

        Called without gradient between the backward pass and the optimiser's step. It is not called
        for a skipped step.

        Args:
            step: the result of :func:`~grap_solo.balance.balance`.
            outputs: see :meth:`make_targets`.
            targets: the targets that :meth:`make_targets` returned.
            batch: ``[indexes, [view1, view2], labels]``.
        """
        return {}

    @classmethod
    def check_config(cls, cfg: DictConfig) -> None:
        """Checks values of ``method_kwargs`` that must fit each other.

        Raises:
            ConfigError: if they do not.
        """

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
        weighted = self.weighting.needs_gradients and self.weighting.shared_heads != "sum"
        self.shared: SharedHead | None = None
        if weighted and not self.separate:
            projector = self._own_projector
            parameters = [] if projector is None else projector.parameters()
            self.shared = SharedHead(self.weighting.terms, parameters)
        self.projectors = nn.ModuleDict()
        if self.separate:
            if self._own_projector is None:
                raise ConfigError(
                    f"method_kwargs.separate_projectors: {cfg.method} has no projector: leave the "
                    "key out"
                )
            for term in self.weighting.terms[1:]:
                self.projectors[term] = copy_and_reinitialize(self._own_projector)
        self._freeze_unused_modules()
        if self.cfg.performance.compile:  # Module.compile keeps the names in state dicts.
            for name in ("backbone", "momentum_backbone", "momentum_projector"):
                if hasattr(self, name):
                    getattr(self, name).compile()
        self.parameter_space_every: int = self.cfg.diagnostics.parameter_space_every
        self.max_skipped_steps: int = self.cfg.diagnostics.max_skipped_steps
        self.last_step = 0
        self.effective_weights: Tensor = self.weighting.reference
        self.shown_weights: list[float] = self.weighting.reference.tolist()
        self.diagnostics: dict[str, Tensor] = {}
        self._last_batch: tuple[Views, Any] | None = None

    @property
    def _own_projector(self) -> nn.Module | None:
        """``self.projector``; None for a method without a projector."""
        return getattr(self, "projector", None)

    def _freeze_unused_modules(self) -> None:
        """Freezes the modules that no active term uses: DDP would wait for their gradients."""
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
        """The parameter groups of the base, the separate projectors and the weighting, and a group
        of all other trained parameters."""
        groups = [{**each, "params": list(each["params"])} for each in super().learnable_params]
        groups += [{"params": list(each.parameters())} for each in self.projectors.values()]
        learned = list(self.weighting.parameters())
        if learned:
            groups.append({"params": learned, "weight_decay": 0})
        known = {id(each) for group in groups for each in group["params"]}
        rest = [each for each in self.parameters() if each.requires_grad and id(each) not in known]
        return [*groups, {"name": "heads", "params": rest}] if rest else groups

    # ---- one step -----------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Computes the surrogate of a batch. Its backward pass is the weighting's step.

        After the backward pass, Lightning calls :meth:`on_after_backward`, which ends the step.

        Args:
            batch: ``[indexes, [view1, view2], labels]``; or a dictionary of two such batches,
                ``train`` for the terms and ``labelled`` for the downstream head. With a
                ``downstream:`` block the labels are each head's targets by its name.
            batch_idx: the batch's number in the epoch.
        """
        self._remember_state()
        labelled = None
        if isinstance(batch, Mapping):
            batch, labelled = batch["train"], batch["labelled"]
        truth = (batch if labelled is None else labelled)[2]
        if self.heads_downstream is not None:
            batch = [*batch[:2], self.labels_of(batch[2])]
        # Calls the base directly, which embeds both views and logs the probe's metrics: the
        # method's own class would compute its loss.
        momentum = isinstance(self, BaseMomentumMethod)
        base: Any = BaseMomentumMethod if momentum else BaseMethod
        outputs: dict[str, Any] = base.training_step(self, batch, batch_idx)
        with torch.no_grad():
            targets = self.make_targets(outputs) if self.weighting.active else None
        held_out = None if labelled is None else self._embed_held_out(labelled[1])

        self.weighting.train(self.current_epoch >= self.weighting.warmup_epochs)
        if batch_idx == 0 and self.current_epoch:
            self.weighting.end_epoch()  # After the last epoch's checkpoint has been saved.
        step = self._balance(outputs["feats"], targets, truth, held_out)
        diagnostics = self._diagnose(step, outputs["feats"], held_out)
        labels = self.labels_of(truth)
        self._taken = Taken(step, outputs, targets, batch, held_out, labels, diagnostics)
        return step.loss + outputs.get("momentum_loss", 0)

    def finish_step(self, taken: Taken) -> None:
        """Updates the method's state, and logs the step."""
        self.diagnostics = taken.diagnostics
        if self.weighting.needs_losses_after:
            self._last_batch = (taken.batch[1], taken.targets)
        metrics = self.after_step(taken.step, taken.outputs, taken.targets, taken.batch)
        self._log_step(taken.step, metrics)
        if taken.held_out is not None:
            self._log_labelled(taken.step, taken.held_out, taken.labels)

    def _balance(
        self, embeddings: Views, targets: Any, truth: Any, held_out: HeldOut | None
    ) -> Step:
        """Balances the terms of a batch. ``truth`` is what trains the probe, or the downstream
        heads."""

        def terms(*leaves: Tensor) -> TermLosses:
            projections = self._project(leaves)
            return TermLosses(self.compute_terms(projections, targets), projections)

        def downstream(*leaves: Tensor) -> Tensor:
            return self.downstream_loss(leaves, truth)

        return self.balance(embeddings, terms, downstream, self.weighting, self.shared, held_out)

    def _project(self, embeddings: Views) -> dict[str, Views]:
        """Projects both views for each active term, (B, proj_output_dim) each."""
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

    def _embed_held_out(self, views: Views) -> HeldOut:
        """Embeds a labelled batch and prepares its terms.

        The batch changes no running statistic and no queue entry, and trains only the probe."""
        with torch.no_grad(), frozen_statistics(self):
            embeddings = [self.multicrop_forward(each)["feats"] for each in views]
            if not self.weighting.needs_gradients:
                return HeldOut(embeddings, lambda *leaves: {})  # The terms are not needed.
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

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if not self.weighting.active and self.momentum_classifier is None:
            return {}  # No term and no classifier uses the momentum networks.
        return super()._shared_step_momentum(X, targets)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gives the weighting the optimiser's schedule, if it follows it."""
        super().on_train_batch_start(batch, batch_idx)
        if self.weighting.follows_schedule:
            self.weighting.lr_factor = schedule_factor(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Updates, after an optimiser step, a weighting that needs the losses after it.

        After a skipped step neither it nor the momentum networks are updated."""
        if not self.usable:
            self.last_step = self.trainer.global_step
        elif self.trainer.global_step > self.last_step:
            with self.trainer.precision_plugin.forward_context():
                self.update_weighting_after_step()
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.last_step = self.trainer.global_step

    @torch.no_grad()
    def update_weighting_after_step(self) -> None:
        """Computes the last batch's losses anew for a weighting that needs them after the step."""
        if self._last_batch is None:
            return
        views, targets = self._last_batch
        with frozen_statistics(self):
            embeddings = [self.multicrop_forward(each)["feats"] for each in views]
            losses = self.compute_terms(self._project(embeddings), targets)
        values = torch.stack([losses[term] for term in self.weighting.terms])
        self.weighting.after_step(mean_over_ranks(values))

    def on_train_start(self) -> None:
        """Tells the weighting the run's length, and sets the momentum schedule to the step of a
        resumed run."""
        super().on_train_start()
        # Set anew because the reference weights are now on the device. They are recorded if the
        # first steps are skipped.
        self.effective_weights = self.weighting.reference
        self.last_step = self.trainer.global_step
        self.weighting.set_total_steps(count_batches(self.trainer))
        if self.last_step and isinstance(self, BaseMomentumMethod):
            self.momentum_updater.update_tau(
                self.last_step, int(self.trainer.estimated_stepping_batches)
            )
