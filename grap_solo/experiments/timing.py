"""Step times: contenders take turns in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from grap_solo.balance import Step
from grap_solo.data import holds_out
from grap_solo.evaluation.offline import device_of
from grap_solo.methods import find_method

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""The dtype of autocast for each ``precision``; None for none."""


class Contender:
    """A method and its optimiser, which train on one batch again and again.

    A step is forward, backward, optimiser and momentum update. Loading data is left out.

    Args:
        cfg: a prepared configuration, ``data.num_classes`` included.
        batch: ``[indexes, [view1, view2], labels]``.
        base: the method's class; None takes the class that ``cfg.method`` names.
        surrogate: a function to call in place of :func:`~grap_solo.balance.balance`.
    """

    def __init__(
        self,
        cfg: DictConfig,
        batch: list[Any],
        base: Any = None,
        surrogate: Callable[..., Step] | None = None,
    ) -> None:
        seed_everything(cfg.seed, verbose=False)
        self.device = device_of(cfg)
        cfg.scheduler.name = "none"
        self.model: Any = (base or find_method(cfg.method))(cfg).to(self.device).train()
        if not cfg.performance.disable_channel_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model.parameter_space_every = (
            0  # Every step would measure it: without a trainer the step is 0.
        )
        if hasattr(self.model, "weighting"):  # Without a trainer; the length costs no time.
            self.model.weighting.set_total_steps(1000)
        self.model.log = self.model.log_dict = lambda *args, **kwargs: None
        self.optimizer = self.model.configure_optimizers()
        dtype = AUTOCAST.get(str(cfg.get("precision")))
        self.autocast: Any = (
            nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
        )
        if surrogate is not None:
            self.model.balance = partial(surrogate, self.model)
        indexes, views, labels = batch
        batch = [
            indexes.to(self.device),
            [each.to(self.device) for each in views],
            labels.to(self.device),
        ]
        apart = holds_out(cfg.labels)
        self.batch: Any = {"train": batch, "labelled": batch} if apart else batch

    def seconds(self) -> float:
        """Takes one step and returns its seconds."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self._backward()
        self.optimizer.step()
        if hasattr(self.model, "update_weighting_after_step"):
            self.model.update_weighting_after_step()
        self.update_momentum()
        self._wait()
        return time.perf_counter() - start

    def update_momentum(self) -> None:
        """Updates the momentum networks, if the method has any."""
        for pair in getattr(self.model, "momentum_pairs", ()):
            self.model.momentum_updater.update(*pair)

    def _backward(self) -> None:
        with self.autocast:
            loss = self.model.training_step(self.batch, 0)
        loss.backward()
        with self.autocast:
            self.model.on_after_backward()  # Of any LightningModule; ours ends the step in it.

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def random_batch(cfg: DictConfig) -> list[Any]:
    """Makes ``[indexes, [view1, view2], labels]`` of random images, in a configuration's sizes."""
    size, count = cfg.augmentations[0].crop_size, cfg.optimizer.batch_size
    generator = torch.Generator().manual_seed(cfg.seed)
    views = [torch.randn(count, 3, size, size, generator=generator) for _ in range(2)]
    labels: Any = torch.arange(count) % cfg.data.num_classes
    if cfg.get("downstream") is not None:
        labels = {name: _targets_of(head, count) for name, head in cfg.downstream.items()}
    return [torch.arange(count), views, labels]


def _targets_of(head: Any, count: int) -> torch.Tensor:
    """Targets of a downstream head for a number of images."""
    if head.task == "classification":
        return torch.arange(count) % head.classes
    shape = (count,) if head.task == "regression" else (count, len(head.columns))
    return (torch.arange(count) % 2).float().reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def in_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Times every contender once in each round and returns its seconds, by name.

    Args:
        contenders: by name, a function that takes a step and returns its seconds.
        rounds: the rounds that count.
        warmup: the rounds before them, which do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, step in contenders.items():
            seconds = step()
            if turn >= warmup:
                times[name].append(seconds)
    return times


def ratio(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Divides two contenders' seconds round by round: ``median``, ``min`` and ``max``."""
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def step_costs(
    configs: Mapping[str, DictConfig], base: str, rounds: int = 15, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Times a step of each configuration against one of ``base``: see :class:`Contender`.

    Args:
        configs: prepared configurations, ``data.num_classes`` included, by name.
        base: the name of the configuration to divide by; all train on its batch.
        rounds: see :func:`in_turns`.
        warmup: see :func:`in_turns`.

    Returns:
        By name, ``median``, ``min`` and ``max`` of the rounds' ratios, and ``ms``, the median
        time of a step in milliseconds.
    """
    batch = random_batch(configs[base])
    contenders = {name: Contender(cfg, batch).seconds for name, cfg in configs.items()}
    times = in_turns(contenders, rounds, warmup)
    return {
        name: ratio(mine, times[base]) | {"ms": 1000 * statistics.median(mine)}
        for name, mine in times.items()
    }
