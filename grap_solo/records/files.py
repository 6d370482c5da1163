"""The names of a run folder's files, and how a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from grap_solo.errors import ConfigError

# A run's folder.
CONFIG_FILE = "config.yaml"
TERMS_FILE = "terms.yaml"
WEIGHTS_FILE = "weights.csv"
DIAGNOSTICS_FILE = "diagnostics.csv"
METRICS_FILE = "metrics.csv"
LABELS_FILE = "labels.csv"
DATA_FILE = "data.json"
MEDIAN_FILE = "median_weights.yaml"
PICTURE_FILE = "weights.png"
WANDB_FILE = "wandb.json"
TRAINED_FILE = "trained.json"
RESULT_FILE = "result.json"
CHECKPOINTS_FOLDER = "checkpoints"
ARGS_FILE = "args.json"  # Among the checkpoints, where solo-learn's scripts look for it.

# A folder of runs, such as a comparison's.
SUMMARY_FILE = "summary.csv"
COST_FILE = "cost.json"
FAILURE_FILE = "failure.json"  # Of a failed run, beside its log.


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Opens a file to write. It replaces the old one only once it is whole."""
    waiting = path.with_name(path.name + ".new")
    with waiting.open("w", newline="") as file:
        yield file
    os.replace(waiting, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; returns None if it is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Keeps a second command from writing to a folder.

    Takes a record lock: the system releases it when this process ends, even if it is killed, and
    child processes do not inherit it.

    Raises:
        ConfigError: another command is writing there.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{directory}: another command is writing there: wait, or give another folder"
            ) from None
        yield
