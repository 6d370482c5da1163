"""The names of a run folder and its files, and how files and folders are read, made and written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
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
EVALUATION_FILE = "evaluation.json"
CHECKPOINTS_FOLDER = "checkpoints"
ARGS_FILE = "args.json"  # Among the checkpoints, where solo-learn's scripts look for it.

# A folder of runs, such as a comparison's.
SUMMARY_FILE = "summary.csv"
COST_FILE = "cost.json"

LONGEST_NAME = 230
"""The most bytes of a name: files have 255, and a checkpoint's adds ``-interrupted.ckpt.new``."""

PROBE_BYTES = 1 << 16
"""How much :func:`make_folder` writes, to see whether there is room."""


# ---- names and paths ------------------------------------------------------------------------


def check_name(name: str, key: str = "name") -> None:
    """Refuses a name that cannot name a folder and the files that are called after it.

    Args:
        name: of a run or of a comparison.
        key: where the name was given.

    Raises:
        ConfigError: the name is empty, a path, too long, or has characters that are not printed.
    """
    wrong = None
    if not name:
        wrong = "it is empty: give one"
    elif "/" in name or "\\" in name or name in (".", ".."):
        wrong = "it is a path: give the name of one folder, and the folders above in checkpoint.dir"
    elif name != name.strip():
        wrong = "it starts or ends with a blank: leave it out"
    elif not _is_plain_text(name):
        wrong = "it has a control character, or a byte that is not UTF-8: leave it out"
    elif len(name.encode()) > LONGEST_NAME:
        wrong = f"it has {len(name.encode())} bytes: give one of at most {LONGEST_NAME}"
    if wrong is not None:
        raise ConfigError(f"{key}: {name[:60]!r}: {wrong}")


def _is_plain_text(text: str) -> bool:
    """Whether a text has no control character and no byte that is not UTF-8."""
    return not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)


def expand_path(text: str) -> str:
    """Replaces a leading ``~`` and each ``$VARIABLE`` of a path.

    A ``$`` stands for itself where the variable is not set but the path exists.

    Raises:
        ConfigError: a variable that is not set, an unknown user, or a path that the system does
            not take.
    """
    if not text:
        raise ConfigError("expected a path, got an empty text")
    if not _is_plain_text(text):
        raise ConfigError(f"{text!r}: it has a control character, or a byte that is not UTF-8")

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in os.environ and not os.path.lexists(text):
            raise ConfigError(f"'{text}': the variable {variable} is not set: export it")
        return os.environ.get(variable, found[0])

    path = re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value, text, flags=re.ASCII)
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ConfigError(f"'{text}': no such user: write ./~... for a folder of this name")
    try:
        os.lstat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass  # Whoever reads it says what is missing; whoever writes it makes it.
    except OSError as error:
        raise ConfigError(f"{expanded}: {error.strerror}") from None
    return expanded


# ---- reading and writing --------------------------------------------------------------------


def make_folder(folder: Path, key: str) -> None:
    """Makes a folder, unless it is there, and tries to write to it.

    Args:
        folder: the folder.
        key: what named it, for the error.

    Raises:
        ConfigError: it cannot be made, or takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be made: {error.strerror}") from None
    try:
        # A file without a name: nothing stays behind, even if the process is killed.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"{key}: {folder} cannot be written to ({error.strerror}): make room, or give a folder "
            "that you may write to"
        ) from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Opens a file to write. It replaces the old one only once it is whole."""
    waiting = path.with_name(path.name + ".new")
    with waiting.open("w", newline="", encoding="utf-8") as file:
        yield file
    os.replace(waiting, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; returns None if it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_config(path: Path) -> Any:
    """Reads a YAML file of keys and values into an OmegaConf block.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, not YAML, or something else than keys.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = read_text(path)
    try:
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        line = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise ConfigError(f"{path}: not YAML: {line}") from None
    if not OmegaConf.is_dict(config):
        raise ConfigError(f"{path}: expected keys and values")
    return config


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Keeps a second command from writing to a folder.

    Takes a record lock: the system releases it when this process ends, even if it is killed, and
    child processes do not inherit it.

    Raises:
        ConfigError: another command is writing there, or the file system has no locks.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"{directory}: cannot be locked ({error.strerror}): give a folder on a file "
                    "system with locks"
                ) from None
            raise ConfigError(
                f"{directory}: another command is writing there: wait, or give another folder"
            ) from None
        yield
