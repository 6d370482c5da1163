"""Loaders of views and of evaluation images, from a configuration with solo-learn's keys."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset

from grap_solo.data.augmentations import (
    Transform,
    build_evaluation,
    build_views,
    count_crops,
)
from grap_solo.data.batched import BatchedLoader, batched_loader
from grap_solo.data.datasets import (
    DATASETS,
    FORMATS,
    NUM_CLASSES,
    Images,
    load_images,
    split_labels,
)
from grap_solo.data.sampling import (
    EpochSampler,
    Place,
    ShareSampler,
    leave_sigterm_to_the_training,
    mixed_seed,
)
from grap_solo.errors import ConfigError

__all__ = [
    "DATASETS",
    "FORMATS",
    "NUM_CLASSES",
    "count_crops",
    "evaluation_loader",
    "labelled_loader",
    "load_images",
    "pretrain_loader",
    "resolve_num_classes",
    "split_labels",
]


class _Views(Dataset[tuple[int, list[Tensor], int]]):
    """(index, views, label) of each image: what solo-learn's methods train on. The views are a
    function of the image and of the draw that its place names."""

    def __init__(self, images: Images, transforms: list[Transform]) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> tuple[int, list[Tensor], int]:
        draw, index = place
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(draw, index))
            return index, [transform(image) for transform in self.transforms], label


class _Evaluated(Dataset[tuple[Tensor, int]]):
    """(image, label) of each image."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


def pretrain_loader(
    cfg: DictConfig, images: Images, together: int, epoch: int = 0
) -> DataLoader[Any] | BatchedLoader:
    """Shuffled batches ``[indexes, views, labels]``; the last, smaller one is dropped. With
    ``data.batched`` the images lie decoded in memory and the views are made a batch at a time.

    Args:
        cfg: the configuration.
        images: what to train on.
        together: the images of one step, over all devices.
        epoch: the first that is to be drawn.

    Raises:
        ConfigError: fewer images than one batch needs; for ``data.batched``, images of more than
            one size.
    """
    if together > len(images):
        raise ConfigError(
            f"optimizer.batch_size: {together} images a step, but the training set has only "
            f"{len(images)}: use a smaller batch"
        )
    return _training(cfg, images, EpochSampler(len(images), cfg.seed, epoch), drop_last=True)


def labelled_loader(
    cfg: DictConfig, images: Images, together: int, epoch: int = 0
) -> DataLoader[Any] | BatchedLoader:
    """Shuffled batches of views of held-out images, as :func:`pretrain_loader` gives them; one
    smaller batch where there are fewer images than a batch holds."""
    sampler = EpochSampler(len(images), mixed_seed(cfg.seed, 1), epoch)
    return _training(cfg, images, sampler, drop_last=len(images) >= together)


def evaluation_loader(cfg: DictConfig, images: Images, keep: bool = False) -> DataLoader[Any]:
    """Batches ``[images, labels]`` in order, without augmentation.

    Args:
        cfg: the configuration.
        images: what to evaluate on.
        keep: with ``data.batched``, transform all of them now and keep them in memory.
    """
    transform = build_evaluation(cfg.data.dataset, cfg.augmentations)
    sampler, dataset = ShareSampler(len(images)), _Evaluated(images, transform)
    if not (keep and cfg.data.get("batched", False)):
        return _loader(cfg, dataset, sampler, drop_last=False)
    pixels, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return DataLoader(
        TensorDataset(torch.stack(pixels), torch.tensor(labels)),
        sampler=BatchSampler(sampler, cfg.optimizer.batch_size, drop_last=False),
        batch_size=None,  # The sampler's places are whole batches.
        pin_memory=torch.cuda.is_available(),
    )


def resolve_num_classes(data: DictConfig, *parts: Images) -> int:
    """The number of classes: the dataset's, or as given, or as found in a custom dataset.

    Raises:
        ConfigError: the labels or folders do not fit it.
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


def _training(
    cfg: DictConfig, images: Images, sampler: EpochSampler, drop_last: bool
) -> DataLoader[Any] | BatchedLoader:
    if cfg.data.get("batched", False):
        return batched_loader(cfg, images, sampler, drop_last)
    dataset = _Views(images, build_views(cfg.data.dataset, cfg.augmentations))
    return _loader(cfg, dataset, sampler, drop_last)


def _loader(
    cfg: DictConfig, dataset: Dataset[Any], sampler: Sampler[Any], drop_last: bool
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        sampler=sampler,
        drop_last=drop_last,
        batch_size=cfg.optimizer.batch_size,
        num_workers=cfg.data.num_workers,
        persistent_workers=cfg.data.num_workers > 0,
        worker_init_fn=leave_sigterm_to_the_training,
        pin_memory=torch.cuda.is_available(),
    )
