"""Loads a backbone from a file of weights, of ours or of another tool."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grap_solo.errors import ConfigError
from grap_solo.exported import EXPORTED_WEIGHTS
from grap_solo.methods import CompositeMethod
from grap_solo.solo import BaseMomentumMethod
from grap_solo.training.checkpoints import find_not_finite

ENTRIES = ("state_dict", "model_state_dict", "teacher", "student", "model", "encoder", "backbone")
"""The entries of a file that may hold the weights, in the order in which they are tried."""

NETWORKS = (
    "backbone",
    "encoder",
    "teacher",
    "student",
    "model",
    "net",
    "network",
    "base_encoder",
    "encoder_q",
    "momentum_backbone",
    "momentum_encoder",
    "encoder_k",
)
"""Names of a backbone within a larger network, in the order in which they are tried."""

COMPILED = "_orig_mod"
WRAPPERS = ("module", COMPILED)
"""Names that DataParallel, DDP and ``torch.compile`` put around a network."""

LISTED = 4
"""How many keys or parts a text lists."""


def start_backbone(model: CompositeMethod, path: Path) -> str:
    """Starts a method's backbone and its momentum copy from a file of weights.

    Args:
        model: the method, before it is trained.
        path: the file.

    Returns:
        See :func:`load_weights`.

    Raises:
        ConfigError: see :func:`load_weights`.
    """
    said = load_weights(
        model.backbone,
        path,
        f"pretrained_feature_extractor: {path}",
        model.cfg.backbone.name,
        "set backbone.name and backbone.kwargs to that backbone's",
    )
    if isinstance(model, BaseMomentumMethod):
        model.momentum_backbone.load_state_dict(model.backbone.state_dict())
    return f"backbone from {path}: {said}"


def load_weights(backbone: nn.Module, path: Path, key: str, name: str, fix: str) -> str:
    """Loads a file of weights, of ours or of another tool, into a backbone.

    The file may hold a run's checkpoint, another tool's, or a bare state dict, as torch's file or
    as safetensors. The weights are those whose keys, after a common prefix, are the backbone's.

    Args:
        backbone: built as the file's weights need it.
        path: the file.
        key: the key or flag that names the file, and its value, for the errors.
        name: the backbone's name, for the errors.
        fix: what to do if the weights are another backbone's.

    Returns:
        The entry and prefix of the weights, and the keys left out.

    Raises:
        ConfigError: no such file, its keys or shapes are not the backbone's, or a number is not
            finite.
    """
    wanted = backbone.state_dict()
    content = _read_weights_file(path, key)
    candidates = list(_candidates(content, wanted, _classifiers(backbone)))
    if not candidates:
        keys = [name for _, state in _state_dicts(content) for name in state]
        held = f"its keys are {_shorten(keys)}" if keys else "there are no weights in it"
        raise ConfigError(f"{key}: {held}: give weights with keys such as {next(iter(wanted))}")
    fitting = [each for each in candidates if not _first_misfit(each.found, wanted)]
    if not fitting:
        nearest = max(candidates, key=lambda each: _count_same(each.found, wanted))
        raise ConfigError(
            f"{key}: its {nearest.where} does not fit {name}: "
            f"{_first_misfit(nearest.found, wanted)}: {fix}"
        )
    chosen, *others = fitting
    found = chosen.found
    # In the backbone's own precision, into which a large number may not fit.
    kept = {name: found.get(name, value).to(value.dtype) for name, value in wanted.items()}
    bad = find_not_finite(kept)
    if bad is not None:
        raise ConfigError(
            f"{key}: '{bad}' of its {chosen.where} is not finite: give an earlier checkpoint"
        )
    backbone.load_state_dict(kept)
    out = f", without {_shorten(chosen.left)}" if chosen.left else ""
    also = f" ({_shorten([each.where for each in others])} would fit too)" if others else ""
    return f"its {chosen.where}{out}{also}"


def _classifiers(backbone: nn.Module) -> tuple[str, ...]:
    """The names that the classifier of one of timm's models has beside the backbone's parts."""
    named = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _read_weights_file(path: Path, key: str) -> Any:
    """Reads a file of torch's or of safetensors. Never runs code from it.

    Raises:
        ConfigError: not such a file.
    """
    if path.is_dir():
        raise ConfigError(
            f"{key}: a folder: give a file in it, such as an export's {EXPORTED_WEIGHTS}"
        )
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: give a checkpoint or a state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign:
            raise ConfigError(
                f"{key}: holds a {foreign[1]} besides weights, and reading that may run code: save "
                "its state dict alone, with torch.save(state_dict, file)"
            ) from None
        raise ConfigError(f"{key}: not a checkpoint, or one cut short") from None


@dataclass(frozen=True)
class Candidate:
    """A part of a file that may be the backbone.

    Attributes:
        where: its entry and prefix, in words.
        found: its tensors, by their names after the prefix, without those of a head.
        left: the names of the parts beside it, and of its head.
    """

    where: str
    found: dict[str, Tensor]
    left: list[str]


def _candidates(
    content: Any, wanted: Mapping[str, Tensor], classifiers: tuple[str, ...]
) -> Iterator[Candidate]:
    """Every part of a file that may be the backbone, the preferred ones first. Those of its
    classifiers are left out."""
    modules = {name.partition(".")[0] for name in wanted}
    for entry, state in _state_dicts(content):
        for prefix in sorted(_prefixes(state, wanted), key=_rank_of_prefix):
            found, left = {}, set()
            for key, value in state.items():
                name = _without_wrapper(key.removeprefix(prefix))
                if not key.startswith(prefix):
                    left.add(_branch(key, prefix))
                elif name not in wanted and name.rpartition(".")[0] in classifiers:
                    left.add(name.rpartition(".")[0])
                elif name.partition(".")[0] in modules:
                    found[name] = value
                else:
                    left.add(name.partition(".")[0])
            words = [f"entry '{entry}'"] if entry else []
            words += [f"keys '{prefix}*'"] if prefix else []
            yield Candidate(", ".join(words) or "state dict", found, sorted(left))


def _state_dicts(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts of a file, by the name of their entry; the file itself has none."""
    if not isinstance(content, Mapping):
        return
    for entry in (*ENTRIES, *(name for name in content if name not in ENTRIES)):
        inner = content.get(entry)
        if isinstance(inner, Mapping):
            yield from (
                (f"{entry}.{name}" if name else str(entry), state)
                for name, state in _state_dicts(inner)
            )
    bare = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if bare:
        yield "", bare


def _prefixes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> set[str]:
    """The prefixes after which some key of a state dict is one of the backbone's."""
    found = set()
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if parts[i] != COMPILED and _without_wrapper(".".join(parts[i:])) in wanted:
                found.add("".join(f"{each}." for each in parts[:i]))
    return found


def _without_wrapper(key: str) -> str:
    """A key without the name that ``torch.compile`` of a part puts in its middle."""
    return ".".join(each for each in key.split(".") if each != COMPILED)


def _branch(key: str, prefix: str) -> str:
    """The part of a network beside a prefix to which a key belongs."""
    names: list[str] = []
    for name, other in zip_longest(key.split("."), prefix.split(".")):
        names.append(name)
        if name != other:
            break
    return ".".join(names)


def _rank_of_prefix(prefix: str) -> tuple[int, int, str]:
    """Sorts prefixes: the networks in the order of :data:`NETWORKS`, others after them."""
    names = [each for each in prefix.split(".") if each and each not in WRAPPERS]
    ranks = [NETWORKS.index(each) if each in NETWORKS else len(NETWORKS) for each in names]
    return max(ranks, default=-1), len(names), prefix


def _count_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    """How many tensors have a key and shape of the backbone's."""
    return sum(k in wanted and v.shape == wanted[k].shape for k, v in found.items())


def _first_misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Names the first keys and the first shape in which tensors are not the backbone's; empty if
    they are.

    A batch-norm's count of batches, which old files lack, may be missing."""
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in wanted]
    texts = [f"it lacks {_shorten(missing)}"] if missing else []
    texts += [f"it also has {_shorten(unexpected)}"] if unexpected else []
    for name, value in wanted.items():
        if name in found and found[name].shape != value.shape:
            theirs, ours = tuple(found[name].shape), tuple(value.shape)
            texts.append(f"{name} has shape {theirs}, not {ours}")
            break
    return "; ".join(texts)


def _shorten(names: list[str]) -> str:
    """The first of some names."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
