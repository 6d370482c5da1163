"""Checks the keys of a configuration that say which labels a rule and downstream heads learn."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grap_solo.data import holds_out
from grap_solo.errors import ConfigError
from grap_solo.keys import missing_key
from grap_solo.weighting import Weighting

LARGEST_HELD_OUT = 0.5
HEAD_NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")
TAKEN_NAMES = ("knn",)
"""Names that a downstream head cannot have: its metrics would have those of others."""


def check_labels(cfg: DictConfig, rule: type[Weighting], options: dict[str, Any]) -> None:
    """Refuses labels that a rule cannot use, and a ``labels:`` block that contradicts itself."""
    name, own = cfg.weighting.name, cfg.labels.path is not None
    if own and cfg.labels.split == "held_out":
        raise ConfigError(
            "labels.path: a labelled set of its own is held out already: leave out labels.split"
        )
    if cfg.labels.split == "held_out" and cfg.labels.fraction > LARGEST_HELD_OUT:
        raise ConfigError(
            "labels.fraction: the part that is held out: expected a number above 0 and up to "
            f"{LARGEST_HELD_OUT}, got {cfg.labels.fraction}"
        )
    if cfg.data.no_labels and not own:
        if rule.needs_labels:
            raise missing_labels("data.no_labels: no image has a label", name)
        if cfg.labels.val_path is not None:
            raise ConfigError(
                "labels.val_path: data.no_labels leaves the probe no label to learn from: set "
                "labels.path, or leave out one of the two"
            )
    key, fix = (
        ("labels.path", "leave it out") if own else ("labels.split", "set labels.split=train")
    )
    held_out = holds_out(cfg.labels)
    if held_out and rule.needs_losses_after and rule.asks_for_gradients(options):
        raise ConfigError(
            f"{key}: '{name}' with another scale or heads learns from the pretraining batch "
            f"alone: {fix}"
        )
    if held_out and rule.trains_on_labels:
        raise ConfigError(
            f"{key}: '{name}' trains the backbone with the labels, so they cannot be held "
            "out: " + ("give the labelled images as data.train_path" if own else fix)
        )


def check_downstream(cfg: DictConfig) -> None:
    """Refuses keys of a head that its task does not take, and blocks that need classes where no
    head has any."""
    if cfg.data.no_labels and cfg.labels.path is None:
        raise ConfigError(
            "data.no_labels: leaves the downstream heads no target: leave out the key, or the "
            "downstream block, or set labels.path"
        )
    for name, head in cfg.downstream.items():
        where = f"downstream.{name}"
        if not isinstance(name, str) or not HEAD_NAME.fullmatch(name) or name in TAKEN_NAMES:
            raise ConfigError(
                f"{where}: a head's name is a letter, then letters, digits and _, and none of "
                f"{', '.join(TAKEN_NAMES)}: give it another one"
            )
        right, wrong = "column", "columns"
        if head.task == "multi_label":
            right, wrong = wrong, right
        if head.get(wrong) is not None:
            raise ConfigError(f"{where}.{wrong}: {head.task} takes '{right}': set that instead")
        if head.get(right) is None and head.task != "classification":
            raise missing_key(f"{where}.{right}")
        names = list(head.get("columns") or [])
        if len(set(names)) < len(names):
            raise ConfigError(f"{where}.columns: {', '.join(names)}: name each column once")
    if any(head.task == "classification" for head in cfg.downstream.values()):
        return
    for key in ("knn_eval.enabled", "momentum.classifier"):
        if OmegaConf.select(cfg, key):
            raise ConfigError(
                f"{key}: it needs classes, and no head of the downstream block is of task "
                f"classification: add one, or set {key}=False"
            )


def learns_labels(cfg: DictConfig) -> bool:
    """Whether a run's online accuracy is by the images' own labels: without a ``downstream`` block,
    or where the first head that classifies learns these."""
    heads = (cfg.get("downstream") or {}).values()
    first = next((head for head in heads if head.task == "classification"), None)
    return not heads or (first is not None and first.get("column") is None)


def missing_labels(where: str, rule: str) -> ConfigError:
    """The error for data without labels and a rule that needs some.

    Args:
        where: the key, and what it gives.
        rule: the rule's name.
    """
    return ConfigError(
        f"{where}, but '{rule}' learns from labels: give labels, or labelled images as "
        "labels.path, or a rule that needs none, such as weighting.name=fixed"
    )
