"""GraP's keys from its authors' optimiser, each against its definition; recipes; learning rates."""

import math

import pytest
import torch

from grap_solo import ConfigError, GraP, Statistics
from grap_solo.weighting.gramian import combine_aligned
from grap_solo.weighting.grap import objective, pull_gradient
from grap_solo.weighting.grap_keys import GRAP_KEYS, RECIPES

TERMS = ["a", "b", "c"]
REFERENCE = {"a": 0.5, "b": 2.0, "c": 1.0}


def statistics(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 20, dtype=torch.float64, generator=generator)
    rows = rows * torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]
    down = torch.randn(20, dtype=torch.float64, generator=generator)
    return Statistics(rows.norm(dim=1), rows @ rows.T, rows @ down, down.norm())


def grap(recipe="alg1", **keys):
    """The paper's Alg. 1 in the keys that a test does not give."""
    return GraP(TERMS, REFERENCE, recipe=recipe, **keys).double()


def is_given(gramian, products):
    """The statistics of a batch with this Gramian, these products and a ``g_down`` of norm 1."""
    one = torch.ones((), dtype=torch.float64)
    return Statistics(torch.ones(3, dtype=torch.float64), gramian, products, one)


def without_the_second():
    """Statistics of a step in which the second term has no gradient."""
    keep = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    stats = statistics(0)
    gramian, products = stats.gramian * torch.outer(keep, keep), stats.products * keep
    return Statistics(stats.losses, gramian, products, stats.downstream_norm)


# ---- parametrization ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_abs_is_torchs_optimiser_on_the_absolute_values(optimizer):
    """A learned number of 0 has the gradient of the weight itself, so it can leave 0."""
    weighting = grap(parametrization="abs", optimizer=optimizer, lr=0.3)
    start = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    weighting.weights.copy_(start)
    learned = start.clone().requires_grad_()
    make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    reference = make([learned], lr=0.3, maximize=True)
    signs = set()
    for step in range(30):
        stats = statistics(step)
        weights = torch.where(learned >= 0, learned, -learned)
        effective = weighting(stats)
        assert effective.min() >= 0
        torch.testing.assert_close(effective / effective.sum(), weights.detach() / weights.sum())
        reference.zero_grad()
        products = stats.products / stats.downstream_norm
        objective(weights, stats.gramian, products, "gradient").backward()
        reference.step()
        torch.testing.assert_close(weighting.weights, learned.detach())
        signs.add(tuple(learned.sign().tolist()))
    assert len(signs) > 1  # The numbers have crossed 0.
    assert weighting.eval()(stats).min() >= 0


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_exp_is_torchs_optimiser_on_the_logarithms(optimizer):
    weighting = grap(parametrization="exp", optimizer=optimizer, lr=0.3)
    learned = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    reference = make([learned], lr=0.3, maximize=True)
    for step in range(30):
        stats = statistics(step)
        weights = learned.exp()
        effective = weighting(stats)
        torch.testing.assert_close(effective / effective.sum(), weights.detach() / weights.sum())
        reference.zero_grad()
        products = stats.products / stats.downstream_norm
        objective(weights, stats.gramian, products, "gradient").backward()
        reference.step()
        torch.testing.assert_close(weighting.weights, learned.detach())


def test_exp_keeps_the_weights_ratios_within_what_a_float_holds():
    weighting = grap(parametrization="exp", optimizer="adam", lr=9.0)
    stats = statistics(0)
    for _ in range(200):
        effective = weighting(stats)
        assert effective.isfinite().all() and weighting.weights.abs().max() <= 20
        assert weighting.cause == 0
    assert weighting.weights.max() - weighting.weights.min() > 20
    for numbers, kept in (([70, 60, 0], [20, 10, -20]), ([-30, 1, 2], [-20, 1, 2])):
        moved = weighting._keep_in_range(torch.tensor(numbers, dtype=torch.float64))
        assert moved.tolist() == kept


# ---- where the weights start ----------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["clip", "abs", "exp"])
def test_a_balanced_start_does_not_depend_on_the_losses_units(parametrization):
    """Multiplying a loss by a constant divides its weights by it, and changes nothing else."""
    keys = {"parametrization": parametrization, "start": "balanced", "scale": "unit"}
    one, other = grap(**keys), grap(**keys)
    factors = torch.tensor([100.0, 1.0, 1e-3], dtype=torch.float64)
    for step in range(60):
        stats = statistics(step)
        scaled = Statistics(
            stats.losses * factors,
            stats.gramian * torch.outer(factors, factors),
            stats.products * factors,
            stats.downstream_norm,
        )
        weights, of_scaled = one(stats), other(scaled)
        torch.testing.assert_close(of_scaled * factors, weights)
        assert one.cause == other.cause == 0
    assert one.weights.std() > 0.1


def test_a_balanced_start_gives_the_gradients_the_same_norm_on_the_average_of_20_steps():
    weighting = grap(start="balanced", lr=1e-12, heads="weighted")
    norms = []
    for step in range(30):
        stats = statistics(step)
        norms.append(stats.gramian.diagonal().sqrt())
        sizes = weighting(stats) * torch.stack(norms[:20]).mean(0)
        torch.testing.assert_close(sizes, sizes.mean().expand(3))
    resumed = grap(start="balanced", lr=1e-12, heads="weighted")
    resumed.load_state_dict(weighting.state_dict())
    assert torch.equal(resumed(statistics(40)), weighting(statistics(40)))
    before = weighting.start_norms.clone()
    assert weighting.eval()(statistics(41)).isfinite().all()
    assert torch.equal(weighting.start_norms, before)


def test_a_balanced_start_is_equal_until_a_step_was_learned_from():
    held = grap(start="balanced").eval()
    assert torch.equal(held(statistics(0)), grap().eval()(statistics(0)))
    weighting, broken = grap(start="balanced"), statistics(0)
    broken.gramian[0, 0] = math.inf
    evidence = grap(start="balanced")
    assert evidence(statistics(1), broken).isfinite().all()  # Of another, a held-out batch.
    weighting(broken)
    assert torch.equal(weighting.start_norms, torch.ones(3).double()) and weighting.updates == 0


def test_a_balanced_start_survives_a_term_without_a_gradient():
    gone = without_the_second()
    weighting = grap(start="balanced")
    for _ in range(3):
        effective = weighting(gone)
        assert effective.isfinite().all() and weighting.cause == 0
    weights = weighting._start(gone).weights
    assert weights[1] == 1 and weights.log().sum().item() == pytest.approx(0)


# ---- averages -------------------------------------------------------------------------------


def test_norms_are_averaged_and_stand_in_for_the_steps_own():
    weighting, plain = grap(norm_ema=0.9, optimizer="sgd"), grap(optimizer="sgd", scale="none")
    norms, reference = None, torch.tensor(list(REFERENCE.values()), dtype=torch.float64)
    for step in range(5):
        stats = statistics(step)
        own = stats.gramian.diagonal().sqrt()
        norms = own if norms is None else 0.9 * norms + 0.1 * own
        ratio = norms / own
        seen = is_given(
            stats.gramian * torch.outer(ratio, ratio),
            stats.products * ratio / stats.downstream_norm,
        )
        effective, weights = weighting(stats), plain(seen)
        wanted = [(each @ seen.gramian @ each).sqrt() for each in (weights, reference)]
        torch.testing.assert_close(effective, weights * wanted[1] / wanted[0])
        torch.testing.assert_close(weighting.weights, plain.weights)
        torch.testing.assert_close(weighting.norms, norms)
    before = weighting.norms.clone()
    held = weighting.eval()(statistics(9))
    assert torch.equal(weighting.norms, before) and held.isfinite().all()


def test_norms_of_one_step_alone_are_plain_grap():
    weighting, plain = grap(norm_ema=0.0), grap()
    for step in range(5):
        torch.testing.assert_close(weighting(statistics(step)), plain(statistics(step)))


def test_a_term_without_a_gradient_has_cosines_of_0():
    gone = without_the_second()
    weighting, plain = grap(norm_ema=0.0, optimizer="sgd"), grap(optimizer="sgd")
    torch.testing.assert_close(weighting(gone), plain(gone))
    torch.testing.assert_close(weighting.weights, plain.weights)


@pytest.mark.parametrize("norm_ema", [None, 0.8])
@pytest.mark.parametrize("first", [1, 3])
def test_the_first_steps_have_a_plain_mean_that_the_moving_average_starts_from(first, norm_ema):
    """Of the cosines, if the norms are averaged apart."""
    weighting = grap(average_first=first, ema=0.9, norm_ema=norm_ema, optimizer="sgd", lr=0.05)
    plain = grap(optimizer="sgd", lr=0.05, scale="none")
    gramians, products, norms, mean = [], [], None, None
    for step in range(6):
        stats = statistics(step)
        own = torch.ones(3, dtype=torch.float64)
        if norm_ema is not None:
            own = stats.gramian.diagonal().sqrt()
            norms = own if norms is None else norm_ema * norms + (1 - norm_ema) * own
        gramians.append(stats.gramian / torch.outer(own, own))
        products.append(stats.products / stats.downstream_norm / own)
        if step < first:
            mean = [torch.stack(each).mean(0) for each in (gramians, products)]
        else:
            mean = [0.9 * m + 0.1 * each[-1] for m, each in zip(mean, (gramians, products))]
        sizes = own if norms is None else norms
        weighting(stats)
        plain(is_given(mean[0] * torch.outer(sizes, sizes), mean[1] * sizes))
        torch.testing.assert_close(weighting.weights, plain.weights)


def test_held_out_labels_leave_the_norm_of_the_composite_to_the_batch_that_trains():
    weighting, batch, evidence = grap(norm_ema=0.9), statistics(0), statistics(1)
    reference = torch.tensor(list(REFERENCE.values()), dtype=torch.float64)
    for _ in range(3):
        effective = weighting(batch, evidence)
        norms = [each @ batch.gramian @ each for each in (effective, reference)]
        torch.testing.assert_close(*norms)
    torch.testing.assert_close(weighting.norms, evidence.gramian.diagonal().sqrt())


# ---- regularization -------------------------------------------------------------------------


def test_the_pull_is_the_gradient_of_its_definition():
    gramian = statistics(0).gramian
    weights = torch.tensor([0.3, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    size = torch.linalg.norm(weights * gramian.diagonal().sqrt())
    (expected,) = torch.autograd.grad((size - 1) ** 2, weights)
    torch.testing.assert_close(pull_gradient(weights.detach(), gramian), expected)
    assert pull_gradient(torch.zeros_like(expected), gramian).isfinite().all()


@pytest.mark.parametrize("parametrization", ["clip", "abs"])
def test_regularization_brings_the_weighted_norms_to_1(parametrization):
    stats, sizes = statistics(0), {}
    norms = stats.gramian.diagonal().sqrt() / 2
    stats = is_given(stats.gramian / torch.outer(norms, norms), stats.products / norms)
    for strength in (0.0, 1.0):
        weighting = grap(
            regularization=strength, parametrization=parametrization, optimizer="sgd", lr=1e-2
        )
        for _ in range(1000):
            weighting(stats)
        sizes[strength] = 2 * weighting.weights.norm().item()  # Each gradient has norm 2.
    assert sizes[1.0] == pytest.approx(1, abs=0.05) and sizes[0.0] > 3


# ---- the shared head ------------------------------------------------------------------------


def test_aligned_mtl_of_two_gradients():
    """Orthogonal gradients of sizes 1 and 4 both get size 1; in general every singular value of
    the matrix of gradients gets the least one's size, and its rows are added up."""
    weights = combine_aligned(torch.diag(torch.tensor([1.0, 16.0])))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.25]))
    rows = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 1.0]], dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    expected = (sizes.min() * left @ right).sum(0)
    torch.testing.assert_close(combine_aligned(rows @ rows.T) @ rows, expected)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_aligned_mtl_without_a_usable_gramian_is_the_sum(value):
    assert torch.equal(combine_aligned(torch.full((2, 2), value)), torch.ones(2))


# ---- recipes and learning rates -------------------------------------------------------------


def test_a_recipe_is_the_keys_that_it_sets_and_a_given_key_wins():
    for name, recipe in RECIPES.items():
        assert set(recipe) <= set(GRAP_KEYS)
        written_out, by_name = grap(**recipe), grap(recipe=name)
        for step in range(15):
            assert torch.equal(written_out(statistics(step)), by_name(statistics(step)))
    changed = GraP(TERMS, recipe="paper", heads="unweighted", norm_ema=0.5)
    assert changed.heads == "unweighted" and changed.norm_ema == 0.5
    assert changed.parametrization == "abs"
    assert GraP(TERMS, recipe="paper", heads=None).heads == "reference"  # null is left out
    per_run = GraP(TERMS, recipe="paper", lr_per_run=2.0)  # Instead of all about the recipe's.
    assert per_run.lr is None and not per_run.follows_schedule


def test_a_schedules_factor_multiplies_the_learning_rate():
    weighting, plain = grap(recipe="paper"), grap(recipe="paper")
    assert weighting.follows_schedule and weighting.lr_factor == 1
    for step in range(5):
        weighting.lr_factor = 0.5**step
        plain.lr = 0.1 * 0.5**step
        assert torch.equal(weighting(statistics(step)), plain(statistics(step)))


@pytest.mark.parametrize("recipe", [None, "paper"])
def test_a_learning_rate_per_run_is_divided_by_the_runs_steps(recipe):
    weighting = grap(lr_per_run=1.5, recipe=recipe)
    own = {"parametrization": "exp"} if recipe is None else {}
    plain = grap(lr=1.5 / 40, recipe=recipe, **own)
    with pytest.raises(ConfigError, match="weighting.lr_per_run: the number of steps .* not known"):
        weighting(statistics(0))
    weighting.eval()(statistics(0))  # Held weights need no learning rate.
    weighting.train().set_total_steps(40)
    plain.set_total_steps(7)  # Means nothing to a learning rate per step.
    for step in range(40):
        if step == 20:  # Resumed: the number of steps is not part of the state.
            state = weighting.state_dict()
            weighting = grap(lr_per_run=1.5, recipe=recipe)
            weighting.load_state_dict(state)
            weighting.set_total_steps(40)
        assert torch.equal(weighting(statistics(step)), plain(statistics(step)))
    for steps in (0, math.inf):
        with pytest.raises(
            ConfigError, match="weighting.lr_per_run: needs a run of a known length"
        ):
            weighting.set_total_steps(steps)
