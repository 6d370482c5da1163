"""GraP for solo-learn: the weights of a composite self-supervised loss, learned while it trains.

Importing this package imports neither torch nor anything else that is slow: each name below is
imported when it is first used, and needs torch alone. ``import grap_solo.methods`` adds the
``grap_*`` methods to solo-learn's where solo-learn is installed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grap_solo.balance import SharedHead, Step, balance
    from grap_solo.errors import ConfigError
    from grap_solo.exported import load_backbone
    from grap_solo.lightning_module import BalanceMixin
    from grap_solo.weighting import (
        Equal,
        Fixed,
        GraP,
        Statistics,
        Weighting,
        build_weighting,
    )

__version__ = "0.1.0"

__all__ = [
    "BalanceMixin",
    "ConfigError",
    "Equal",
    "Fixed",
    "GraP",
    "SharedHead",
    "Statistics",
    "Step",
    "Weighting",
    "balance",
    "build_weighting",
    "load_backbone",
]

if not TYPE_CHECKING:  # A type checker reads the imports above and refuses every other name.
    _MODULES = {"ConfigError": "errors", "SharedHead": "balance", "Step": "balance"}
    _MODULES |= {"balance": "balance", "load_backbone": "exported"}
    _MODULES |= {"BalanceMixin": "lightning_module"}

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        module = import_module(f"{__name__}.{_MODULES.get(name, 'weighting')}")
        value = globals()[name] = getattr(module, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``grap_solo.balance`` the function, whichever import comes first: importing the module
    of that name would otherwise put the module in the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "balance" and isinstance(value, ModuleType):
            value = value.balance
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
