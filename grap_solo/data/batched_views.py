"""Makes random views of whole batches of images, by the pipelines of
:mod:`grap_solo.data.augmentations`.

Each transform of a pipeline has a counterpart here. It does to a batch what torchvision and PIL do
to one image, with separate draws for each image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from grap_solo.data.augmentations import GaussianBlur
from grap_solo.data.batched_operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    equalize,
    flip,
    resize_boxes,
    solarize,
    to_grayscale,
)

CROP_TRIES = 10  # torchvision draws a crop this often, until one fits into the image.


# The transforms. Each takes the images and a table of numbers from [0, 1), one row an image.


class BatchTransform(Protocol):
    """One transform of a pipeline.

    Attributes:
        columns: the number of random numbers that it needs for an image.
    """

    @property
    def columns(self) -> int: ...

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Transforms images (B, 3, H, W). ``draws`` are numbers from [0, 1), (B, columns)."""


@dataclass(frozen=True)
class Resize:
    """Resizes images so that the shorter edge has a given size."""

    size: int
    columns: int = 0

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[2:]
        short = min(height, width)
        size = (self.size * height // short, self.size * width // short)
        boxes = np.tile([0, 0, height, width], (len(images), 1))
        return resize_boxes(images, send_to_device(boxes, images.device), size)


@dataclass(frozen=True)
class Crop:
    """torchvision's ``RandomResizedCrop``, with its distribution and its rounding.

    Of ten draws of area and aspect ratio it takes the first that fits into the image. If none fits,
    it takes the middle of the image."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    columns: int = 2 * CROP_TRIES + 2

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        boxes = self.boxes(draws, images.shape[2], images.shape[3])
        return resize_boxes(images, send_to_device(boxes, images.device), self.size)

    def boxes(self, draws: np.ndarray, height: int, width: int) -> np.ndarray:
        """Top, left, height and width of each crop in pixels, shape (B, 4)."""
        draws = draws.astype(np.float64)
        area = height * width * _scale_to_range(*self.scale, draws[:, :CROP_TRIES])
        logs = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(_scale_to_range(*logs, draws[:, CROP_TRIES : 2 * CROP_TRIES]))
        widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = (np.arange(len(draws)), fits.argmax(1))
        size = np.stack([heights[first], widths[first]], 1)
        room = [height, width] - size
        start = np.minimum(np.floor(draws[:, -2:] * (room + 1)), room)
        boxes = np.hstack([start, size])
        boxes[~fits.any(1)] = self._middle(height, width)
        return boxes.astype(np.int64)

    def _middle(self, height: int, width: int) -> list[int]:
        low, high = self.ratio
        tall, wide = height, width
        if width / height < low:
            tall = round(width / low)
        elif width / height > high:
            wide = round(height * high)
        return [(height - tall) // 2, (width - wide) // 2, tall, wide]


@dataclass(frozen=True)
class RandomApply:
    """Applies a function to some of the images, with parameters drawn uniformly from ranges.

    Attributes:
        probability: the probability of applying the function to an image.
        function: takes images and their parameters.
        ranges: the range of each parameter.
    """

    probability: float
    function: Callable[..., Tensor]
    ranges: Sequence[tuple[float, float]] = ()

    @property
    def columns(self) -> int:
        return 1 + len(self.ranges)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        parameters = [_scale_to_range(*each, draws[:, 1 + k]) for k, each in enumerate(self.ranges)]
        return _apply_to_chosen(images, draws[:, 0] < self.probability, self.function, *parameters)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@dataclass(frozen=True)
class Jitter:
    """Applies torchvision's ``ColorJitter`` to some of the images.

    Factors and the order of the four adjustments are drawn for each image.

    Attributes:
        probability: the probability of adjusting an image.
        ranges: the range of each factor, in the order of ``ADJUSTMENTS``; None for an adjustment
            that is not made.
    """

    probability: float
    ranges: Sequence[tuple[float, float] | None]
    columns: int = 1 + 2 * len(ADJUSTMENTS)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        adjusted = draws[:, 0] < self.probability
        order = self.order(draws)
        for turn in range(len(ADJUSTMENTS)):
            for number, adjust in enumerate(ADJUSTMENTS):
                factors = self.factors(draws, number)
                if factors is not None:
                    chosen = adjusted & (order[:, turn] == number)
                    images = _apply_to_chosen(images, chosen, adjust, factors)
        return images

    def order(self, draws: np.ndarray) -> np.ndarray:
        """The number of the adjustment that comes first, second, ..., shape (B, 4)."""
        return draws[:, 1 : 1 + len(ADJUSTMENTS)].argsort(1)

    def factors(self, draws: np.ndarray, number: int) -> np.ndarray | None:
        """The factors of one adjustment, shape (B,); None if it is not made."""
        between = self.ranges[number]
        if between is None:
            return None
        return _scale_to_range(*between, draws[:, 1 + len(ADJUSTMENTS) + number])


class Pipeline:
    """Makes random, normalised views of images by all transforms of a pipeline.

    Args:
        transform: a pipeline of :func:`~grap_solo.data.augmentations.build_pipeline`.

    Raises:
        TypeError: if a transform has no counterpart for batches.
    """

    def __init__(self, transform: Any) -> None:
        *steps, _, _, normalize = transform.transforms
        self.steps = [build_batch_transform(each) for each in steps]
        self.columns = sum(each.columns for each in self.steps)
        mean, std = (np.reshape(each, (3, 1, 1)) for each in (normalize.mean, normalize.std))
        # (x / 255 - mean) / std is x * scale + shift.
        self._scale = (1 / (255 * std)).astype(np.float32)
        self._shift = (-mean / std).astype(np.float32)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Makes one view of each image.

        Args:
            images: uint8, shape (B, 3, H, W).
            draws: numbers from [0, 1), shape (B, columns).

        Returns:
            float32, normalised, shape (B, 3, S, S).
        """
        ends = np.cumsum([each.columns for each in self.steps])[:-1]
        for step, part in zip(self.steps, np.split(draws, ends, axis=1), strict=True):
            images = step(images, part)
        scale, shift = (send_to_device(each, images.device) for each in (self._scale, self._shift))
        return torch.addcmul(shift, images, scale)


def build_batch_transform(transform: Any) -> BatchTransform:
    """Builds the counterpart for batches of one of torchvision's transforms."""
    probability = getattr(transform, "p", 1.0)
    if isinstance(transform, v2.RandomApply):
        (transform,) = transform.transforms
    match transform:
        case v2.RandomResizedCrop():
            return Crop(tuple(transform.size), transform.scale, transform.ratio)
        case v2.Resize():
            return Resize(*transform.size)
        case v2.ColorJitter():
            names = ("brightness", "contrast", "saturation", "hue")
            return Jitter(probability, [getattr(transform, each) for each in names])
        case v2.RandomGrayscale():
            return RandomApply(probability, to_grayscale)
        case GaussianBlur():
            return RandomApply(probability, blur, [transform.sigma])
        case v2.RandomSolarize():
            return RandomApply(
                probability, functools.partial(solarize, threshold=transform.threshold)
            )
        case v2.RandomEqualize():
            return RandomApply(probability, equalize)
        case v2.RandomHorizontalFlip():
            return RandomApply(probability, flip)
    raise TypeError(f"{type(transform).__name__}: no such transform on batches")


def send_to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to a device. Does not wait for a GPU: the copy takes its turn there."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _apply_to_chosen(
    images: Tensor, chosen: np.ndarray, function: Callable[..., Tensor], *parameters: np.ndarray
) -> Tensor:
    """Applies a function to the chosen images. May overwrite ``images``."""
    if not chosen.any():
        return images
    if chosen.all():
        return function(images, *[send_to_device(each, images.device) for each in parameters])
    where = send_to_device(np.flatnonzero(chosen), images.device)
    given = [send_to_device(each[chosen], images.device) for each in parameters]
    return images.index_copy_(0, where, function(images.index_select(0, where), *given))


def _scale_to_range(low: float, high: float, draws: np.ndarray) -> np.ndarray:
    """Scales numbers from [0, 1) to [low, high]."""
    return low + (high - low) * draws
