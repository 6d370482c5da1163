"""Where one optimiser step of All4One goes: torch's profiler on a contender of ``bench step``.

    python benchmarks/profile_step.py grap [--batch 64] [--accelerator cpu] [--precision 32-true]

Prints the operators that take the most time by themselves, how many operators a step starts (on a
GPU each is a kernel or a few) and how often the host waits for a result: for a value, or for the
size of what a mask selects.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from grap_solo.bench import contender

WAITS = {"_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "equal"}


class Counter(TorchDispatchMode):
    """Counts operators, and those for whose result the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.waits = 0, 0
        original = Tensor.tolist

        def tolist(each: Tensor) -> Any:  # On a CPU no operator tells of it.
            self.waits += 1
            return original(each)

        self.tolist = tolist

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.operators += 1
        indexes = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(each is not None and each.dtype == torch.bool for each in indexes)
        self.waits += masked or name in WAITS
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("contender")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    chosen = parser.parse_args()
    mine = contender(chosen.contender, chosen.batch, chosen.accelerator, chosen.precision)
    for _ in range(2):
        mine.seconds()
    with Counter() as counted, mock.patch.object(Tensor, "tolist", counted.tolist):
        mine.seconds()
    gpu = mine.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as found:
        mine.seconds()
    print(f"{chosen.contender}, batch {chosen.batch}, {chosen.precision}, {mine.device.type}")
    print(f"{counted.operators} operators, {counted.waits} waits\n")
    averages = found.key_averages()
    attribute = "self_device_time_total" if gpu else "self_cpu_time_total"
    total = sum(getattr(each, attribute) for each in averages)
    rows = sorted(averages, key=lambda each: -getattr(each, attribute))[:20]
    print(f"{'operator':46} {'self, ms':>9} {'share':>6} {'calls':>6}")
    for each in rows:
        own = getattr(each, attribute)
        print(f"{each.key[:46]:46} {own / 1000:9.1f} {own / total:6.1%} {each.count:6}")


if __name__ == "__main__":
    main()
