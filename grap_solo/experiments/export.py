"""Exports a run's backbone as a folder that other programs load: weights, config and model card."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from grap_solo.data.augmentations import DEFAULT_MEAN, DEFAULT_STD, MEAN_AND_STD
from grap_solo.data.labelled import CIFAR_FOLDERS
from grap_solo.errors import ConfigError
from grap_solo.experiments.model_card import model_card
from grap_solo.experiments.sources import find_run, load_run_backbone
from grap_solo.exported import (
    EXPORTED_CONFIG,
    EXPORTED_STATE,
    EXPORTED_WEIGHTS,
    OWN_ENTRY,
    load_backbone,
    read_exported_config,
)
from grap_solo.extras import require
from grap_solo.records.files import CONFIG_FILE, make_folder, read_config, whole_file, write_json
from grap_solo.solo.backbones import LOADED, RESNETS, embedding_width

EXPORT_FORMATS = ("timm", "torchvision", "state-dict", "onnx")
ONNX_FILE = "model.onnx"
CARD_FILE = "README.md"
TRAINING_FILE = "training.yaml"
"""A copy of the run's ``config.yaml``, from which the card's command trains it again."""

OF_ONE_MACHINE = ("checkpoint", "wandb")
"""Blocks of a configuration that mean nothing to others: they are left out of the copy."""


FROM_TIMM = ("first_conv", "classifier", "fixed_input_size", "min_input_size")
"""The keys of timm's own description of an architecture that an export keeps."""


def export(run: Path, form: str | None = None, to: Path | None = None) -> Path:
    """Writes a run's backbone, without heads and probe, into a folder of its own.

    The folder has the weights, ``config.json``, a model card (``README.md``) and ``training.yaml``.
    The weights are loaded again by the format's own loader, and must give the same embeddings to
    the bit, except for ONNX.

    Args:
        run: a run's folder, whose newest checkpoint is taken, or one of its checkpoints.
        form: ``timm``, ``torchvision``, ``state-dict`` or ``onnx``; None takes timm's where timm
            has the model, else torchvision's.
        to: the folder; None takes ``export`` in the run's.

    Returns:
        The folder.

    Raises:
        ConfigError: not a run, a format that does not have the backbone, or a folder with other
            files.
    """
    found = find_run(run)
    if found is None:
        raise ConfigError(f"{run}: not a run: give the folder of a run, or one of its checkpoints")
    directory, checkpoint = found
    saved = read_config(directory / CONFIG_FILE)
    name, stem = saved.backbone.name, saved.data.dataset
    small = name in RESNETS and stem in CIFAR_FOLDERS
    form = form or ("torchvision" if small else "timm")
    _refuse_format(form, name, small)
    backbone = load_run_backbone(saved, checkpoint).float()  # As the loaders build it.
    folder = to or directory / "export"
    if folder.exists() and any(folder.iterdir()) and not _is_export(folder):
        raise ConfigError(f"--to: {folder} holds other files: give a new folder")
    make_folder(folder, "--to")
    config = _describe(saved, form)
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    for each in (EXPORTED_WEIGHTS, EXPORTED_STATE, ONNX_FILE):  # Of an earlier export.
        (folder / each).unlink(missing_ok=True)
    write_json(folder / EXPORTED_CONFIG, config)
    if form == "onnx":
        _write_onnx(backbone, config, folder / ONNX_FILE)
    else:
        _write_weights(state, folder, form)
        _check_round_trip(backbone, folder, form, config)
    own = {key: value for key, value in saved.items() if key not in OF_ONE_MACHINE}
    OmegaConf.save(OmegaConf.create(own), folder / TRAINING_FILE)
    with whole_file(folder / CARD_FILE) as file:
        file.write(model_card(directory, saved, checkpoint, config, form))
    print(f"{form}: {name} of {checkpoint} in {folder}")
    return folder


def _is_export(folder: Path) -> bool:
    try:
        return OWN_ENTRY in read_exported_config(folder)
    except ConfigError:
        return False


def _refuse_format(form: str, name: str, small: bool) -> None:
    """Refuses a format that does not have the backbone, or whose packages are not installed."""
    if form == "timm" and small:
        raise ConfigError(
            f"--format timm: timm's {name} has no stem for small images: leave --format out, and "
            "load the export with grap_solo.load_backbone"
        )
    if form == "torchvision" and name not in RESNETS:
        raise ConfigError(f"--format torchvision: {name} is a model of timm: use --format timm")
    if form == "onnx":
        require("--format onnx", "onnx")


def _describe(saved: DictConfig, form: str) -> dict[str, Any]:
    """Makes the content of ``config.json``: for timm, and for
    :func:`~grap_solo.exported.load_backbone`."""
    name, dataset = saved.backbone.name, saved.data.dataset
    given: Any = OmegaConf.to_container(saved.backbone.get("kwargs") or OmegaConf.create({}))
    kwargs = {key: value for key, value in given.items() if key not in LOADED}
    augmentation = saved.augmentations[0]
    size = int(augmentation.crop_size)
    own = (augmentation.get("mean", DEFAULT_MEAN), augmentation.get("std", DEFAULT_STD))
    mean, std = MEAN_AND_STD.get(dataset, own)
    pretrained_cfg: dict[str, Any] = {
        "input_size": [3, size, size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bicubic" if dataset in MEAN_AND_STD else "bilinear",
        "crop_pct": 1.0 if dataset == "digits" or dataset in CIFAR_FOLDERS else 224 / 256,
        "num_classes": 0,
    }
    config: dict[str, Any] = {}
    if form == "timm":
        theirs = timm.get_pretrained_cfg(name, allow_unregistered=True)
        described = {} if theirs is None else theirs.to_dict()
        known = {key: described[key] for key in FROM_TIMM if described.get(key) is not None}
        pretrained_cfg = {**known, **pretrained_cfg}
        config = {"architecture": name, "model_args": {"num_classes": 0, **kwargs}}
    return {
        **config,
        "num_classes": 0,
        "num_features": embedding_width(name, dataset, kwargs, size),
        "pretrained_cfg": pretrained_cfg,
        OWN_ENTRY: {"backbone": name, "dataset": dataset, "kwargs": kwargs, "format": form},
    }


def _write_weights(state: dict[str, Tensor], folder: Path, form: str) -> None:
    if form == "state-dict":
        torch.save(state, folder / EXPORTED_STATE)
        return
    from safetensors.torch import save_file

    save_file(state, folder / EXPORTED_WEIGHTS, metadata={"format": "pt"})


def _check_round_trip(backbone: nn.Module, folder: Path, form: str, config: dict[str, Any]) -> None:
    """Loads an export as its users do, and compares the embeddings of random images.

    Raises:
        ConfigError: they differ in a bit.
    """
    copies = [load_backbone(folder)]
    if form == "timm":
        copies.append(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    if form == "torchvision" and config[OWN_ENTRY]["dataset"] not in CIFAR_FOLDERS:
        plain = getattr(torchvision.models, config[OWN_ENTRY]["backbone"])()
        plain.fc = nn.Identity()
        plain.load_state_dict(load_backbone(folder).state_dict())
        copies.append(plain.eval())
    size = config["pretrained_cfg"]["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone(images)
        for copy in copies:
            if not torch.equal(copy(images), expected):
                raise ConfigError(
                    f"--format {form}: the exported backbone gives other embeddings: use --format "
                    "state-dict"
                )


def _write_onnx(backbone: nn.Module, config: dict[str, Any], file: Path) -> None:
    """Writes an ONNX graph from images (B, 3, height, width) to embeddings (B, D)."""
    images = torch.randn(2, *config["pretrained_cfg"]["input_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the exporter's own code.
        torch.onnx.export(
            backbone,
            (images,),
            str(file),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
