"""Which of the Trainer's arguments a configuration may set."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from grap_solo.errors import ConfigError
from grap_solo.keys import Key

ARGUMENTS = inspect.signature(Trainer.__init__).parameters

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "enable_checkpointing": (
        ("True",),
        "set checkpoint.enabled=False for a run without checkpoints",
    ),
    "logger": (
        ("True",),
        "a run always writes metrics.csv: leave it out; wandb.enabled=True adds W&B",
    ),
    "callbacks": (
        ("[]",),
        "a configuration cannot hold them: leave it out, and give them to "
        "grap_solo.training.run.pretrain",
    ),
    "plugins": (("[]",), "a configuration cannot hold them: leave it out"),
    "default_root_dir": ((), "set checkpoint.dir and name, the run's folder"),
    "use_distributed_sampler": (
        ("False",),
        "the loaders share the images out among the devices themselves: leave it out",
    ),
    "barebones": (
        ("False",),
        "a run logs its steps: leave it out; 'grap-solo bench step' times steps",
    ),
    "overfit_batches": (
        ("0", "0.0"),
        "the views of an image differ from epoch to epoch: set data.fraction to train on few "
        "images",
    ),
    "reload_dataloaders_every_n_epochs": (
        ("0", "0.0"),
        "the loaders make new views in every epoch themselves: leave it out",
    ),
    "limit_test_batches": (("1.0",), "a run has no test images: leave it out"),
    "limit_predict_batches": (("1.0",), "a run predicts nothing: leave it out"),
    "model_registry": ((), "a run uploads nothing there: leave it out"),
}
"""For each Trainer argument that a run sets itself or has no use for: the values that change
nothing, and what to do instead."""

KINDS = {
    "benchmark": Key(bool),
    "check_val_every_n_epoch": Key(int, least=1),
    "detect_anomaly": Key(bool),
    "deterministic": Key(bool, choices=("warn",)),
    "enable_autolog_hparams": Key(bool),
    "enable_model_summary": Key(bool),
    "gradient_clip_val": Key(float, least=0),
    "inference_mode": Key(bool),
    "limit_train_batches": Key(float, least=0),
    "limit_val_batches": Key(float, least=0),
    "log_every_n_steps": Key(int, least=0),
    "max_steps": Key(int, least=-1),
    "min_epochs": Key(int, least=0),
    "min_steps": Key(int, least=0),
    "num_sanity_val_steps": Key(int, least=-1),
}
"""The arguments whose type or range the Trainer does not check, or not in a clear line."""


def check_arguments(cfg: DictConfig) -> None:
    """Refuses Trainer arguments that a run could not obey.

    Args:
        cfg: a prepared configuration.

    Raises:
        ConfigError: names the argument and what to do instead.
    """
    for name, (harmless, instead) in REFUSED.items():
        value: Any = cfg.get(name)
        if value is not None and str(value) not in harmless:
            raise ConfigError(f"{name}: {value} cannot be obeyed: {instead}")
    if cfg.get("limit_train_batches") == 0:
        raise ConfigError("limit_train_batches: 0 leaves nothing to train: leave it out")
    interval: Any = cfg.get("val_check_interval")
    if isinstance(interval, int | float):  # Else a time, which the Trainer checks.
        Key(float, above=0).check(interval, "val_check_interval")
    if cfg.get("max_steps") == 0:
        raise ConfigError("max_steps: 0 leaves nothing to train: leave it out")
    for name, key in KINDS.items():
        if cfg.get(name) is not None:
            key.check(cfg[name], name)
    if (cfg.get("min_epochs") or 0) > cfg.max_epochs:
        raise ConfigError(
            f"min_epochs: {cfg.min_epochs} is more than max_epochs {cfg.max_epochs}, where a run "
            "ends: give a larger max_epochs"
        )
