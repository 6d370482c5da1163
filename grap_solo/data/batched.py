"""Small images in memory, augmented a batch at a time on any device.

Each pipeline of :mod:`grap_solo.data.augmentations` is taken step by step: every step here does to
a whole batch, with draws of its own for each image, what torchvision and PIL do to one image.
Between the steps images are float32 with whole values from 0 to 255, rounded where PIL rounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from grap_solo.data.augmentations import GaussianBlur, build_views
from grap_solo.data.datasets import Images
from grap_solo.data.sampling import EpochSampler, leave_sigterm_to_the_training, mixed_seed
from grap_solo.distributed import rank, world_size
from grap_solo.errors import ConfigError

TRIES = 10  # torchvision's, for a crop that fits into the image.
BLUR_PASSES = 3  # PIL's: its Gaussian blur is a box blur, this often.


# What is done to images (B, 3, H, W), with parameters (B,) where each image has its own.


def resize_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL's bicubic resize, with antialiasing, of a box of each image: across, then down. (Where a
    box shrinks in height, PIL goes down first since version 13: the roundings differ.)

    Args:
        images: uint8, shape (B, 3, H, W).
        boxes: top, left, height and width in whole pixels, shape (B, 4).
        size: height and width of the result.
    """
    top, left, height, width = boxes.float().unbind(1)
    across = _resize_matrix(left, width, images.shape[3], size[1])
    down = _resize_matrix(top, height, images.shape[2], size[0])
    rows = _round(_along_rows(images.float(), across))
    return _round(_along_rows(rows.mT, down)).mT.contiguous()


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Brightness``."""
    return _cut(images * _of_each(factors))


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Contrast``: away from the mean gray, a whole number."""
    mean = _round(_gray(images).mean((1, 2, 3), keepdim=True))
    return _blend(mean, images, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ``ImageEnhance.Color``: away from the gray image."""
    return _blend(_gray(images), images, factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """torchvision's ``adjust_hue`` on PIL's 8-bit HSV; the shifts are shares of the circle."""
    high, low = images.amax(1), images.amin(1)
    spread = (high - low).clamp(min=1)  # Where it is 0, so is the saturation.
    red, green, blue = ((high.unsqueeze(1) - images) / spread.unsqueeze(1)).unbind(1)
    sixths = torch.where(images[:, 1] == high, 2 + red - blue, 4 + green - red)
    sixths = torch.where(images[:, 0] == high, blue - green, sixths)
    hue = _wrap(sixths / 6, 1).mul_(255).floor_()
    saturation = ((high - low) / high.clamp(min=1)).mul_(255).floor_().div_(255)
    hue = _wrap(hue + (shifts * 255).trunc().view(-1, 1, 1), 256)
    # Back: each channel falls from the value by as much as the hue is away from it.
    offset = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    place = _wrap(hue.mul_(6 / 255).unsqueeze(1) + offset, 6)
    away = torch.minimum(place, 4 - place).clamp_(0, 1)
    return _round(high.unsqueeze(1) * (1 - saturation.unsqueeze(1) * away))


def grayscale(images: Tensor) -> Tensor:
    """PIL's luma, in all three channels."""
    return _gray(images).expand_as(images).contiguous()


def blur(images: Tensor, radii: Tensor) -> Tensor:
    """PIL's ``GaussianBlur``: three box blurs, each of the variance that a third of it has."""
    for _ in range(2):  # Across and down.
        matrix = _box_matrix(_box_radius(radii), images.shape[3])
        for _ in range(BLUR_PASSES):
            images = _round(_along_rows(images, matrix))
        images = images.mT
    return images


def solarize(images: Tensor, threshold: float) -> Tensor:
    """PIL's ``ImageOps.solarize``: values from the threshold on are inverted."""
    return torch.where(images >= threshold, 255 - images, images)


def equalize(images: Tensor) -> Tensor:
    """PIL's ``ImageOps.equalize``, of each channel by itself."""
    equalized: Tensor = v2.functional.equalize(images.to(torch.uint8))
    return equalized.float()


def flip(images: Tensor) -> Tensor:
    """Left and right exchanged."""
    return images.flip(-1)


# The random steps. Each takes the images and a table of numbers from [0, 1), one row an image.


class Step(Protocol):
    """One step of a pipeline.

    Attributes:
        columns: how many numbers it needs for an image.
    """

    @property
    def columns(self) -> int: ...

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """The images (B, 3, H, W) after the step; ``draws`` is of shape (B, columns)."""


@dataclass(frozen=True)
class Resize:
    """The whole image, its shorter edge brought to a size."""

    size: int
    columns: int = 0

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[2:]
        short = min(height, width)
        size = (self.size * height // short, self.size * width // short)
        boxes = np.tile([0, 0, height, width], (len(images), 1))
        return resize_boxes(images, _send(boxes, images.device), size)


@dataclass(frozen=True)
class Crop:
    """torchvision's ``RandomResizedCrop``, its law and its rounding: of ten draws of area and
    aspect ratio the first that fits counts, and the middle of the image if none does."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    columns: int = 2 * TRIES + 2

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        boxes = self.boxes(draws, images.shape[2], images.shape[3])
        return resize_boxes(images, _send(boxes, images.device), self.size)

    def boxes(self, draws: np.ndarray, height: int, width: int) -> np.ndarray:
        """Top, left, height and width of each crop in pixels, shape (B, 4)."""
        draws = draws.astype(np.float64)
        area = height * width * _between(*self.scale, draws[:, :TRIES])
        logs = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(_between(*logs, draws[:, TRIES : 2 * TRIES]))
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
class Sometimes:
    """A function of images for some of them, with parameters drawn evenly from ranges."""

    probability: float
    function: Callable[..., Tensor]
    ranges: Sequence[tuple[float, float]] = ()

    @property
    def columns(self) -> int:
        return 1 + len(self.ranges)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        parameters = [_between(*each, draws[:, 1 + k]) for k, each in enumerate(self.ranges)]
        return _change(images, draws[:, 0] < self.probability, self.function, *parameters)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@dataclass(frozen=True)
class Jitter:
    """torchvision's ``ColorJitter`` for some of the images: each of these has its factors and the
    order of the four adjustments to itself.

    Attributes:
        probability: of being adjusted.
        ranges: of the factors, in the order of ``ADJUSTMENTS``; None where there is none.
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
                    images = _change(images, chosen, adjust, factors)
        return images

    def order(self, draws: np.ndarray) -> np.ndarray:
        """Which adjustment comes first, second, ...: shape (B, 4)."""
        return draws[:, 1 : 1 + len(ADJUSTMENTS)].argsort(1)

    def factors(self, draws: np.ndarray, number: int) -> np.ndarray | None:
        """One adjustment's factors, shape (B,)."""
        between = self.ranges[number]
        if between is None:
            return None
        return _between(*between, draws[:, 1 + len(ADJUSTMENTS) + number])


class Pipeline:
    """Random views of images, all their steps and the normalisation.

    Args:
        transform: a pipeline of :func:`~grap_solo.data.augmentations.build_pipeline`.

    Raises:
        TypeError: a step in it that is not known here.
    """

    def __init__(self, transform: Any) -> None:
        *steps, _, _, normalize = transform.transforms
        self.steps = [_batched(each) for each in steps]
        self.columns = sum(each.columns for each in self.steps)
        mean, std = (np.reshape(each, (3, 1, 1)) for each in (normalize.mean, normalize.std))
        # (x / 255 - mean) / std is x * scale + shift.
        self._scale = (1 / (255 * std)).astype(np.float32)
        self._shift = (-mean / std).astype(np.float32)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Views of images.

        Args:
            images: uint8, shape (B, 3, H, W).
            draws: numbers from [0, 1), shape (B, columns).

        Returns:
            float32, normalised, shape (B, 3, S, S).
        """
        ends = np.cumsum([each.columns for each in self.steps])[:-1]
        for step, part in zip(self.steps, np.split(draws, ends, axis=1), strict=True):
            images = step(images, part)
        scale, shift = (_send(each, images.device) for each in (self._scale, self._shift))
        return torch.addcmul(shift, images, scale)


def _batched(transform: Any) -> Step:
    """What one of torchvision's transforms does to one image, for batches."""
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
            return Sometimes(probability, grayscale)
        case GaussianBlur():
            return Sometimes(probability, blur, [transform.sigma])
        case v2.RandomSolarize():
            return Sometimes(
                probability, functools.partial(solarize, threshold=transform.threshold)
            )
        case v2.RandomEqualize():
            return Sometimes(probability, equalize)
        case v2.RandomHorizontalFlip():
            return Sometimes(probability, flip)
    raise TypeError(f"{type(transform).__name__}: no such step on batches")


# The loader.


class Batch(NamedTuple):
    """One batch to be made: the images, and all that its randomness depends on.

    Attributes:
        seed: of the step, the same on all processes.
        rank, processes: which share of the step this is.
        indexes: the images, shape (B,).
    """

    seed: int
    rank: int
    processes: int
    indexes: np.ndarray


class Batches(Sampler[Batch]):
    """The places of a sampler in batches.

    Args:
        sampler: of one process's images in an epoch.
        size: images in a batch.
        drop_last: leave out the last batch if it is smaller.
    """

    def __init__(self, sampler: EpochSampler, size: int, drop_last: bool) -> None:
        self.sampler, self.size, self.drop_last = sampler, size, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        places = np.array(list(self.sampler))
        for number in range(len(self)):
            draws, indexes = places[number * self.size : (number + 1) * self.size].T
            yield Batch(mixed_seed(int(draws[0]), number), rank(), world_size(), indexes)


class MemoryViews(Dataset[list[Any]]):
    """Batches ``[indexes, views, labels]`` of images that lie decoded in memory.

    Args:
        images: uint8, shape (N, 3, H, W).
        labels: shape (N,).
        pipelines: one for each view.
        device: where the views are made; ``cuda`` is the current device at the first batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        pipelines: Sequence[Pipeline],
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.labels, self.pipelines = images, labels, pipelines
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, batch: Batch) -> list[Any]:
        self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        indexes = _send(batch.indexes, self.device)
        images = self.images[indexes]
        generator = np.random.default_rng(batch.seed)
        views = []
        for pipeline in self.pipelines:
            # As for the whole step: how it is shared out changes nothing.
            shape = (batch.processes * len(indexes), pipeline.columns)
            draws = generator.random(shape, dtype=np.float32)[batch.rank :: batch.processes]
            views.append(pipeline(images, draws))
        return [indexes, views, self.labels[indexes]]


class BatchedLoader:
    """Batches ``[indexes (B,), views, labels (B,)]``, each view (B, 3, S, S), float32.

    What it gives is a function of the sampler's seed and epoch; the global random state is left
    as it is. It is no ``DataLoader``, so Lightning puts no sampler of its own in place of this
    one, and it calls ``sampler.set_epoch`` before each epoch.

    Args:
        dataset: makes the batches.
        sampler: of one process's images.
        batch_size: of one process.
        drop_last: leave out the last batch if it is smaller.
        num_workers: processes that make the batches, on the CPU only; 0 for this process.

    Attributes:
        sampler: the order of the images; see
            :meth:`~grap_solo.data.sampling.EpochSampler.set_epoch`.
    """

    def __init__(
        self,
        dataset: MemoryViews,
        sampler: EpochSampler,
        batch_size: int,
        drop_last: bool = True,
        num_workers: int = 0,
    ) -> None:
        self.sampler = sampler
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            sampler=Batches(sampler, batch_size, drop_last),
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=dataset.device.type == "cpu" and torch.cuda.is_available(),
            worker_init_fn=leave_sigterm_to_the_training,
            generator=torch.Generator(),  # Else each epoch takes a number from the global one.
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Any]]:
        yield from self._loader  # Drawn when the first is asked for: Lightning calls iter() twice.

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is drawn when the loader is next iterated over."""
        self.sampler.set_epoch(epoch)


def batched_loader(
    cfg: DictConfig,
    images: Images,
    sampler: EpochSampler,
    drop_last: bool,
    device: torch.device | str | None = None,
) -> BatchedLoader:
    """The views that ``augmentations`` describes, made a batch at a time.

    Args:
        cfg: the configuration.
        images: all of one size; they are decoded here, once.
        sampler: of one process's images.
        drop_last: leave out the last batch if it is smaller.
        device: where the views are made; the GPU that is trained on if that is CUDA's, else the
            CPU.

    Raises:
        ConfigError: images of more than one size, or an unknown key of ``augmentations``.
    """
    if device is None:
        cuda = cfg.get("accelerator", "auto") in ("auto", "gpu", "cuda")
        device = "cuda" if cuda and torch.cuda.is_available() else "cpu"
    pipelines = [Pipeline(each) for each in build_views(cfg.data.dataset, cfg.augmentations)]
    labels = torch.from_numpy(np.asarray(images.targets, dtype=np.int64))
    dataset = MemoryViews(decode(images), labels, pipelines, device)
    workers = cfg.data.num_workers if dataset.device.type == "cpu" else 0
    return BatchedLoader(dataset, sampler, cfg.optimizer.batch_size, drop_last, workers)


def decode(images: Images) -> Tensor:
    """All images, uint8, shape (N, 3, H, W).

    Raises:
        ConfigError: they are not all of one size.
    """
    width, height = images[0][0].size
    pixels = np.empty((len(images), height, width, 3), np.uint8)
    for index in range(len(images)):
        image = images[index][0]
        if image.size != (width, height):
            raise ConfigError(
                f"data.batched: image {index} is {image.size[0]}x{image.size[1]}, not "
                f"{width}x{height} as the first: set data.batched=False"
            )
        pixels[index] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# Parts of the functions above.


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device. A GPU gets it in its turn, without being waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _change(
    images: Tensor, chosen: np.ndarray, function: Callable[..., Tensor], *parameters: np.ndarray
) -> Tensor:
    """The images, which may be written over, with the chosen ones changed by a function."""
    if not chosen.any():
        return images
    if chosen.all():
        return function(images, *[_send(each, images.device) for each in parameters])
    where = _send(np.flatnonzero(chosen), images.device)
    given = [_send(each[chosen], images.device) for each in parameters]
    return images.index_copy_(0, where, function(images.index_select(0, where), *given))


def _between(low: float, high: float, draws: np.ndarray) -> np.ndarray:
    """Numbers from [0, 1), float32, brought to [low, high]."""
    return low + (high - low) * draws


def _of_each(parameters: Tensor) -> Tensor:
    return parameters.view(-1, 1, 1, 1)


def _cut(images: Tensor) -> Tensor:
    """To whole values as in a C cast, which PIL's enhancements end with."""
    return images.clamp_(0, 255).floor_()


def _round(images: Tensor) -> Tensor:
    """To the nearest whole values, halves up."""
    return images.add_(0.5).floor_().clamp_(0, 255)


def _wrap(values: Tensor, period: float) -> Tensor:
    """Into [0, period). Much faster on CPUs than the remainder operator."""
    return values - (values / period).floor_().mul_(period)


def _gray(images: Tensor) -> Tensor:
    """PIL's luma, shape (B, 1, H, W). Its fixed-point sums are whole and below 2^24: exact."""
    red, green, blue = images.split(1, dim=1)
    sum_ = red * 19595 + green * 38470 + blue * 7471
    return sum_.add_(0x8000).mul_(1 / 65536).floor_()


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """From ``start`` through the images and beyond: PIL's ``Image.blend``."""
    return _cut((images - start).mul_(_of_each(factors)).add_(start))


def _along_rows(images: Tensor, matrices: Tensor) -> Tensor:
    """Each row x of an image (3, H, W) becomes M x; matrices of shape (B, V, W)."""
    flat = images.flatten(1, 2) @ matrices.mT
    return flat.unflatten(1, images.shape[1:3])


def _resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """PIL's bicubic weights (B, target, source) for a part of each row or column."""
    scale = (length / target).view(-1, 1, 1)
    first, last = start.view(-1, 1, 1), (start + length).view(-1, 1, 1)
    pixels = torch.arange(source, device=start.device) + 0.5
    centres = first + (torch.arange(target, device=start.device).view(1, -1, 1) + 0.5) * scale
    away = ((pixels - centres) / scale.clamp(min=1)).abs_().clamp_(max=2)
    near = (1.5 * away - 2.5) * away.square() + 1
    far = ((2.5 - 0.5 * away) * away - 4) * away + 2
    weights = torch.where(away < 1, near, far).mul_((pixels > first) & (pixels < last))
    return weights / weights.sum(-1, keepdim=True)


def _box_radius(sigma: Tensor) -> Tensor:
    """The radius of PIL's box blur for a Gaussian's standard deviation in pixels, shape (B,)."""
    variance = sigma.double().square() / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return (whole + part / (6 * (variance - (whole + 1).square()))).float()


def _box_matrix(radii: Tensor, size: int) -> Tensor:
    """A box blur's weights (B, size, size): a fractional radius takes a part of the next pixel,
    and beyond the edge the last pixel goes on."""
    radius = radii.view(-1, 1, 1)
    whole, weight = radius.floor(), 1 / (2 * radius + 1)
    pixels = torch.arange(size, device=radii.device)
    away = torch.arange(-1, size, device=radii.device) - pixels.view(-1, 1)
    # The sums of the weights up to each pixel, of all those beyond the edges at the edges.
    sums = (away + 1 + radius) * weight
    sums = torch.where(away < -whole - 1, 0, torch.where(away > whole, 1, sums))
    sums[..., 0], sums[..., -1] = 0, 1
    return sums.diff(dim=-1)
