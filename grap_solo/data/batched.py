"""The loader that keeps small images in memory and makes their views a batch at a time, on any
device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from grap_solo.data.augmentations import build_views
from grap_solo.data.batched_views import Pipeline, send_to_device
from grap_solo.data.images import Images, read_image
from grap_solo.data.labelled import holds_out
from grap_solo.data.sampling import EpochSampler, mixed_seed
from grap_solo.data.shared import make_or_share
from grap_solo.data.workers import build_loader
from grap_solo.distributed import rank, world_size
from grap_solo.errors import ConfigError


class BatchPlan(NamedTuple):
    """Everything that a batch depends on: its images, and the source of its randomness.

    Attributes:
        seed: the seed of the step, the same on all ranks.
        rank: the rank that makes the batch.
        world_size: the number of ranks.
        indexes: the images' indexes, shape (B,).
    """

    seed: int
    rank: int
    world_size: int
    indexes: np.ndarray


class BatchPlanSampler(Sampler[BatchPlan]):
    """Groups a sampler's places into batches.

    Args:
        sampler: draws one rank's images of an epoch.
        size: the number of images in a batch.
        drop_last: whether to drop the last batch if it is smaller.
    """

    def __init__(self, sampler: EpochSampler, size: int, drop_last: bool) -> None:
        self.sampler, self.size, self.drop_last = sampler, size, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[BatchPlan]:
        places = np.array(list(self.sampler))
        for number in range(len(self)):
            draws, indexes = places[number * self.size : (number + 1) * self.size].T
            yield BatchPlan(mixed_seed(int(draws[0]), number), rank(), world_size(), indexes)


class MemoryViews(Dataset[list[Any]]):
    """Makes batches ``[indexes, views, labels]`` of images that it keeps decoded in memory.

    Args:
        images: uint8, shape (N, 3, H, W).
        labels: shape (N,), or the targets of each downstream head by its name.
        pipelines: one pipeline for each view.
        device: the device that makes the views. ``cuda`` stands for the device that is current
            when the first batch is made.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | dict[str, Tensor],
        pipelines: Sequence[Pipeline],
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.labels, self.pipelines = images, labels, pipelines
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, batch: BatchPlan) -> list[Any]:
        self.images = self.images.to(self.device)
        self.labels = _of_each(self.labels, lambda each: each.to(self.device))
        indexes = send_to_device(batch.indexes, self.device)
        images = self.images[indexes]
        generator = np.random.default_rng(batch.seed)
        views = []
        for pipeline in self.pipelines:
            # Drawn for the global batch, so that results do not depend on the world size.
            shape = (batch.world_size * len(indexes), pipeline.columns)
            draws = generator.random(shape, dtype=np.float32)[batch.rank :: batch.world_size]
            views.append(pipeline(images, draws))
        return [indexes, views, _of_each(self.labels, lambda each: each[indexes])]


def _of_each(labels: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes labels, or the targets of each head."""
    if isinstance(labels, dict):
        return {name: change(each) for name, each in labels.items()}
    return change(labels)


class BatchedLoader:
    """Loads batches ``[indexes (B,), views, labels (B,)]``, each view (B, 3, S, S) in float32.

    The batches depend only on the sampler's seed and epoch, and leave the global random states
    unchanged. The class is not a ``DataLoader``, because Lightning would replace the sampler of a
    ``DataLoader`` by its own. Lightning calls ``sampler.set_epoch`` before each epoch.

    Args:
        dataset: makes the batches.
        sampler: draws one rank's images.
        batch_size: the number of images in a rank's batch.
        drop_last: whether to drop the last batch if it is smaller.
        num_workers: the number of processes that make the batches, for views made on the CPU; 0
            for this process.

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
        self._loader: DataLoader[Any] = build_loader(
            dataset,
            num_workers,
            sampler=BatchPlanSampler(sampler, batch_size, drop_last),
            batch_size=None,
            pin_memory=dataset.device.type == "cpu" and torch.cuda.is_available(),
            generator=torch.Generator(),  # The default draws from the global random state.
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Any]]:
        yield from self._loader  # Draws at the first batch: Lightning calls iter() twice.

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration draws."""
        self.sampler.set_epoch(epoch)


def batched_loader(
    cfg: DictConfig,
    images: Images,
    sampler: EpochSampler,
    drop_last: bool,
    device: torch.device | str | None = None,
    part: str = "train",
) -> BatchedLoader:
    """Builds the loader of the views that ``augmentations`` describes.

    Within :func:`~grap_solo.data.shared.shared_arrays` the decoded images are there once for all
    runs of the machine.

    Args:
        cfg: the configuration.
        images: images of one size. They are decoded here, once.
        sampler: draws one rank's images.
        drop_last: whether to drop the last batch if it is smaller.
        device: the device that makes the views. The default is the GPU if the run trains on
            CUDA, else the CPU.
        part: which of the run's images they are.

    Raises:
        ConfigError: if the images are of several sizes, or ``augmentations`` has an unknown key.
    """
    if device is None:
        cuda = cfg.get("accelerator", "auto") in ("auto", "gpu", "cuda")
        device = "cuda" if cuda and torch.cuda.is_available() else "cpu"
    pipelines = [Pipeline(each) for each in build_views(cfg.data.dataset, cfg.augmentations)]
    pixels = make_or_share(describe_part(cfg, images, part), lambda: decode(images).numpy())
    dataset = MemoryViews(torch.from_numpy(pixels), targets_of(images), pipelines, device)
    workers = cfg.data.num_workers if dataset.device.type == "cpu" else 0
    return BatchedLoader(dataset, sampler, cfg.optimizer.batch_size, drop_last, workers)


def describe_part(cfg: DictConfig, images: Images, part: str) -> dict[str, Any]:
    """Everything that the pixels of a part of a run's images depend on, while no file changes.

    Args:
        cfg: the run's configuration.
        images: the images.
        part: which of the run's images they are, such as ``train``.
    """
    labels: Any = OmegaConf.to_container(cfg.get("labels") or OmegaConf.create({}))
    heads = cfg.get("downstream")  # Without a head for the labels, fractions are drawn otherwise.
    return {
        "part": part,
        "images": len(images),
        "data": OmegaConf.to_container(cfg.data),
        "labels": labels,
        "downstream": None if heads is None else OmegaConf.to_container(heads),
        "seed": cfg.seed if holds_out(labels) else None,  # It draws the images held out.
    }


def targets_of(images: Images) -> Any:
    """The labels of all images, (N,), or the targets of each downstream head by its name."""
    if images.values is None:
        return torch.from_numpy(np.asarray(images.targets, dtype=np.int64))
    return {name: torch.from_numpy(each) for name, each in images.values.items()}


def decode(images: Images) -> Tensor:
    """Decodes all images: uint8, shape (N, 3, H, W).

    Raises:
        ConfigError: if the images are of several sizes, or one cannot be read.
    """
    width, height = read_image(images, 0)[0].size
    pixels = np.empty((len(images), height, width, 3), np.uint8)
    for index in range(len(images)):
        image = read_image(images, index)[0]
        if image.size != (width, height):
            raise ConfigError(
                f"data.batched: {images.describe(index)} is {image.size[0]}x{image.size[1]}, not "
                f"{width}x{height} like the first: set data.batched=False"
            )
        pixels[index] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
