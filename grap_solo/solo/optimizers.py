"""Optimisers and the learning-rate schedule, with solo-learn's names and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor

SCHEDULERS = ("warmup_cosine", "step", "none")


def warmup_cosine(
    base_lr: float,
    warmup: float,
    total: float,
    start_lr: float,
    min_lr: float,
    step: int,
) -> float:
    """The learning rate at a step: a linear warm-up from ``start_lr`` to ``base_lr``, then a cosine
    down to ``min_lr``.

    Args:
        base_lr: the peak.
        warmup: the number of warm-up steps.
        total: the number of all steps.
        start_lr: the learning rate at the first step.
        min_lr: the learning rate at the last step.
        step: the step, from 0.
    """
    if step < warmup:
        return start_lr + step * (base_lr - start_lr) / max(warmup - 1, 1)
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
    return min_lr + (base_lr - min_lr) * cosine


def split_groups(
    groups: Iterable[dict[str, Any]],
    apart: Callable[[Tensor], bool],
    changes: dict[str, Any],
) -> list[dict[str, Any]]:
    """Moves some parameters of each parameter group into a new group with other settings.

    Args:
        groups: an optimiser's parameter groups.
        apart: whether a parameter moves to the new group.
        changes: the settings that differ in the new groups.
    """
    out = []
    for group in groups:
        params = list(group["params"])
        kept = {**group, "params": [p for p in params if not apart(p)]}
        split = {**group, **changes, "params": [p for p in params if apart(p)]}
        if "name" in group:
            split["name"] = f"{group['name']}_no_decay"
        out += [each for each in (kept, split) if each["params"]]
    return out


def lars(groups: Iterable[dict[str, Any]], lr: float, weight_decay: float, **kwargs: Any) -> Lars:
    """Builds timm's LARS (You et al. 2017, arXiv 1708.03888) from solo-learn's arguments.

    timm's never waits for the device, while solo-learn's reads three numbers from it for each
    adapted parameter; on a GPU, timm's uses torch's foreach functions. The two differ if a
    parameter's gradient is exactly 0: timm's decays the parameter by ``lr * weight_decay``,
    solo-learn's does not change it.

    Args:
        groups: parameter groups.
        lr: the learning rate.
        weight_decay: the factor of the L2 penalty.
        kwargs: solo-learn's ``eta``, ``clip_lr`` and ``exclude_bias_n_norm`` (whether biases and
            norms, the parameters of one dimension, are neither adapted nor decayed), and timm's
            own arguments.
    """
    if kwargs.pop("exclude_bias_n_norm", False):
        plain = {"weight_decay": 0, "always_adapt": False}
        groups = split_groups(groups, lambda p: p.ndim == 1, plain)
    return Lars(
        groups,
        lr=lr,
        weight_decay=weight_decay,
        always_adapt=True,
        trust_coeff=kwargs.pop("eta", 1e-3),
        trust_clip=kwargs.pop("clip_lr", False),
        **kwargs,
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "lars": lars,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

MARKS = {"sgd": "dampening", "lars": "trust_coeff", "adam": "betas", "adamw": "betas"}
"""For each optimiser an option without which its parameter groups are another optimiser's."""
