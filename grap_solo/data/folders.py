"""Folders of images, and torchvision's datasets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from grap_solo.data.images import Images, Sample, open_rgb
from grap_solo.errors import ConfigError

UNLABELLED = "_unlabelled"
"""The folder, beside the class folders, of images without a label."""


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
    """A folder with a folder of images for each class. Images in :data:`UNLABELLED` have no label.
    Hidden files and folders are left out.

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
                "data.no_labels=True to train on all images without labels, or labels.path to a "
                "labelled set"
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
        unlabelled = sorted(_image_files(path, (path / UNLABELLED).rglob("*")))
        self.samples += [(str(file), -1) for file in unlabelled]
        self.targets += [-1] * len(unlabelled)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = [each for each in _visible_folders(Path(directory)) if each != UNLABELLED]
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


def load_folder(path: Path, key: str, labelled: bool) -> Images:
    """Loads a folder of images: by its class folders or, without labels, every image below it.

    Args:
        path: the folder.
        key: the key that gave it, for the errors.
        labelled: whether the images need labels.

    Raises:
        ConfigError: if there is no such folder, or no class folder where labels are needed.
    """
    if not path.is_dir():
        raise ConfigError(f"{key}: no such folder {path}: give a folder of images")
    loose = _image_files(path, path.iterdir())
    if not labelled and (not _visible_folders(path) or loose):
        return Folder(path)
    if _visible_folders(path) == [UNLABELLED] and not loose:
        return Folder(path)
    try:
        return ClassFolders(path)
    except FileNotFoundError as error:
        if not labelled:
            return Folder(path)  # An empty folder among them is no class to be missed.
        line = str(error).partition("\n")[0].partition(". Supported")[0].rstrip(".")
        raise ConfigError(
            f"{key}: {path}: {line}: put images into them, or remove the folders"
        ) from None
