"""Copies the modules of a method, and freezes their running statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch-norms of a module: every layer with ``running_mean`` and ``momentum``."""
    return [
        each
        for each in module.modules()
        if hasattr(each, "running_mean") and hasattr(each, "momentum")
    ]


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch-norms from changing.

    The layers still normalise by the batch, as in training."""
    norms: list[Any] = batch_norms(module)
    momenta = [each.momentum for each in norms]
    for each in norms:
        each.momentum = 0.0
    try:
        yield
    finally:
        for each, momentum in zip(norms, momenta, strict=True):
            each.momentum = momentum


def copy_and_reinitialize(module: nn.Module) -> nn.Module:
    """Copies a module and initialises the copy anew, as far as its layers have
    ``reset_parameters``."""
    fresh = copy.deepcopy(module)
    for each in fresh.modules():
        reset: Any = getattr(each, "reset_parameters", None)
        if reset is not None:
            reset()
    return fresh
