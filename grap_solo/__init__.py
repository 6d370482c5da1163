"""GraP for solo-learn: the weights of a composite self-supervised loss, learned while it trains.

Importing this package needs neither Lightning nor solo-learn. ``import grap_solo.methods`` adds
the ``grap_*`` methods to solo-learn's where solo-learn is installed.
"""

from grap_solo.balance import SharedHead, Step, balance
from grap_solo.errors import ConfigError
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
]
