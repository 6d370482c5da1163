"""Loads datasets of (PIL image, label) pairs by solo-learn's names and formats."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets.folder import IMG_EXTENSIONS

from grap_solo.data.images import (
    Images,
    Part,
    Relabelled,
    Sample,
    drop_labels,
    keep_labels,
    open_rgb,
)
from grap_solo.data.parquet import Parquet
from grap_solo.errors import ConfigError

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet100": 100}
DATASETS = (*NUM_CLASSES, "custom")
FORMATS = ("image_folder", "parquet")
DIGITS_SIZE = 32


class Digits(Images):
    """scikit-learn's 1,797 handwritten digits of 8x8, upsampled to 32x32 RGB (UCI, 1998).

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
        pixels = (digits.images[kept] * (255 / 16)).round().astype(np.uint8)
        size = (DIGITS_SIZE, DIGITS_SIZE)
        self.images = [
            Image.fromarray(each).resize(size, Image.Resampling.BICUBIC).convert("RGB")
            for each in pixels
        ]

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.targets[index])


class Torchvision(Images):
    """A torchvision dataset: ``CIFAR10``, ``CIFAR100`` or a folder of class folders."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.targets = np.asarray(dataset.targets)
        self.classes = len(dataset.classes)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.dataset[index]
        return image, int(label)


class ClassFolders(Torchvision):
    """A folder with a folder of images for each class. Hidden files and folders are left out.

    Args:
        path: the folder.

    Raises:
        ConfigError: if images lie beside the class folders.
        FileNotFoundError: if there are no class folders, or one of them holds no image.
    """

    def __init__(self, path: Path) -> None:
        loose = _image_files(path, path.iterdir())
        if loose:
            raise ConfigError(
                f"{loose[0]}: lies beside the class folders of {path}: move it into one, or set "
                "data.no_labels=True to train on all images without labels"
            )
        super().__init__(_Visible(path))
        self.class_names = self.dataset.classes

    def describe(self, index: int) -> str:
        return self.file_of(index)

    def file_of(self, index: int) -> str:
        return str(self.dataset.samples[index][0])


class _Visible(torchvision.datasets.ImageFolder):
    """torchvision's, without hidden files and folders."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            str(path),
            loader=open_rgb,
            is_valid_file=lambda file: _names_image(file, str(path)),
        )

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = _visible_folders(Path(directory))
        if not names:
            raise FileNotFoundError("it has no class folders")
        return names, {name: label for label, name in enumerate(names)}


class Folder(Images):
    """All images in a folder and in the folders inside it, without labels; hidden files and
    folders are left out.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.files = sorted(_image_files(path, path.rglob("*")))
        self.targets = np.full(len(self.files), -1)

    def __getitem__(self, index: int) -> Sample:
        return open_rgb(self.files[index]), -1

    def describe(self, index: int) -> str:
        return self.file_of(index)

    def file_of(self, index: int) -> str:
        return str(self.files[index])


def _visible_folders(path: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    inside = (each for each in path.iterdir() if each.is_dir())
    return sorted(each.name for each in inside if not each.name.startswith("."))


def _image_files(root: Path, files: Iterable[Path]) -> list[Path]:
    """Those of the files below a folder that are images by their name, and not hidden there."""
    return [each for each in files if _names_image(str(each), str(root)) and not each.is_dir()]


def _names_image(file: str, root: str) -> bool:
    """Whether a path below a folder has an image's name, and no hidden part below the folder."""
    inside = file.removeprefix(f"{root}{os.sep}")
    return inside.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in f"{os.sep}{inside}"


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
    labelled = np.flatnonzero(images.targets >= 0)
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


def load_images(config: DictConfig, train: bool) -> Images:
    """Loads the training or validation images that a ``data:`` block names.

    Args:
        config: the block, with solo-learn's keys: ``dataset``, ``format``, ``train_path``,
            ``val_path``, ``no_labels``, ``fraction``; and ``download`` for CIFAR.
        train: whether to load the training images, else the validation images.

    Raises:
        ConfigError: if the path is missing or holds no images of that format, the dataset is
            empty, or the fraction is out of range.
    """
    key = "data.train_path" if train else "data.val_path"
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


def load_both(config: DictConfig) -> tuple[Images, Images]:
    """Loads the training and the validation images, with the same number for a class in both.

    Classes of folders, and of texts in Parquet files, are matched by their names.

    Args:
        config: see :func:`load_images`.

    Raises:
        ConfigError: see :func:`load_images`; or if a validation class is not among the training's.
    """
    train, validation = (load_images(config, train=part) for part in (True, False))
    return train, match_classes(train, validation)


def match_classes(train: Images, validation: Images) -> Images:
    """Gives the validation images the numbers that the training has for their classes.

    Raises:
        ConfigError: if a validation class is not among the training's.
    """
    theirs, ours = validation.class_names, train.class_names
    if theirs is None and ours is None or theirs == ours:
        return validation
    if theirs is None or ours is None:
        raise ConfigError(
            "data.val_path: its classes are "
            + ("numbers, those of training names" if theirs is None else "names, not numbers")
            + ": label both in the same way"
        )
    unknown = [name for name in theirs if name not in ours]
    if unknown:
        raise ConfigError(
            f"data.val_path: its class '{unknown[0]}' is not one of training's "
            f"({', '.join(ours[:10])}{', ...' * (len(ours) > 10)}): name both alike"
        )
    number = np.array([ours.index(name) for name in theirs])
    targets = np.where(validation.targets < 0, -1, number[validation.targets])
    matched = Relabelled(validation, targets)
    matched.classes, matched.class_names = train.classes, ours
    return matched


def _load(config: DictConfig, path: Path, key: str, train: bool) -> Images:
    if config.format == "parquet":
        if path.is_dir():
            names = ("train.parquet",) if train else ("val.parquet", "test.parquet")
            path = next(
                (path / name for name in names if (path / name).exists()),
                path / names[0],
            )
        if not path.is_file():
            raise ConfigError(f"{key}: no such file {path}: give a Parquet file")
        return Parquet(path)
    if config.dataset in ("cifar10", "cifar100"):
        return _load_cifar(config, path, key, train)
    if not path.is_dir():
        raise ConfigError(f"{key}: no such folder {path}: give a folder of images")
    flat = not _visible_folders(path) or _image_files(path, path.iterdir())
    if config.no_labels and flat:
        return Folder(path)
    try:
        return ClassFolders(path)
    except FileNotFoundError as error:
        line = str(error).partition("\n")[0].partition(". Supported")[0].rstrip(".")
        raise ConfigError(
            f"{key}: {path}: {line}: put images into them, or remove the folders"
        ) from None


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
