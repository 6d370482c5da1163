"""A composed configuration with solo-learn's keys: checked and completed before any data is read.

What solo-learn's ``parse_cfg`` does for its scripts, with an error of one line for each mistake.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim.lars import Lars

from grap_solo.data import DATASETS, FORMATS, count_crops
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.methods.all4one import JOINED_REFERENCE, REFERENCE
from grap_solo.solo import register_backbone
from grap_solo.solo.base import OPTIMIZERS, SCHEDULERS, check_backbone
from grap_solo.weighting import build_weighting

METHODS = ("all4one", "grap_all4one")

DEFAULTS = """
seed: 5
accelerator: auto
devices: 1
num_nodes: 1
strategy: null
resume_from_checkpoint: null
data:
  train_path: null
  val_path: null
  format: image_folder
  no_labels: false
  fraction: -1
  num_workers: 4
  download: true
optimizer: {kwargs: {}}
scheduler: {interval: step}
method_kwargs: {queue_size: 65536, join_feature_loss: false, separate_projectors: false}
performance: {disable_channel_last: false}
checkpoint: {enabled: true, dir: runs, frequency: 1, keep_prev: false}
wandb: {enabled: false, entity: null, project: grap-solo, offline: false}
"""

REQUIRED = (
    "name",
    "method",
    "backbone.name",
    "data.dataset",
    "max_epochs",
    "optimizer.name",
    "optimizer.batch_size",
    "optimizer.lr",
    "optimizer.classifier_lr",
    "optimizer.weight_decay",
    "scheduler.name",
    "method_kwargs.temperature",
    "method_kwargs.proj_hidden_dim",
    "method_kwargs.proj_output_dim",
    "method_kwargs.pred_hidden_dim",
)

POSITIVE = (
    "max_epochs",
    "optimizer.batch_size",
    "optimizer.lr",
    "optimizer.classifier_lr",
    "method_kwargs.temperature",
    "method_kwargs.proj_hidden_dim",
    "method_kwargs.pred_hidden_dim",
)

OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "lars": {
        "momentum": 0.9,
        "eta": 1e-3,
        "clip_lr": False,
        "exclude_bias_n_norm": False,
    },
    "adam": {},
    "adamw": {"betas": [0.9, 0.999]},
}


def prepare(source: DictConfig) -> DictConfig:
    """The configuration that a method is built from: checked, completed, learning rates scaled.

    As in solo-learn, ``optimizer.lr`` and ``optimizer.classifier_lr`` are multiplied by
    ``batch_size * devices * nodes / 256``.

    Args:
        source: as composed from YAML and the command line; left as it is.

    Raises:
        ConfigError: the first key that cannot be used.
    """
    cfg = OmegaConf.merge(OmegaConf.create(DEFAULTS), source)
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, False)
    _none_strings(cfg)
    _check_keys(cfg)
    _check_weighting(cfg)

    crops = count_crops(cfg.get("augmentations") or [])
    cfg.data.num_large_crops, cfg.data.num_small_crops = crops, 0
    if cfg.data.num_large_crops != 2:
        raise ConfigError(
            f"augmentations: All4One takes two views, not {cfg.data.num_large_crops}: "
            "let the entries' num_crops add up to 2"
        )
    kwargs = OPTIMIZER_DEFAULTS[cfg.optimizer.name]
    cfg.optimizer.kwargs = OmegaConf.merge(OmegaConf.create(kwargs), cfg.optimizer.kwargs)
    _resolve_devices(cfg)
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    scale = cfg.optimizer.batch_size * devices * cfg.num_nodes / 256
    cfg.optimizer.lr *= scale
    if cfg.data.val_path is not None or cfg.data.dataset == "digits":  # As in solo-learn.
        cfg.optimizer.classifier_lr *= scale
    return cfg


def run_dir(cfg: DictConfig) -> Path:
    """Where a run leaves its files: ``checkpoint.dir`` / ``name``."""
    return Path(cfg.checkpoint.dir) / cfg.name


def terms_of(cfg: DictConfig) -> dict[str, float]:
    """The terms that a configuration trains, with their reference weights."""
    return JOINED_REFERENCE if cfg.method_kwargs.join_feature_loss else REFERENCE


def _none_strings(node: Any) -> None:
    """YAML has no word 'None', but solo-learn's files use it: make it null."""
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if OmegaConf.is_config(value):
            _none_strings(value)
        elif value == "None":
            node[key] = None


def _check_keys(cfg: DictConfig) -> None:
    """Required keys, names and ranges."""
    for key in REQUIRED:
        if OmegaConf.select(cfg, key, default=None) is None:
            raise ConfigError(f"{key}: missing: add it to the configuration file")
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{key}: expected a number above 0, got {value!r}")
    for key, valid in (
        ("method", METHODS),
        ("data.dataset", DATASETS),
        ("data.format", FORMATS),
        ("optimizer.name", OPTIMIZERS),
        ("scheduler.name", SCHEDULERS),
        ("scheduler.interval", ("step", "epoch")),
    ):
        name = OmegaConf.select(cfg, key)
        if name not in valid:
            raise unknown_name(key, name, valid)
    for key in ("train_path", "val_path"):
        needed = cfg.data.dataset != "digits" and (key == "train_path" or not cfg.data.no_labels)
        if needed and cfg.data[key] is None:
            raise ConfigError(f"data.{key}: missing: say where the images are")
    check_backbone(cfg.backbone.name)
    register_backbone(cfg.backbone.name)

    kwargs = cfg.method_kwargs
    if kwargs.queue_size < 5:
        raise ConfigError(
            f"method_kwargs.queue_size: {kwargs.queue_size} is fewer than the 5 neighbours"
        )
    if kwargs.proj_output_dim < 8 or kwargs.proj_output_dim % 8:
        raise ConfigError(
            f"method_kwargs.proj_output_dim: {kwargs.proj_output_dim} cannot be split among the "
            "transformer's 8 attention heads: use a multiple of 8"
        )
    optimizer = cfg.optimizer.name
    options = set(OPTIMIZER_DEFAULTS[optimizer])
    classes = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "lars": Lars,
    }
    options |= set(inspect.signature(classes[optimizer]).parameters) - {
        "params",
        "lr",
        "weight_decay",
        "trust_coeff",  # LARS goes by solo-learn's words: eta and clip_lr.
        "trust_clip",
        "always_adapt",
    }
    for key in cfg.optimizer.kwargs:
        if key not in options:
            raise unknown_name("optimizer.kwargs", key, options)


def _check_weighting(cfg: DictConfig) -> None:
    """Fills in the block, or tries it: what it refuses is known before any data is read."""
    if cfg.method == "all4one":
        if "weighting" in cfg:
            raise ConfigError(
                "method: all4one trains with All4One's own weights and takes no 'weighting:' "
                "block: set method=grap_all4one"
            )
        cfg.weighting = {"name": "fixed"}
    elif "weighting" not in cfg:
        cfg.weighting = {"name": "grap"}
    if not OmegaConf.is_dict(cfg.weighting):
        raise ConfigError("weighting: expected a block with a 'name:', such as 'name: grap'")
    reference = terms_of(cfg)
    block: Any = OmegaConf.to_container(cfg.weighting, resolve=True)
    build_weighting(block, tuple(reference), reference)


def _resolve_devices(cfg: DictConfig) -> None:
    """Lets a file that was written for GPUs run on the CPU, and one device need no strategy."""
    cpu = cfg.accelerator == "cpu" or (
        cfg.accelerator == "auto" and not torch.accelerator.is_available()
    )
    if cpu and not isinstance(cfg.devices, int):
        cfg.devices = len(cfg.devices)
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    if devices < 1:
        raise ConfigError(f"devices: expected at least one, got {cfg.devices}")
    if devices * cfg.num_nodes == 1:
        cfg.strategy, cfg.sync_batchnorm = "auto", False
    elif cpu and cfg.get("sync_batchnorm"):
        raise ConfigError("sync_batchnorm: torch has it for GPUs only: set sync_batchnorm=False")
    if cfg.strategy is None:
        cfg.strategy = "auto"
