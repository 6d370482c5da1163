"""Decides where the base classes come from.

They are solo-learn's if these can be imported, and the project's own otherwise. No other module
needs to know which.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

from grap_solo.errors import ConfigError

if TYPE_CHECKING:
    from grap_solo.solo.base import BaseMethod, BaseMomentumMethod
else:
    try:
        from solo.methods.base import BaseMethod, BaseMomentumMethod

        if "cfg" not in signature(BaseMethod.__init__).parameters:
            raise ImportError("its BaseMethod takes no configuration")
    except ImportError as error:
        from grap_solo.solo.base import BaseMethod, BaseMomentumMethod

        BASE = "grap_solo"
        if find_spec("solo") is not None:
            warnings.warn(
                f"the installed solo-learn has no usable BaseMethod ({error}): using grap-solo's "
                "own. To use solo-learn's, install its main branch: the release of 2021 is too old",
                stacklevel=2,
            )
    else:
        BASE = "solo-learn"

BASE: str
"""Where the base classes come from: ``solo-learn`` or ``grap_solo``."""

__all__ = [
    "BASE",
    "BaseMethod",
    "BaseMomentumMethod",
    "describe_base",
    "prefer_solo_learn",
    "register_backbone",
    "register_method",
]


T = TypeVar("T")


def prefer_solo_learn(module: str) -> Callable[[type[T]], type[T]]:
    """Returns a decorator that replaces a class by solo-learn's of the same name, if there is one.

    Args:
        module: the module below ``solo.methods`` that has solo-learn's class.
    """

    def choose(own: type[T]) -> type[T]:
        if BASE == "solo-learn":
            try:
                theirs: type[T] = getattr(import_module(f"solo.methods.{module}"), own.__name__)
            except (ImportError, AttributeError):
                return own
            return theirs
        return own

    return choose


def describe_base(method: type) -> str:
    """Returns one line that names the base class of a method."""
    base = next(
        each for each in method.__mro__ if each.__module__.startswith(("solo.", "grap_solo.solo."))
    )
    if base.__module__.startswith("solo."):
        return f"base class: solo-learn's {base.__name__}"
    absent = "" if BASE == "solo-learn" else " (solo-learn not found)"
    return f"base class: grap-solo's own{absent} {base.__name__}"


def register_method(name: str, method: type) -> None:
    """Adds a method to solo-learn's, for its scripts. Does nothing without solo-learn."""
    if BASE == "solo-learn":
        from solo.methods import METHODS

        METHODS[name] = method


def register_backbone(name: str) -> bool:
    """Makes sure that the base can build a backbone. Adds a timm model to solo-learn's backbones.

    Returns:
        Whether the backbone is torchvision's or timm's, and not of solo-learn's own.

    Raises:
        ConfigError: if neither the base nor timm has the model.
    """
    from grap_solo.solo.backbones import RESNETS, build_backbone, check_backbone

    if BASE != "solo-learn":
        check_backbone(name)
        return True
    backbones: dict[str, Any] = vars(BaseMethod)["_BACKBONES"]
    if name in backbones:
        return name in RESNETS or getattr(backbones[name], "is_timms", False)
    check_backbone(name)
    if name.startswith("resnet"):  # solo-learn treats such a name as a torchvision model.
        raise ConfigError(f"backbone.name: on solo-learn's base use resnet18, not '{name}'")

    def build(method: str, **kwargs: Any) -> Any:
        return build_backbone(name, "", kwargs)[0]

    vars(build)["is_timms"] = True
    backbones[name] = build
    return True
