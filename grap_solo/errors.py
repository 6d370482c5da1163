"""Errors that a user can fix: one line that names the key or file and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 40
"""How many valid names an error lists."""


class ConfigError(ValueError):
    """Input that cannot be used. The command line prints only its text and exits with code 2."""


class RunStopped(ConfigError):
    """A training that cannot continue. Its files are complete; the text says why it stopped."""


def refusal(error: Exception) -> str:
    """The one line that the command line prints for an error."""
    return f"grap-solo: {' '.join(str(error).split())}"


def unknown_name(where: str, name: object, valid: Iterable[str]) -> ConfigError:
    """The error for a name that is not one of ``valid``. It suggests the nearest valid name.

    Args:
        where: the key for which the name was given, such as ``weighting.name``.
        name: the unknown name.
        valid: every valid name.
    """
    options = sorted(valid)
    near = difflib.get_close_matches(str(name), options, n=1)
    more = f" and {len(options) - MOST_LISTED} others" if len(options) > MOST_LISTED else ""
    listed = f"use one of {', '.join(options[:MOST_LISTED])}{more}"
    hint = f"did you mean '{near[0]}'?" if near else listed
    return ConfigError(f"{where}: unknown name '{name}': {hint}")
