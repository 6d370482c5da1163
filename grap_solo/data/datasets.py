"""Loads datasets of (PIL image, label) pairs by solo-learn's names and formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from grap_solo.data.columns import choose_column
from grap_solo.data.folders import Torchvision, load_folder
from grap_solo.data.images import (
    Images,
    Part,
    Relabelled,
    Sample,
    drop_labels,
    keep_labels,
)
from grap_solo.data.parquet import Parquet, find_parquet
from grap_solo.data.saved import ListedFiles, SavedDataset
from grap_solo.errors import ConfigError

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet100": 100}
DATASETS = (*NUM_CLASSES, "custom")
FORMATS = ("image_folder", "parquet", "huggingface")
DIGITS_SIZE = 32


class Digits(Images):
    """scikit-learn's 1,797 handwritten digits of 8x8, upsampled to 32x32 RGB (UCI, 1998).

    Their columns are ``label``; ``ink``, the mean brightness of the 8x8 pixels from 0 to 1; and the
    digit's properties ``even`` and ``large`` (5 or more), 0 or 1 each.

    Args:
        train: whether to take the 70 % for training or the 30 % for validation. The split is
            stratified by class.
    """

    classes = 10

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        kept = train_test_split(
            np.arange(len(digits.target)),
            test_size=0.3,
            stratify=digits.target,
            random_state=0,
        )[0 if train else 1]
        self.targets = digits.target[kept]
        self.ink = digits.images[kept].mean((1, 2)) / 16
        pixels = (digits.images[kept] * (255 / 16)).round().astype(np.uint8)
        size = (DIGITS_SIZE, DIGITS_SIZE)
        self.images = [
            Image.fromarray(each).resize(size, Image.Resampling.BICUBIC).convert("RGB")
            for each in pixels
        ]

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.targets[index])

    def read_column(self, name: str, key: str) -> Any:
        import pyarrow

        columns = {
            "label": self.targets,
            "ink": self.ink,
            "even": 1 - self.targets % 2,
            "large": self.targets >= 5,
        }
        return pyarrow.array(columns[choose_column([*columns], name, key, (), "digits")])


def split_labels(
    images: Images, fraction: float, held_out: bool, seed: int
) -> tuple[Images, Images | None, np.ndarray | None]:
    """Removes some of the labels, and may hold the remaining labelled images out of pretraining.

    Args:
        images: all training images.
        fraction: the share of the labelled images that keep their labels. They are drawn in equal
            proportion from each class.
        held_out: whether to hold the labelled images out. The pretraining images then have no
            labels.
        seed: the seed of the draw.

    Returns:
        The pretraining images; the held-out images, None unless ``held_out``; and the indexes of
        the images that keep their labels, shape (N,), None if all do.

    Raises:
        ConfigError: if there are no labels, or too few for every class.
    """
    if fraction == 1 and not held_out:
        return images, None, None
    labelled = np.flatnonzero(images.labelled)
    kept = labelled
    if fraction < 1:
        try:
            kept, _ = train_test_split(
                labelled, train_size=fraction, stratify=images.targets[labelled], random_state=seed
            )
        except ValueError as error:
            raise ConfigError(
                f"labels.fraction: {fraction} of {len(labelled)} labelled images: {error}"
            ) from None
    kept = np.sort(kept)
    if not held_out:
        return keep_labels(images, kept), None, kept
    rest = np.setdiff1d(np.arange(len(images)), kept)
    return drop_labels(Part(images, rest)), Part(images, kept), kept


def load_images(config: DictConfig, train: bool, key: str | None = None) -> Images:
    """Loads the training or validation images that a ``data:`` block names.

    Args:
        config: the block, with solo-learn's keys: ``dataset``, ``format``, ``train_path``,
            ``val_path``, ``no_labels``, ``fraction``; and ``download`` for CIFAR.
        train: whether to load the training images, else the validation images.
        key: the key that gave the path, for the errors; by default that of the block.

    Raises:
        ConfigError: if the path is missing or holds no images of that format, the dataset is
            empty, or the fraction is out of range.
    """
    key = key or ("data.train_path" if train else "data.val_path")
    if config.dataset == "digits":
        images: Images = Digits(train)
    else:
        path = Path(str(config.train_path if train else config.val_path))
        images = _load(config, path, key, train)
    if not len(images):
        raise ConfigError(f"{key}: no images in {path}: give a folder or file that holds some")
    if config.no_labels:
        images = drop_labels(images)
    fraction = config.fraction
    if train and fraction > 0:
        labels = None if config.no_labels else images.targets
        try:
            kept, _ = train_test_split(
                np.arange(len(images)), train_size=float(fraction), stratify=labels, random_state=42
            )
        except ValueError as error:
            raise ConfigError(f"data.fraction: {fraction} of {len(images)}: {error}") from None
        images = Part(images, kept)
    return images


def match_classes(train: Images, validation: Images, key: str = "data.val_path") -> Images:
    """Gives the validation images the numbers that the training has for their classes.

    Args:
        train: the images whose numbers count.
        validation: the images to number alike.
        key: the key that gave these images, for the errors.

    Raises:
        ConfigError: if a validation class is not among the training's.
    """
    theirs, ours = validation.class_names, train.class_names
    if theirs is None and ours is None or theirs == ours:
        return validation
    if theirs is None or ours is None:
        raise ConfigError(
            f"{key}: its classes are "
            + ("numbers, those of training names" if theirs is None else "names, not numbers")
            + ": label both in the same way"
        )
    unknown = [name for name in theirs if name not in ours]
    if unknown:
        raise ConfigError(
            f"{key}: its class '{unknown[0]}' is not one of training's "
            f"({', '.join(ours[:10])}{', ...' * (len(ours) > 10)}): name both alike"
        )
    number = np.array([ours.index(name) for name in theirs])
    targets = np.where(validation.targets < 0, -1, number[validation.targets])
    matched = Relabelled(validation, targets)
    matched.classes, matched.class_names = train.classes, ours
    return matched


def resolve_num_classes(data: DictConfig, *parts: Images) -> int:
    """Returns the number of classes: the dataset's, else ``num_classes``, else the number found.

    Args:
        data: the ``data:`` block of the configuration.
        parts: the training and validation images.

    Raises:
        ConfigError: if the labels, the class folders or ``num_classes`` do not fit it.
    """
    found = max([int(each.targets.max()) + 1 for each in parts])
    declared = max([each.classes or 0 for each in parts])
    given = data.get("num_classes")
    expected = NUM_CLASSES.get(data.dataset, given)
    if expected is None:
        return max(1, found, declared)
    if given is not None and given != expected:
        raise ConfigError(
            f"data.num_classes: {data.dataset} has {expected} classes, not {given}: remove the key"
        )
    if found > expected or (declared and declared != expected and data.dataset != "custom"):
        raise ConfigError(
            f"data.num_classes: {expected} does not fit: the images have "
            f"{max(found, declared)} classes: give the matching data"
            + (" or number" if data.dataset == "custom" else "")
        )
    return int(expected)


def _load(config: DictConfig, path: Path, key: str, train: bool) -> Images:
    columns = (config.get("image_key"), config.get("label_key"), not config.no_labels)
    if config.format == "parquet":
        return Parquet(find_parquet(str(path), key, train), *columns)
    if config.format == "huggingface":
        return SavedDataset(path, key, train, *columns)
    if path.suffix.lower() == ".csv":
        if not path.is_file():
            raise ConfigError(f"{key}: no such file {path}: give a CSV file")
        return ListedFiles(path, *columns)
    if config.dataset in ("cifar10", "cifar100"):
        return _load_cifar(config, path, key, train)
    return load_folder(path, key, labelled=not config.no_labels)


def _load_cifar(config: DictConfig, path: Path, key: str, train: bool) -> Images:
    load = getattr(torchvision.datasets, config.dataset.upper())
    try:
        return Torchvision(load(str(path), train=train, download=False))
    except RuntimeError:
        if not config.download:
            raise ConfigError(
                f"{key}: no {load.__name__} in {path}: put its '{load.base_folder}' there, or "
                f"set data.download=True"
            ) from None
    try:
        return Torchvision(load(str(path), train=train, download=True))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{key}: no {load.__name__} in {path}, and it could not be downloaded ({error}): "
            f"put its '{load.base_folder}' there"
        ) from None
