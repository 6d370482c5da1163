"""The base of all weightings: a rule turns one step's statistics into K effective weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.extras import require
from grap_solo.keys import Key, read_keys

SCALES = ("none", "reference", "unit")
HEADS = ("weighted", "unweighted", "reference")
SHARED_HEADS = ("sum", "weights", "aligned_mtl")

WEIGHTS = Key(
    dict,
    least=0,
    optional=True,
    doc="The weight of each term; the reference weights "
    "when left out. A term of weight 0 is not computed.",
)
"""A constant weight for each term."""

CAUSES = ("", "held", "unlabelled", "not finite", "no composite gradient", "every weight 0")
"""The reasons why a rule does not learn from a step. The first, "", means that it learned."""

FIRST_INNER_SCALE = 2.0**14
STEPS_TO_GROW = 2000


@dataclass(frozen=True)
class Statistics:
    """One step's numbers, from which a weighting computes its weights. Everything is detached. In a
    distributed run the numbers are those of the joined batch.

    Attributes:
        losses: the K terms' values, shape (K,). For a weighting that does not use them they are
            those of this process alone.
        gramian: ``C = G G^T`` of the embedding gradients, shape (K, K); None if the weighting
            needs no gradients.
        products: ``p = G g_down``, shape (K,); None if the weighting needs no gradients.
        downstream_norm: the Euclidean norm of ``g_down``, shape (); None if the weighting needs no
            gradients. It is 0 for a batch without labels.
    """

    losses: Tensor
    gramian: Tensor | None = None
    products: Tensor | None = None
    downstream_norm: Tensor | None = None


def treatment_keys(scale: str = "none", heads: str = "weighted") -> dict[str, Key]:
    """The three keys that say what is done with a rule's weights, with a rule's own defaults."""
    return {
        "scale": Key(
            float,
            above=0,
            choices=SCALES,
            default=scale,
            doc="The norm of the composite gradient at the embedding. `none` leaves the rule's "
            "weights as they are; `reference` gives it the norm that the reference weights would "
            "give it at this step; `unit` the norm 1; a number that norm.",
        ),
        "heads": Key(
            str,
            choices=HEADS,
            default=heads,
            doc="What trains each term's own head: `weighted`, the term times its effective "
            "weight, as in loss = sum_k w_k L_k; `unweighted`, the term alone; `reference`, the "
            "term times its reference weight.",
        ),
        "shared_heads": Key(
            str,
            choices=SHARED_HEADS,
            default="sum",
            doc="What trains a module that several terms share, such as a projector: `sum`, the "
            "sum of what the terms' heads get; `weights`, the same weighted sum as the backbone; "
            "`aligned_mtl`, the sum of the unweighted terms' gradients by the module's parameters, "
            "whose principal components are first brought to the least one's size (Senushkin et "
            "al. 2023, arXiv 2305.19000, Alg. 1; `shared_algorithm: aligned-mtl` of GraP's "
            "authors). It stores K gradients of the module.",
        ),
    }


class Weighting(nn.Module, ABC):
    """Base of all weightings. In ``eval()`` mode a weighting that learns holds its weights.

    A rule gives a *direction*, K weights. The three keys of :func:`treatment_keys`, which almost
    every rule takes, say what is done with them. Each rule's own defaults are those of its source.

    Args:
        terms: the names of the K terms. Every K-vector here stands in their order.
        reference: the method's own default weight of each term; 1 for each when None.
        given: the rule's keys; :attr:`keys` has the type, range, default and meaning of each.

    Raises:
        ConfigError: no terms, a name twice, reference weights that do not fit the terms, an
            unknown key, or a value that its key cannot take.
    """

    keys: ClassVar[Mapping[str, Key]] = treatment_keys()
    """The keys that the rule takes in a ``weighting:`` block and in its constructor."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Where torch is not enough: the extra to install, and its modules that the rule imports."""

    uses_gradients = False
    """Whether the rule reads the Gramian or the products."""

    uses_losses = False
    """Whether the rule reads the losses' values. They are then those of the joined batch."""

    needs_labels = False
    """Whether the rule can do nothing on data without any label."""

    trains_on_labels = False
    """Whether the downstream loss trains the backbone."""

    needs_losses_after = False
    """Whether :meth:`after_step` must be called."""

    warmup_epochs = 0
    """Epochs for which a training loop that counts epochs keeps the weighting in eval mode."""

    downstream_weight = 0.0
    """The weight with which the downstream loss reaches the backbone."""

    lr_factor = 1.0
    """The factor of the rule's own learning rate. A training loop sets it before each step if
    :attr:`follows_schedule`."""

    follows_schedule = False
    """Whether the rule's learning rate has the schedule of the trainer's optimiser."""

    bypass_checked = False
    """Whether the terms are known to reach the backbone through the embedding alone."""

    inner_scale: Tensor
    """The factor of the inner gradients within heads in float16, shape ()."""

    cause: Tensor | None = None
    """Why the last step was not learned from, an index into :data:`CAUSES`, shape (); None for a
    rule that does not record it."""

    reference: Tensor
    finite_steps: Tensor

    def __init__(
        self, terms: Sequence[str], reference: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        super().__init__()
        self.terms = () if isinstance(terms, str) else tuple(terms)  # No text's letters.
        if not all(self.terms) or not self.terms or len(set(self.terms)) < len(self.terms):
            raise ConfigError(f"terms: expected one or more different names, got {terms!r}")
        weights = dict.fromkeys(self.terms, 1.0) if reference is None else reference
        check_weights(weights, self.terms, "reference weights")
        self.register_buffer("reference", self.vector(weights), persistent=False)
        self.options = self.read_options(given)
        self.check_options(self.options, self.terms)
        self.scale: str | float = self.options["scale"]
        self.heads: str = self.options["heads"]
        self.shared_heads: str = self.options["shared_heads"]
        saved = self.needs_gradients  # Else a state dict is solo-learn's.
        self.register_buffer("inner_scale", torch.tensor(FIRST_INNER_SCALE), persistent=saved)
        self.register_buffer("finite_steps", torch.zeros((), dtype=torch.int32), persistent=saved)

    @classmethod
    def read_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's options with their defaults; ``scale``, ``heads`` and ``shared_heads`` are
        always among them.

        Args:
            given: values by name; the others get their defaults.

        Raises:
            ConfigError: an unknown key, a value that its key cannot take, or a package that is not
                installed.
        """
        treatment = {name: key.default for name, key in treatment_keys().items()}
        options = treatment | read_keys(cls.keys, given, "weighting")
        if cls.needs:
            require(f"weighting: {cls.__name__}", *cls.needs)
        if options["shared_heads"] == "aligned_mtl":
            require("weighting.shared_heads: aligned_mtl", "train", "torchjd")
        return options

    @classmethod
    def keep_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a run keeps, so that a later version trains the same from them.

        Args:
            given: values by name, as :meth:`read_options` takes them.
        """
        return dict(given)

    @classmethod
    def kept_options(cls, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a run, from what this version or an earlier one has kept of them.

        Args:
            kept: values by name, as :meth:`keep_options` returns them.
        """
        return dict(kept)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], terms: Sequence[str]) -> None:
        """Refuses options that do not fit the terms or what is installed.

        Args:
            options: as :meth:`read_options` returns them.
            terms: the names of the K terms.

        Raises:
            ConfigError: they do not fit.
        """

    @classmethod
    def asks_for_gradients(cls, options: Mapping[str, Any]) -> bool:
        """Whether a rule with these options needs the embedding gradients."""
        treated = options["scale"] != "none" or options["heads"] != "weighted"
        return cls.uses_gradients or treated or options["shared_heads"] == "aligned_mtl"

    @property
    def needs_gradients(self) -> bool:
        """Whether the rule, or a key of it, needs the embedding gradients."""
        return self.asks_for_gradients(self.options)

    @property
    def active(self) -> tuple[str, ...]:
        """The terms that can get weight. The other terms need not be computed."""
        return self.terms

    def vector(self, weights: Mapping[str, float]) -> Tensor:
        """Weights by term as a (K,) tensor. See :func:`check_weights`."""
        return torch.tensor([float(weights[name]) for name in self.terms])

    @abstractmethod
    def direction(self, statistics: Statistics) -> Tensor:
        """The rule's weights, shape (K,), before ``scale`` sets their norm.

        In training mode the rule also learns from the statistics, for later steps."""

    def forward(self, statistics: Statistics, evidence: Statistics | None = None) -> Tensor:
        """The effective weights of this step, shape (K,): multipliers of the plain losses.

        Args:
            statistics: of the batch that the weights multiply. With a ``scale`` the effective
                weights are ``e = s w / sqrt(w^T C w)``, where ``s`` is the norm to reach.
            evidence: statistics of the batch that the rule learns from; the same batch when None.
        """
        # Taken first: an average over the steps must not count this one twice.
        gramian = self.scale_gramian(statistics) if evidence is None else statistics.gramian
        weights = self.direction(statistics if evidence is None else evidence)
        if self.scale == "none":
            return weights
        assert gramian is not None
        weights = weights.to(gramian.dtype)
        unit = weights / composite_norm(weights, gramian)
        if self.scale == "reference":
            return unit * composite_norm(self.reference.to(gramian.dtype), gramian)
        return unit if self.scale == "unit" else unit * float(self.scale)

    def scale_gramian(self, statistics: Statistics) -> Tensor | None:
        """The Gramian with which ``scale`` measures norms, shape (K, K)."""
        return statistics.gramian

    def set_total_steps(self, steps: float) -> None:
        """Tells the rule how many batches the run has, before the first of them. A training loop
        with a rule that is given a learning rate per run calls it, also when it resumes.

        Args:
            steps: the batches on each device, over all epochs; infinite if the run has no end.

        Raises:
            ConfigError: the rule needs the number, and it is not finite or below 1.
        """

    def head_weights(self, effective: Tensor) -> Tensor:
        """The factor of each term for its own head, shape (K,)."""
        if self.heads == "weighted":
            return effective
        reference = self.reference.to(effective)
        return reference if self.heads == "reference" else torch.ones_like(reference)

    def extra_loss(self, losses: Tensor) -> Tensor | None:
        """The loss that trains the weighting's own parameters, shape (); None if it has none.

        Args:
            losses: the terms' values, shape (K,), detached.
        """
        return None

    def end_epoch(self) -> None:
        """Rolls an epoch's record over. A training loop calls it at the end of each epoch."""

    @torch.no_grad()
    def adapt_inner_scale(self, finite: Tensor) -> None:
        """Halves the scale of the inner gradients after a step that is not finite, and doubles it
        after 2000 finite steps in a row, as torch's ``GradScaler`` does for the trainer.

        Args:
            finite: whether the step was finite, shape ().
        """
        steps = torch.where(finite, self.finite_steps + 1, 0)
        grow = steps == STEPS_TO_GROW
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.finite_steps.copy_(torch.where(grow, 0, steps))
        self.inner_scale.mul_(factor).clamp_(1.0, FIRST_INNER_SCALE)

    def after_step(self, losses: Tensor) -> None:
        """Learns from the same batch's losses, shape (K,), computed again after the optimiser's
        step."""


def check_weights(weights: Mapping[str, float], terms: Sequence[str], where: str) -> None:
    """Refuses weights unless they are one finite number of 0 or more for each term, not all 0.

    Args:
        weights: by term.
        terms: the names of the K terms.
        where: what the weights were given for, such as ``weighting.weights``.

    Raises:
        ConfigError: an unknown or missing term, or a weight that is refused.
    """
    WEIGHTS.check(weights, where)
    for name in weights:
        if name not in terms:
            raise unknown_name(where, name, terms)
    missing = [name for name in terms if name not in weights]
    if missing:
        raise ConfigError(f"{where}: no weight for {', '.join(missing)}: add it")
    if not any(weights.values()):
        raise ConfigError(f"{where}: every weight is 0: give at least one term some weight")


def composite_norm(weights: Tensor, gramian: Tensor) -> Tensor:
    """``sqrt(w^T C w)``: the norm of the composite gradient ``w^T G``, shape ().

    At least the smallest normal number, so that dividing by it gives no NaN on a step on which
    every gradient vanishes.
    """
    tiny = torch.finfo(gramian.dtype).tiny
    return (weights @ gramian @ weights).clamp(min=tiny).sqrt()
