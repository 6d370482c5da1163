"""Functions that the launcher's tests let it call. They import nothing slow."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from grap_solo.errors import ConfigError

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS")
STARTED_WITH = {name: os.environ.get(name) for name in VARIABLES}
"""As they were when this process imported its first module of the project's."""


def record(folder, name, seconds=0.0):
    """Writes which process ran a task, when, and with which variables."""
    began = time.monotonic()
    time.sleep(seconds)
    found = {"pid": os.getpid(), "began": began, "ended": time.monotonic(), **STARTED_WITH}
    found["torch"] = "torch" in sys.modules
    Path(folder, f"{name}.json").write_text(json.dumps(found))
    print(f"{name} has run")


def count_threads(file):
    import torch

    Path(file).write_text(str(torch.get_num_threads()))


def kill_itself(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(30)


def leave(code):
    os._exit(code)


def refuse():
    raise ConfigError("key: bad value: give another")


def fail():
    raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")


def fill_disk(file):
    """Writes more than its process may, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    try:
        Path(file).write_bytes(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train_until(file, folder, name):
    """Runs until a file is there. SIGTERM ends it as it ends a training: with a checkpoint."""

    def end(number, frame):
        Path(folder, f"{name}.ckpt").touch()
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    Path(folder, f"{name}.pid").write_text(str(os.getpid()))
    while not Path(file).exists():
        time.sleep(0.02)
    record(folder, name)


def take_shared(queue, barrier):
    """Takes a shared array; reports how often it has made it, the array, and whether it is mapped
    from a file."""
    import numpy as np

    from grap_solo.data.shared import make_or_share

    made = []

    def make():
        made.append(1)
        return np.arange(6, dtype=np.uint8).reshape(2, 3)

    barrier.wait()
    array = make_or_share(["images"], make)
    with open("/proc/self/maps") as maps:
        mapped = any(line.rstrip().endswith(".npy") for line in maps)
    queue.put((len(made), array.tolist(), mapped))
