"""Errors that a user can mend: one line that names the key or file and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Input that cannot be used. The command line prints its text alone and exits with 2."""


class RunStopped(ConfigError):
    """A training that cannot go on: what it has written is whole, and the text says why."""


def unknown_name(where: str, name: object, valid: Iterable[str]) -> ConfigError:
    """The error for a name that is not one of ``valid``, with the nearest valid name.

    Args:
        where: what the name was given for, such as ``weighting.name``.
        name: what was given.
        valid: every name that would do.
    """
    options = sorted(valid)
    near = difflib.get_close_matches(str(name), options, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(options)}"
    return ConfigError(f"{where}: unknown name '{name}': {hint}")
