"""Builds the method of a run, and refuses sizes with which it cannot train."""

from __future__ import annotations

import re

from omegaconf import DictConfig
from torch.nn.modules.batchnorm import _BatchNorm

from grap_solo.errors import ConfigError
from grap_solo.methods import CompositeMethod, find_method
from grap_solo.training.config import images_per_step

TOO_LARGE = re.compile("memory|overflow|Storage size", re.IGNORECASE)


def build_model(cfg: DictConfig) -> CompositeMethod:
    """Builds the method of a prepared configuration.

    Raises:
        ConfigError: its networks or its queue do not fit into memory.
    """
    try:
        return find_method(cfg.method)(cfg)
    except (RuntimeError, MemoryError, OverflowError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and not TOO_LARGE.search(line):
            raise
        raise ConfigError(
            f"method_kwargs: the networks or the queue do not fit into memory ({line}): give "
            "smaller sizes, or a smaller backbone or data.num_classes"
        ) from None


def check_batch_norms(model: CompositeMethod, cfg: DictConfig, held_out: int | None) -> None:
    """Refuses batches that leave a batch-norm one image: there is nothing to normalise by.

    Args:
        model: the method.
        cfg: its prepared configuration.
        held_out: the number of images that train the probe only; None if there are none.

    Raises:
        ConfigError: such a batch.
    """
    processes = images_per_step(cfg) // cfg.optimizer.batch_size
    joined = processes > 1 and cfg.get("sync_batchnorm")
    if joined or not any(isinstance(each, _BatchNorm) for each in model.modules()):
        return
    if cfg.optimizer.batch_size == 1:
        raise ConfigError(
            "optimizer.batch_size: 1 image on each device leaves the batch-norms nothing to "
            "normalise by: give 2 or more"
        )
    if held_out is not None and held_out <= processes:
        raise ConfigError(
            f"labels.fraction: {held_out} held-out images for {processes} processes leave the "
            "batch-norms one image each: hold out more"
        )
