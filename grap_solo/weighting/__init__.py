"""The weightings by name. A new rule is a class in a file of this folder, imported here, and a line
in ``WEIGHTINGS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.keys import refuse_unknown
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
from grap_solo.weighting.scheduled import Scheduled
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
    "scheduled": Scheduled,
}

DEFAULT_WEIGHTING = "grap"
"""The rule of a method that takes a ``weighting:`` block and is given none."""

__all__ = [
    "CAUSES",
    "DEFAULT_WEIGHTING",
    "WEIGHTINGS",
    "Equal",
    "Fixed",
    "GraP",
    "Statistics",
    "Weighting",
    "build_weighting",
    "find_weighting",
]


def build_weighting(
    config: Mapping[str, Any],
    terms: Sequence[str],
    reference: Mapping[str, float] | None = None,
) -> Weighting:
    """Builds the weighting that a ``weighting:`` block describes.

    Args:
        config: ``name`` and the rule's own keys.
        terms: see :class:`~grap_solo.weighting.base.Weighting`.
        reference: see :class:`~grap_solo.weighting.base.Weighting`.

    Raises:
        ConfigError: an unknown name or key, or a value that its key cannot take.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"weighting: expected a block of keys such as {{'name': '{DEFAULT_WEIGHTING}'}}, got "
            f"{config!r}"
        )
    given = dict(config)
    rule = find_weighting(given.pop("name", None))
    refuse_unknown(rule.keys, given, "weighting")  # A key named `terms` would clash below.
    return rule(terms, reference, **given)


def find_weighting(name: object) -> type[Weighting]:
    """The class of a rule.

    Args:
        name: one of ``WEIGHTINGS``.

    Raises:
        ConfigError: no name, or an unknown one.
    """
    if name is None:
        raise ConfigError(f"weighting.name: missing: use one of {', '.join(sorted(WEIGHTINGS))}")
    if not isinstance(name, str) or name not in WEIGHTINGS:
        raise unknown_name("weighting.name", name, WEIGHTINGS)
    return WEIGHTINGS[name]
