"""Builds augmentation pipelines for PIL images from solo-learn's YAML keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from grap_solo.errors import ConfigError, unknown_name

# ImageNet's, written out: timm has them too, but its import takes seconds in each spawned worker.
DEFAULT_MEAN, DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_AND_STD = {
    "digits": ((0.31,) * 3, (0.35,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet100": (DEFAULT_MEAN, DEFAULT_STD),
}
KEYS = {
    "rrc",
    "color_jitter",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
    "crop_size",
    "num_crops",
    "mean",
    "std",
}
BICUBIC = v2.InterpolationMode.BICUBIC

Transform = Callable[[Image.Image], Tensor]


class GaussianBlur:
    """PIL's Gaussian blur with a radius drawn uniformly, as in solo-learn.

    Args:
        sigma: the least and the largest radius in pixels.
    """

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = torch.empty(()).uniform_(*self.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def build_pipeline(dataset: str, config: DictConfig) -> Transform:
    """Builds the random transform that one entry of ``augmentations`` describes.

    Args:
        dataset: the dataset's name, which decides the mean and standard deviation to normalise
            with. For an unknown dataset they are the entry's ``mean`` and ``std``, else ImageNet's.
        config: the entry.

    Raises:
        ConfigError: if the entry has an unknown key.
    """
    for key in config:
        if key not in KEYS:
            raise unknown_name("augmentations", key, KEYS)

    def probability(name: str) -> float:
        return float(config[name].prob) if name in config else 0.0

    size = config.crop_size
    steps: list[Any] = []
    if "rrc" in config and config.rrc.enabled:
        scale = (config.rrc.crop_min_scale, config.rrc.crop_max_scale)
        steps.append(v2.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC))
    else:
        steps.append(v2.Resize(size, interpolation=BICUBIC))
    if probability("color_jitter"):
        jitter = config.color_jitter
        steps.append(
            v2.RandomApply(
                [
                    v2.ColorJitter(
                        jitter.brightness,
                        jitter.contrast,
                        jitter.saturation,
                        jitter.hue,
                    )
                ],
                p=jitter.prob,
            )
        )
    if probability("grayscale"):
        steps.append(v2.RandomGrayscale(probability("grayscale")))
    if probability("gaussian_blur"):
        steps.append(v2.RandomApply([GaussianBlur()], p=probability("gaussian_blur")))
    if probability("solarization"):
        steps.append(v2.RandomSolarize(128, probability("solarization")))
    if probability("equalization"):
        steps.append(v2.RandomEqualize(probability("equalization")))
    if probability("horizontal_flip"):
        steps.append(v2.RandomHorizontalFlip(probability("horizontal_flip")))
    transform: Transform = v2.Compose([*steps, *_build_normalization(dataset, config)])
    return transform


def build_views(dataset: str, augmentations: ListConfig) -> list[Transform]:
    """Builds one transform for each view of an image: every entry counts ``num_crops`` times."""
    pipelines = [(build_pipeline(dataset, each), each.num_crops) for each in augmentations]
    return [pipeline for pipeline, crops in pipelines for _ in range(crops)]


def build_evaluation(dataset: str, augmentations: ListConfig) -> Transform:
    """Builds the deterministic transform of validation images.

    Small images (``digits``, CIFAR) are resized to the crop size. Other images get solo-learn's
    resize to 256 and centre crop of 224, or the same proportion for another crop size.
    """
    config = augmentations[0]
    size = config.crop_size
    if dataset in ("digits", "cifar10", "cifar100"):
        steps = [v2.Resize(size, interpolation=BICUBIC)]
    else:
        steps = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    transform: Transform = v2.Compose([*steps, *_build_normalization(dataset, config)])
    return transform


def count_crops(augmentations: Sequence[Any]) -> int:
    """Returns the number of views of an image.

    Raises:
        ConfigError: if there is no entry, an entry lacks a valid ``crop_size`` or ``num_crops``,
            or the crop sizes differ.
    """
    if not isinstance(augmentations, Sequence) or not augmentations:
        raise ConfigError("augmentations: missing: give a list of pipelines, as solo-learn does")
    for each in augmentations:
        for key in ("crop_size", "num_crops"):
            if key not in each:
                raise ConfigError(f"augmentations: an entry has no '{key}': add it")
            if type(each[key]) is not int or each[key] < 1:
                raise ConfigError(
                    f"augmentations: {key}: expected a whole number of 1 or more, got {each[key]!r}"
                )
    if len({each.crop_size for each in augmentations}) > 1:
        raise ConfigError(
            "augmentations: crop_size: all views must be of one size, multi-crop is not supported: "
            "give one crop_size"
        )
    return sum(each.num_crops for each in augmentations)


def _build_normalization(dataset: str, config: DictConfig) -> list[Any]:
    default = (config.get("mean", DEFAULT_MEAN), config.get("std", DEFAULT_STD))
    mean, std = MEAN_AND_STD.get(dataset, default)
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
