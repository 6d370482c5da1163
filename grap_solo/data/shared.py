"""Arrays that the runs of one command share, in files mapped into memory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER_VARIABLE = "GRAP_SOLO_SHARED_ARRAYS"
"""The environment variable by which worker processes find the folder of shared arrays."""


@contextlib.contextmanager
def shared_arrays(folder: Path) -> Iterator[None]:
    """Lets this process, and those it starts, share arrays in a folder that exists meanwhile.

    Args:
        folder: a folder for this alone: what an earlier command has left there is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before
        shutil.rmtree(folder, ignore_errors=True)  # A process that has it mapped keeps it.


def make_or_share(key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array that belongs to a key. Within :func:`shared_arrays` the first process
    makes it, and all map the same file: the machine then holds it once.

    Writing to the array changes this process's copy alone. Where the file cannot be written, such
    as on a full disk, the process keeps the array to itself.

    Args:
        key: everything that the array depends on, as JSON has it.
        make: makes the array.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return make()
    text = json.dumps(key, sort_keys=True, default=str)
    file = Path(folder, f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy")
    try:
        lock = file.with_suffix(".lock").open("w")
    except OSError:
        return make()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # The system unlocks it if the process dies.
        if not file.exists():
            array, part = make(), file.with_suffix(".part")
            try:
                with part.open("wb") as opened:
                    np.save(opened, array)
                os.replace(part, file)
            except OSError:
                part.unlink(missing_ok=True)
                return array
    mapped: np.ndarray = np.load(file, mmap_mode="c")
    return mapped
