"""Composes configuration files with hydra.

Importing this module adds ``configs/`` to the end of hydra's search path. A file in any folder can
then use what ours share (``/common/...``, ``augmentations``, ``wandb``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from grap_solo.errors import ConfigError
from grap_solo.packaged import CONFIGS


class SharedConfigs(SearchPathPlugin):
    """Adds ``configs/`` to the end of hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if CONFIGS.is_dir():
            search_path.append(provider="grap-solo", path=f"file://{CONFIGS}")


Plugins.instance().register(SharedConfigs)


def compose(file: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Composes a configuration file with hydra overrides.

    Args:
        file: a YAML file.
        overrides: such as ``max_epochs=2``.

    Raises:
        ConfigError: the file does not exist, it or a file that it includes is not UTF-8, or an
            override that hydra cannot read.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    try:
        with hydra.initialize_config_dir(str(file.parent.resolve()), version_base="1.2"):
            return hydra.compose(file.name, readable_overrides(overrides))
    except UnicodeDecodeError as error:
        raise not_utf8(error, [file.parent]) from None


def not_utf8(error: UnicodeDecodeError, folders: Iterable[Path]) -> Exception:
    """The error for a configuration file that is not UTF-8. Hydra does not say which one it is.

    Args:
        error: hydra's.
        folders: where hydra looks besides ``configs/``.

    Returns:
        An error that names the file, or the given one if all files there are UTF-8.
    """
    for folder in (*folders, CONFIGS):
        for pattern in ("*.yaml", "*/*.yaml"):
            for file in sorted(folder.glob(pattern)):
                try:
                    file.read_bytes().decode()
                except UnicodeDecodeError:
                    return ConfigError(f"{file}: it is not UTF-8 text: save it as UTF-8")
    return error


def readable_overrides(overrides: Iterable[str]) -> list[str]:
    """Checks that hydra can read the command line's overrides. A value such as ``~/runs`` is put
    into quotes, since hydra would not take it and it can mean nothing else.

    Raises:
        ConfigError: an override that hydra cannot read. The line shows it in quotes.
    """
    found = []
    for text in overrides:
        reason = _why_unreadable(text)
        key, _, value = text.partition("=")
        quoted = f"{key}={_in_quotes(value)}"
        if reason is not None and value.startswith("~") and _why_unreadable(quoted) is None:
            text, reason = quoted, None
        if reason is not None and _why_unreadable(quoted) is not None:
            raise ConfigError(f"{text}: not an override ({reason}): expected key=value")
        if reason is not None:
            listed = (
                "a list or block ends with its bracket; " if value.startswith(("[", "{")) else ""
            )
            raise ConfigError(
                f"{key.lstrip('+')}: hydra cannot read {value} ({reason}): {listed}a text with "
                f"such characters needs quotes: {_for_shell(quoted)}"
            )
        found.append(text)
    return found


def _why_unreadable(override: str) -> str | None:
    """Hydra's reason not to read an override; None if it can."""
    if override.startswith("="):
        return "no key"
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        line, *_ = str(error).splitlines() or [type(error).__name__]
        return line.partition(" expecting ")[0]
    return None


def _in_quotes(value: str) -> str:
    """A text in the quotes from which hydra reads it back."""
    quote = '"' if "'" in value else "'"
    # A backslash counts before this quote and at the end only.
    doubled = re.sub(rf"(\\+)(?={quote}|\Z)", r"\1\1", value)
    return quote + doubled.replace(quote, f"\\{quote}") + quote


def _for_shell(argument: str) -> str:
    """An argument as it is typed in a shell."""
    escaped = re.sub(r'(["$`\\])', r"\\\1", argument)
    return f'"{escaped}"'
