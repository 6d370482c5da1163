"""The images that a run trains and evaluates on, with labels that may come from another place."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from glob import escape as glob_escape
from glob import glob
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from grap_solo.data.datasets import load_images, match_classes
from grap_solo.data.images import Images
from grap_solo.data.saved import is_saved
from grap_solo.data.targets import Heads, attach_targets, uses_labels, without_targets
from grap_solo.errors import ConfigError

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""The folder in which torchvision keeps each of the two."""


class RunImages(NamedTuple):
    """The images of a run.

    Attributes:
        train: the images that the terms train on. They have no labels if ``labelled`` is given.
        validation: the images to validate on; None if there are none with labels.
        labelled: the images of ``labels.path``; None without it.
    """

    train: Images
    validation: Images | None
    labelled: Images | None


def holds_out(labels: Mapping[str, Any]) -> bool:
    """Whether a ``labels:`` block gives the downstream head images that the terms never see."""
    return labels.get("path") is not None or labels.get("split") == "held_out"


def has_validation(data: DictConfig, labels: DictConfig) -> bool:
    """Whether a configuration names labelled images to validate on."""
    if labels.get("val_path") is not None:
        return True
    return not data.no_labels and (data.dataset == "digits" or data.val_path is not None)


def load_run(data: DictConfig, labels: DictConfig, heads: Heads | None = None) -> RunImages:
    """Loads all images of a run, with the same number for a class in each part.

    Classes of folders, and of texts, are matched by their names.

    Args:
        data: see :func:`~grap_solo.data.datasets.load_images`.
        labels: the ``labels:`` block, with ``path`` and ``val_path``.
        heads: the ``downstream:`` block, if any. The images then come with the targets of its
            heads, and the number of classes of each head is filled in.

    Raises:
        ConfigError: see ``load_images`` and ``attach_targets``; or if a validation class is not
            among the training's, or no image of ``labels.path`` has a label.
    """
    known = heads is None or uses_labels(heads)
    if labels.get("path") is None:
        train, labelled = load_images(data if known else _unlabelled(data), train=True), None
    else:
        train = load_images(_unlabelled(data), train=True)
        labelled = _load_labelled(data, labels, known)
    source, validation = train if labelled is None else labelled, None
    if has_validation(data, labels):
        validation = _load_validation(data, labels, source, known)
    if heads is None:
        return RunImages(train, validation, labelled)
    source, validation = attach_targets(heads, data, source, validation)
    if labelled is None:
        return RunImages(source, validation, None)
    return RunImages(without_targets(train, source), validation, source)


def load_both(data: DictConfig, labels: DictConfig | None = None) -> tuple[Images, Images]:
    """Loads the images to fit an evaluation on and those to score it on, with labels.

    Args:
        data: see :func:`load_run`.
        labels: see :func:`load_run`; None for the labels of the ``data:`` block.

    Raises:
        ConfigError: see :func:`load_run`.
    """
    labels = OmegaConf.create({}) if labels is None else labels
    own = labels.get("path") is not None
    train = _load_labelled(data, labels) if own else load_images(data, train=True)
    return train, _load_validation(data, labels, train)


def move_labelled_set(cfg: DictConfig) -> None:
    """Makes the images of ``labels.path`` the training images, for a run that trains on labels.

    Raises:
        ConfigError: the data set of the run is stored in another way.
    """
    OmegaConf.update(cfg, "labels.split", "train", force_add=True)
    path = cfg.labels.get("path")
    if path is None:
        return
    dataset, form = kind_of(path)
    if cfg.data.dataset in (*CIFAR_FOLDERS, "digits") and cfg.data.dataset != dataset:
        raise ConfigError(
            f"labels.path: {cfg.data.dataset} is stored in another way than {path}, so the "
            "backbone cannot be trained further on it: set data.train_path and data.dataset"
        )
    changes = {"train_path": path, "format": form, "no_labels": False, "fraction": -1}
    if cfg.data.get("no_labels"):
        changes["val_path"] = None  # Its images may have none either.
    for key, value in changes.items():
        OmegaConf.update(cfg, f"data.{key}", value, force_add=True)
    cfg.labels.path = None


def kind_of(path: str) -> tuple[str, str]:
    """The dataset and the format of the images at a path, as ``data:`` names them."""
    if path.endswith(".parquet") or glob(os.path.join(glob_escape(path), "*.parquet")):
        return "custom", "parquet"
    if is_saved(path):
        return "custom", "huggingface"
    for name, folder in CIFAR_FOLDERS.items():
        if os.path.isdir(os.path.join(path, folder)):
            return name, "image_folder"
    return "custom", "image_folder"


def _load_labelled(data: DictConfig, labels: DictConfig, known: bool = True) -> Images:
    """Loads the images of ``labels.path``; without their labels unless these are ``known``."""
    block = _block_at(data, labels.path)
    images = load_images(block if known else _unlabelled(block), True, "labels.path")
    if known and not (images.targets >= 0).any():
        raise ConfigError(
            f"labels.path: no image of {labels.path} has a label: give labelled images, or leave "
            "the key out"
        )
    return images


def _load_validation(
    data: DictConfig, labels: DictConfig, train: Images, known: bool = True
) -> Images:
    """Loads the validation images, with the numbers that the labelled training images have for
    their classes; without labels unless these are ``known``."""
    path, key = labels.get("val_path"), "labels.val_path"
    if path is None:
        key, block = "data.val_path", data
    else:
        block = _block_at(data, path)
    images = load_images(block if known else _unlabelled(block), False, key)
    if known and not (images.targets >= 0).any():
        raise ConfigError(
            f"{key}: no validation image has a label: give labelled images, or leave the key out"
        )
    return match_classes(train, images, key)


def _block_at(data: DictConfig, path: str) -> DictConfig:
    """A ``data:`` block for the labelled images at a path."""
    dataset, form = kind_of(path)
    own = {"dataset": dataset, "format": form, "train_path": path, "val_path": path}
    return _changed(data, **own, no_labels=False, fraction=-1)


def _unlabelled(data: DictConfig) -> DictConfig:
    """A copy of a block whose images have no labels."""
    return _changed(data, no_labels=True)


def _changed(data: DictConfig, **changes: Any) -> DictConfig:
    """A copy of a block with other values."""
    copied: DictConfig = copy.deepcopy(data)
    copied.update(changes)
    return copied
