"""A dataset's images: read with a clear error, converted to 8-bit RGB, in part or relabelled."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from grap_solo.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

TargetsByHead = dict[str, np.ndarray]
"""Targets by the name of their downstream head, each (N,) or (N, L): whole numbers for classes,
with -1 where one is missing, else float32, with NaN."""

Sample = tuple[Image.Image, Any]
"""An image, and its label; with a ``downstream:`` block its targets by the heads' names."""

RANGES = (255, 2**16 - 1, 2**31 - 1)
"""The largest values of the integer ranges that gray images come in."""


class UnreadableImage(ConfigError):
    """An image that cannot be loaded; the text names its file or row.

    A loading process sends the error with its traceback in front: only the last line is kept.
    """

    def __init__(self, text: str) -> None:
        lines = text.strip().splitlines() or [""]
        super().__init__(lines[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Images(Dataset[Sample]):
    """Images with labels in memory or on disk.

    Attributes:
        targets: the labels, shape (N,); -1 for an unlabelled image.
        classes: the number of classes that the source declares; None if it declares none.
        class_names: each label's name; None where the labels are numbers.
        values: the targets of the downstream heads; None without a ``downstream:`` block.
    """

    targets: np.ndarray
    values: TargetsByHead | None = None
    classes: int | None = None
    class_names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labelled(self) -> np.ndarray:
        """Whether each image has a label or, with a ``downstream:`` block, any target, (N,)."""
        if self.values is None:
            return self.targets >= 0
        known = [~is_missing(each).reshape(len(self), -1).all(1) for each in self.values.values()]
        found: np.ndarray = np.any(known, axis=0)
        return found

    def read_column(self, name: str, key: str) -> pyarrow.Array | pyarrow.ChunkedArray:
        """The N values of a column of the table that lists the images.

        Args:
            name: the column.
            key: the configuration's key that names it, for the error.

        Raises:
            ConfigError: there is no table, or it has no such column.
        """
        raise ConfigError(
            f"{key}: these images have no columns: list them in a CSV file, or store them as "
            "Parquet or a saved dataset"
        )

    def describe(self, index: int) -> str:
        """The file or row of an image, for an error's text."""
        return f"image {index}"

    def file_of(self, index: int) -> str | None:
        """The file that an image has for itself; None if it has none."""
        return None

    def stored_size(self, index: int) -> int:
        """The bytes of an image's file or encoding; 0 if it has none, or cannot be read."""
        file = self.file_of(index)
        try:
            return 0 if file is None else os.path.getsize(file)
        except OSError:
            return 0


class Relabelled(Images):
    """A dataset's images with other labels.

    Args:
        dataset: the dataset.
        targets: the labels, shape (N,).
        values: the targets of the downstream heads, which an image then comes with.
    """

    def __init__(
        self, dataset: Images, targets: np.ndarray, values: TargetsByHead | None = None
    ) -> None:
        self.dataset, self.targets, self.values = dataset, targets, values
        self.classes, self.class_names = dataset.classes, dataset.class_names

    def __getitem__(self, index: int) -> Sample:
        image = self.dataset[index][0]
        if self.values is None:
            return image, int(self.targets[index])
        return image, {name: each[index] for name, each in self.values.items()}

    def read_column(self, name: str, key: str) -> pyarrow.Array | pyarrow.ChunkedArray:
        return self.dataset.read_column(name, key)

    def describe(self, index: int) -> str:
        return self.dataset.describe(index)

    def file_of(self, index: int) -> str | None:
        return self.dataset.file_of(index)

    def stored_size(self, index: int) -> int:
        return self.dataset.stored_size(index)


class Part(Images):
    """Some of a dataset's images.

    Args:
        dataset: the dataset.
        kept: the indexes to keep.
    """

    def __init__(self, dataset: Images, kept: np.ndarray) -> None:
        self.dataset, self.kept = dataset, kept
        self.targets = dataset.targets[kept]
        if dataset.values is not None:
            self.values = {name: each[kept] for name, each in dataset.values.items()}
        self.classes, self.class_names = dataset.classes, dataset.class_names

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.kept[index])]

    def read_column(self, name: str, key: str) -> pyarrow.Array | pyarrow.ChunkedArray:
        return self.dataset.read_column(name, key).take(self.kept)

    def describe(self, index: int) -> str:
        return self.dataset.describe(int(self.kept[index]))

    def file_of(self, index: int) -> str | None:
        return self.dataset.file_of(int(self.kept[index]))

    def stored_size(self, index: int) -> int:
        return self.dataset.stored_size(int(self.kept[index]))


def drop_labels(dataset: Images) -> Relabelled:
    """A dataset's images without their labels."""
    return keep_labels(dataset, np.array([], dtype=np.int64))


def keep_labels(dataset: Images, kept: np.ndarray) -> Relabelled:
    """A dataset in which only some images keep their labels, those at the indexes ``kept``."""
    targets = np.full(len(dataset), -1)
    targets[kept] = dataset.targets[kept]
    if dataset.values is None:
        return Relabelled(dataset, targets)
    values = {name: no_targets(each) for name, each in dataset.values.items()}
    for name, each in dataset.values.items():
        values[name][kept] = each[kept]
    return Relabelled(dataset, targets, values)


def is_missing(values: np.ndarray) -> np.ndarray:
    """Whether each target is missing, in the shape of ``values``."""
    missing: np.ndarray = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return missing


def no_targets(like: np.ndarray) -> np.ndarray:
    """Targets in the shape of others, all of them missing."""
    return np.full_like(like, np.nan if like.dtype.kind == "f" else -1)


def read_image(images: Images, index: int) -> Sample:
    """An image and its label.

    Raises:
        UnreadableImage: if it cannot be loaded.
    """
    try:
        return images[index]
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Its text has an address or the path again.
            line = "its content is no image"
        raise UnreadableImage(
            f"{images.describe(index)}: cannot be read as an image ({line}): replace or remove it"
        ) from error


def open_rgb(source: str | Path | io.BytesIO) -> Image.Image:
    """Reads an image as 8-bit RGB.

    PIL would cut a gray image of 16 or 32 bits, or of floats, at 255. Such an image is scaled to 8
    bits instead: one of 16 bits from 65,535, any other from the smallest of 1 (floats only), 255,
    65,535 and 2^31 - 1 that is not below its largest value.
    """
    if not isinstance(source, io.BytesIO) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is no file")  # A named pipe would be waited for without end.
    with Image.open(source) as image:
        if not image.mode.startswith(("I", "F")):
            return image.convert("RGB")
        pixels = np.asarray(image).astype(np.float64)
        ranges: tuple[int, ...] = (65_535,) if ";16" in image.mode else RANGES
        if image.mode == "F":
            ranges = (1, *RANGES)
    pixels = np.nan_to_num(pixels, posinf=0, neginf=0).clip(min=0)
    largest = pixels.max(initial=0)
    full = next((each for each in ranges if largest <= each), largest)
    return Image.fromarray((pixels * (255 / full)).round().astype(np.uint8)).convert("RGB")
