"""GraP's configuration keys, and the recipes that set several of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grap_solo.errors import ConfigError
from grap_solo.keys import Key
from grap_solo.weighting.base import treatment_keys

NORMALIZATIONS = ("gradient", "sum", "none")
LR_SCHEDULES = ("constant", "optimizer")
PARAMETRIZATIONS = ("clip", "abs", "exp")
STARTS = ("equal", "balanced")
WEIGHT_OPTIMIZERS = ("adam", "sgd")

RECIPES: dict[str, dict[str, Any]] = {
    "alg1": {
        "lr": 0.1,
        "parametrization": "clip",
        "start": "equal",
        "heads": "unweighted",
    },
    "paper": {
        "lr": 0.1,
        "lr_schedule": "optimizer",
        "optimizer": "adam",
        "normalization": "gradient",
        "parametrization": "abs",
        "start": "equal",
        "norm_ema": 0.99,
        "average_first": 10,
        "ema": 0.0,
        "regularization": 0.0,
        "warmup_epochs": 0,
        "scale": "reference",
        "heads": "reference",
        "shared_heads": "sum",
    },
}
"""The keys that each recipe sets. ``average_first`` is their optimiser's default ``warmup``."""

LR_PER_RUN = 2.0
"""``lr_per_run`` where no learning rate is given. docs/results/study compares it with others."""


PINNED = ("parametrization", "start", "heads", "lr", "lr_per_run")
"""The keys that a run's ``config.yaml`` always says."""


def _listed(recipe: str) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in RECIPES[recipe].items())


GRAP_KEYS = {
    "recipe": Key(
        str,
        choices=tuple(RECIPES),
        optional=True,
        doc="Sets several keys at once; a key that is given too wins. `alg1` is Alg. 1 of the "
        f"paper (arXiv 2605.07756): {_listed('alg1')}. `paper` is its authors' setting on CIFAR-10 "
        "(scripts/pretrain/cifar/hpo-*.yaml of their solo-learn fork, with their optimiser's "
        f"defaults): {_listed('paper')}. They also join two terms of their method: "
        "`method_kwargs.join_feature_loss`.",
    ),
    "lr": Key(
        float,
        above=0,
        optional=True,
        doc="How far one step moves the learned weights, in place of `lr_per_run`. It needs "
        "`recipe` or `parametrization`, which say what a step does. It is not scaled with the "
        "batch size.",
    ),
    "lr_per_run": Key(
        float,
        above=0,
        optional=True,
        doc="How far the learned weights can move in a whole run: `lr` is this number divided by "
        "the run's number of batches on each device, those of `warmup_epochs` included, so that "
        "the weights move the same way in a short run and a long one. With `parametrization: exp` "
        "the unit is the natural logarithm: 2 lets a weight change by a factor of about "
        "exp(2) = 7.4, and the ratio of two by its square; with the others it is a weight's start. "
        f"{LR_PER_RUN:g} if neither `lr` nor a recipe with an `lr` is given. In a loop of your "
        "own, call `weighting.set_total_steps(N)`.",
    ),
    "lr_schedule": Key(
        str,
        choices=LR_SCHEDULES,
        default="constant",
        doc="Whether the weights' learning rate stays as it is (`constant`) or warms up and falls "
        "with the `optimizer`'s: it is multiplied by that learning rate divided by its peak. The "
        "authors' training has one schedule for all (configure_optimizers in solo/methods/base.py "
        "of their solo-learn fork). In a loop of your own, set `weighting.lr_factor`.",
    ),
    "optimizer": Key(
        str,
        choices=WEIGHT_OPTIMIZERS,
        default="adam",
        doc="The optimiser of the weights. Adam has betas 0.9 and 0.999 and eps 1e-8, as torch's.",
    ),
    "normalization": Key(
        str,
        choices=NORMALIZATIONS,
        default="gradient",
        doc="What the objective p^T w is divided by: `gradient`, the composite gradient's norm "
        "sqrt(w^T C w); `sum`, the sum of the weights; `none`, 1 (arXiv 2605.07756, Table 5).",
    ),
    "parametrization": Key(
        str,
        choices=PARAMETRIZATIONS,
        default="exp",
        doc="How the weights stay at 0 or above: `clip`, each step ends with max(w, 0) (arXiv "
        "2605.07756, Alg. 1); `abs`, w = abs(v), where v is learned and the "
        "gradient of abs at 0 is 1 (`weights_parametrization` of the authors' optimiser); `exp`, "
        "w = exp(v): a step multiplies a weight, so that terms whose good weights are orders of "
        "magnitude apart need no more steps, and no weight reaches 0.",
    ),
    "start": Key(
        str,
        choices=STARTS,
        default="balanced",
        doc="The weights that the run starts from: `equal`, 1 for each term; `balanced`, weights "
        "that give every term's gradient the same norm, on the average of the first 20 steps that "
        "are learned from. The weights that are learned are factors of these, so that multiplying "
        "a loss by a constant does not change the direction of the composite gradient.",
    ),
    "ema": Key(
        float,
        least=0,
        below=1,
        default=0.0,
        doc="The share of the past in the moving averages of Gramian and products that the "
        "weights learn from (arXiv 2605.07756, Appendix A), bias-corrected as in Adam. 0 "
        "learns from each step's own.",
    ),
    "average_first": Key(
        int,
        least=0,
        default=0,
        doc="Steps over which Gramian and products are averaged evenly, before `ema` goes on from "
        "their mean without a bias correction (`warmup` of the authors' optimiser, which has 10). "
        "0 starts with `ema`.",
    ),
    "norm_ema": Key(
        float,
        least=0,
        below=1,
        optional=True,
        doc="The share of the past in a moving average of each term's gradient norm. The Gramian "
        "and the products are then averaged as cosines, and get these norms in place of the "
        "step's own; `scale: reference` also goes by them (`stats` of `ema` in the authors' "
        "optimiser, which has 0.9). Left out, norms are not averaged apart.",
    ),
    "regularization": Key(
        float,
        least=0,
        default=0.0,
        doc="Subtracts this times (norm(u) - 1)^2 from the objective, where u_k is a weight times "
        "the norm of its term's gradient: the cosine alone does not depend on the size of the "
        "weights, so nothing else holds it (`regularization` of the authors' optimiser).",
    ),
    "warmup_epochs": Key(
        int,
        least=0,
        default=0,
        doc="Epochs for which the weights are equal, since `start: balanced` is measured on "
        "the first steps that are learned from. During them grap-solo "
        "keeps the rule in eval mode; in a loop of your own, call `weighting.eval()`.",
    ),
    **treatment_keys(scale="reference", heads="weighted"),
}


def apply_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys, those of their recipe that are not given themselves, and a learning rate.

    Args:
        given: values by name. None stands for a value that is left out.

    Raises:
        ConfigError: both learning rates are given.
    """
    own = {name: value for name, value in given.items() if value is not None}
    if "lr" in own and "lr_per_run" in own:
        raise ConfigError(
            "weighting.lr_per_run: weighting.lr is given too, and only one of the two can hold: "
            "leave one of them out, as weighting.lr=null does on the command line"
        )
    name = own.get("recipe")
    recipe = dict(RECIPES.get(name, {}) if isinstance(name, str) else {})
    if "lr_per_run" in own:  # In place of all that the recipe says about the learning rate.
        recipe = {key: value for key, value in recipe.items() if key not in ("lr", "lr_schedule")}
    found = recipe | own
    if not {"lr", "lr_per_run"} & set(found):
        found["lr_per_run"] = LR_PER_RUN
    return found


def refuse_bare_lr(given: Mapping[str, Any]) -> None:
    """Refuses a learning rate for each step without what such a step does.

    Until ``parametrization: exp`` was the default, 0.1 was a good one. Now it would multiply a
    weight by up to exp(100) in a thousand steps.

    Args:
        given: values by name. None stands for a value that is left out.

    Raises:
        ConfigError: ``lr`` is given, but neither ``recipe`` nor ``parametrization``.
    """
    own = {name for name, value in given.items() if value is not None}
    if "lr" in own and not {"recipe", "parametrization"} & own:
        raise ConfigError(
            "weighting.lr: say what a step of it does: weighting.recipe=alg1 adds to the weights, "
            "weighting.parametrization=exp multiplies them; or give weighting.lr_per_run instead, "
            "which the default has"
        )
