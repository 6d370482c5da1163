"""Loads datasets of (PIL image, label) pairs by solo-learn's names and formats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

from grap_solo.errors import ConfigError

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet100": 100}
DATASETS = (*NUM_CLASSES, "custom")
FORMATS = ("image_folder", "parquet")
DIGITS_SIZE = 32

Sample = tuple[Image.Image, int]


class Images(Dataset[Sample]):
    """Images with labels in memory or on disk.

    Attributes:
        targets: the labels, shape (N,); -1 for an unlabelled image.
        classes: the number of classes that the source declares; None if it declares none.
    """

    targets: np.ndarray
    classes: int | None = None

    def __len__(self) -> int:
        return len(self.targets)


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


class Parquet(Images):
    """A Parquet file with columns ``img`` (a struct with encoded ``bytes``) and ``label``.

    Keeps the encoded images in memory and decodes an image on access.

    Args:
        path: the file.

    Raises:
        ConfigError: if it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path, columns=["img", "label"])
            self.encoded = pyarrow.compute.struct_field(table["img"], "bytes")
            self.targets = table["label"].to_numpy().astype(np.int64)
        except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ConfigError(
                f"{path}: not a Parquet file with columns 'img' (with 'bytes') and 'label': {line}"
            ) from None

    def __getitem__(self, index: int) -> Sample:
        data = io.BytesIO(self.encoded[index].as_py())
        return Image.open(data).convert("RGB"), int(self.targets[index])


class Torchvision(Images):
    """A torchvision dataset: ``ImageFolder``, ``CIFAR10`` or ``CIFAR100``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.targets = np.asarray(dataset.targets)
        self.classes = len(dataset.classes)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.dataset[index]
        return image, int(label)


class Folder(Images):
    """All images of one folder, without labels.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        extensions = torchvision.datasets.folder.IMG_EXTENSIONS
        self.files = sorted(each for each in path.iterdir() if each.suffix.lower() in extensions)
        self.targets = np.full(len(self.files), -1)

    def __getitem__(self, index: int) -> Sample:
        return Image.open(self.files[index]).convert("RGB"), -1


class Unlabelled(Images):
    """A dataset's images without their labels.

    Args:
        dataset: the dataset.
    """

    def __init__(self, dataset: Images) -> None:
        self.dataset, self.classes = dataset, dataset.classes
        self.targets = np.full(len(dataset), -1)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index][0], -1


class PartlyLabelled(Images):
    """A dataset with only some of its labels.

    Args:
        dataset: the dataset.
        kept: the indexes of the images that keep their labels.
    """

    def __init__(self, dataset: Images, kept: np.ndarray) -> None:
        self.dataset, self.classes = dataset, dataset.classes
        self.targets = np.full(len(dataset), -1)
        self.targets[kept] = dataset.targets[kept]

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index][0], int(self.targets[index])


class Part(Images):
    """Some of a dataset's images.

    Args:
        dataset: the dataset.
        kept: the indexes to keep.
    """

    def __init__(self, dataset: Images, kept: np.ndarray) -> None:
        self.dataset, self.kept = dataset, kept
        self.targets = dataset.targets[kept]
        self.classes = dataset.classes

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.kept[index])]


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
        return PartlyLabelled(images, kept), None, kept
    rest = np.setdiff1d(np.arange(len(images)), kept)
    return Unlabelled(Part(images, rest)), Part(images, kept), kept


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
        images = Unlabelled(images)
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
    if config.no_labels and not any(each.is_dir() for each in path.iterdir()):
        return Folder(path)
    try:
        return Torchvision(torchvision.datasets.ImageFolder(str(path)))
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {error}".splitlines()[0]) from None


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
