"""Counts a step's operators and the host's waits, and measures its peak memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from grap_solo.experiments.timing import Contender

WAITS = ("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "equal")
"""Operators for which the host waits on a GPU: each needs a value of a tensor."""

TRANSFERS = ("tolist", "cpu", "numpy")
"""Methods of a tensor that make the host wait on a GPU and start no operator on a CPU."""


class Operators(TorchDispatchMode):
    """Counts what is started inside its ``with`` block.

    Attributes:
        operators: the number of operators.
        waits: the names of the calls that make the host wait on a GPU: for a value, or for the
            size of what a mask selects.
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


class _Transfers(TorchFunctionMode):
    """Adds every call of :data:`TRANSFERS` to a list of waits."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in TRANSFERS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def count_operators(function: Callable[[], Any]) -> Operators:
    """Calls a function and counts the operators and waits that it starts."""
    with Operators() as found, _Transfers(found.waits):
        function()
    return found


def peak_memory(mine: Contender) -> float:
    """The most that a step allocates beyond what was allocated before it, in MiB."""
    mine.seconds()  # The first step also allocates the optimiser's buffers.
    if mine.device.type == "cuda":
        mine.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mine.seconds()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Else it warns that there is no GPU.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        mine.seconds()
    with NamedTemporaryFile(suffix=".json") as file:
        found.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    live: dict[int, int] = {}  # By address, what the step itself has allocated.
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
