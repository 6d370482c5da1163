"""The weightings by name. A new rule is a class beside these and a line in ``WEIGHTINGS``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.weighting.base import CAUSES, Statistics, Weighting
from grap_solo.weighting.dwa import DWA
from grap_solo.weighting.equal import Equal
from grap_solo.weighting.fixed import Fixed
from grap_solo.weighting.gradnorm import GradNorm
from grap_solo.weighting.gramian import (
    IMTLG,
    AlignedMTL,
    CAGrad,
    DualProj,
    FairGrad,
    PCGrad,
    UPGrad,
)
from grap_solo.weighting.grap import GraP
from grap_solo.weighting.mgda import MGDA
from grap_solo.weighting.scalarized import FAMO, Random, Uncertainty
from grap_solo.weighting.supervised import Auxiliary, Supervised

WEIGHTINGS: dict[str, type[Weighting]] = {
    "fixed": Fixed,
    "equal": Equal,
    "gradnorm": GradNorm,
    "dwa": DWA,
    "mgda": MGDA,
    "grap": GraP,
    "pcgrad": PCGrad,
    "aligned_mtl": AlignedMTL,
    "imtl_g": IMTLG,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "fairgrad": FairGrad,
    "cagrad": CAGrad,
    "uncertainty": Uncertainty,
    "famo": FAMO,
    "random": Random,
    "auxiliary": Auxiliary,
    "supervised": Supervised,
}

__all__ = [
    "CAUSES",
    "WEIGHTINGS",
    "Equal",
    "Fixed",
    "GraP",
    "Statistics",
    "Weighting",
    "build_weighting",
]


def build_weighting(
    config: Mapping[str, Any],
    terms: Sequence[str],
    reference: Mapping[str, float] | None = None,
) -> Weighting:
    """The weighting that a ``weighting:`` block describes.

    Args:
        config: ``name`` and the rule's own keys.
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.

    Raises:
        ConfigError: an unknown name or key, or a value that the rule refuses.
    """
    keys = dict(config)
    name = keys.pop("name", None)
    if name is None:
        raise ConfigError(f"weighting.name: missing: use one of {', '.join(sorted(WEIGHTINGS))}")
    if not isinstance(name, str) or name not in WEIGHTINGS:
        raise unknown_name("weighting.name", name, WEIGHTINGS)
    rule = WEIGHTINGS[name]
    valid = _keys(rule)
    for key in keys:
        if key not in valid:
            if not valid:
                raise ConfigError(f"weighting: '{name}' takes no keys: remove '{key}'")
            raise unknown_name(f"weighting ({name})", key, valid)
    return rule(terms, reference, **keys)


def _keys(rule: type[Weighting]) -> set[str]:
    """The keys that a rule takes: its constructor's, and its base's where it passes them on."""
    keys: set[str] = set()
    for each in rule.__mro__:
        constructor = vars(each).get("__init__")
        if constructor is not None:
            parameters = inspect.signature(constructor).parameters.values()
            keys |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return keys
