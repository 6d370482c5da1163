"""Builds the loaders of training views and of evaluation images from solo-learn's keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    StackDataset,
)

from grap_solo.data.augmentations import (
    Transform,
    build_evaluation,
    build_views,
    count_crops,
)
from grap_solo.data.batched import BatchedLoader, batched_loader, describe_part, targets_of
from grap_solo.data.datasets import (
    DATASETS,
    FORMATS,
    NUM_CLASSES,
    load_images,
    resolve_num_classes,
    split_labels,
)
from grap_solo.data.fingerprint import fingerprint
from grap_solo.data.images import Images, UnreadableImage, read_image
from grap_solo.data.labelled import (
    RunImages,
    has_validation,
    holds_out,
    kind_of,
    load_both,
    load_run,
    move_labelled_set,
)
from grap_solo.data.sampling import (
    EpochSampler,
    Place,
    ShareSampler,
    mixed_seed,
)
from grap_solo.data.shared import make_or_share, shared_arrays
from grap_solo.data.targets import fill_in_classes, fill_in_scales
from grap_solo.data.workers import build_loader, stop_workers
from grap_solo.errors import ConfigError

__all__ = [
    "DATASETS",
    "FORMATS",
    "NUM_CLASSES",
    "Images",
    "RunImages",
    "UnreadableImage",
    "count_crops",
    "evaluation_loader",
    "fill_in_classes",
    "fill_in_scales",
    "fingerprint",
    "has_validation",
    "holds_out",
    "kind_of",
    "labelled_loader",
    "load_both",
    "load_images",
    "load_run",
    "move_labelled_set",
    "pretrain_loader",
    "resolve_num_classes",
    "shared_arrays",
    "split_labels",
    "stop_workers",
    "views_loader",
]


class _Views(Dataset[tuple[int, list[Tensor], Any]]):
    """(index, views, label) of each image, as solo-learn's methods expect.

    The views depend only on the image and on the draw in its :data:`Place`."""

    def __init__(self, images: Images, transforms: list[Transform]) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> tuple[int, list[Tensor], Any]:
        draw, index = place
        image, label = read_image(self.images, index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(draw, index))
            return index, [transform(image) for transform in self.transforms], label


class _Evaluated(Dataset[tuple[Tensor, Any]]):
    """(transformed image, label) of each image."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = read_image(self.images, index)
        return self.transform(image), label


def pretrain_loader(
    cfg: DictConfig, images: Images, together: int, epoch: int = 0
) -> DataLoader[Any] | BatchedLoader:
    """Builds the loader of shuffled training batches ``[indexes, views, labels]``.

    It drops the last batch if that is smaller. With ``data.batched`` it keeps the decoded images in
    memory and makes the views a batch at a time.

    Args:
        cfg: the configuration.
        images: the training images.
        together: the number of images of one step on all ranks.
        epoch: the first epoch to draw.

    Raises:
        ConfigError: if there are fewer images than one step needs or, for ``data.batched``, if
            the images are of several sizes.
    """
    if together > len(images):
        raise ConfigError(
            f"optimizer.batch_size: {together} images a step, but the training set has only "
            f"{len(images)}: use a smaller batch"
        )
    return _build_training_loader(
        cfg, images, EpochSampler(len(images), cfg.seed, epoch), True, "train"
    )


def labelled_loader(
    cfg: DictConfig, images: Images, together: int, epoch: int = 0
) -> DataLoader[Any] | BatchedLoader:
    """Builds the loader of held-out labelled images, like :func:`pretrain_loader`'s.

    If there are fewer images than one step needs, it gives one smaller batch."""
    sampler = EpochSampler(len(images), mixed_seed(cfg.seed, 1), epoch)
    return _build_training_loader(cfg, images, sampler, len(images) >= together, "labelled")


def evaluation_loader(cfg: DictConfig, images: Images, keep: bool = False) -> DataLoader[Any]:
    """Builds the loader of evaluation batches ``[images, labels]``, in order and not augmented.

    Args:
        cfg: the configuration.
        images: the images to evaluate on.
        keep: with ``data.batched``, transform all images now and keep them in memory.
    """
    transform = build_evaluation(cfg.data.dataset, cfg.augmentations)
    sampler, dataset = ShareSampler(len(images)), _Evaluated(images, transform)
    if not (keep and cfg.data.get("batched", False)):
        return _build_loader(cfg, dataset, sampler, drop_last=False)

    def transform_all() -> np.ndarray:
        return torch.stack([dataset[index][0] for index in range(len(dataset))]).numpy()

    key = describe_part(cfg, images, "evaluated")
    key["augmentations"] = OmegaConf.to_container(cfg.augmentations)
    stacked: Any = torch.from_numpy(make_or_share(key, transform_all))
    targets = targets_of(images)
    kept: Any = StackDataset(**targets) if isinstance(targets, dict) else targets
    return DataLoader(
        StackDataset(stacked, kept),
        sampler=BatchSampler(sampler, cfg.optimizer.batch_size, drop_last=False),
        batch_size=None,  # The sampler gives the indexes of whole batches.
        pin_memory=torch.cuda.is_available(),
    )


def views_loader(cfg: DictConfig, images: Images, views: int) -> DataLoader[Any]:
    """Builds the loader of several training views of each image: ``[indexes, views, labels]``, in
    order.

    The pipelines of ``augmentations`` take turns. The views depend on the run's seed alone.

    Args:
        cfg: the configuration.
        images: the images.
        views: how many of each, at least; a multiple of the number of views in training.
    """
    transforms = build_views(cfg.data.dataset, cfg.augmentations)
    dataset = _Views(images, transforms * -(-views // len(transforms)))
    places = [(mixed_seed(cfg.seed, 2), index) for index in range(len(images))]
    return _build_loader(cfg, dataset, places, drop_last=False)


def _build_training_loader(
    cfg: DictConfig, images: Images, sampler: EpochSampler, drop_last: bool, part: str
) -> DataLoader[Any] | BatchedLoader:
    if cfg.data.get("batched", False):
        return batched_loader(cfg, images, sampler, drop_last, part=part)
    dataset = _Views(images, build_views(cfg.data.dataset, cfg.augmentations))
    return _build_loader(cfg, dataset, sampler, drop_last)


def _build_loader(
    cfg: DictConfig, dataset: Dataset[Any], sampler: Sampler[Any] | list[Place], drop_last: bool
) -> DataLoader[Any]:
    return build_loader(
        dataset,
        cfg.data.num_workers,
        sampler=sampler,
        drop_last=drop_last,
        batch_size=cfg.optimizer.batch_size,
    )
