"""GraP where the network computes in half precision, through ``balance`` alone."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grap_solo import GraP, balance

TERMS = ["useful", "harmful", "noise", "planted"]
STEPS = 20


class Problem(nn.Module):
    """A small network for four classes, and a labelled batch of 64 for each step.

    Args:
        heads: what the embedding, the heads and the probe compute in. The backbone and the losses
            stay in float32, or in float64 with the heads.
        planted: what the last term's loss is multiplied by.
        down: what the downstream loss is multiplied by.
    """

    def __init__(self, seed=0, heads=torch.float32, planted=1e-3, down=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.sizes, self.down, self.dtype = dict.fromkeys(TERMS, 1.0), down, heads
        self.sizes["planted"] = planted
        self.wide = torch.promote_types(heads, torch.float32)
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).to(self.wide)
        self.heads = nn.ModuleDict({term: nn.Linear(8, 4) for term in TERMS}).to(heads)
        self.probe = nn.Linear(8, 4).to(heads)
        self.noise = torch.randn(64, 4)
        self.labels = torch.randint(0, 4, (STEPS, 64))
        self.x = torch.randn(4, 12)[self.labels] + 0.5 * torch.randn(STEPS, 64, 12)

    def embed(self, number=0):
        return self.backbone(self.x[number].to(self.wide)).to(self.dtype)

    def terms(self, z, number=0):
        classes = F.one_hot(self.labels[number], 4).to(self.wide)
        targets = {
            "useful": 2 * classes,
            "harmful": torch.full_like(classes, 0.5),
            "noise": 2 * self.noise.to(self.wide),
            "planted": classes,
        }
        return {
            term: self.sizes[term] * F.mse_loss(self.heads[term](z).to(self.wide), targets[term])
            for term in TERMS
        }

    def downstream(self, z, number=0):
        return self.down * F.cross_entropy(self.probe(z).to(self.wide), self.labels[number])

    def step(self, weighting, number=0):
        return balance(
            self.embed(number),
            lambda z: self.terms(z, number),
            lambda z: self.downstream(z, number),
            weighting,
        )


def learned(problem, autocast=None, **keys):
    """The weights of ``GraP`` after each of a training's steps, (STEPS, K)."""
    weighting, path = GraP(TERMS, **keys, recipe="alg1"), []
    optimizer = torch.optim.SGD(problem.backbone.parameters(), lr=0.05)
    for number in range(STEPS):
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            step = problem.step(weighting, number)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        path.append(weighting.weights.clone())
    return torch.stack(path)


def exact(problem):
    """The terms' gradients, (K, d), and the downstream one, by a copy in float64."""
    other = Problem(heads=torch.float64, planted=problem.sizes["planted"], down=problem.down)
    other.load_state_dict(problem.state_dict())
    # What the heads are given is the same number for number.
    z = problem.embed().detach().double().requires_grad_()
    losses = [*other.terms(z).values(), other.downstream(z)]
    rows = torch.stack([torch.autograd.grad(each, z)[0].flatten() for each in losses])
    return rows[:-1], rows[-1]


# The spacing of bfloat16 is 2^-7 of a number and a rounding errs by half of that at most. Were each
# step of a weight, which Adam keeps near ``lr``, wrong by as much and always to the same side, it
# would be 20 * 0.1 * 2^-8 = 0.008 after 20 steps. The largest that was seen in 8 seeds is 0.0034.
TOLERANCE = 0.01


@pytest.mark.parametrize("keys", [{}, {"optimizer": "sgd", "lr": 1.0}, {"ema": 0.9}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_weights_under_bfloat16_autocast_follow_those_of_float32(seed, keys):
    wide = learned(Problem(seed), **keys)
    narrow = learned(Problem(seed), autocast=torch.bfloat16, **keys)
    assert not torch.equal(wide, narrow)  # It did compute in another precision.
    assert (wide[-1] - 1).abs().max() > 5 * TOLERANCE  # And there was something to follow.
    torch.testing.assert_close(narrow, wide, rtol=0, atol=TOLERANCE)


CASES = [
    pytest.param(torch.float32, torch.bfloat16, id="autocast-bfloat16"),
    pytest.param(torch.float32, torch.float16, id="autocast-float16"),
    pytest.param(torch.bfloat16, None, id="bfloat16"),
    pytest.param(torch.float16, None, id="float16"),
    pytest.param(torch.float32, None, id="float32"),
]


@pytest.mark.parametrize(("heads", "autocast"), CASES)
def test_statistics_and_the_algebra_of_the_weights_are_in_float32(heads, autocast):
    """To float32's own rounding they are what float64 makes of the same gradients."""
    problem = Problem(heads=heads, planted=1.0)
    weighting, exactly = GraP(TERMS, recipe="alg1"), GraP(TERMS, recipe="alg1").double()
    for number in range(5):
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            step = problem.step(weighting, number)
        statistics = step.statistics
        rows = torch.stack([view.flatten() for (view,) in step.gradients])
        everything = (rows, statistics.gramian, statistics.products, statistics.downstream_norm)
        assert {each.dtype for each in everything} == {torch.float32}
        assert step.weights.dtype == step.loss.dtype == weighting.weights.dtype == torch.float32

        rows = rows.double()
        torch.testing.assert_close(statistics.gramian.double(), rows @ rows.T, rtol=1e-5, atol=1e-9)
        wide = type(statistics)(
            statistics.losses.double(),
            statistics.gramian.double(),
            statistics.products.double(),
            statistics.downstream_norm.double(),
        )
        torch.testing.assert_close(step.weights.double(), exactly(wide), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weighting.weights.double(), exactly.weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("heads", "autocast"), CASES)
def test_statistics_are_those_of_exact_gradients_to_the_networks_precision(heads, autocast):
    problem = Problem(heads=heads, planted=1.0)
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        statistics = problem.step(GraP(TERMS, recipe="alg1")).statistics
    rows, down = exact(problem)
    # A few roundings one after another: of the embedding, the output, and the way back.
    error = {torch.bfloat16: 2**-5, torch.float16: 2**-8}.get(autocast or heads, 1e-5)
    norms = rows.norm(dim=1)
    for found, right, size in (
        (statistics.gramian, rows @ rows.T, norms[:, None] * norms),
        (statistics.products, rows @ down, norms * down.norm()),
        (statistics.downstream_norm, down.norm(), down.norm()),
    ):
        assert ((found - right) / size).abs().max() < error


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_float64_stays_float64(autocast):
    problem = Problem(heads=torch.float64)
    weighting = GraP(TERMS, recipe="alg1").double()
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        step = problem.step(weighting)
        rows, down = exact(problem)
    statistics = step.statistics
    found = (statistics.gramian, statistics.products, statistics.downstream_norm)
    for each in (*found, *(view for (view,) in step.gradients), step.weights, step.loss):
        assert each.dtype == torch.float64
    for each, right in zip(found, (rows @ rows.T, rows @ down, down.norm())):
        torch.testing.assert_close(each, right, rtol=1e-12, atol=1e-18)
    step.loss.backward()
    (first, *_) = problem.backbone.parameters()
    expected = torch.autograd.grad(
        sum(w * each for w, each in zip(step.weights, problem.terms(problem.embed()).values())),
        first,
    )[0]
    torch.testing.assert_close(first.grad, expected, rtol=1e-12, atol=1e-18)


# ---- the range of float16 -------------------------------------------------------------------

# float16 has nothing between 0 and 6e-8, and nothing above 65504.
TINY, LARGE = 2e-6, 1e4


def test_the_planted_gradients_are_what_they_are_meant_to_be():
    rows, _ = exact(Problem(heads=torch.float16, planted=TINY))
    assert rows[-1].any() and not rows[-1].half().any()
    assert rows[:-1].half().bool().float().mean() > 0.99
    _, down = exact(Problem(heads=torch.float16, down=TINY))
    assert down.any() and not down.half().any()
    rows, _ = exact(Problem(heads=torch.float16, planted=LARGE))
    assert 10 < rows[-1].abs().max() < 1000


@pytest.mark.parametrize("which", ["planted", "down"])
def test_a_gradient_too_small_for_float16_is_right_in_the_statistics(which):
    problem = Problem(heads=torch.float16, **{which: TINY})
    statistics = problem.step(GraP(TERMS, recipe="alg1")).statistics
    rows, down = exact(problem)
    norms = rows.norm(dim=1)
    assert statistics.downstream_norm.item() == pytest.approx(down.norm().item(), rel=0.02)
    for found, right, size in (
        (statistics.gramian, rows @ rows.T, norms[:, None] * norms),
        (statistics.products, rows @ down, norms * down.norm()),
    ):
        assert ((found - right) / size).abs().max() < 0.02


@pytest.mark.parametrize("which", ["planted", "down"])
def test_weights_learned_from_gradients_too_small_for_float16_follow_those_of_float32(which):
    wide = learned(Problem(**{which: TINY}))
    narrow = learned(Problem(heads=torch.float16, **{which: TINY}))
    assert (wide[-1] - 1).abs()[-1] > 0.3
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0.05)


def test_a_gradient_that_float16_can_hold_is_right_however_large_it_is():
    """In the last of a few steps, so that a scale of the inner gradients may find its size."""
    problem, weighting = Problem(heads=torch.float16, planted=LARGE), GraP(TERMS, recipe="alg1")
    for _ in range(STEPS):
        step = problem.step(weighting)
    rows, _ = exact(problem)
    norms = rows.norm(dim=1)
    errors = (step.statistics.gramian - rows @ rows.T) / (norms[:, None] * norms)
    assert errors.abs().max() < 0.02
    assert step.weights.isfinite().all() and weighting.updates > 0


def test_the_scale_halves_after_a_step_that_overflows_and_comes_back():
    problem, weighting = Problem(heads=torch.float16, planted=LARGE), GraP(TERMS, recipe="alg1")
    first = weighting.inner_scale.item()
    finite, scales = [], []
    for number in range(STEPS):
        scales.append(weighting.inner_scale.item())
        finite.append(bool(problem.step(weighting, number).finite))
    assert not finite[0] and finite[-1] and scales[0] == first == 2.0**14
    for good, before, after in zip(finite, scales, scales[1:]):
        assert after == (before if good else before / 2)
    again = GraP(TERMS, recipe="alg1")
    again.load_state_dict(weighting.state_dict())
    assert again.inner_scale == scales[-1]
    for _ in range(1999 - int(again.finite_steps)):
        again.adapt_inner_scale(torch.tensor(True))
    assert again.inner_scale == scales[-1]
    again.adapt_inner_scale(torch.tensor(True))
    assert again.inner_scale == 2 * scales[-1] and again.finite_steps == 0


def test_in_float32_nothing_is_scaled_and_no_scale_moves():
    problem, weighting = Problem(planted=LARGE), GraP(TERMS, recipe="alg1")
    step = problem.step(weighting)
    assert step.finite and weighting.inner_scale == 2.0**14 and weighting.finite_steps == 0
