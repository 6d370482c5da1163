"""Errors that a user can fix: one line that names the key or file and the fix."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

MOST_LISTED = 40
"""How many valid names an error lists."""


class ConfigError(ValueError):
    """Input that cannot be used. The command line prints only its text and exits with code 2."""


class RunStopped(ConfigError):
    """A training that cannot continue. Its files are complete; the text says why it stopped."""


class Diverged(RunStopped):
    """A training whose steps are not finite any more."""


UNWRITABLE = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    }
)
"""Why the system does not let a file be read or written."""


def is_machine_failure(error: Exception) -> bool:
    """Whether the system did not let a file be read or written."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


def refusal(error: Exception) -> str:
    """The one line that the command line prints for an error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # Hydra's have a text alone.
        place = "a file" if error.filename is None else error.filename
        text = f"{place}: cannot be read or written: {error.strerror}"
    return f"grap-solo: {' '.join(text.split())}"


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
