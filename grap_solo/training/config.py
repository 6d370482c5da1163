"""A composed configuration with solo-learn's keys: checked and completed before any data is read.

What solo-learn's ``parse_cfg`` does for its scripts, with an error of one line for each mistake.
"""

from __future__ import annotations

import difflib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim.lars import Lars

from grap_solo.data import DATASETS, FORMATS, count_crops
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.methods import CompositeMethod, find_method, takes_weighting, weighted_name
from grap_solo.methods.composite import POSITIVE
from grap_solo.solo import register_backbone
from grap_solo.solo.backbones import build_backbone
from grap_solo.solo.optimizers import OPTIMIZERS, SCHEDULERS
from grap_solo.weighting import Weighting, build_weighting

DEFAULTS = """
seed: 5
accelerator: auto
devices: 1
num_nodes: 1
strategy: null
resume_from_checkpoint: null
pretrained_feature_extractor: null
labels: {fraction: 1.0, split: train}
diagnostics: {parameter_space_every: 0, max_skipped_steps: 100}
data:
  train_path: null
  val_path: null
  format: image_folder
  no_labels: false
  fraction: -1
  num_workers: 4
  batched: false
  download: true
optimizer: {kwargs: {}}
scheduler: {interval: step}
method_kwargs: {}
performance: {disable_channel_last: false, compile: false}
checkpoint: {enabled: true, dir: runs, frequency: 1, keep_prev: false}
wandb: {enabled: false, entity: null, project: grap-solo, offline: false}
"""

# Every key with a value that is checked: its type and, for numbers, the least that it may be.
# "above 0" is a least of POSITIVE. Those with a default or an absence that is legal are optional.
# A method says itself what stands under method_kwargs.
REQUIRED: dict[str, tuple[type, float | None]] = {
    "name": (str, None),
    "backbone.name": (str, None),
    "data.dataset": (str, None),
    "max_epochs": (int, 1),
    "optimizer.name": (str, None),
    "optimizer.batch_size": (int, 1),
    "optimizer.lr": (float, POSITIVE),
    "optimizer.classifier_lr": (float, POSITIVE),
    "optimizer.weight_decay": (float, 0),
    "scheduler.name": (str, None),
}
OPTIONAL: dict[str, tuple[type, float | None]] = {
    "seed": (int, 0),
    "num_nodes": (int, 1),
    "accumulate_grad_batches": (int, 1),
    "data.num_workers": (int, 0),
    "data.fraction": (float, -1),
    "data.num_classes": (int, 1),
    "labels.fraction": (float, POSITIVE),
    "diagnostics.parameter_space_every": (int, 0),
    "diagnostics.max_skipped_steps": (int, 1),
    "pretrained_feature_extractor": (str, None),
    "data.no_labels": (bool, None),
    "data.batched": (bool, None),
    "data.download": (bool, None),
    "momentum.base_tau": (float, 0),
    "momentum.final_tau": (float, 0),
    "momentum.classifier": (bool, None),
    "scheduler.warmup_epochs": (float, 0),
    "scheduler.warmup_start_lr": (float, 0),
    "scheduler.min_lr": (float, 0),
    "checkpoint.enabled": (bool, None),
    "checkpoint.dir": (str, None),
    "checkpoint.frequency": (int, 1),
    "checkpoint.keep_prev": (bool, None),
    "knn_eval.enabled": (bool, None),
    "knn_eval.k": (int, 1),
    "wandb.enabled": (bool, None),
    "performance.disable_channel_last": (bool, None),
    "performance.compile": (bool, None),
}
BLOCKS: tuple[str, ...] = (
    "backbone",
    "data",
    "optimizer",
    "scheduler",
    "method_kwargs",
    "momentum",
    "checkpoint",
)
BLOCKS += ("knn_eval", "wandb", "performance", "optimizer.kwargs", "backbone.kwargs", "weighting")
BLOCKS += ("labels", "diagnostics")
SPLITS = ("train", "held_out")
LARGEST_HELD_OUT = 0.5
PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "32", "64", "16", "bf16")

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
    try:
        cfg = OmegaConf.merge(OmegaConf.create(DEFAULTS), source)
    except (ValueError, TypeError) as error:  # A value where a block stands, or the reverse.
        raise ConfigError(f"configuration: {error}".splitlines()[0]) from None
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, False)
    _none_strings(cfg)
    _check_keys(cfg)
    weighting = _check_weighting(cfg)
    _check_labels(cfg, weighting)

    crops = count_crops(cfg.get("augmentations") or [])
    cfg.data.num_large_crops, cfg.data.num_small_crops = crops, 0
    if cfg.data.num_large_crops != 2:
        raise ConfigError(
            f"augmentations: {cfg.method} takes two views, not {cfg.data.num_large_crops}: "
            "let the entries' num_crops add up to 2"
        )
    kwargs = OPTIMIZER_DEFAULTS[cfg.optimizer.name]
    cfg.optimizer.kwargs = OmegaConf.merge(OmegaConf.create(kwargs), cfg.optimizer.kwargs)
    _resolve_devices(cfg)
    scale = images_per_step(cfg) / 256
    cfg.optimizer.lr *= scale
    if cfg.data.val_path is not None or cfg.data.dataset == "digits":  # As in solo-learn.
        cfg.optimizer.classifier_lr *= scale
    return cfg


def run_dir(cfg: DictConfig) -> Path:
    """Where a run leaves its files: ``checkpoint.dir`` / ``name``."""
    return Path(cfg.checkpoint.dir) / cfg.name


def images_per_step(cfg: DictConfig) -> int:
    """The images of one step, over all devices and nodes."""
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    return int(cfg.optimizer.batch_size * devices * cfg.num_nodes)


def terms_of(cfg: DictConfig) -> dict[str, float]:
    """The terms that a configuration trains, with their reference weights."""
    return find_method(cfg.method).reference_weights(cfg)


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


def _check_value(cfg: DictConfig, key: str, kind: type, least: float | None) -> None:
    """One key's type and range."""
    value = OmegaConf.select(cfg, key)
    numbers = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}[kind]
    fits = isinstance(value, numbers) and (kind is bool or not isinstance(value, bool))
    if fits and (least is None or (value >= least and math.isfinite(value))):
        return
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}[kind]
    if least is not None:
        words += " above 0" if least == POSITIVE else f" of {least} or more"
    raise ConfigError(f"{key}: expected {words}, got {value!r}")


def _check_required(cfg: DictConfig, key: str, kind: type, least: float | None) -> None:
    """As :func:`_check_value`, of a key that must be there."""
    if OmegaConf.select(cfg, key) is None:
        raise ConfigError(f"{key}: missing: add it to the configuration file")
    _check_value(cfg, key, kind, least)


def _check_keys(cfg: DictConfig) -> None:
    """Required keys, types, ranges and names."""
    for key in BLOCKS:
        if not OmegaConf.is_dict(OmegaConf.select(cfg, key, default=OmegaConf.create({}))):
            raise ConfigError(
                f"{key}: expected a block of keys, got {OmegaConf.select(cfg, key)!r}"
            )
    _check_required(cfg, "method", str, None)
    method = find_method(cfg.method)
    _check_spelling(cfg, method)
    for key, (kind, least) in REQUIRED.items():
        _check_required(cfg, key, kind, least)
    for key, (kind, least) in OPTIONAL.items():
        if OmegaConf.select(cfg, key) is not None:
            _check_value(cfg, key, kind, least)
    for name, each in method.all_keys().items():
        if cfg.method_kwargs.get(name) is None and each.default is not None:
            cfg.method_kwargs[name] = each.default
        _check_required(cfg, f"method_kwargs.{name}", each.kind, each.least)
    method.check_config(cfg)
    for key, valid in (
        ("data.dataset", DATASETS),
        ("data.format", FORMATS),
        ("optimizer.name", OPTIMIZERS),
        ("scheduler.name", SCHEDULERS),
        ("scheduler.interval", ("step", "epoch")),
        ("labels.split", SPLITS),
        ("knn_eval.distance_func", ("euclidean", "cosine")),
        ("precision", PRECISIONS),
    ):
        name = OmegaConf.select(cfg, key)
        if name is not None and str(name) not in valid:
            raise unknown_name(key, name, valid)
    every = OmegaConf.select(cfg, "diagnostics.parameter_space_every")
    if cfg.performance.compile and every:
        raise ConfigError(
            "performance.compile: diagnostics.parameter_space_every goes back through the backbone "
            "many times, a compiled one lets a gradient through only once: leave out one of them"
        )
    if cfg.scheduler.name == "step" and not cfg.scheduler.get("lr_decay_steps"):
        raise ConfigError("scheduler.lr_decay_steps: missing: 'step' needs a list of epochs")
    if cfg.data.dataset != "digits" and cfg.data.train_path is None:
        raise ConfigError("data.train_path: missing: say where the images are")
    register_backbone(cfg.backbone.name)
    _check_backbone_kwargs(cfg)
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


def _check_spelling(cfg: DictConfig, method: type[CompositeMethod]) -> None:
    """Refuses a key that is not known but nearly is one. solo-learn's files have keys of which
    nothing here depends, so that one which is like none is left alone."""
    known = [*REQUIRED, *OPTIONAL, "optimizer.kwargs", "optimizer.exclude_bias_n_norm_wd"]
    known += ["scheduler.lr_decay_steps", "scheduler.interval", "knn_eval.distance_func"]
    known += ["data.format", "data.train_path", "data.val_path", "backbone.kwargs"]
    known += [f"method_kwargs.{key}" for key in method.all_keys()]
    known += [f"wandb.{key}" for key in ("entity", "project", "offline")]
    tops = {key.partition(".")[0] for key in known} | {*BLOCKS, "precision", "augmentations"}
    for block in sorted({key.rpartition(".")[0] for key in known}):
        node = cfg if not block else OmegaConf.select(cfg, block)
        inside = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == block}
        valid = inside if block else tops
        for key in node or ():
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.85)
            if key not in valid and near:
                raise unknown_name(block or "configuration", key, valid)


def _check_backbone_kwargs(cfg: DictConfig) -> None:
    """Tries the backbone's arguments on a model without memory."""
    kwargs = cfg.backbone.get("kwargs") or {}
    if kwargs:
        try:
            with torch.device("meta"):
                build_backbone(cfg.backbone.name, cfg.data.dataset, dict(kwargs))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"backbone.kwargs: {error}".splitlines()[0]) from None


def _check_weighting(cfg: DictConfig) -> Weighting:
    """Fills in the block, or tries it: what it refuses is known before any data is read."""
    if not takes_weighting(cfg.method):
        if "weighting" in cfg:
            raise ConfigError(
                f"method: {cfg.method} trains with its reference weights and takes no 'weighting:' "
                f"block: set method={weighted_name(cfg.method)}"
            )
        cfg.weighting = {"name": "fixed"}
    elif "weighting" not in cfg:
        cfg.weighting = {"name": "grap"}
    reference = terms_of(cfg)
    for term, value in reference.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"method_kwargs: they give {term} a reference weight of {value:g}: 0 or more is "
                "needed"
            )
    if not any(reference.values()):
        raise ConfigError("method_kwargs: every reference weight is 0: give a term some weight")
    block: Any = OmegaConf.to_container(cfg.weighting, resolve=True)
    return build_weighting(block, tuple(reference), reference)


def _check_labels(cfg: DictConfig, weighting: Weighting) -> None:
    """Which images keep their labels, and whether the weighting can do with them."""
    for block, keys in (
        ("labels", ("fraction", "split")),
        ("diagnostics", ("parameter_space_every", "max_skipped_steps")),
    ):
        for key in cfg[block]:
            if key not in keys:
                raise unknown_name(block, key, keys)
    for key, default in (("fraction", 1.0), ("split", "train")):
        if cfg.labels.get(key) is None:
            cfg.labels[key] = default
    fraction, held_out = cfg.labels.fraction, cfg.labels.split == "held_out"
    most = LARGEST_HELD_OUT if held_out else 1
    if fraction > most:
        part = "the part that is held out" if held_out else "the part that keeps its labels"
        raise ConfigError(
            f"labels.fraction: {part}: expected a number above 0 and up to {most}, got {fraction}"
        )
    if weighting.downstream_weight and cfg.data.no_labels:
        raise ConfigError(
            f"data.no_labels: '{cfg.weighting.name}' trains the backbone with the labels: "
            "leave it out"
        )
    if held_out and weighting.needs_losses_after and weighting.needs_gradients:
        raise ConfigError(
            f"labels.split: '{cfg.weighting.name}' with its scale or heads changed learns from the "
            "pretraining batch alone: set labels.split=train"
        )
    if held_out and weighting.downstream_weight:
        raise ConfigError(
            f"labels.split: '{cfg.weighting.name}' trains the backbone with the labels: they "
            "cannot be held out: set labels.split=train"
        )


def _resolve_devices(cfg: DictConfig) -> None:
    """Lets a file that was written for GPUs run on the CPU, and one device need no strategy."""
    devices = cfg.devices
    if isinstance(devices, str) and devices.isdigit():
        cfg.devices = devices = int(devices)
    listed = OmegaConf.is_list(devices) and all(type(each) is int for each in devices)
    count = len(devices) if listed else devices
    if type(count) is not int or count < 1:
        raise ConfigError(
            f"devices: expected a number of them or a list such as [0], got {devices}"
        )
    cpu = cfg.accelerator == "cpu" or (
        cfg.accelerator == "auto" and not torch.accelerator.is_available()
    )
    if cpu:
        cfg.devices = count
    if count * cfg.num_nodes == 1:
        cfg.strategy, cfg.sync_batchnorm = "auto", False
    elif cpu and cfg.get("sync_batchnorm"):
        raise ConfigError("sync_batchnorm: torch has it for GPUs only: set sync_batchnorm=False")
    if cfg.strategy is None:
        cfg.strategy = "auto"
