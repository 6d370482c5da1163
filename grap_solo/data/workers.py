"""Loaders with worker processes, which end with the program."""

from __future__ import annotations

import atexit
import os
import signal
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch.utils.data import DataLoader, Dataset

_started: WeakSet[DataLoader[Any]] = WeakSet()


class _Loader(DataLoader[Any]):
    """Ends its workers also where the garbage collector finds the iterator in a cycle, as after an
    error in a worker: the queue that would tell them to end is then closed already."""

    def _get_iterator(self) -> Any:
        iterator: Any = super()._get_iterator()
        if self.num_workers > 0:
            finalize(iterator, _end_workers, iterator._workers, os.getpid()).atexit = False
        return iterator


def _end_workers(workers: list[Any], parent: int) -> None:
    """Ends the workers that still run; does nothing in a worker, which has a copy of the list."""
    if os.getpid() == parent:
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGALRM)


def build_loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Builds a loader whose workers stay from one epoch to the next.

    Args:
        dataset: the dataset.
        num_workers: the number of processes that load; 0 for this process.
        options: further arguments of ``DataLoader``.
    """
    loader = _Loader(
        dataset,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_handle_signals,
        **{"pin_memory": torch.cuda.is_available(), **options},
    )
    _started.add(loader)
    return loader


def _handle_signals(worker: int) -> None:
    """Makes a worker ignore SIGTERM: the training ends its step first, and needs its workers until
    then. SIGALRM ends it with code 0, since torch takes any other end for a crash."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


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
