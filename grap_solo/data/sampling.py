"""The order of the images and the randomness of their views, as functions of seed and epoch.

They depend on nothing else. A run resumed at the start of an epoch therefore sees the batches of an
uninterrupted run, for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from grap_solo.distributed import rank, world_size

Place = tuple[int, int]
"""The seed of an image's views in this epoch, and the image's index."""


def mixed_seed(*parts: int) -> int:
    """Mixes several numbers into one 32-bit seed. Other numbers give an unrelated seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EpochSampler(Sampler[Place]):
    """Draws a new order of all images in each epoch; on N ranks, each rank takes its share.

    All ranks get the same number of images. If the number of images is not a multiple of N, the
    first images of the order come a second time at its end.

    Args:
        size: the number of images.
        seed: the seed of the order and of the views.
        epoch: the first epoch to draw.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0) -> None:
        self.size, self.seed, self.epoch, self.passes = size, seed, epoch, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch to draw. The trainer calls it before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.passes = epoch, 0

    def __len__(self) -> int:
        return -(-self.size // world_size())

    def __iter__(self) -> Iterator[Place]:
        draw = mixed_seed(self.seed, self.epoch, self.passes)
        self.passes += 1  # Of two combined loaders, the shorter one starts again within an epoch.
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(draw))
        mine = order.repeat(2)[rank() :: world_size()][: len(self)]
        return iter([(draw, index) for index in mine.tolist()])


class ShareSampler(Sampler[int]):
    """All images in order; on N ranks, each rank takes every N-th image, and no image comes twice.

    Args:
        size: the number of images.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return len(range(rank(), self.size, world_size()))

    def __iter__(self) -> Iterator[int]:
        return iter(range(rank(), self.size, world_size()))
