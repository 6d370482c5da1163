"""What a step starts and allocates."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from grap_solo.experiments.timing import Contender

WAITS = ("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "equal")


def peak_memory(mine: Contender) -> float:
    """What a step allocates at most beyond what is there before it, in MiB."""
    mine.seconds()  # The optimiser's buffers are there after the first step.
    if mine.device.type == "cuda":
        mine.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mine.seconds()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # It speaks of GPUs that are not there.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        mine.seconds()
    with NamedTemporaryFile(suffix=".json") as file:
        found.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    live: dict[int, int] = {}  # What was there before it, and is freed in it, does not count.
    now = peak = 0
    changes = [each for each in events if each["name"] == "[memory]"]
    for change in sorted(changes, key=lambda each: each["ts"]):
        size, address = change["args"]["Bytes"], change["args"]["Addr"]
        if size > 0:
            live[address] = size
            now += size
        else:
            now -= live.pop(address, 0)
        peak = max(peak, now)
    return peak / 2**20


class Operators(TorchDispatchMode):
    """What is started while it is entered.

    Attributes:
        operators: how many operators.
        waits: the names of those for which the host waits, on a GPU: for a value, or for the size
            of what a mask selects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.waits = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.operators += 1
        indexes = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(each is not None and each.dtype == torch.bool for each in indexes)
        if masked or name in WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def count_operators(function: Callable[[], Any]) -> Operators:
    """What a function starts."""
    with ExitStack() as patches, Operators() as found:
        for name in ("tolist", "cpu", "numpy"):  # On a CPU no operator tells of them.
            original = getattr(Tensor, name)

            def told(each: Tensor, *args: Any, f: Any = original, n: str = name) -> Any:
                found.waits.append(n)
                return f(each, *args)

            patches.enter_context(mock.patch.object(Tensor, name, told))
        function()
    return found
