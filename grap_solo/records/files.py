"""Files that are whole or not there, and folders that one command writes to at a time."""

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
    """A file to write, which takes its place when it is whole; until then what was there stays."""
    waiting = path.with_name(path.name + ".new")
    with waiting.open("w", newline="") as file:
        yield file
    os.replace(waiting, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is not there or is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Keeps a second command from writing to a folder.

    It is a record lock, which the processes that this one starts do not inherit: it ends with
    this process, however that ends.

    Raises:
        ConfigError: there is one already.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{directory}: another command is writing there: wait, or give another folder"
            ) from None
        yield
