"""One training step of a composite method, whatever its terms are.

A method's own file holds its terms and nothing else: see :class:`CompositeMethod`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grap_solo.balance import HeldOut, SharedHead, Step, balance
from grap_solo.distributed import mean_over_processes
from grap_solo.errors import ConfigError
from grap_solo.methods.losses import Projections, Views, probe_loss
from grap_solo.methods.modules import fresh_copy, frozen_statistics
from grap_solo.methods.recorded import RecordedMethod, TermLosses
from grap_solo.solo import BaseMethod, BaseMomentumMethod, register_backbone
from grap_solo.solo.base import MomentumUpdater
from grap_solo.solo.optimizers import lars
from grap_solo.weighting import build_weighting

POSITIVE = 1e-300
"""A lower bound that stands for "above 0"."""


@dataclass(frozen=True)
class Key:
    """A key of ``method_kwargs``.

    Attributes:
        kind: ``int``, ``float``, ``str`` or ``bool``.
        least: a number's lower bound; :data:`POSITIVE` if it must be above 0.
        default: its value where it is not given; without one it must be given.

    Raises:
        ConfigError: another ``kind``.
    """

    kind: type
    least: float | None = None
    default: Any = None

    def __post_init__(self) -> None:
        if self.kind not in (int, float, str, bool):
            raise ConfigError(f"method_keys: a key is an int, float, str or bool, not {self.kind}")


class CompositeMethod(RecordedMethod, ABC):
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
        cfg: solo-learn's configuration of the method, and besides it

            - ``weighting``: see :func:`~grap_solo.weighting.build_weighting`; GraP when absent;
            - ``diagnostics.parameter_space_every``: steps between two measurements of
              :func:`~grap_solo.diagnostics.parameter_space_cosine`; 0, the default, for none;
            - ``diagnostics.max_skipped_steps``: how many steps in a row may be left out because
              their loss or gradients are not finite, before the run is stopped;
            - ``performance.compile``: whether ``torch.compile`` compiles the backbone and the
              momentum networks. The other heads are left as they are: a compiled one computes
              its parameters' gradients in each of the K inner passes too;
            - ``method_kwargs.separate_projectors``: a projector for each term, as GraP's paper has
              it, instead of one that they share. The first term has ``self.projector``.

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
                self.projectors[term] = fresh_copy(self._own_projector)
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
        """Every key of ``method_kwargs`` that is read: the method's own, and those of all."""
        return {"separate_projectors": Key(bool, default=False), **cls.method_keys}

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Fills in the defaults of the base's keys, the method's and those above."""
        cfg = super().add_and_assert_specific_cfg(cfg)
        for name, key in cls.all_keys().items():
            if key.default is not None:
                cfg.method_kwargs.setdefault(name, key.default)
        cfg.setdefault("weighting", {"name": "grap"})
        cfg.setdefault("performance", {})
        cfg.performance.setdefault("compile", False)
        cfg.setdefault("diagnostics", {})
        cfg.diagnostics.setdefault("parameter_space_every", 0)
        cfg.diagnostics.setdefault("max_skipped_steps", 100)
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

        def terms(*leaves: Tensor) -> TermLosses:
            projections = self._project(leaves)
            return TermLosses(self.compute_terms(projections, targets), projections)

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
