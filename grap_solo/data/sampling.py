"""The order of the images and the randomness of their views, as functions of seed and epoch.

Nothing else is remembered from step to step, so a run that is resumed at an epoch's start sees
what an uninterrupted one sees, whatever the number of workers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from grap_solo.distributed import rank, world_size

Place = tuple[int, int]
"""Which draw of an image's view it is, and the image's index."""


def mixed_seed(*parts: int) -> int:
    """One 32-bit seed from several numbers; other numbers give another, unrelated seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EpochSampler(Sampler[Place]):
    """A new order of all images in each epoch; with N processes, each one's share of it.

    All processes get the same number of images: the first of the order stand in again for those
    that are missing at its end.

    Args:
        size: the number of images.
        seed: of the order and of the views.
        epoch: the first that is to be drawn.
    """

    def __init__(self, size: int, seed: int, epoch: int = 0) -> None:
        self.size, self.seed, self.epoch, self.passes = size, seed, epoch, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.passes = epoch, 0

    def __len__(self) -> int:
        return -(-self.size // world_size())

    def __iter__(self) -> Iterator[Place]:
        draw = mixed_seed(self.seed, self.epoch, self.passes)
        self.passes += 1  # Within an epoch, a loader that is shorter than another starts again.
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(draw))
        mine = order.repeat(2)[rank() :: world_size()][: len(self)]
        return iter([(draw, index) for index in mine.tolist()])


class ShareSampler(Sampler[int]):
    """All images in order; with N processes, every N-th of them, none of them twice.

    Args:
        size: the number of images.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return len(range(rank(), self.size, world_size()))

    def __iter__(self) -> Iterator[int]:
        return iter(range(rank(), self.size, world_size()))


def leave_sigterm_to_the_training(worker: int) -> None:
    """A process that loads data ends with the training, not when all get SIGTERM: the training
    still ends its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
