"""solo-learn's optimisers and learning-rate schedule, by its names and keys."""

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
    """The learning rate at a step: linear up to ``base_lr``, then a cosine down to ``min_lr``."""
    if step < warmup:
        return start_lr + step * (base_lr - start_lr) / max(warmup - 1, 1)
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
    return min_lr + (base_lr - min_lr) * cosine


def split_groups(
    groups: Iterable[dict[str, Any]],
    apart: Callable[[Tensor], bool],
    changes: dict[str, Any],
) -> list[dict[str, Any]]:
    """Parameter groups with the parameters for which ``apart`` holds in groups of their own.

    Args:
        groups: an optimiser's parameter groups.
        apart: which parameters to set apart.
        changes: the settings in which their groups differ.
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
    """timm's LARS (You et al. 2017, arXiv 1708.03888) by solo-learn's words.

    It never asks for a value, where solo-learn's asks three for each parameter that it adapts,
    and on a GPU it goes by torch's foreach functions.

    Args:
        groups: parameter groups.
        lr: the learning rate.
        weight_decay: the L2 penalty's factor.
        kwargs: solo-learn's ``eta``, ``clip_lr`` and ``exclude_bias_n_norm``: whether vectors,
            which are biases and norms, are neither adapted nor decayed; and timm's own. Where a
            parameter's gradient is exactly 0, timm decays it by ``lr * weight_decay``, and
            solo-learn's leaves it.
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
