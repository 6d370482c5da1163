"""The weightings by name. A new rule is a file beside this one and a line in ``WEIGHTINGS``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.weighting.base import GradientWeighting, Statistics, Weighting
from grap_solo.weighting.equal import Equal
from grap_solo.weighting.fixed import Fixed
from grap_solo.weighting.grap import GraP

WEIGHTINGS: dict[str, type[Weighting]] = {"fixed": Fixed, "equal": Equal, "grap": GraP}

__all__ = [
    "WEIGHTINGS",
    "Equal",
    "Fixed",
    "GraP",
    "GradientWeighting",
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
    if name not in WEIGHTINGS:
        raise unknown_name("weighting.name", name, WEIGHTINGS)
    rule = WEIGHTINGS[name]
    valid = set(inspect.signature(rule).parameters) - {"terms", "reference"}
    for key in keys:
        if key not in valid:
            if not valid:
                raise ConfigError(f"weighting: '{name}' takes no keys: remove '{key}'")
            raise unknown_name(f"weighting ({name})", key, valid)
    return rule(terms, reference, **keys)
