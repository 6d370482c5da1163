"""Reads the folder of an exported backbone: the names of its files, and how it is built again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grap_solo.errors import ConfigError
from grap_solo.extras import require

EXPORTED_CONFIG = "config.json"
EXPORTED_WEIGHTS = "model.safetensors"
EXPORTED_STATE = "backbone.pth"

OWN_ENTRY = "grap_solo"
"""The entry of ``config.json`` that says how :func:`load_backbone` builds the backbone."""


def load_backbone(folder: str | os.PathLike[str]) -> nn.Module:
    """Loads a backbone that ``grap-solo export`` has written, in eval mode.

    It computes embeddings, (B, D), from images that are normalised as ``config.json`` says under
    ``pretrained_cfg``: (B, 3, height, width).

    Args:
        folder: the export's folder, of the format ``timm``, ``torchvision`` or ``state-dict``.

    Raises:
        ConfigError: not such a folder, its weights are not the backbone's, or the extra ``train``
            is not installed.
    """
    require("load_backbone", "train")
    from grap_solo.solo.backbones import build_backbone

    directory = Path(folder)
    config = read_exported_config(directory)
    block = config.get(OWN_ENTRY)
    if not isinstance(block, dict):
        raise ConfigError(
            f"{directory / EXPORTED_CONFIG}: no entry '{OWN_ENTRY}': give the folder of an export, "
            "or load it with timm"
        )
    size = config["pretrained_cfg"]["input_size"][-1]
    backbone, _ = build_backbone(block["backbone"], block["dataset"], block["kwargs"], size)
    try:
        backbone.load_state_dict(_read_state(directory))
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{directory}: its weights do not fit its config.json: {line}") from None
    return backbone.eval()


def read_exported_config(folder: Path) -> dict[str, Any]:
    """Reads the ``config.json`` of an export, or of one of timm's model folders.

    Raises:
        ConfigError: no such file, or it holds no keys and values.
    """
    file = folder / EXPORTED_CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{file}: no such file: give the folder of an export") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: damaged: expected keys and values: export again")
    return content


def _read_state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    for name in (EXPORTED_WEIGHTS, EXPORTED_STATE):
        if not (folder / name).is_file():
            continue
        try:
            if name == EXPORTED_WEIGHTS:
                return load_file(folder / name)
            state: dict[str, Tensor] = torch.load(folder / name, "cpu", weights_only=True)
            return state
        except Exception:
            raise ConfigError(f"{folder / name}: damaged: export again") from None
    raise ConfigError(f"{folder}: no {EXPORTED_WEIGHTS}: give the folder of an export, not onnx's")
