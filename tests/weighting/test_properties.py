"""What must hold for every rule, whatever the gradients: drawn at random, the same every time."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grap_solo import GraP, Statistics, build_weighting
from grap_solo.weighting import CAUSES, WEIGHTINGS
from grap_solo.weighting.grap import objective
from grap_solo.weighting.grap_keys import NORMALIZATIONS, WEIGHT_OPTIMIZERS

RULES = sorted(WEIGHTINGS)
GRADIENT_RULES = sorted(name for name in RULES if WEIGHTINGS[name].uses_gradients)

MAY_BE_NEGATIVE = {
    "imtl_g",  # Its combination has equal projections onto all directions, wherever it lies.
    "aligned_mtl",  # A root of the inverse Gramian times 1 / K, which may have any sign.
}
# All the others are not negative by their definitions: constants (equal, fixed, auxiliary,
# supervised), a softmax (dwa, random) or one over positive losses (famo), an exponential
# (uncertainty), a clamp (gradnorm, grap), a solution with w >= 0 (mgda, fairgrad, and cagrad, which
# adds 1 / K) or with w >= 1 / K (upgrad, dualproj), and 1 plus what a conflict adds (pcgrad).


def drawn(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# ---- gradients and weightings ---------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One step's gradients, (K, d), the downstream one, (d,), and the losses before and after."""

    rows: Tensor
    down: Tensor
    losses: Tensor
    after: Tensor

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def gramian(self) -> Tensor:
        return self.rows @ self.rows.T

    def statistics(self) -> Statistics:
        return Statistics(self.losses, self.gramian, self.rows @ self.down, self.down.norm())

    def times(self, size: float) -> Batch:
        """The same batch with all the terms' losses multiplied by ``size``."""
        rows, losses, after = size * self.rows, size * self.losses, size * self.after
        return Batch(rows, self.down, losses, after)

    def ordered(self, order: list[int]) -> Batch:
        return Batch(self.rows[order], self.down, self.losses[order], self.after[order])

    def with_twins(self) -> Batch:
        """The second term is the first again."""
        return self.ordered([0, 0, *range(2, self.count)])


SEEDS = st.integers(0, 2**32 - 1)


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@st.composite
def any_batches(draw, count=None, dtype=None, lowest=-6, highest=6):
    """Of any rank and of sizes from 1e-6 to 1e6, with rows that are 0, the same or opposed."""
    count = draw(st.integers(1, 8)) if count is None else count
    dtype = draw(st.sampled_from([torch.float32, torch.float64])) if dtype is None else dtype
    dimension, rank = draw(st.integers(1, 12)), draw(st.integers(1, count))
    seed = draw(SEEDS)
    rows = randn(seed, count, rank) @ randn(seed + 1, rank, dimension)
    for k in range(count):
        kind = draw(st.sampled_from(["own", "own", "own", "zero", "same", "opposed"]))
        factor = {"own": None, "zero": 0.0, "same": 1.0, "opposed": -1.0}[kind]
        if factor is not None:
            rows[k] = factor * rows[draw(st.integers(0, count - 1))]
    sizes = st.floats(lowest, highest)
    if draw(st.booleans()):
        powers = torch.tensor([draw(sizes) for _ in range(count)], dtype=torch.float64)
    else:
        powers = torch.tensor([draw(sizes)] * count, dtype=torch.float64)
    rows = rows * 10 ** powers[:, None]
    down = 10 ** draw(st.floats(-6, 6)) * randn(seed + 2, dimension)
    losses = 10 ** (3 * randn(seed + 3, count)).clamp(-6, 6)
    after = losses * (0.1 * randn(seed + 4, count)).exp()
    return Batch(rows.to(dtype), down.to(dtype), losses.to(dtype), after.to(dtype))


@st.composite
def plain_batches(draw, count=None, least=1):
    """In float64, linearly independent, of sizes that differ by a factor of 100 at most."""
    count = draw(st.integers(least, 8)) if count is None else count
    seed = draw(SEEDS)
    rows = randn(seed, count, count + 6) + randn(seed + 1, count, 1)
    rows = rows * 10 ** torch.tanh(randn(seed + 2, count, 1))
    down = randn(seed + 3, count + 6)
    losses = 10 ** torch.tanh(randn(seed + 4, count))
    after = losses * (0.3 * randn(seed + 5, count)).exp()
    return Batch(rows, down, losses, after)


@st.composite
def paths(draw, batches=any_batches, least=1, most=4, **keys):
    """The batches of a few steps with the same terms."""
    first = draw(batches(**keys))
    length = draw(st.integers(least, most))
    if batches is any_batches:
        keys["dtype"] = first.rows.dtype
    keys["count"] = first.count
    return [first, *(draw(batches(**keys)) for _ in range(length - 1))]


def names(count: int) -> list[str]:
    return [f"term{k}" for k in range(count)]


def build(name: str, terms: int | list[str], **keys):
    """In float64, with the reference weights 0.5, 1.5, 2.5, ..."""
    terms = names(terms) if isinstance(terms, int) else terms
    reference = {f"term{k}": 0.5 + k for k in range(len(terms))}
    if name == "random":
        keys.setdefault("seed", 3)
    if name == "grap":  # `recipe=None` is GraP with its own defaults.
        keys.setdefault("recipe", "alg1")
    weighting = build_weighting({"name": name, **keys}, terms, reference).double()
    weighting.set_total_steps(50)
    return weighting


def finish(weighting, batch: Batch, number: int) -> None:
    """What a training loop does after a step, with an epoch of two steps."""
    extra = weighting.extra_loss(batch.losses)
    if extra is not None:
        (parameter,) = weighting.parameters()
        (gradient,) = torch.autograd.grad(extra, parameter)
        with torch.no_grad():
            parameter -= 0.01 * gradient
    if weighting.needs_losses_after:
        weighting.after_step(batch.after)
    if number % 2:
        weighting.end_epoch()


def walk(weighting, path: list[Batch], start: int = 0) -> list[Tensor]:
    """The effective weights of every step."""
    found = []
    for number, batch in enumerate(path[start:], start):
        found.append(weighting(batch.statistics()).detach().clone())
        finish(weighting, batch, number)
    return found


def state_of(weighting) -> dict[str, Tensor]:
    """Every tensor of the state, flat, for a comparison."""
    flat = {}

    def collect(key, value):
        if isinstance(value, dict):
            for name, each in value.items():
                collect(f"{key}.{name}", each)
        elif isinstance(value, Tensor):
            flat[key] = value.clone()
        elif isinstance(value, (int, float)):
            flat[key] = torch.tensor(value)

    collect("", weighting.state_dict())
    return flat


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def cancels(weights: Tensor, gramian: Tensor, share: float) -> bool:
    """Whether the composite's squared norm is less than ``share`` of what its parts add up to."""
    weights, gramian = weights.double() / weights.abs().max(), gramian.double()
    parts = weights.abs() @ gramian.abs() @ weights.abs()
    return bool(weights @ gramian @ weights <= share * parts)


# ---- every rule -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@drawn(20)
@given(path=paths(), scale=st.sampled_from([None, "reference", "unit"]))
def test_any_gradients_give_finite_weights_of_the_right_sign(name, path, scale):
    keys = {} if scale is None or name == "supervised" else {"scale": scale}
    path = path[:1] if name == "fairgrad" else path  # Its solver is slow where it finds nothing.
    for weights in walk(build(name, path[0].count, **keys), path):
        assert weights.shape == (path[0].count,)
        assert weights.isfinite().all()
        assert name in MAY_BE_NEGATIVE or weights.min() >= 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("imtl_g", [[-3, 0, 1], [0, 0, 3], [-3, 2, -3]]),
        ("aligned_mtl", [[1, 2, 2], [1, 1, 0], [0, 0, 3]]),
    ],
)
def test_the_rules_that_may_give_negative_weights_do(name, rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    weights = build(name, 3)(Statistics(torch.ones(3, dtype=torch.float64), rows @ rows.T))
    assert weights.min() < -0.01


@pytest.mark.parametrize("name", GRADIENT_RULES)
@drawn(30)
@given(
    batch=any_batches(dtype=torch.float32, lowest=-30, highest=0),
    scale=st.sampled_from(["none", "reference"]),
)
def test_gradients_whose_squares_underflow_give_finite_weights(name, batch, scale):
    weights = build(name, batch.count, scale=scale).float()(batch.statistics())
    assert weights.isfinite().all()
    assert name in MAY_BE_NEGATIVE or weights.min() >= 0


@pytest.mark.parametrize("name", ["dwa", "famo", "gradnorm", "grap"])
@drawn(30)
@given(
    path=paths(plain_batches, least=2),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    where=st.sampled_from(["losses", "after", "rows", "down"]),
    data=st.data(),
)
def test_a_step_that_is_not_finite_is_not_learned_from(name, path, value, where, data):
    """The rules that learn from statistics. Each has its own: the others may be anything."""
    looked_at = {
        "dwa": ["losses"],
        "famo": ["losses", "after"],
        "gradnorm": ["losses", "rows"],
        "grap": ["rows", "down"],
    }[name]
    assume(where in looked_at and path[0].count > 1)
    weighting = build(name, path[0].count)
    walk(weighting, path)
    before = state_of(weighting)
    spoiled = getattr(path[0], where).clone()
    spoiled.view(-1)[data.draw(st.integers(0, spoiled.numel() - 1))] = value
    batch = replace(path[0], **{where: spoiled})
    weighting(batch.statistics())
    if name == "famo":
        weighting.after_step(batch.after)
    found = state_of(weighting)
    for state in (before, found):  # What FAMO keeps from the forward for the comparison.
        state.pop("._extra_state.losses", None)
    assert same_state(before, found)
    assert all(each.isfinite().all() for each in walk(weighting, path))


STATES = [
    *({"name": name} for name in RULES),
    {"name": "grap", "ema": 0.9},
    {"name": "grap", "recipe": None},
    {"name": "grap", "recipe": "paper", "average_first": 3, "ema": 0.9},
    {"name": "grap", "optimizer": "sgd"},
    {"name": "gradnorm", "scale": "reference"},
]


@pytest.mark.parametrize("keys", STATES, ids=lambda keys: "-".join(map(str, keys.values())))
@drawn(12)
@given(
    path=paths(plain_batches, least=2, most=7),
    cut=st.integers(0, 6),
    middle=st.booleans(),
    through_file=st.booleans(),
)
def test_a_state_dict_continues_the_same_path(keys, path, cut, middle, through_file):
    """From between two steps, or from between the forward and what follows the update."""
    keys = dict(keys)
    name, count, cut = keys.pop("name"), path[0].count, min(cut, len(path) - 1)
    first = build(name, count, **keys)
    walk(first, path[:cut])
    if middle:
        first(path[cut].statistics())
    state = first.state_dict()
    second = build(name, count, **keys)
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    found = []
    for weighting in (first, second):  # One after the other: they must not share their state.
        if middle:
            finish(weighting, path[cut], cut)
        found.append(walk(weighting, path, cut + middle))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert same_state(state_of(first), state_of(second))


# ---- all losses times a constant ------------------------------------------------------------

# The constants are powers of 2, which change no digit: what is to be equal is equal to the last.
POWERS = st.integers(-20, 20).map(lambda power: 2.0**power)


@pytest.mark.parametrize(
    "name", sorted(set(RULES) - {"fairgrad", "famo", "gradnorm", "uncertainty"})
)
@drawn(20)
@given(path=paths(dtype=torch.float64), size=POWERS, scale=st.sampled_from(["", "reference"]))
def test_weights_do_not_depend_on_the_size_of_all_losses(name, path, size, scale):
    """Nor does then the direction of the composite. Each rule that is left out has its own test.

    A composite that vanishes has no direction, and dividing by its norm means nothing.
    """
    keys = {"scale": scale} if scale and name != "supervised" else {}
    ones = walk(build(name, path[0].count, **keys), path)
    others = walk(build(name, path[0].count, **keys), [each.times(size) for each in path])
    for one, other, batch in zip(ones, others, path):
        if (scale or name == "grap") and cancels(one, batch.gramian, 1e-12):
            continue
        assert torch.equal(one, other)


@drawn(20)
@given(path=paths(plain_batches), seed=SEEDS)
def test_graps_balanced_start_makes_up_for_the_size_of_each_loss(path, seed):
    """Each loss has a factor of its own; a term's gradient times its weight stays the same."""
    factors = (2 * randn(seed, path[0].count).double()).exp()
    one, other = (build("grap", path[0].count, recipe=None, scale="unit") for _ in range(2))
    for batch in path:
        scaled = replace(batch, rows=batch.rows * factors[:, None], losses=batch.losses * factors)
        weights, of_scaled = one(batch.statistics()), other(scaled.statistics())
        torch.testing.assert_close(of_scaled * factors, weights, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", sorted(set(GRADIENT_RULES) - {"fairgrad", "gradnorm"}))
@drawn(15)
@given(path=paths(dtype=torch.float64), size=POWERS)
def test_a_composite_of_unit_norm_stays_the_same_vector(name, path, size):
    ones = walk(build(name, path[0].count, scale="unit"), path)
    others = walk(build(name, path[0].count, scale="unit"), [b.times(size) for b in path])
    for one, other, batch in zip(ones, others, path):
        if not cancels(one, batch.gramian, 1e-12):
            assert torch.equal(one, size * other)


@drawn(20)
@given(batch=plain_batches(), size=POWERS, alpha=st.sampled_from([0.5, 1.0, 2.0]))
def test_fairgrads_direction_does_not_depend_on_the_size_of_all_losses(batch, size, alpha):
    """``C w = w^(-1/alpha)``: with ``c^2 C`` the solution is ``c^(-2 alpha / (alpha + 1)) w``."""
    one = build("fairgrad", batch.count, alpha=alpha)(batch.statistics())
    other = build("fairgrad", batch.count, alpha=alpha)(batch.times(size).statistics())
    torch.testing.assert_close(other, one * size ** (-2 * alpha / (alpha + 1)))
    keys = {"alpha": alpha, "scale": "reference"}
    one = build("fairgrad", batch.count, **keys)(batch.statistics())
    other = build("fairgrad", batch.count, **keys)(batch.times(size).statistics())
    torch.testing.assert_close(other, one)


@drawn(20)
@given(path=paths(plain_batches), power=st.integers(-6, 20))
def test_famos_weights_do_not_depend_on_the_size_of_all_losses(path, power):
    """Its logarithms do, and 1e-8 stands beside the losses, all in float32."""
    ones = walk(build("famo", path[0].count), path)
    others = walk(build("famo", path[0].count), [each.times(2.0**power) for each in path])
    for one, other in zip(ones, others):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "gradnorm"},
        {"name": "grap", "optimizer": "sgd", "normalization": "sum"},
        {"name": "grap", "optimizer": "sgd", "normalization": "none"},
    ],
    ids=lambda keys: "-".join(keys.values()),
)
@drawn(20)
@given(path=paths(dtype=torch.float64), size=POWERS)
def test_where_the_path_depends_on_the_size_the_learning_rate_makes_up_for_it(keys, path, size):
    """The gradient by the weights is a multiple of the terms' gradients, not of their ratios."""
    keys = dict(keys)
    name, count = keys.pop("name"), path[0].count
    one, other = build(name, count, lr=0.25, **keys), build(name, count, lr=0.25 / size, **keys)
    for batch in path:
        assert torch.equal(one.weights, other.weights)
        a, b = one(batch.statistics()), other(batch.times(size).statistics())
        assert torch.equal(a, b) or cancels(a, batch.gramian, 1e-12)
    assert torch.equal(one.weights, other.weights)


@drawn(20)
@given(batch=plain_batches(), size=st.floats(1e-3, 1e3), seed=SEEDS)
def test_uncertaintys_variances_move_with_the_size_of_all_losses(batch, size, seed):
    """Where ``s`` is stationary for the losses, ``s + log c`` is for ``c`` times them, and there
    the weights are ``1 / c`` times as large: the composite is the same vector."""
    one, other = build("uncertainty", batch.count), build("uncertainty", batch.count)
    with torch.no_grad():
        one.scalarizer.log_var.copy_(randn(seed, batch.count))
        other.scalarizer.log_var.copy_(one.scalarizer.log_var + torch.tensor(size).double().log())
    big = batch.times(size)
    torch.testing.assert_close(size * other(big.statistics()), one(batch.statistics()))
    gradients = [
        torch.autograd.grad(weighting.extra_loss(losses), weighting.scalarizer.log_var)[0]
        for weighting, losses in ((one, batch.losses), (other, big.losses))
    ]
    torch.testing.assert_close(*gradients)
    # The weights themselves look at no loss.
    assert torch.equal(one(batch.statistics()), one(big.statistics()))


# ---- the order of the terms -----------------------------------------------------------------

# PCGrad draws the order of its projections, Random its weights: see their own tests.
TOLERANCES = {"cagrad": 1e-3, "fairgrad": 1e-3, "famo": 1e-4}  # Of solvers, and of float32.


@pytest.mark.parametrize("name", sorted(set(RULES) - {"pcgrad", "random"}))
@drawn(20)
@given(data=st.data(), path=paths(plain_batches))
def test_other_order_same_weights(name, data, path):
    order = list(data.draw(st.permutations(range(path[0].count))))
    terms = names(path[0].count)
    tolerance = TOLERANCES.get(name, 1e-6)
    found = walk(build(name, terms), path)
    others = walk(build(name, [terms[k] for k in order]), [each.ordered(order) for each in path])
    for one, other, batch in zip(found, others, path):
        if name in ("mgda", "cagrad"):  # The composite is what is unique.
            one, other = one @ batch.rows, other @ batch.rows[order]
        else:
            one = one[order]
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * one.abs().max())


@drawn(20)
@given(data=st.data(), batch=st.one_of(plain_batches(count=2), plain_batches()))
def test_other_order_same_weights_in_pcgrad_where_its_draw_does_not_matter(data, batch):
    """With two terms there is one order of the others; without a conflict nothing is projected."""
    if batch.count > 2:
        batch = replace(batch, rows=batch.rows.abs())
    order = list(data.draw(st.permutations(range(batch.count))))
    one = build("pcgrad", batch.count)(batch.statistics())
    other = build("pcgrad", batch.count)(batch.ordered(order).statistics())
    torch.testing.assert_close(other, one[order])


# Not IMTL-G, whose pseudo-inverse of a singular Gramian hangs on a threshold, not those whose
# weights are not unique then (mgda, cagrad), and not those that draw (pcgrad, random).
SYMMETRIC = ["aligned_mtl", "dualproj", "dwa", "equal", "fairgrad", "famo", "gradnorm", "grap"]
SYMMETRIC += ["uncertainty", "upgrad"]


@pytest.mark.parametrize("name", SYMMETRIC)
@drawn(20)
@given(path=paths(plain_batches, least=2, most=6))
def test_two_identical_terms_get_equal_weights(name, path):
    assume(path[0].count > 1)
    tolerance = TOLERANCES.get(name, 1e-6)
    for weights in walk(build(name, path[0].count), [each.with_twins() for each in path]):
        torch.testing.assert_close(weights[0], weights[1], rtol=tolerance, atol=0)


# ---- GraP -----------------------------------------------------------------------------------

GRAPS = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(WEIGHT_OPTIMIZERS),
        "normalization": st.sampled_from(NORMALIZATIONS),
        "ema": st.sampled_from([0.0, 0.5, 0.99]),
        "average_first": st.sampled_from([0, 3]),
        "lr": st.sampled_from([0.01, 0.1, 1.0]),
    }
)


@drawn(60)
@given(keys=GRAPS, path=paths(most=6), powers=st.lists(st.integers(-20, 20), min_size=6))
def test_graps_path_does_not_depend_on_the_size_of_the_downstream_gradient(keys, path, powers):
    """Another size at each step, and not a digit changes."""
    one, other = build("grap", path[0].count, **keys), build("grap", path[0].count, **keys)
    for batch, power in zip(path, powers):
        stretched = replace(batch, down=2.0**power * batch.down)
        assert torch.equal(one(batch.statistics()), other(stretched.statistics()))
        assert same_state(state_of(one), state_of(other))


def spoiled(batch: Batch, cause: str, where: str) -> Statistics:
    """The batch's statistics as they are when the step is to be left out for that cause."""
    good = batch.statistics()
    zero = torch.zeros_like(good.products)
    return {
        "unlabelled": replace(good, products=zero, downstream_norm=0 * good.downstream_norm),
        "not finite": replace(good, **{where: torch.full_like(getattr(good, where), torch.inf)}),
        "no composite gradient": replace(good, gramian=0 * good.gramian, products=zero),
    }[cause]


@drawn(60)
@given(data=st.data(), keys=GRAPS, recipe=st.sampled_from([None, "alg1"]), path=paths(most=8))
def test_grap_over_any_path(data, keys, recipe, path):
    """Never negative, all zero or not finite; the composite has the reference norm; and a step
    that is left out changes nothing and says why."""
    own = {"parametrization": "exp"} if recipe is None else {}  # As `lr` asks for.
    weighting = build("grap", path[0].count, **own | keys, recipe=recipe)
    reference = weighting.reference.clone()
    causes = ["", "", "", "held", "unlabelled", "not finite", "no composite gradient"]
    for batch in path:
        cause = data.draw(st.sampled_from(causes))
        weighting.train(cause != "held")
        where = data.draw(st.sampled_from(["gramian", "products", "downstream_norm"]))
        statistics = batch.statistics() if cause in ("", "held") else spoiled(batch, cause, where)
        before = state_of(weighting)
        effective = weighting(statistics)
        found = CAUSES[weighting.cause]
        assert found == cause or cause in ("", "no composite gradient")
        if cause == "no composite gradient":
            assert found  # A smooth gradient of 0 / 0 is not finite, and that is said first.
        if found:
            assert same_state(before, state_of(weighting))
        else:
            assert weighting.updates == before[".updates"] + 1
        state = state_of(weighting)
        assert all(each.isfinite().all() for each in state.values())
        learned = weighting._to_weights(weighting.weights)
        assert learned.min() >= 0 and learned.any()
        if cause == "not finite":
            continue
        assert effective.isfinite().all() and effective.min() >= 0
        gramian, digits = batch.gramian, torch.finfo(batch.rows.dtype).eps
        vanishing = [cancels(each, gramian, 1e4 * digits) for each in (effective, reference)]
        if cause != "no composite gradient" and not any(vanishing):
            norm, wanted = (
                each @ gramian.double() @ each for each in (effective.double(), reference)
            )
            assert norm.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-30)


@drawn(60)
@given(batch=plain_batches(least=2), seed=SEEDS, normalization=st.sampled_from(NORMALIZATIONS))
def test_a_small_step_of_grap_raises_its_objective(batch, seed, normalization):
    start = randn(seed, batch.count).abs() + 0.1
    statistics = batch.statistics()
    given = statistics.gramian, statistics.products / statistics.downstream_norm, normalization
    weighting = GraP(
        names(batch.count), lr=1e-4, optimizer="sgd", normalization=normalization, recipe="alg1"
    ).double()
    weighting.weights.copy_(start)
    weighting(statistics)
    moved = weighting.weights
    assume(not torch.equal(moved, start) and moved.min() > 0)
    slope = (objective(moved, *given) - objective(start, *given)) / (moved - start).square().sum()
    # Along a gradient step the objective rises by |step|^2 / lr, to first order.
    assert slope.item() == pytest.approx(1e4, rel=0.05)


# ---- what each source promises --------------------------------------------------------------


@drawn(100)
@given(batch=any_batches(dtype=torch.float64))
def test_mgdas_composite_is_no_longer_than_any_gradient(batch):
    """It is a convex combination, known to 1e-8 of the longest gradient."""
    weights = build("mgda", batch.count)(batch.statistics())
    norms = batch.rows.norm(dim=1)
    assert weights.min() >= 0 and weights.sum().item() == pytest.approx(1)
    assert (weights @ batch.rows).norm() <= norms.min() + 1e-7 * norms.max()


def test_mgda_has_time_enough_where_a_term_has_no_gradient():
    """A case that needs more iterations than scipy allows when it is not told."""
    rows = torch.tensor(
        [[3, -1], [0, -10_000], [-0.02, -0.01], [-20_000, -30_000], [0, 0]], dtype=torch.float64
    )
    weights = build("mgda", 5)(Statistics(torch.ones(5, dtype=torch.float64), rows @ rows.T))
    assert (weights @ rows).norm() < 1e-7 * rows.norm()


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
@drawn(60)
@given(batch=any_batches(dtype=torch.float64))
def test_the_dual_cone_rules_conflict_with_no_gradient(name, batch):
    """The source's solver adds 1e-4 of the trace to the diagonal: with that, no product of the
    composite and a gradient is negative, and no weight less than in the mean."""
    assume(batch.gramian.trace() > 0)
    gramian = batch.gramian / batch.gramian.trace()
    weights = build(name, batch.count)(batch.statistics())
    products = gramian @ weights + 1e-4 * weights
    assert products.min() >= -1e-9 * weights.max()
    assert weights.min() >= 1 / batch.count - 1e-9
    if (
        name == "dualproj"
    ):  # A gradient that was added is one that the projection is at the edge of.
        assert ((weights - 1 / batch.count) * products).abs().max() <= 1e-8 * weights.max() ** 2


@drawn(60)
@given(batch=any_batches(dtype=torch.float64))
def test_pcgrad_adds_to_weights_of_1_and_only_for_a_conflict(batch):
    weights = build("pcgrad", batch.count)(batch.statistics())
    assume(batch.gramian.trace() > 0)
    assert weights.min() >= 1
    conflicts = (batch.gramian < 0).any(dim=1)
    assert (weights[~conflicts] == 1).all()
    if batch.count == 2:
        composite = weights @ batch.rows
        norms = batch.rows.norm(dim=1)
        assert (batch.rows @ composite >= -1e-9 * norms * norms.max()).all()


@drawn(20)
@given(batch=plain_batches(count=4), seed=SEEDS)
def test_pcgrads_draws_depend_on_the_step_and_nothing_else(batch, seed):
    """Four gradients that all conflict: what is left of each hangs on the order of the others."""
    noise = batch.rows[:, :4] / batch.rows.abs().max()
    batch = replace(batch, rows=torch.eye(4) - 0.25 + 0.05 * noise, down=batch.down[:4])
    assert (batch.gramian - torch.eye(4) < 0).all()
    torch.manual_seed(seed)
    expected = torch.rand(2)
    torch.manual_seed(seed)
    ones, others = (walk(build("pcgrad", 4), [batch] * 10) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(one, other) for one, other in zip(ones, others))
    assert len({tuple(each.tolist()) for each in ones}) > 1


@drawn(30)
@given(batch=plain_batches())
def test_imtl_gs_composite_has_equal_projections_and_weights_that_add_up_to_1(batch):
    weights = build("imtl_g", batch.count)(batch.statistics())
    projections = (batch.rows @ (weights @ batch.rows)) / batch.rows.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand_as(projections))
    assert weights.sum().item() == pytest.approx(1)


@drawn(30)
@given(batch=plain_batches())
def test_aligned_mtls_composite_has_the_least_singular_values_size(batch):
    weights = build("aligned_mtl", batch.count)(batch.statistics())
    least = torch.linalg.svdvals(batch.rows).min()
    torch.testing.assert_close((weights @ batch.rows).norm(), least / batch.count**0.5)


@drawn(30)
@given(batch=plain_batches(), alpha=st.sampled_from([0.5, 1.0, 2.0]))
def test_fairgrads_weights_solve_its_equation(batch, alpha):
    weights = build("fairgrad", batch.count, alpha=alpha)(batch.statistics())
    torch.testing.assert_close(batch.gramian @ weights, weights ** (-1 / alpha), rtol=0.01, atol=0)


@drawn(30)
@given(batch=plain_batches(), c=st.sampled_from([0.1, 0.5, 0.9]))
def test_cagrads_composite_lies_in_its_ball_and_helps_the_worst_term(batch, c):
    weights = build("cagrad", batch.count, c=c)(batch.statistics())
    assert weights.min() >= 1 / batch.count - 1e-6
    mean = batch.rows.mean(dim=0)
    composite = weights @ batch.rows
    assert (composite - mean).norm() <= (c + 1e-4) * mean.norm()
    size = batch.rows.norm() * mean.norm()
    assert (batch.rows @ composite).min() >= (batch.rows @ mean).min() - 1e-4 * size


@drawn(60)
@given(path=paths(dtype=torch.float64, most=6), lr=st.sampled_from([1e-3, 0.025, 1.0]))
def test_gradnorms_weights_add_up_to_k(path, lr):
    for weights in walk(build("gradnorm", path[0].count, lr=lr), path):
        assert weights.min() >= 0
        assert weights.sum().item() == pytest.approx(len(weights))


@drawn(30)
@given(batch=plain_batches(least=2), seed=SEEDS)
def test_a_step_of_gradnorm_brings_the_weighted_norms_together(batch, seed):
    """With equal training rates: none that is above the mean gains on one that is below."""
    weighting = build("gradnorm", batch.count, lr=1e-3)
    start = randn(seed, batch.count).abs() + 0.5
    weighting.weights.copy_(start)
    weighting(batch.statistics())
    weighted = start * batch.rows.norm(dim=1)
    change = weighting.weights / start
    above = weighted > weighted.mean()
    assert change[above].max() < change[~above].min()


@drawn(30)
@given(path=paths(plain_batches, least=2, most=2))
def test_dwa_gives_the_most_to_the_term_that_falls_the_least(path):
    weighting = build("dwa", path[0].count)
    for batch in path:
        assert weighting(batch.statistics()).eq(1).all()
        weighting.end_epoch()
    assume(len(path) == 2)
    weights = weighting(path[0].statistics())
    assert weights.sum().item() == pytest.approx(path[0].count)
    rates = path[1].losses / path[0].losses
    assert torch.equal(weights.argsort(), rates.argsort())


@drawn(30)
@given(batch=plain_batches(least=2))
def test_famos_weights_are_convex_and_prefer_what_has_fallen_the_least(batch):
    weighting = build("famo", batch.count)
    first = weighting(batch.statistics())
    # At the start every weighted loss is the same: the logarithms are to fall at one rate.
    torch.testing.assert_close(first * batch.losses, (first * batch.losses)[0].expand_as(first))
    weighting.after_step(batch.after)
    second = weighting(batch.statistics())
    for weights in (first, second):
        assert weights.min() >= 0 and weights.sum().item() == pytest.approx(1, rel=1e-5)
    falls = batch.losses.log() - batch.after.log()
    shares = (second * batch.losses)[falls.argsort()]
    assert (shares.diff() <= 1e-6 * shares.max()).all() and shares[0] > shares[-1]


@drawn(30)
@given(path=paths(least=2, most=4), seed=st.integers(0, 2**20))
def test_randoms_draws_depend_on_the_seed_and_the_step_and_nothing_else(path, seed):
    torch.manual_seed(seed)
    expected = torch.rand(2)
    torch.manual_seed(seed)
    ones = walk(build("random", path[0].count, seed=seed), path)
    others = walk(build("random", path[0].count, seed=seed), [b.times(7.0) for b in path[::-1]])
    assert torch.equal(torch.rand(2), expected)
    for one, other in zip(ones, others):
        assert torch.equal(one, other)
        assert one.min() > 0 and one.sum().item() == pytest.approx(1, rel=1e-5)


@drawn(20)
@given(path=paths())
def test_constant_rules_look_at_nothing(path):
    count = path[0].count
    reference = [0.5 + k for k in range(count)]
    wanted = {"equal": [1.0] * count, "supervised": [0.0] * count}
    for name in ("equal", "fixed", "auxiliary", "supervised"):
        for weights in walk(build(name, count), path):
            assert weights.tolist() == wanted.get(name, reference)
