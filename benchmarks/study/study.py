"""Trains the runs of the study in plan.md: one method on one data set, in one stage.

    python benchmarks/study/study.py vicreg digits screen [--parallel 2] [key=value ...]

Started again, it trains only what is missing. The table of a stage is
``runs/study/<method>-<data>-<stage>/summary.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from grap_solo.cli import exit_on_refusal
from grap_solo.compose import compose
from grap_solo.experiments.compare import compare
from grap_solo.experiments.tasks import make_launcher

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"

FILES = {
    ("digits", method): CONFIGS / "digits" / f"{method}.yaml"
    for method in ("vicreg", "barlow_twins", "all4one")
} | {
    ("cifar10", method): HERE / f"cifar10_{method}.yaml"
    for method in ("vicreg", "barlow_twins", "all4one")
}


def grap(**keys: Any) -> dict[str, Any]:
    """The weighting block of a GraP variant."""
    return {"weighting": {"name": "grap", **keys}}


def adding(rate: float, **keys: Any) -> dict[str, Any]:
    """A GraP variant from equal weights whose steps add to them, with a learning rate per run."""
    given = {"lr_per_run": rate, "parametrization": "clip", "start": "equal", "heads": "weighted"}
    return grap(**given | keys)


def factors(rate: float, **keys: Any) -> dict[str, Any]:
    """A GraP variant whose steps multiply weights that start where the gradients' norms are
    equal, with a learning rate per run."""
    return adding(rate, **{"parametrization": "exp", "start": "balanced"} | keys)


VARIANTS = {
    # The paper: its Alg. 1, and the recipe of its authors' code.
    "alg1": grap(lr=0.1, parametrization="clip", start="equal", heads="unweighted"),
    "recipe": grap(recipe="paper"),
    # How far the weights can move in a run. The first is a control: equal weights that stay, but on
    # GraP's scale and with its heads.
    "rate0": adding(1e-6),
    "rate0.3": adding(0.3),
    "rate1": adding(1.0),
    "rate2": adding(2.0),
    "rate6": adding(6.0),
    # Weights as factors, and a start from equal norms of the gradients. `balanced0` is a control:
    # weights that stay where they start.
    "exp1": adding(1.0, parametrization="exp"),
    "exp2": adding(2.0, parametrization="exp"),
    "exp4": adding(4.0, parametrization="exp"),
    "balanced0": adding(1e-6, start="balanced"),
    "balanced_rate1": adding(1.0, start="balanced"),
    "balanced_exp1": factors(1.0),
    "balanced_exp2": factors(2.0),
    "balanced_exp4": factors(4.0),
    # From the chosen variant, one factor at a time.
    "unweighted_heads": factors(2.0, heads="unweighted"),
    "ema0.9": factors(2.0, ema=0.9),
    "ema0.99": factors(2.0, ema=0.99),
    "late": factors(2.0, warmup_epochs=4),
    "held_out": factors(2.0) | {"labels": {"split": "held_out", "fraction": 0.1}},
    "fast_probe": factors(2.0) | {"optimizer": {"classifier_lr": 0.1}},
}
SCREENED = ["unweighted_heads", "ema0.9", "ema0.99", "late", "held_out", "fast_probe"]

CONFIRMED = ["fixed", "equal", "alg1", "balanced_exp2"]
BASELINES = ["random", "gradnorm", "dwa", "uncertainty", "mgda", "upgrad"]
STAGES: dict[str, tuple[list[str], list[int]]] = {
    "core": (
        ["fixed", "equal", "alg1", "recipe", "rate0", "rate0.3", "rate1", "rate2", "rate6"],
        [1, 2, 3],
    ),
    "start": (
        ["exp2", "balanced0", "balanced_rate1", "balanced_exp1", "balanced_exp2", "balanced_exp4"],
        [1, 2],
    ),
    "screen": (["balanced_exp2", "balanced0", *SCREENED], [1, 2, 3]),
    "baselines": (["fixed", "equal", "balanced_exp2", *BASELINES], [1, 2, 3]),
    "confirm": (CONFIRMED, [11, 12, 13, 14]),
}

# Stage transfer: the digits' trainings with one thing changed, each a stage of its own.
TRANSFER = {
    "quarter": ["max_epochs=5", "scheduler.warmup_epochs=1"],
    "fourfold": ["max_epochs=80", "scheduler.warmup_epochs=12"],
    "batch": ["optimizer.batch_size=128"],  # lr follows the batch
    "wide": ["+backbone.kwargs={stem_width: 32, channels: [64, 96, 96, 192]}"],
}
STAGES |= {stage: (["fixed", "equal", "balanced_exp2"], [11, 12, 13, 14]) for stage in TRANSFER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted({method for _, method in FILES}))
    parser.add_argument("data", choices=sorted({data for data, _ in FILES}))
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--methods", nargs="+", help="in place of those of the stage")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of those of the stage")
    given, overrides = parser.parse_known_args()
    methods, seeds = STAGES[given.stage]
    name = f"name={given.method}-{given.data}-{given.stage}"
    changed = [name, "checkpoint.dir=runs/study", *TRANSFER.get(given.stage, [])]
    cfg = compose(FILES[given.data, given.method], [*changed, *overrides])
    methods, seeds = given.methods or methods, given.seeds or seeds
    definitions = {each: VARIANTS[each] for each in methods if each in VARIANTS}
    compare(cfg, methods, seeds, definitions, make_launcher(parallel=given.parallel))


if __name__ == "__main__":
    with exit_on_refusal():
        main()
