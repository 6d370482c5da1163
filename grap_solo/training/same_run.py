"""Tells whether a folder holds the run of a configuration, so that the run may resume there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from grap_solo.data import RunImages, fingerprint
from grap_solo.errors import ConfigError
from grap_solo.methods import takes_weighting
from grap_solo.records.files import CONFIG_FILE, DATA_FILE, read_config, read_json, write_json
from grap_solo.training.config import complete, device_count
from grap_solo.weighting import DEFAULT_WEIGHTING, find_weighting

PATHS = {
    "train": "data.train_path",
    "validation": "data.val_path",
    "labelled": "labels.path",
    "labelled_validation": "labels.val_path",
    "weights": "pretrained_feature_extractor",
}
"""The keys that say where the images and the starting weights are, by their part of the data."""

FREE_KEYS = (
    *PATHS.values(),  # Their content is compared: see check_same_data.
    "data.num_workers",
    "data.download",
    "accelerator",
    "checkpoint",
    "wandb",
    "name",
    "tuned_from",
    "max_time",
    "max_steps",
    "log_every_n_steps",
    "num_sanity_val_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "profiler",
)
"""Keys, and blocks of keys, that cannot change what is trained: a run may resume with others."""

WHOLE = ("limit_train_batches", "limit_val_batches", "val_check_interval")
"""Keys whose number is a share of the batches if it is written with a point, else a count."""

PRECISIONS = {"32": None, "32-true": None, "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's further names of a precision, and its default."""

SHOWN = 3
"""How many differing keys an error lists."""


@dataclass(frozen=True)
class Difference:
    """A key in which two configurations differ.

    Attributes:
        key: the full name, such as ``data.num_workers``.
        old: the value of the earlier configuration; None if it is left out and has no default.
        new: the value of the later one.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {self.old!r}, not {self.new!r}"

    @property
    def is_free(self) -> bool:
        """Whether the key cannot change what is trained."""
        return any(f"{self.key}.".startswith(f"{each}.") for each in FREE_KEYS)


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """The keys in which two configurations differ, sorted. A key that is left out has its default.

    Args:
        old: the earlier configuration, as plain values.
        new: the later one.
    """
    both = [old, new]
    # A run of an earlier version may have keys that are gone: then what is given is compared.
    with contextlib.suppress(ConfigError, AssertionError):  # solo-learn's base asserts.
        both = [_with_all_defaults(each) for each in both]
    theirs, ours = (_flat(each) for each in both)
    pairs = ((key, theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours}))
    return [Difference(*each) for each in pairs if each[1] != each[2]]


def refuse_differences(
    differences: Sequence[Difference], where: str, way_out: str
) -> list[Difference]:
    """Returns the free ones of some differences, if there are no others.

    Args:
        differences: see :func:`find_differences`.
        where: the key or folder, and what it holds, such as ``name: runs/a already holds a run``.
        way_out: what else to give, such as ``another name``.

    Raises:
        ConfigError: a key that changes what is trained differs; the text has both values.
    """
    found = [each for each in differences if not each.is_free]
    if found:
        more = f", and {len(found) - SHOWN} other keys" if len(found) > SHOWN else ""
        listed = "; ".join(str(each) for each in found[:SHOWN])
        raise ConfigError(f"{where} with {listed}{more}: set it back, or give {way_out}")
    return list(differences)


def describe_free(differences: Iterable[Difference]) -> str:
    """One line about free keys that differ; empty if none does."""
    listed = [f"{each.key}={each.new} (before: {each.old})" for each in differences]
    return f"resuming with {', '.join(listed)}" if listed else ""


def keep_config(resolved: Mapping[Any, Any]) -> dict[Any, Any]:
    """The configuration that a run keeps: that it was given, with the keys of its weighting whose
    defaults another version may have changed.

    Args:
        resolved: a configuration that can be used, as plain values.
    """
    block = dict(resolved.get("weighting") or {})
    name = block.pop("name", _default_rule(resolved))
    kept = find_weighting(name).keep_options(block)
    return {**resolved, "weighting": {"name": name, **kept}} if kept or block else dict(resolved)


def _default_rule(plain: Mapping[Any, Any]) -> str:
    return DEFAULT_WEIGHTING if takes_weighting(str(plain.get("method"))) else "fixed"


def read_run_config(directory: Path) -> dict[str, Any]:
    """The configuration that a run has kept, as :func:`of_its_version` reads it.

    Raises:
        ConfigError: see :func:`~grap_solo.records.files.read_config`.
    """
    return of_its_version(OmegaConf.to_container(read_config(directory / CONFIG_FILE)))


def of_its_version(kept: Any) -> dict[str, Any]:
    """A kept configuration, with the defaults of the version that has kept it.

    Args:
        kept: what :func:`keep_config` of this version or an earlier one has returned.
    """
    plain = {str(key): value for key, value in kept.items()}
    block = plain.get("weighting") or {}
    with contextlib.suppress(ConfigError):  # An unknown rule, or none, is refused later on.
        if isinstance(block, dict):
            rest = {key: value for key, value in block.items() if key != "name"}
            name = block.get("name", _default_rule(plain))
            options = find_weighting(name).kept_options(rest)
            if options or block:
                plain["weighting"] = {"name": name, **options}
    return plain


def _with_all_defaults(plain: Mapping[str, Any]) -> dict[str, Any]:
    cfg, method, rule = complete(OmegaConf.create(dict(plain)))
    cfg = method.add_and_assert_specific_cfg(cfg)
    block: Any = OmegaConf.to_container(cfg.weighting, resolve=True)
    name = block.pop("name")
    cfg.weighting = {"name": name, **rule.read_options(block)}
    cfg.devices = count = device_count(cfg.devices)
    if count * cfg.num_nodes == 1:  # As prepare leaves it.
        cfg.strategy, cfg.sync_batchnorm = None, None
    completed: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, parameter in signature(Trainer.__init__).parameters.items():
        if key in completed and completed[key] == parameter.default:
            completed[key] = None
    for key in WHOLE:
        completed[key] = read_limit(completed, key)
    precision = str(completed.get("precision"))
    completed["precision"] = PRECISIONS.get(precision, completed.get("precision"))
    return dict(completed)


def read_limit(plain: Mapping[str, Any], key: str) -> str | None:
    """One of the keys :data:`WHOLE`, as a text: 1 is one batch, but 1.0, all of them, is None."""
    value = plain.get(key)
    return None if value is None or value == 1 and isinstance(value, float) else str(value)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Every value that is not null, by its full key. A list of blocks counts as a block."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {} if value is None else {key: value}
    inner = f"{key}." if key else ""
    return {k: v for name, each in value.items() for k, v in _flat(each, f"{inner}{name}").items()}


# ---- the data -----------------------------------------------------------------------------------


def data_fingerprints(cfg: DictConfig, images: RunImages) -> dict[str, Any]:
    """The fingerprints of a run's images, by the part of the data: see
    :func:`~grap_solo.data.fingerprint`; and that of the weights from which its backbone starts."""
    validation = "validation" if cfg.labels.val_path is None else "labelled_validation"
    parts = {"train": images.train, validation: images.validation, "labelled": images.labelled}
    found: dict[str, Any] = {part: None for part in PATHS}
    for part, each in parts.items():
        if each is not None:
            found[part] = fingerprint(each, OmegaConf.select(cfg, PATHS[part]) or "")
    return {**found, "weights": _digest(cfg.pretrained_feature_extractor)}


def _digest(file: str | None) -> dict[str, Any] | None:
    """The fingerprint of a file by its content; None if it is not there."""
    if file is None or not os.path.isfile(file):
        return None
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(2**20):
            content.update(part)
    return {"digest": content.hexdigest()[:32]}


def write_fingerprints(directory: Path, found: Mapping[str, Any]) -> None:
    """Writes the fingerprints of a run's data to its folder. Weights that a run has started from
    may be gone when it resumes: theirs stays."""
    kept = read_json(directory / DATA_FILE)
    new = dict(found)
    if isinstance(kept, dict) and new.get("weights") is None:
        new["weights"] = kept.get("weights")
    write_json(directory / DATA_FILE, new)


def check_same_data(cfg: DictConfig, directory: Path, found: Mapping[str, Any]) -> None:
    """Refuses other images, or other starting weights, than those of the run in a folder, if they
    lie elsewhere.

    Images at the same place are not compared: an unreadable one may have been replaced.

    Args:
        cfg: the configuration to resume with, with its defaults.
        directory: the run's folder.
        found: the fingerprints of the configuration's data; of a part without one, the run's own
            may be anything.

    Raises:
        ConfigError: the data differs, or the run has kept no fingerprints.
    """
    if not (directory / CONFIG_FILE).exists():
        return
    theirs = OmegaConf.create(read_run_config(directory))
    kept = read_json(directory / DATA_FILE)
    for part in found:
        key = PATHS[part]
        old, new = OmegaConf.select(theirs, key), OmegaConf.select(cfg, key)
        if _real(old) == _real(new):
            continue
        what = "weights" if part == "weights" else "images"
        where = f"{key}: the run in {directory} has {what} at {old}, and "
        way_out = f": give {key}={old}, or another name"
        if not isinstance(kept, dict) or part not in kept:
            raise ConfigError(
                f"{where}keeps no fingerprint of them to compare those at {new} with{way_out}"
            )
        if kept.get(part) != found.get(part):
            raise ConfigError(
                f"{where}those at {new} are others ({_tell_apart(kept.get(part), found.get(part))})"
                f"{way_out}"
            )


def _real(path: Any) -> str:
    return os.path.realpath(str(path)) if path not in (None, "None") else ""


def _tell_apart(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    """Says how two fingerprints differ."""
    if old is None or new is None:
        return "none before" if old is None else "none now"
    if "images" not in old:
        return "with another content"
    for key in ("images", "classes"):
        if old.get(key) != new.get(key):
            return f"{old.get(key)} {key} before, {new.get(key)} now"
    return "with other names, labels or sizes of files"
