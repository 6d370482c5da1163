"""The composite methods by name.

Importing this package adds the ``grap_*`` methods to solo-learn's, if solo-learn is installed. To
add a method, write a class beside these and a line in ``METHODS``; or name a class of your own in
the configuration, ``method: package.module:Class``.
"""

from __future__ import annotations

import inspect
import os
import sys
from importlib import import_module

import grap_solo.compose  # noqa: F401 (lets hydra find the files that configurations share)
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.keys import Key
from grap_solo.methods.all4one import GrapAll4One
from grap_solo.methods.barlow_twins import GrapBarlowTwins
from grap_solo.methods.composite import CompositeMethod
from grap_solo.methods.vibcreg import GrapVIbCReg
from grap_solo.methods.vicreg import GrapVICReg
from grap_solo.solo import register_method

METHODS: dict[str, type[CompositeMethod]] = {
    "all4one": GrapAll4One,
    "vicreg": GrapVICReg,
    "vibcreg": GrapVIbCReg,
    "barlow_twins": GrapBarlowTwins,
}
"""The class of each method. ``method: <name>`` trains it with its reference weights,
``method: grap_<name>`` with a ``weighting:`` block."""

WEIGHTED = "grap_"

for _name, _method in METHODS.items():
    register_method(f"{WEIGHTED}{_name}", _method)

__all__ = [
    "METHODS",
    "CompositeMethod",
    "GrapAll4One",
    "GrapBarlowTwins",
    "GrapVIbCReg",
    "GrapVICReg",
    "Key",
    "find_method",
    "takes_weighting",
    "weighted_name",
]


def find_method(name: str) -> type[CompositeMethod]:
    """Returns the class of a method.

    Args:
        name: a name of ``METHODS``, with or without ``grap_``; or ``package.module:Class``, which
            is imported from Python's path or from the current folder.

    Raises:
        ConfigError: if the name is unknown, or the path does not lead to a composite method.
    """
    if ":" in name:
        return _import_method(name)
    if name.removeprefix(WEIGHTED) in METHODS:
        return METHODS[name.removeprefix(WEIGHTED)]
    raise unknown_name("method", name, [*METHODS, *(f"{WEIGHTED}{each}" for each in METHODS)])


def takes_weighting(name: str) -> bool:
    """Whether a method of this name takes a ``weighting:`` block. A plain name of ``METHODS`` does
    not: it stands for the reference weights."""
    return name not in METHODS


def weighted_name(name: str) -> str:
    """The name by which a method takes a ``weighting:`` block."""
    return name if takes_weighting(name) else f"{WEIGHTED}{name}"


def _import_method(path: str) -> type[CompositeMethod]:
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # A user's module may raise anything.
        line = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"method: {module_name} cannot be imported ({type(error).__name__}: {line}): fix it, "
            "or put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found) or not issubclass(found, CompositeMethod):
        what = "no such class" if found is None else "not a CompositeMethod"
        raise ConfigError(
            f"method: {path}: {what}: derive a class from grap_solo.methods.CompositeMethod there"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ConfigError(f"method: {path}: it lacks {missing}: define it")
    for name, key in found.method_keys.items():
        if not isinstance(key, Key):
            raise ConfigError(f"method: {path}: method_keys: '{name}' is no Key: write Key(int, 1)")
    if not isinstance(inspect.getattr_static(found, "reference_weights"), staticmethod):
        raise ConfigError(f"method: {path}: reference_weights: put @staticmethod above it")
    return found
