"""Says in sentences what the demo's figures show. Each sentence is computed, so that it can also
say that GraP did not help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

STANDARD_ERRORS = 2
"""Accuracies that differ by at most this many standard errors count as level."""

STEADY = 1.1
"""A distance that changes by less than this factor counts as unchanged."""

CONCLUSIONS = {
    ("above", "above"): "Learning the weights helped here.",
    ("level with", "above"): "Learning the weights did as well as choosing them by hand, and "
    "better than not choosing them.",
    ("below", "above"): "Learning the weights is better than not choosing them, and choosing them "
    "by hand is better still.",
    ("above", "level with"): "Equal weights do as well, so nothing shows that GraP helped.",
    ("level with", "level with"): "GraP cannot be told apart from either, so nothing shows that "
    "it helped.",
    ("below", "level with"): "GraP did not help here.",
    ("above", "below"): "GraP did not help here: equal weights are the best of the three.",
    ("level with", "below"): "GraP did not help here.",
    ("below", "below"): "GraP did not help here: its weights are the worst of the three.",
}
"""The conclusion from two verdicts: GraP against the default weights, and against equal ones."""


def noise_margin(accuracies: Sequence[float], images: int) -> float:
    """Computes how far two accuracies of the same network can differ by chance, in points.

    It is two binomial standard errors of a difference, ``2 sqrt(2 p (1 - p) / N)``.

    Args:
        accuracies: in percent; ``p`` is their mean.
        images: the number of validation images N.
    """
    p = sum(accuracies) / len(accuracies) / 100
    return 100 * STANDARD_ERRORS * math.sqrt(2 * p * (1 - p) / images)


def judge(accuracy: float, other: float, margin: float) -> str:
    """Says whether an accuracy is ``above``, ``level with`` or ``below`` another one."""
    if abs(accuracy - other) <= margin:
        return "level with"
    return "above" if accuracy > other else "below"


def describe_accuracies(linear: Mapping[str, float | None], images: int) -> str:
    """Compares the linear probe of GraP with those of the default and of equal weights.

    Args:
        linear: the accuracies of ``grap``, ``default`` and ``equal`` in percent; and of
            ``grap_tuned``, if the median of the learned weights was held constant in a run. None
            for a run whose embeddings allow no linear probe.
        images: the number of validation images.
    """
    without = [name for name in ("grap", "default", "equal") if linear[name] is None]
    if without:
        return (
            f"The embeddings of {' and '.join(without)} allow no linear probe, so nothing can be "
            "compared."
        )
    grap, default, equal = (linear[name] or 0.0 for name in ("grap", "default", "equal"))
    tuned = linear.get("grap_tuned")
    margin = noise_margin([grap, default, equal, *([] if tuned is None else [tuned])], images)
    verdicts = judge(grap, default, margin), judge(grap, equal, margin)
    text = (
        f"By the linear probe, GraP ({grap:.2f} %) is {verdicts[0]} the default weights "
        f"({default:.2f} %) and {verdicts[1]} equal weights ({equal:.2f} %). "
        f"{CONCLUSIONS[verdicts]} "
    )
    if tuned is not None:
        text += (
            f"GraP's median weights, held constant ({tuned:.2f} %), are "
            f"{judge(tuned, default, margin)} the default weights. "
        )
    return text + (
        f"Differences of up to {margin:.1f} points count as level: twice the binomial standard "
        f"error of the difference between two accuracies on {images} images."
    )


def find_farthest(
    weights: Mapping[str, float], default: Mapping[str, float]
) -> tuple[str, str, float]:
    """Finds the two terms whose weights are in a proportion that is farthest from that of their
    default weights. A common factor of all weights changes nothing.

    Args:
        weights: 0 or more, by term; not all 0.
        default: the default weights, above 0.

    Returns:
        The term with too much weight, the one with too little, and by which factor the proportion
        is off: 1 or more, infinite if a weight is 0.
    """
    ratios = {term: weight / default[term] for term, weight in weights.items()}
    most = max(ratios, key=ratios.__getitem__)
    least = min(reversed(ratios), key=ratios.__getitem__)
    factor = ratios[most] / ratios[least] if ratios[least] > 0 else math.inf
    return most, least, factor


def describe_approach(
    start: Mapping[str, float], end: Mapping[str, float], default: Mapping[str, float]
) -> str:
    """Says whether the proportions of learned weights came nearer to those of the default weights.

    Args:
        start: the weights of the first step, by term.
        end: the weights at the end of the run.
        default: the default weights, above 0.
    """
    first, last = find_farthest(start, default), find_farthest(end, default)
    before, after = first[2], last[2]
    if after * STEADY < before:
        verdict = "GraP came nearer to the default weights."
    elif after > before * STEADY:
        verdict = "GraP moved away from the default weights."
    else:
        verdict = "GraP came no nearer to the default weights."
    return (
        "Where GraP differs most from the default weights: at the first step "
        f"{_say_farthest(*first)}, in the last epoch {_say_farthest(*last)}. {verdict}"
    )


def _say_farthest(most: str, least: str, factor: float) -> str:
    if math.isinf(factor):
        return f"{least} weighed nothing"
    return f"{most} weighed {factor:.1f} times as much against {least}"
