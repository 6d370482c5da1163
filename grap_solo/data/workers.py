"""Loaders with worker processes, which end with the program."""

from __future__ import annotations

import atexit
import signal
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

_started: WeakSet[DataLoader[Any]] = WeakSet()


def build_loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Builds a loader whose workers stay from one epoch to the next.

    Args:
        dataset: the dataset.
        num_workers: the number of processes that load; 0 for this process.
        options: further arguments of ``DataLoader``.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_ignore_sigterm,
        **{"pin_memory": torch.cuda.is_available(), **options},
    )
    _started.add(loader)
    return loader


def _ignore_sigterm(worker: int) -> None:
    """Makes a worker ignore SIGTERM. The training ends its step first, and needs its workers until
    then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stop_workers() -> None:
    """Ends the workers of all loaders. A loader that is used again starts new ones."""
    for loader in list(_started):
        iterator: Any = loader._iterator
        if iterator is None:
            continue
        iterator._shutdown_workers()  # Waits up to 5 s for a worker's current batch.
        for worker in iterator._workers:
            worker.kill()
            worker.join()
        loader._iterator = None


# At the end of a program Python sends SIGTERM to the workers, which they ignore, and waits for
# them. This runs before.
atexit.register(stop_workers)
