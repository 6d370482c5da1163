"""The one place that decides where the base classes come from.

If solo-learn's All4One can be imported, it is the base; else it is the project's own. Everything
above this module is written once and does not know which.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from grap_solo.errors import ConfigError

try:
    from solo.methods.all4one import All4One
except ImportError as error:
    from grap_solo.solo.all4one import All4One

    BASE = "grap_solo"
    if find_spec("solo") is not None:
        warnings.warn(
            f"the installed solo-learn gives no All4One ({error}): using grap-solo's own. The "
            "registry's release of 2021 has none: install solo-learn's main branch instead",
            stacklevel=2,
        )
else:
    BASE = "solo-learn"

__all__ = ["BASE", "All4One", "describe_base", "register_backbone", "register_method"]


def describe_base() -> str:
    """One line that says which base the methods stand on."""
    origin = "solo-learn's" if BASE == "solo-learn" else "grap-solo's own (solo-learn not found)"
    return f"base class: {origin} All4One"


def register_method(name: str, method: type) -> None:
    """Adds a method to solo-learn's, so that its scripts can name it. Nothing without it."""
    if BASE == "solo-learn":
        from solo.methods import METHODS

        METHODS[name] = method


def register_backbone(name: str) -> None:
    """Makes sure that the base can build a backbone; solo-learn's is told of timm's models.

    Raises:
        ConfigError: neither the base nor timm has the model.
    """
    from grap_solo.solo.backbones import build_backbone, check_backbone

    if BASE != "solo-learn":
        check_backbone(name)
        return
    from solo.methods.base import BaseMethod

    if name in BaseMethod._BACKBONES:
        return
    check_backbone(name)
    if name.startswith("resnet"):  # solo-learn takes any such name for a torchvision model.
        raise ConfigError(f"backbone.name: on solo-learn's base use resnet18, not '{name}'")

    def build(method: str, **kwargs: Any) -> Any:
        return build_backbone(name, "", kwargs)[0]

    BaseMethod._BACKBONES[name] = build
