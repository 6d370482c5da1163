"""What a step of one weighting costs beside another's: timed in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from torch import Tensor

from grap_solo.evaluate import device_of
from grap_solo.methods import GrapAll4One


class _Contender:
    """A method and its optimiser, on one batch again and again."""

    def __init__(self, cfg: DictConfig, batch: list[Any], device: torch.device) -> None:
        seed_everything(cfg.seed, verbose=False)
        self.model = GrapAll4One(cfg).to(device).train()
        self.model.parameter_space_every = 0  # Without a trainer every step is the first.
        self.model.log = self.model.log_dict = lambda *args, **kwargs: None
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4)
        held_out = cfg.labels.split == "held_out"
        self.batch: Any = {"train": batch, "labelled": batch} if held_out else batch
        self.device = device

    def seconds(self) -> float:
        """One step: forward, backward, a plain SGD update, the momentum update."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model.training_step(self.batch, 0).backward()
        self.optimizer.step()
        self.model.update_weighting_after_step()
        for pair in self.model.momentum_pairs:
            self.model.momentum_updater.update(*pair)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def step_costs(
    configs: Mapping[str, DictConfig], base: str, rounds: int = 15, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Each configuration's time of a step by that of ``base``, in turns on one random batch.

    A step is forward, backward, a plain SGD update and the momentum update, in float32; loading
    data and LARS, which are the same for all, are left out.

    Args:
        configs: prepared configurations, ``data.num_classes`` included, by name.
        base: the name that the others are compared with.
        rounds: how often each is timed.
        warmup: rounds before that.

    Returns:
        By name, ``median``, ``min`` and ``max`` of the rounds' ratios, and ``ms``, the median
        time of a step in milliseconds.
    """
    cfg = configs[base]
    device = device_of(cfg)
    size, count = cfg.augmentations[0].crop_size, cfg.optimizer.batch_size
    generator = torch.Generator().manual_seed(cfg.seed)
    views = [torch.randn(count, 3, size, size, generator=generator).to(device) for _ in range(2)]
    labels: Tensor = torch.arange(count) % cfg.data.num_classes
    batch = [torch.arange(count).to(device), views, labels.to(device)]
    contenders = {name: _Contender(each, batch, device) for name, each in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, contender in contenders.items():
            seconds = contender.seconds()
            if turn >= warmup:
                times[name].append(seconds)
    found = {}
    for name, seconds_of in times.items():
        ratios = [a / b for a, b in zip(seconds_of, times[base], strict=True)]
        found[name] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "ms": 1000 * statistics.median(seconds_of),
        }
    return found
