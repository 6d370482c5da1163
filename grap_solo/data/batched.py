"""Small images in memory, augmented a batch at a time on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from grap_solo.data.augmentations import build_views
from grap_solo.data.batched_views import Pipeline, send_to_device
from grap_solo.data.datasets import Images
from grap_solo.data.sampling import EpochSampler, leave_sigterm_to_the_training, mixed_seed
from grap_solo.distributed import rank, world_size
from grap_solo.errors import ConfigError


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
        indexes = send_to_device(batch.indexes, self.device)
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
