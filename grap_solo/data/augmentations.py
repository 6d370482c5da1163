"""Builds augmentation pipelines for PIL images from solo-learn's YAML keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.keys import Key, missing_key, read_keys

# ImageNet's, written out: timm has them too, but its import takes seconds in each spawned worker.
DEFAULT_MEAN, DEFAULT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_AND_STD = {
    "digits": ((0.31,) * 3, (0.35,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet100": (DEFAULT_MEAN, DEFAULT_STD),
}
CHANCE = {"prob": Key(float, 0, most=1)}
BLOCK_KEYS: dict[str, dict[str, Key]] = {
    "rrc": {
        "enabled": Key(bool),
        "crop_min_scale": Key(float, 0, optional=True),
        "crop_max_scale": Key(float, above=0, optional=True),
    },
    "color_jitter": {
        **CHANCE,
        "brightness": Key(float, 0, optional=True),
        "contrast": Key(float, 0, optional=True),
        "saturation": Key(float, 0, optional=True),
        "hue": Key(float, 0, most=0.5, optional=True),
    },
    "grayscale": CHANCE,
    "gaussian_blur": CHANCE,
    "solarization": CHANCE,
    "equalization": CHANCE,
    "horizontal_flip": CHANCE,
}
"""The blocks of an entry of ``augmentations``, and their keys."""

NUMBERS = {"crop_size": Key(int, 1, most=2**14), "num_crops": Key(int, 1)}
COLOURS = {"mean": Key(float), "std": Key(float, above=0)}
"""One number for each of the three channels."""

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
        ConfigError: if the entry has an unknown key, or a value that does not fit.
    """
    _check_entry("augmentations", config)

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
    """Checks the pipelines and returns the number of views of an image.

    Raises:
        ConfigError: if there is no entry, an entry has an unknown key or a value that does not fit,
            or the crop sizes differ.
    """
    if not isinstance(augmentations, Sequence) or isinstance(augmentations, str):
        raise ConfigError(f"augmentations: expected a list of pipelines, got {augmentations!r}")
    if not augmentations:
        raise ConfigError("augmentations: missing: give a list of pipelines, as solo-learn does")
    for index, each in enumerate(augmentations):
        _check_entry(f"augmentations.{index}", each)
    if len({each.crop_size for each in augmentations}) > 1:
        raise ConfigError(
            "augmentations: crop_size: all views must be of one size, multi-crop is not supported: "
            "give one crop_size"
        )
    return sum(each.num_crops for each in augmentations)


def _check_entry(where: str, entry: Any) -> None:
    """Refuses an entry of ``augmentations`` that cannot be built.

    Args:
        where: its full name, for the errors.
        entry: the entry.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a block of keys, got {entry!r}")
    for key in entry:
        if key not in (*BLOCK_KEYS, *NUMBERS, *COLOURS):
            raise unknown_name(where, key, (*BLOCK_KEYS, *NUMBERS, *COLOURS))
    for key, number in NUMBERS.items():
        if key not in entry:
            raise missing_key(f"{where}.{key}")
        number.check(entry[key], f"{where}.{key}")
    for key in COLOURS.keys() & entry.keys():
        values = entry[key]
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 3:
            raise ConfigError(f"{where}.{key}: expected three numbers, got {values!r}")
        for value in values:
            COLOURS[key].check(value, f"{where}.{key}")
    for name in BLOCK_KEYS.keys() & entry.keys():
        _check_block(f"{where}.{name}", entry[name], BLOCK_KEYS[name])


def _check_block(where: str, block: Any, keys: Mapping[str, Key]) -> None:
    """Refuses a block of an entry: see :func:`_check_entry`."""
    if not isinstance(block, Mapping):
        raise ConfigError(f"{where}: expected a block of keys, got {block!r}")
    values = read_keys(keys, block, where)
    if values.get("enabled", values.get("prob")):
        for key, value in values.items():
            if value is None:
                raise missing_key(f"{where}.{key}")
        if "enabled" in values and values["crop_min_scale"] > values["crop_max_scale"]:
            raise ConfigError(
                f"{where}: crop_min_scale {values['crop_min_scale']} is above crop_max_scale "
                f"{values['crop_max_scale']}: give a smaller one"
            )


def _build_normalization(dataset: str, config: DictConfig) -> list[Any]:
    default = (config.get("mean", DEFAULT_MEAN), config.get("std", DEFAULT_STD))
    mean, std = MEAN_AND_STD.get(dataset, default)
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
