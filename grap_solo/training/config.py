"""Checks and completes a configuration with solo-learn's keys, before any data is read.

It takes the place of solo-learn's ``parse_cfg``, with an error of one line for each mistake.
:mod:`~grap_solo.training.schema` has every key; here are the rules between keys.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim.lars import Lars

from grap_solo.data import count_crops
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.keys import Key, missing_key
from grap_solo.methods import CompositeMethod, find_method, takes_weighting, weighted_name
from grap_solo.records.files import check_name, expand_path
from grap_solo.solo import register_backbone
from grap_solo.solo.backbones import embedding_width
from grap_solo.solo.optimizers import OPTIMIZERS
from grap_solo.training.blocks import Block, validate
from grap_solo.training.label_keys import check_downstream, check_labels
from grap_solo.training.schema import Configuration, schema_of
from grap_solo.training.trainer_keys import check_arguments
from grap_solo.weighting import DEFAULT_WEIGHTING, Weighting, find_weighting

MOST_DEVICES = 1024
LARGEST_NUMBER = 2**32 - 1
"""The largest whole number in a configuration: a seed's. Nothing that is counted has as many."""

PATH_KEYS = (
    "data.train_path",
    "data.val_path",
    "labels.path",
    "labels.val_path",
    "checkpoint.dir",
    "resume_from_checkpoint",
    "pretrained_feature_extractor",
)
"""The keys whose values are paths."""

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
    """The configuration from which a method is built: checked, with defaults, learning rates
    scaled.

    As in solo-learn, ``optimizer.lr`` and ``optimizer.classifier_lr`` are multiplied by
    ``batch_size * devices * nodes / 256``.

    Args:
        source: as composed from YAML and the command line; it is left unchanged.

    Raises:
        ConfigError: names the first key that cannot be used.
    """
    cfg, method, rule = complete(expand_paths(source))
    check_name(cfg.name)
    method.check_config(cfg)
    _check_together(cfg)
    check_arguments(cfg)
    _check_optimizer_kwargs(cfg)
    _check_weighting(cfg, rule)

    crops = count_crops(cfg.get("augmentations") or [])
    cfg.data.num_large_crops, cfg.data.num_small_crops = crops, 0
    if cfg.data.num_large_crops != 2:
        raise ConfigError(
            f"augmentations: {cfg.method} takes two views, not {cfg.data.num_large_crops}: "
            "let the entries' num_crops add up to 2"
        )
    _check_backbone(cfg)
    kwargs = OPTIMIZER_DEFAULTS[cfg.optimizer.name]
    cfg.optimizer.kwargs = OmegaConf.merge(OmegaConf.create(kwargs), cfg.optimizer.kwargs)
    _resolve_devices(cfg)
    if cfg.performance.compile:
        _check_compiler(_trains_on_cpu(cfg))
    scale = images_per_step(cfg) / 256
    cfg.optimizer.lr *= scale
    validated = (cfg.data.val_path, cfg.labels.val_path) != (None, None)
    if validated or cfg.data.dataset == "digits":  # As in solo-learn.
        cfg.optimizer.classifier_lr *= scale
    return cfg


def expand_paths(source: DictConfig) -> DictConfig:
    """Replaces ``~`` and ``$VARIABLES`` in the values of :data:`PATH_KEYS`.

    A command does this first, so that all that it writes and starts has the same paths.

    Args:
        source: as composed; it is left unchanged.

    Raises:
        ConfigError: see :func:`~grap_solo.records.files.expand_path`.
    """
    cfg = source
    for key in PATH_KEYS:
        block, _, name = key.rpartition(".")
        node: Any = OmegaConf.select(source, block) if block else source
        value = node.get(name) if isinstance(node, DictConfig) else None
        if not isinstance(value, str) or value == "None":
            continue  # None, or refused with the other values of a wrong type.
        try:
            path = expand_path(value)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        if path != value:
            cfg = copy.deepcopy(source) if cfg is source else cfg
            OmegaConf.update(cfg, key, path)
    return cfg


def complete(source: DictConfig) -> tuple[DictConfig, type[CompositeMethod], type[Weighting]]:
    """Checks each key of a configuration and fills in the defaults of those left out or null.

    Args:
        source: see :func:`prepare`.

    Returns:
        The configuration, and the classes of its method and of its rule. Keys whose default the
        base class or the Trainer has are still left out.

    Raises:
        ConfigError: names the first key that cannot be used.
    """
    plain: Any = _without_nulls(OmegaConf.to_container(source, resolve=True))
    cfg = OmegaConf.create(plain)
    method, rule = _find_classes(plain)
    _check_and_fill(cfg, plain, schema_of(method, rule))
    if cfg.get("weighting") is None:
        cfg.weighting = {"name": DEFAULT_WEIGHTING if takes_weighting(cfg.method) else "fixed"}
    return cfg, method, rule


def complete_blocks(source: DictConfig, model: type[Block]) -> DictConfig:
    """As :func:`complete`, for a configuration that trains nothing.

    Args:
        source: see :func:`prepare`.
        model: declares its keys.

    Raises:
        ConfigError: names the first key that cannot be used.
    """
    plain: Any = _without_nulls(OmegaConf.to_container(source, resolve=True))
    cfg = OmegaConf.create(plain)
    _check_and_fill(cfg, plain, model)
    return cfg


def _check_and_fill(cfg: DictConfig, plain: dict[str, Any], model: type[Block]) -> None:
    """Checks the values of ``plain`` and fills the defaults of those left out into ``cfg``."""
    _fill_in(cfg, validate(model, plain))
    _refuse_unusable_numbers(plain)


def run_dir(cfg: DictConfig) -> Path:
    """The folder of a run: ``checkpoint.dir`` / ``name``."""
    return Path(cfg.checkpoint.dir) / cfg.name


def images_per_step(cfg: DictConfig) -> int:
    """The number of images of one step, over all devices and nodes."""
    devices = cfg.devices if isinstance(cfg.devices, int) else len(cfg.devices)
    return int(cfg.optimizer.batch_size * devices * cfg.num_nodes)


def terms_of(cfg: DictConfig) -> dict[str, float]:
    """The terms that a configuration trains, with their reference weights."""
    return find_method(cfg.method).reference_weights(cfg)


def _without_nulls(value: Any, key: str = "") -> Any:
    """Leaves out every key whose value counts as not given: null, missing (``???``), or the text
    'None', which solo-learn's files use for null.

    Null stays where it is a value: in arguments of the backbone's and of the Trainer's."""
    if isinstance(value, list):
        return [_without_nulls(each, f"{key}[]") for each in value]
    if not isinstance(value, dict):
        return None if value in ("None", "???") else value
    inner = f"{key}." if key else ""
    cleaned = {name: _without_nulls(each, f"{inner}{name}") for name, each in value.items()}
    if key in ("backbone.kwargs", "downstream"):  # A head without keys is refused, not left out.
        return cleaned
    return {
        name: each
        for name, each in cleaned.items()
        if each is not None or (not key and name not in Configuration.model_fields)
    }


def _refuse_unusable_numbers(value: Any, key: str = "") -> None:
    """Refuses numbers that no part of a training can use, also in keys that are not declared."""
    if isinstance(value, dict):
        for name, each in value.items():
            _refuse_unusable_numbers(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for each in value:
            _refuse_unusable_numbers(each, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise ConfigError(
            f"{key}: expected a number of at most {LARGEST_NUMBER} (2^32 - 1), got {value}"
        )


def _find_classes(plain: dict[str, Any]) -> tuple[type[CompositeMethod], type[Weighting]]:
    """The method's and the rule's class. Removes ``weighting.name`` from ``plain``: the schema's
    block has no such key."""
    name = plain.get("method")
    if name is None:
        raise missing_key("method")
    Key(str).check(name, "method")
    method = find_method(name)
    if not takes_weighting(name):
        if "weighting" in plain:
            raise ConfigError(
                f"method: {name} trains with its reference weights and takes no 'weighting:' "
                f"block: set method={weighted_name(name)}"
            )
        return method, find_weighting("fixed")
    block = plain.get("weighting", {"name": DEFAULT_WEIGHTING})
    if not isinstance(block, dict):
        raise ConfigError(f"weighting: expected a block of keys, got {block!r}")
    rule = find_weighting(block.pop("name", None))
    default = find_weighting(DEFAULT_WEIGHTING)
    left_over = [key for key in block if key not in rule.keys and key in default.keys]
    if left_over:
        raise ConfigError(
            f"weighting.{left_over[0]}: a key of '{DEFAULT_WEIGHTING}', whose block is in the "
            "file, not of the rule that was given: take the block out first, as in: ~weighting "
            "'+weighting={name: equal}'"
        )
    return method, rule


def _fill_in(cfg: DictConfig, filled: dict[str, Any]) -> None:
    """Adds the values of ``filled`` for which a configuration has none."""
    for key, value in filled.items():
        if isinstance(value, dict) and isinstance(cfg.get(key), DictConfig):
            _fill_in(cfg[key], value)
        elif cfg.get(key) is None:
            cfg[key] = value


def _check_together(cfg: DictConfig) -> None:
    """Refuses keys that do not fit each other, or the folders and loggers of a run."""
    for mark in ("::", "://"):  # Lightning takes them for an address of remote files.
        if mark in cfg.checkpoint.dir or mark in cfg.name:
            raise ConfigError(
                f"checkpoint.dir: '{cfg.checkpoint.dir}' with name '{cfg.name}' has a '{mark}': "
                "give a folder of this machine without it"
            )
    if cfg.performance.compile and cfg.diagnostics.parameter_space_every:
        raise ConfigError(
            "performance.compile: diagnostics.parameter_space_every needs several backward passes "
            "through the backbone, and a compiled backbone allows only one: leave out one of them"
        )
    if cfg.scheduler.name == "step" and not cfg.scheduler.get("lr_decay_steps"):
        raise ConfigError("scheduler.lr_decay_steps: missing: 'step' needs a list of epochs")
    if cfg.data.dataset != "digits" and cfg.data.train_path is None:
        raise ConfigError("data.train_path: missing: say where the images are")


def _check_optimizer_kwargs(cfg: DictConfig) -> None:
    """Refuses arguments that the optimiser does not have."""
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
        "trust_coeff",  # LARS has solo-learn's names: eta and clip_lr.
        "trust_clip",
        "always_adapt",
    }
    for key in cfg.optimizer.kwargs:
        if key not in options:
            raise unknown_name("optimizer.kwargs", key, options)
    _try_optimizer(cfg)


def _try_optimizer(cfg: DictConfig) -> None:
    """Refuses arguments that the optimiser cannot use: takes one step with it on a few numbers."""
    config = cfg.optimizer
    kwargs: Any = OmegaConf.to_container(config.kwargs)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = OPTIMIZERS[config.name](
            [{"params": [parameter]}], lr=config.lr, weight_decay=config.weight_decay, **kwargs
        )
        optimizer.step()
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"optimizer.kwargs: {config.name} cannot use {kwargs} ({line}): change or remove them"
        ) from None


def _check_backbone(cfg: DictConfig) -> None:
    """Refuses an unknown backbone, arguments that it does not take, and images of a size that it
    does not take."""
    if register_backbone(cfg.backbone.name):
        kwargs: Any = OmegaConf.to_container(cfg.backbone.get("kwargs") or OmegaConf.create())
        size = cfg.augmentations[0].crop_size
        embedding_width(cfg.backbone.name, cfg.data.dataset, kwargs, size)


def _check_weighting(cfg: DictConfig, rule: type[Weighting]) -> None:
    """Refuses reference weights, a rule's keys or labels that do not fit each other."""
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
    options = rule.read_options({key: value for key, value in block.items() if key != "name"})
    rule.check_options(options, tuple(reference))

    check_labels(cfg, rule, options)
    if cfg.get("downstream") is not None:
        check_downstream(cfg)


def _trains_on_cpu(cfg: DictConfig) -> bool:
    available = torch.accelerator.is_available()
    return bool(cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not available))


def _check_compiler(cpu: bool) -> None:
    """Refuses to compile without the compiler that torch calls: a C++ compiler for the CPU, and
    Triton's C compiler for a GPU."""
    given = os.environ.get("CC")
    found = any(map(shutil.which, [given] if given else ["gcc", "clang", "cc"]))
    if cpu:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            found = bool(get_cpp_compiler())
        except InvalidCxxCompiler:
            found = False
    if not found:
        kind, variable = ("C++", "CXX") if cpu else ("C", "CC")
        raise ConfigError(
            f"performance.compile: torch finds no {kind} compiler: install one, set the variable "
            f"{variable} to it, or leave the key out"
        )


def device_count(devices: Any) -> int:
    """The number of devices that the key ``devices`` names.

    Raises:
        ConfigError: neither a number nor a list of numbers.
    """
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    listed = OmegaConf.is_list(devices) or isinstance(devices, list)
    numbers = listed and all(type(each) is int for each in devices)
    count = len(devices) if numbers else devices
    if type(count) is not int or not 1 <= count <= MOST_DEVICES:
        raise ConfigError(
            f"devices: expected a number of devices or a list such as [0], got {devices}"
        )
    return count


def _resolve_devices(cfg: DictConfig) -> None:
    """Lets a file that was written for GPUs run on the CPU, and a single device without a
    strategy."""
    count = device_count(cfg.devices)
    cpu = _trains_on_cpu(cfg)
    if cpu or isinstance(cfg.devices, str):
        cfg.devices = count
    if count * cfg.num_nodes == 1:
        cfg.strategy, cfg.sync_batchnorm = "auto", False
    elif cpu and cfg.get("sync_batchnorm"):
        raise ConfigError(
            "sync_batchnorm: torch supports it on GPUs only: set sync_batchnorm=False"
        )
    if cfg.strategy is None:
        cfg.strategy = "auto"
