"""Opens the backbone that an evaluation or an export is about: of a run or from anywhere else."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from torch import nn

from grap_solo.data import count_crops, kind_of
from grap_solo.data.augmentations import DEFAULT_MEAN, DEFAULT_STD
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.experiments.retrain import newest_checkpoint
from grap_solo.exported import EXPORTED_CONFIG, OWN_ENTRY, load_backbone, read_exported_config
from grap_solo.records.files import CHECKPOINTS_FOLDER, CONFIG_FILE, read_config
from grap_solo.solo.backbones import (
    DEFAULT_SIZE,
    LOADED,
    RESNETS,
    build_backbone,
    check_backbone,
)
from grap_solo.training.blocks import Block, nested, unfilled
from grap_solo.training.checkpoints import read_checkpoint
from grap_solo.training.config import complete, complete_blocks, expand_paths
from grap_solo.training.schema import Data
from grap_solo.training.starting_weights import load_weights

HUB = "timm:"
"""How a source starts that is the name of one of timm's models with its weights."""

SMALL_STEM = "cifar10"
"""The dataset for which a ResNet is built with solo-learn's stem for small images."""

SMALL_SIZE = 32

Composer = Callable[[Path], DictConfig]
"""Composes a configuration file with the command line's overrides."""


PLAIN = """
data: {dataset: custom, num_workers: 0}
optimizer: {batch_size: 64}
accelerator: auto
"""
"""The configuration that the command line changes for a source without one of its own."""


class Batches(Block):
    """The part of the ``optimizer:`` block that counts without training."""

    batch_size: int = Field(64, ge=1)


class PlainConfiguration(Block):
    """The keys that count for a source without a configuration of its own."""

    data: Data = nested()
    augmentations: Any = unfilled(title="a list of pipelines")
    optimizer: Batches = nested()
    accelerator: str = Field("auto")
    seed: int = Field(5, ge=0)


@dataclass(frozen=True)
class Source:
    """A backbone to evaluate.

    Attributes:
        name: the source as it was given.
        backbone: in eval mode.
        backbone_name: its name.
        cfg: the configuration with which images are loaded.
        seen: the dataset by whose name images are transformed, as the backbone's training did.
        file: the file of its weights; None for weights from timm's hub.
        run: the run's folder; None if it is of no run.
    """

    name: str
    backbone: nn.Module
    backbone_name: str
    cfg: DictConfig
    seen: str
    file: Path | None
    run: Path | None


def find_run(path: Path) -> tuple[Path, Path] | None:
    """Finds the run, and the checkpoint of it, that a path names; None if it names no run.

    Args:
        path: a run's folder, which stands for its newest checkpoint, or one of its checkpoints.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    if (path / CONFIG_FILE).is_file():
        return path, newest_checkpoint(path)
    above = path.parent.parent
    inside = path.suffix == ".ckpt" and path.resolve().parent.name == CHECKPOINTS_FOLDER
    if inside and (above / CONFIG_FILE).is_file():
        return above, path
    return None


def load_run_backbone(saved: DictConfig, checkpoint: Path) -> nn.Module:
    """Builds a run's backbone with the weights of one of its checkpoints, in eval mode.

    Args:
        saved: the run's ``config.yaml``.
        checkpoint: the checkpoint.

    Raises:
        ConfigError: the checkpoint cannot be read, or is not of this backbone.
    """
    kwargs: Any = OmegaConf.to_container(saved.backbone.get("kwargs") or OmegaConf.create({}))
    size = OmegaConf.select(saved, "augmentations[0].crop_size")
    plain = {key: value for key, value in kwargs.items() if key not in LOADED}
    backbone, _ = build_backbone(saved.backbone.name, saved.data.dataset, plain, size)
    state = read_checkpoint(checkpoint, str(checkpoint), ("state_dict",))["state_dict"]
    inside = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    try:
        backbone.load_state_dict(inside)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{checkpoint}: not of the backbone {saved.backbone.name} in the run's {CONFIG_FILE}: "
            f"{line}: give a checkpoint of this run"
        ) from None
    return backbone.eval()


def open_source(
    name: str, backbone: str | None, load: Composer, train: str | None, val: str | None
) -> Source:
    """Opens a source and completes its configuration with the images to evaluate on.

    Args:
        name: a run's folder, a run's checkpoint, an export's folder, ``timm:NAME``, or a file of
            weights.
        backbone: the name of the backbone in a file of weights.
        load: composes a configuration file with the command line's overrides.
        train: the images to fit on: a folder, a Parquet file, or ``digits``; None for the run's.
        val: those to score on.

    Raises:
        ConfigError: nothing that can be opened, or no images.
    """
    path = Path(name)
    run = None if name.startswith(HUB) or backbone is not None else find_run(path)
    if run is not None:
        saved = read_config(run[0] / CONFIG_FILE)
        model, model_name = load_run_backbone(saved, run[1]), saved.backbone.name
        cfg, seen = load(run[0] / CONFIG_FILE), saved.data.dataset
    else:
        if name.startswith(HUB) and train is None:
            raise _no_images()  # Before the download.
        model, model_name, seen, made_for = _open_plain(name, path, backbone)
        cfg = _compose_plain(made_for, load)
    OmegaConf.set_struct(cfg, False)
    _set_images(cfg, train, val)
    cfg = expand_paths(cfg)
    cfg = complete_blocks(cfg, PlainConfiguration) if run is None else complete(cfg)[0]
    count_crops(cfg.get("augmentations") or [])
    folder, file = run or (None, None if name.startswith(HUB) else path)
    return Source(name, model.eval(), model_name, cfg, seen, file, folder)


def _compose_plain(made_for: Mapping[str, Any], load: Composer) -> DictConfig:
    """Composes the configuration of a source that is no run with the command line's overrides.

    Args:
        made_for: the ``input_size``, ``mean`` and ``std`` of the backbone's images.
        load: see :func:`open_source`.
    """
    cfg: Any = OmegaConf.create(PLAIN)
    cfg.augmentations = [
        {
            "crop_size": int(made_for.get("input_size", (DEFAULT_SIZE,))[-1]),
            "num_crops": 1,
            "mean": list(made_for.get("mean", DEFAULT_MEAN)),
            "std": list(made_for.get("std", DEFAULT_STD)),
        }
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        OmegaConf.save(cfg, file)
        return load(file)


def _open_plain(
    name: str, path: Path, backbone: str | None
) -> tuple[nn.Module, str, str, Mapping[str, Any]]:
    """Opens a source that is no run. Returns the backbone, its name, the dataset by whose name its
    images are transformed, and what it says of them, as in timm's ``pretrained_cfg``."""
    if name.startswith(HUB):
        model = _load_from_hub(name.removeprefix(HUB))
        return model, name.removeprefix(HUB), "custom", _pretrained_cfg(model)
    if path.is_dir():
        config = read_exported_config(path)
        if OWN_ENTRY in config:
            block, made_for = config[OWN_ENTRY], config["pretrained_cfg"]
            return load_backbone(path), block["backbone"], block["dataset"], made_for
        model = _load_timm_folder(path)
        return model, str(config.get("architecture")), "custom", _pretrained_cfg(model)
    if backbone is None:
        raise ConfigError(
            f"{name}: not a run's checkpoint: say whose weights they are, as in --backbone resnet18"
        )
    check_backbone(backbone)
    fix = "give the weights' backbone with --backbone"
    plain, _ = build_backbone(backbone, "custom", {})
    try:
        load_weights(plain, path, name, backbone, fix)
    except ConfigError:
        if backbone not in RESNETS:
            raise
        other, _ = build_backbone(backbone, SMALL_STEM, {})
        try:
            load_weights(other, path, name, backbone, fix)
        except ConfigError:
            pass
        else:
            return other, backbone, SMALL_STEM, {"input_size": (SMALL_SIZE,)}
        raise
    return plain, backbone, "custom", _pretrained_cfg(plain)


def _load_from_hub(name: str) -> nn.Module:
    if not timm.is_model(name):
        raise unknown_name("timm", name, timm.list_models())
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{HUB}{name}: the weights cannot be had ({line}): give a file of them, and "
            f"--backbone {name.partition('.')[0]}"
        ) from None
    return model


def _load_timm_folder(folder: Path) -> nn.Module:
    """Loads a model folder as timm and Hugging Face's hub keep them."""
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder / EXPORTED_CONFIG}: timm cannot load the model ({line}): give a file of its "
            "weights, and --backbone NAME"
        ) from None
    return model


def _pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """timm's description of a model's images; empty for torchvision's models."""
    return getattr(model, "pretrained_cfg", None) or {}


def _set_images(cfg: DictConfig, train: str | None, val: str | None) -> None:
    """Sets the keys of the ``data:`` block by the flags ``--train`` and ``--val``."""
    if train == "digits" and val in (None, "digits"):
        cfg.data.dataset = "digits"
    elif train is not None and val is not None:
        cfg.data.train_path, cfg.data.val_path = train, val
        cfg.data.dataset, cfg.data.format = kind_of(train)
        cfg.data.no_labels = False
    elif train is not None or val is not None:
        raise ConfigError("--train, --val: give both: one to fit on, and one to score on")
    if train is not None:
        cfg.pop("labels", None)
    found = (cfg.data.get("val_path"), OmegaConf.select(cfg, "labels.val_path"))
    if cfg.data.get("dataset") != "digits" and all(each in (None, "None") for each in found):
        raise _no_images()


def _no_images() -> ConfigError:
    return ConfigError("--train, --val: give the images to fit on and those to score on")
