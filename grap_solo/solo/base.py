"""The project's own base classes, used if solo-learn is absent.

They have the configuration keys, submodule names, metric names and numbers of solo-learn's
``BaseMethod`` and ``BaseMomentumMethod``, and are built on torchvision, timm, torchmetrics and
Lightning.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.solo.backbones import build_backbone
from grap_solo.solo.optimizers import OPTIMIZERS, SCHEDULERS, split_groups, warmup_cosine

DEFAULTS = """
backbone: {kwargs: {}}
optimizer: {exclude_bias_n_norm_wd: false, kwargs: {}}
accumulate_grad_batches: 1
scheduler:
  lr_decay_steps: null
  min_lr: 0.0
  warmup_start_lr: 3e-5
  warmup_epochs: 10
  interval: step
knn_eval: {enabled: false, k: 20, distance_func: euclidean}
performance: {disable_channel_last: false}
method_kwargs: {}
"""

MOMENTUM_DEFAULTS = "momentum: {base_tau: 0.99, final_tau: 1.0, classifier: false}"


@torch.no_grad()
def copy_parameters(online: nn.Module, momentum: nn.Module) -> None:
    """Copies the online network's parameters to the momentum network, and freezes the latter."""
    for source, target in zip(online.parameters(), momentum.parameters(), strict=True):
        target.copy_(source)
        target.requires_grad = False


class MomentumUpdater:
    """Updates momentum networks by an exponential moving average of the online parameters.

    Its factor tau follows a cosine from ``base_tau`` to ``final_tau``.

    Args:
        base_tau: tau at the first step.
        final_tau: tau at the last step.

    Raises:
        ConfigError: unless 0 <= base_tau <= final_tau <= 1.
    """

    def __init__(self, base_tau: float, final_tau: float) -> None:
        if not 0 <= base_tau <= final_tau <= 1:
            raise ConfigError(
                f"momentum: expected 0 <= base_tau <= final_tau <= 1, got {base_tau}, {final_tau}"
            )
        self.base_tau, self.final_tau, self.cur_tau = base_tau, final_tau, base_tau

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: nn.Module) -> None:
        """Sets ``momentum = tau * momentum + (1 - tau) * online``."""
        targets: list[Tensor] = list(momentum.parameters())
        sources: list[Tensor] = list(online.parameters())
        torch._foreach_lerp_(targets, sources, 1 - self.cur_tau)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """Sets tau to its value at a step."""
        cosine = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * cosine


class BaseMethod(pl.LightningModule, ABC):
    """Backbone, online probe, optimiser and schedule.

    Args:
        cfg: a configuration with solo-learn's keys, after its ``parse_cfg``: learning rates are
            scaled, and ``data.num_classes`` is filled in.

    Raises:
        ConfigError: if the backbone, the optimiser or the scheduler is unknown.
    """

    _OPTIMIZERS = OPTIMIZERS

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        cfg = self.add_and_assert_specific_cfg(cfg)
        self.cfg = cfg

        self._build_backbones()
        self.num_classes: int = cfg.data.num_classes
        self.classifier: nn.Module = nn.Linear(self.features_dim, self.num_classes)

        scale = cfg.accumulate_grad_batches or 1
        self.lr: float = cfg.optimizer.lr * scale
        self.classifier_lr: float = cfg.optimizer.classifier_lr * scale
        self.min_lr: float = cfg.scheduler.min_lr * scale
        self.warmup_start_lr: float = cfg.scheduler.warmup_start_lr * scale

        self.no_channel_last: bool = cfg.performance.disable_channel_last
        self.knn_eval: bool = cfg.knn_eval.enabled
        self.knn: Any = None  # A derived class sets it if ``knn_eval`` is true.

    def _new_backbone(self) -> tuple[nn.Module, int]:
        """Builds the configured backbone. Returns it and the dimension of its embedding."""
        cfg = self.cfg
        size = OmegaConf.select(cfg, "augmentations[0].crop_size")
        kwargs: Any = OmegaConf.to_container(cfg.backbone.kwargs)
        return build_backbone(cfg.backbone.name, cfg.data.dataset, kwargs, size)

    def _build_backbones(self) -> None:
        self.backbone, self.features_dim = self._new_backbone()

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in solo-learn's defaults."""
        return _fill_defaults(cfg, DEFAULTS)

    # ---- optimisation -----------------------------------------------------------------------

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        return [
            {"name": "backbone", "params": self.backbone.parameters()},
            {
                "name": "classifier",
                "params": self.classifier.parameters(),
                "lr": self.classifier_lr,
                "weight_decay": 0,
            },
        ]

    def configure_optimizers(self) -> Any:
        optimizer = self._build_optimizer()
        scheduler = self.cfg.scheduler
        if scheduler.name not in SCHEDULERS:
            raise unknown_name("scheduler.name", scheduler.name, SCHEDULERS)
        if scheduler.name == "none":
            return optimizer
        if scheduler.name == "step":
            return [optimizer], [MultiStepLR(optimizer, list(scheduler.lr_decay_steps))]

        by_step = scheduler.interval == "step"
        epochs = self.cfg.max_epochs
        total = self.trainer.estimated_stepping_batches if by_step else epochs
        warmup = scheduler.warmup_epochs * (total / epochs if by_step else 1)

        def schedule(base_lr: float) -> Callable[[int], float]:
            # Without warm-up solo-learn starts every group at the backbone's learning rate.
            peak = base_lr if warmup > 0 else self.lr
            return lambda step: (
                warmup_cosine(peak, warmup, total, self.warmup_start_lr, self.min_lr, step)
                / base_lr
            )

        lambdas = [schedule(group["lr"]) for group in optimizer.param_groups]
        interval = {"interval": scheduler.interval, "frequency": 1}
        return [optimizer], [{"scheduler": LambdaLR(optimizer, lambdas), **interval}]

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config = self.cfg.optimizer
        if config.name not in self._OPTIMIZERS:
            raise unknown_name("optimizer.name", config.name, self._OPTIMIZERS)
        groups = self.learnable_params
        kwargs = dict(config.kwargs)
        defaults = {"lr": self.lr, "weight_decay": config.weight_decay}
        if config.exclude_bias_n_norm_wd:
            groups = split_groups(groups, lambda p: p.ndim <= 1, {"weight_decay": 0})
        return self._OPTIMIZERS[config.name](groups, **defaults, **kwargs)

    # ---- training ---------------------------------------------------------------------------

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Returns embeddings ``feats`` (B, D) and the probe's ``logits`` (B, classes) of images
        (B, 3, H, W)."""
        feats = self.multicrop_forward(X)["feats"]
        return {"logits": self.classifier(feats.detach()), "feats": feats}

    def multicrop_forward(self, X: Tensor) -> dict[str, Tensor]:
        """Returns the embeddings ``feats`` (B, D) alone."""
        return {"feats": self.backbone(self._to_memory_format(X))}

    def _to_memory_format(self, X: Tensor) -> Tensor:
        return X if self.no_channel_last else X.to(memory_format=torch.channels_last)

    @abstractmethod
    def base_training_step(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns ``feats`` (B, D) of one view, and the probe's ``loss``, ``acc1`` and ``acc5``.

        A derived class defines it."""

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Any:
        """Embeds every view and logs the probe's metrics. A method adds its loss."""
        _, views, targets = batch
        outs = _collect_views(self.base_training_step(x, targets) for x in views)
        for key in ("loss", "acc1", "acc5"):
            outs[key] = sum(outs[key]) / len(views)
        self._log(
            train_class_loss=outs["loss"],
            train_acc1=outs["acc1"],
            train_acc5=outs["acc5"],
        )
        if self.knn_eval:
            repeated = targets.repeat(len(views))
            labelled = repeated != -1
            self.knn.update(
                train_features=torch.cat(outs["feats"])[labelled].detach(),
                train_targets=repeated[labelled],
            )
        return outs

    def _log(self, **metrics: Tensor) -> None:
        self.log_dict(metrics, on_epoch=True, sync_dist=True)


class BaseMomentumMethod(BaseMethod):
    """The base with a momentum copy of the backbone and, if ``momentum.classifier``, its probe.

    Args:
        cfg: see :class:`BaseMethod`.

    Raises:
        ConfigError: see :class:`BaseMethod` and :class:`MomentumUpdater`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        momentum = self.cfg.momentum
        self.momentum_updater = MomentumUpdater(momentum.base_tau, momentum.final_tau)
        self.momentum_classifier = (
            nn.Linear(self.features_dim, self.num_classes) if momentum.classifier else None
        )

    def _build_backbones(self) -> None:
        super()._build_backbones()
        self.momentum_backbone, _ = self._new_backbone()
        copy_parameters(self.backbone, self.momentum_backbone)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in solo-learn's defaults."""
        return _fill_defaults(BaseMethod.add_and_assert_specific_cfg(cfg), MOMENTUM_DEFAULTS)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds the momentum classifier's group, if there is one."""
        groups = super().learnable_params
        if self.momentum_classifier is not None:
            groups.append(
                {
                    "name": "momentum_classifier",
                    "params": self.momentum_classifier.parameters(),
                    "lr": self.classifier_lr,
                    "weight_decay": 0,
                }
            )
        return groups

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs of an online network and its momentum network."""
        return [(self.backbone, self.momentum_backbone)]

    @torch.no_grad()
    def momentum_forward(self, X: Tensor) -> dict[str, Tensor]:
        """Returns the embeddings ``feats`` (B, D) of the momentum backbone."""
        return {"feats": self.momentum_backbone(self._to_memory_format(X))}

    @abstractmethod
    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Runs the momentum networks on one view, and measures the momentum classifier, if any.

        A derived class defines it."""

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Any:
        """Embeds every view with both networks and logs their probes' metrics. A method adds its
        loss."""
        outs = super().training_step(batch, batch_idx)
        _, views, targets = batch
        momentum = _collect_views(self._shared_step_momentum(x, targets) for x in views)
        if self.momentum_classifier is not None:
            for key in ("loss", "acc1", "acc5"):
                momentum[key] = sum(momentum[key]) / len(views)
            self._log(
                train_momentum_class_loss=momentum["loss"],
                train_momentum_acc1=momentum["acc1"],
                train_momentum_acc5=momentum["acc5"],
            )
            outs["loss"] = outs["loss"] + momentum["loss"]
        return {**outs, **{f"momentum_{key}": value for key, value in momentum.items()}}

    def on_train_start(self) -> None:
        self.last_step = 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Updates the momentum networks once for each optimiser step."""
        if self.trainer.global_step > self.last_step:
            for pair in self.momentum_pairs:
                self.momentum_updater.update(*pair)
            # Logs a tensor on the device: from a number, Lightning would make one and wait for it.
            self.log("tau", torch.full((), self.momentum_updater.cur_tau, device=self.device))
            self.momentum_updater.update_tau(
                self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
            )
        self.last_step = self.trainer.global_step


def _fill_defaults(cfg: DictConfig, defaults: str) -> DictConfig:
    merged = OmegaConf.merge(OmegaConf.create(defaults), cfg)
    assert isinstance(merged, DictConfig)
    return merged


def _collect_views(outs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Turns the views' dictionaries into one dictionary of lists."""
    views = list(outs)
    return {key: [view[key] for view in views] for key in views[0]}
