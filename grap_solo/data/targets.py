"""Targets of the downstream heads: the images' labels, and columns of the table that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from omegaconf import DictConfig

from grap_solo.data.columns import number_labels, read_numbers
from grap_solo.data.datasets import match_classes, resolve_num_classes
from grap_solo.data.images import (
    Images,
    Relabelled,
    TargetsByHead,
    drop_labels,
    is_missing,
    no_targets,
)
from grap_solo.errors import ConfigError

Heads = Mapping[str, Any]
"""The ``downstream:`` block: each head's keys by its name."""


def uses_labels(heads: Heads) -> bool:
    """Whether a head learns the images' own labels, and not a column."""
    return any(_key(head, "column", "columns") is None for head in heads.values())


def attach_targets(
    heads: Heads, data: DictConfig, train: Images, validation: Images | None
) -> tuple[Images, Images | None]:
    """Gives images the targets of the downstream heads. Their labels become those of the first
    head that classifies, if there is one.

    Fills in ``classes``, the number of classes, of each head that classifies.

    Args:
        heads: the ``downstream:`` block.
        data: the ``data:`` block.
        train: the labelled training images.
        validation: the validation images; None if there are none.

    Raises:
        ConfigError: a column is missing or does not fit its task, or a head has no target at all.
    """
    parts = [each for each in (train, validation) if each is not None]
    values: list[TargetsByHead] = [{} for _ in parts]
    labels: list[Images] = []
    for name, head in heads.items():
        where = f"downstream.{name}"
        if head.task == "classification":
            classified = _classify(head, where, data, parts)
            labels = labels or classified
            found = [each.targets.astype(np.int64) for each in classified]
        else:
            found = [_read_columns(head, where, each) for each in parts]
        for known, of_head, kind in zip(values, found, ("training", "validation"), strict=False):
            if is_missing(of_head).all():
                raise ConfigError(
                    f"{where}: no {kind} image has a target: fill in some, or leave the head out"
                )
            known[name] = of_head
    labels = labels or [drop_labels(each) for each in parts]
    attached = []
    for part, own, targets in zip(parts, labels, values, strict=True):
        images = Relabelled(part, own.targets, targets)
        images.classes, images.class_names = own.classes, own.class_names
        attached.append(images)
    return attached[0], attached[1] if len(attached) > 1 else None


def without_targets(images: Images, like: Images) -> Images:
    """Images whose targets of the downstream heads are all missing.

    Args:
        images: the images.
        like: images with targets of these heads.
    """
    some = np.zeros(len(images), dtype=np.int64)
    values = {name: no_targets(each[some]) for name, each in (like.values or {}).items()}
    return Relabelled(images, images.targets, values)


def fill_in_classes(cfg: DictConfig, *parts: Images) -> None:
    """Fills in ``data.num_classes``; with a ``downstream:`` block that of the first head that
    classifies, or 1.

    Raises:
        ConfigError: see :func:`~grap_solo.data.datasets.resolve_num_classes`.
    """
    heads = cfg.get("downstream")
    if heads is None:
        cfg.data.num_classes = resolve_num_classes(cfg.data, *parts)
        return
    found = [head.classes for head in heads.values() if head.task == "classification"]
    cfg.data.num_classes = found[0] if found else 1


def fill_in_scales(heads: Heads, images: Images) -> None:
    """Fills in the mean ``mean`` and the standard deviation ``sd`` of the training targets of each
    regression.

    Args:
        heads: the ``downstream:`` block.
        images: the training images, with the targets that are used.

    Raises:
        ConfigError: a head has no target left, or a regression's targets are all the same.
    """
    for name, values in (images.values or {}).items():
        known = values[~is_missing(values)]
        if not len(known):
            raise ConfigError(
                f"labels.fraction: leaves the head downstream.{name} no training target: give a "
                "larger one"
            )
        if heads[name].task == "regression":
            heads[name].mean, heads[name].sd = float(known.mean(dtype=np.float64)), 1.0
            if known.min() == known.max():
                raise ConfigError(
                    f"downstream.{name}: every training target is {known[0]:g}, so there is "
                    "nothing to learn: give another column, or leave the head out"
                )
            heads[name].sd = float(known.std(dtype=np.float64))


def _classify(head: Any, where: str, data: DictConfig, parts: list[Images]) -> list[Images]:
    """The images with the classes that a head learns as their labels."""
    column = head.get("column")
    if column is None:
        head.classes = resolve_num_classes(data, *parts)
        return parts
    found: list[Images] = []
    key = f"{where}.column: '{column}'"
    for part in parts:
        values = part.read_column(column, f"{where}.column")

        def describe(row: int, part: Images = part) -> str:
            return f"{key} at {part.describe(row)}"

        numbers, names = number_labels(values, key, describe)
        images = Relabelled(part, numbers)
        images.class_names, images.classes = names, None if names is None else len(names)
        found.append(images if not found else match_classes(found[0], images, f"{where}.column"))
    largest = max(int(each.targets.max()) + 1 for each in found)
    head.classes = max(1, largest, *(each.classes or 0 for each in found))
    return found


def _read_columns(head: Any, where: str, images: Images) -> np.ndarray:
    """The numbers that a head learns: (N,) for a regression, (N, L) for L labels."""
    several = head.task == "multi_label"
    key = f"{where}.columns" if several else f"{where}.column"
    found = [
        read_numbers(
            images.read_column(name, key),
            f"{key}: '{name}'",
            images.describe,
            only=(0, 1) if several else (),
        )
        for name in (head.columns if several else [head.column])
    ]
    return np.stack(found, axis=1) if several else found[0]


def _key(head: Any, *keys: str) -> Any:
    """The first of some keys that a head has; None if it has none of them."""
    return next((head.get(key) for key in keys if head.get(key) is not None), None)
