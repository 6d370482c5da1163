"""Each rule against its source's definition, in float64 where there is no reason against it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qpsolvers import solve_qp
from torch import nn
from torchjd import aggregation, scalarization

from grap_solo import ConfigError, GraP, Statistics, balance, build_weighting
from grap_solo.balance import HeldOut
from grap_solo.weighting import WEIGHTINGS
from grap_solo.weighting.mgda import min_norm_weights

TERMS = ["a", "b", "c", "d"]
REFERENCE = {"a": 0.5, "b": 0.5, "c": 2.5, "d": 2.5}


def gradients(seed, count=4, dimension=30, correlated=True):
    """Random gradients, (K, d) in float64, of very different norms and some in conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dimension, dtype=torch.float64, generator=generator)
    if correlated:
        rows += torch.randn(count, 1, dtype=torch.float64, generator=generator)
    return rows * torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]


def statistics(rows, losses=None):
    down = rows.mean(dim=0)
    losses = torch.ones(len(rows), dtype=rows.dtype) if losses is None else losses
    return Statistics(losses, rows @ rows.T, rows @ down, down.norm())


def rule(name, reference=None, **keys):
    if name == "grap":
        keys = {"recipe": "alg1", **keys}
    return build_weighting({"name": name, **keys}, TERMS, reference).double()


# ---- the rules of gradients -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_mgda_is_the_min_norm_point_that_a_quadratic_programme_finds(seed):
    rows = gradients(seed, count=2 + seed % 7, dimension=5 + seed)
    gramian = (rows @ rows.T).numpy()
    count, size = len(gramian), gramian.trace()
    expected = solve_qp(
        gramian / size + 1e-12 * np.eye(count), np.zeros(count), A=np.ones((1, count)),
        b=np.ones(1), lb=np.zeros(count), solver="quadprog",
    )  # fmt: skip
    weights = min_norm_weights(gramian)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    assert weights @ gramian @ weights == pytest.approx(expected @ gramian @ expected, rel=1e-6)
    # The optimality condition: no gradient has a smaller product with the point than it itself.
    assert (gramian @ weights).min() >= weights @ gramian @ weights - 1e-9 * size


def test_mgda_of_two_gradients_is_the_closed_form_and_dull_cases_are_equal():
    gramian = np.array([[4.0, 1.0], [1.0, 2.0]])
    assert min_norm_weights(gramian) == pytest.approx([0.25, 0.75])  # (2 - 1) / (4 + 2 - 2)
    for dull in (np.zeros((3, 3)), np.full((3, 3), np.nan)):
        assert min_norm_weights(dull) == pytest.approx([1 / 3] * 3)


AGGREGATORS = {
    "mgda": (aggregation.MGDA(epsilon=1e-9, max_iters=20_000), 1e-3),
    "pcgrad": (aggregation.PCGrad(), 1e-9),
    "aligned_mtl": (aggregation.AlignedMTL(), 1e-9),
    "imtl_g": (aggregation.IMTLG(), 1e-9),
    "upgrad": (aggregation.UPGrad(), 1e-9),
    "dualproj": (aggregation.DualProj(), 1e-9),
    "fairgrad": (aggregation.FairGrad(1.0), 1e-9),
    "cagrad": (aggregation.CAGrad(0.5), 1e-6),
}


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("seed", range(3))
def test_torchjds_aggregator_on_the_full_matrix_gives_the_same_composite(name, seed):
    aggregator, tolerance = AGGREGATORS[name]
    rows = gradients(seed)
    weights = rule(name)(statistics(rows))
    torch.manual_seed(1)  # The stream of a rule's first step.
    expected = aggregator(rows)
    torch.testing.assert_close(weights @ rows, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(set(AGGREGATORS) - {"fairgrad"}))
def test_the_composites_direction_does_not_depend_on_the_gradients_size(name):
    """At the embedding gradients are small; torchjd's solvers have absolute tolerances."""
    rows = gradients(0)
    large = rule(name)(statistics(rows)) @ rows
    small = rule(name)(statistics(1e-5 * rows)) @ rows
    torch.testing.assert_close(small / small.norm(), large / large.norm(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_solves_its_equation_at_any_size(size, alpha):
    rows = size * gradients(1)
    weights = rule("fairgrad", alpha=alpha)(statistics(rows))
    gramian = rows @ rows.T
    torch.testing.assert_close(gramian @ weights, weights ** (-1 / alpha), rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_projects_each_gradient_off_those_it_conflicts_with(seed):
    """Alg. 1 on the gradients themselves, with the same order of the others."""
    rows = gradients(seed)
    weights = rule("pcgrad")(statistics(rows))
    torch.manual_seed(1)
    total = torch.zeros_like(rows[0])
    for i in range(len(rows)):
        projected = rows[i].clone()
        for j in torch.randperm(len(rows)).tolist():
            product = projected @ rows[j]
            if j != i and product < 0:
                projected = projected - product / rows[j].square().sum() * rows[j]
        total += projected
    torch.testing.assert_close(weights @ rows, total)


def test_pcgrad_leaves_gradients_without_conflict_alone_and_other_random_numbers_too():
    rows = torch.rand(4, 20, dtype=torch.float64)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert rule("pcgrad")(statistics(rows)).tolist() == [1, 1, 1, 1]
    assert torch.equal(torch.rand(2), expected)


def test_imtl_g_has_equal_projections_and_aligned_mtl_equal_components():
    rows = gradients(4)
    composite = rule("imtl_g")(statistics(rows)) @ rows
    projections = composite @ (rows / rows.norm(dim=1, keepdim=True)).T
    assert projections.tolist() == pytest.approx([projections[0].item()] * 4)
    composite = rule("aligned_mtl")(statistics(rows)) @ rows
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(composite, s.min() * u.mean(dim=0) @ v)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorm_descends_its_own_loss_with_constant_targets(alpha):
    """Eq. 2 by autograd over five steps, renormalised to K as in Alg. 1."""
    weighting = rule("gradnorm", lr=0.02, alpha=alpha)
    expected = torch.ones(4, dtype=torch.float64)
    first = None
    for step in range(5):
        rows = gradients(step) / 10
        losses = torch.rand(4, dtype=torch.float64) + 0.5
        first = losses if first is None else first
        torch.testing.assert_close(weighting(statistics(rows, losses)), expected)
        w = expected.clone().requires_grad_()
        norms = (w[:, None] * rows).norm(dim=1)
        inverse = losses / first / (losses / first).mean()
        target = (norms.mean() * inverse**alpha).detach()
        (gradient,) = torch.autograd.grad((norms - target).abs().sum(), w)
        expected = (expected - 0.02 * gradient).clamp(min=0)
        expected = 4 * expected / expected.sum()
    assert expected.std() > 0.01


def test_gradnorm_balances_the_norms():
    """With equal training rates the fixed point has w_k |g_k| equal for all terms."""
    weighting = rule("gradnorm", lr=1e-3, alpha=0.0)
    rows = torch.diag(torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64))
    for _ in range(4000):
        weights = weighting(statistics(rows))
    norms = weights * rows.diagonal()
    assert norms.max() / norms.min() < 1.02


# ---- the rules of losses --------------------------------------------------------------------


def test_dwa_is_its_formula_and_to_the_bit_torchjds():
    generator = torch.Generator().manual_seed(0)
    weighting, other = rule("dwa", temperature=1.5), scalarization.DWA(temperature=1.5)
    means = []
    for epoch in range(5):
        epoch_losses = torch.rand(6, 4, dtype=torch.float64, generator=generator) + 0.1
        for losses in epoch_losses:
            values = losses.clone().requires_grad_()
            (theirs,) = torch.autograd.grad(other(values), values)
            weights = weighting(Statistics(losses))
            assert torch.equal(weights, theirs)
            if epoch < 2:
                assert weights.tolist() == [1, 1, 1, 1]
            else:
                rates = means[-1] / means[-2]
                expected = [4 * np.exp(r / 1.5) / np.exp(rates / 1.5).sum() for r in rates]
                assert weights.tolist() == pytest.approx(expected)
        means.append(epoch_losses.mean(dim=0).numpy())
        weighting.end_epoch()
        other.step()


def test_dwa_unlike_torchjds_leaves_out_a_step_that_is_not_finite_and_saves_its_state():
    """The reasons for a class of our own."""
    generator = torch.Generator().manual_seed(0)
    weighting, without, other = rule("dwa"), rule("dwa"), scalarization.DWA()
    for epoch in range(2):
        for step in range(3):
            losses = torch.rand(4, dtype=torch.float64, generator=generator) + 0.1
            if (epoch, step) == (1, 1):
                losses[2] = torch.nan
            else:
                without(Statistics(losses))
            weighting(Statistics(losses))
            other(losses)
        for each in (weighting, without):
            each.end_epoch()
        other.step()
    values = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(other(values), values)
    resumed = rule("dwa")
    resumed.load_state_dict(weighting.state_dict())
    ours = resumed(Statistics(values.detach()))
    assert torch.equal(ours, without(Statistics(values.detach()))) and ours.std() > 0
    assert theirs.isnan().all() and not other.state_dict()


def test_uncertainty_has_kendalls_weights_and_learns_its_variances():
    weighting = rule("uncertainty")
    with torch.no_grad():
        weighting.scalarizer.log_var.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = 0.5 * torch.exp(-weighting.scalarizer.log_var.detach())
    torch.testing.assert_close(weighting(Statistics(losses)), expected)
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        weighting.extra_loss(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.scalarizer.log_var.exp(), losses)  # sigma^2 = L


def test_famo_is_torchjds_in_a_training_and_continues_from_its_state():
    def train(weights_of, after, steps, x):
        for _ in range(steps):
            losses = torch.stack([(x - 1).square().sum(), 9 * (x + 1).square().sum() + 0.1])
            (gradient,) = torch.autograd.grad((weights_of(losses) * losses).sum(), x)
            with torch.no_grad():
                x -= 0.01 * gradient
                after(torch.stack([(x - 1).square().sum(), 9 * (x + 1).square().sum() + 0.1]))
        return x.detach().clone()

    ours = build_weighting({"name": "famo", "lr": 0.1}, ["a", "b"])
    theirs = scalarization.FAMO(2, lr=0.1)
    x, y = (torch.zeros(3, requires_grad=True) for _ in range(2))

    def their_weights(losses):
        values = losses.detach().requires_grad_()
        return torch.autograd.grad(theirs(values), values)[0]

    train(lambda values: ours(Statistics(values.detach())), ours.after_step, 10, x)
    train(their_weights, theirs.update, 10, y)
    assert torch.equal(x, y)
    again = build_weighting({"name": "famo", "lr": 0.1}, ["a", "b"])
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    z = x.detach().clone().requires_grad_()
    for weighting, place in ((ours, x), (again, z)):
        train(
            lambda values, w=weighting: w(Statistics(values.detach())),
            weighting.after_step,
            5,
            place,
        )
    assert torch.equal(x, z) and not list(ours.parameters())


def test_random_draws_are_on_the_simplex_and_repeat():
    first, second, other = (rule("random", seed=s) for s in (0, 0, 1))
    losses = Statistics(torch.ones(4, dtype=torch.float64))
    draws = torch.stack([first(losses) for _ in range(50)])
    assert torch.equal(draws, torch.stack([second(losses) for _ in range(50)]))
    assert not torch.equal(draws, torch.stack([other(losses) for _ in range(50)]))
    torch.testing.assert_close(draws.sum(dim=1), torch.ones(50, dtype=torch.float64))
    assert draws.min() > 0 and draws.std(dim=0).min() > 0.05


# ---- what every rule is given ---------------------------------------------------------------


class Problem:
    """A backbone, four heads that share a layer, a probe, and one batch of each kind."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.x, self.other = torch.randn(2, 12, 6, dtype=torch.float64)
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
        self.common = nn.Linear(5, 5).double()
        self.heads = nn.ModuleDict({k: nn.Linear(5, 3) for k in TERMS}).double()
        self.probe = nn.Linear(5, 4).double()
        self.labels = torch.randint(0, 4, (12,))
        self.targets = torch.randn(4, 12, 3, dtype=torch.float64)

    def terms(self, z, names=TERMS):
        h = torch.tanh(self.common(z))
        return {k: F.mse_loss(self.heads[k](h), self.targets[TERMS.index(k)]) for k in names}

    def downstream(self, z):
        return F.cross_entropy(self.probe(z), self.labels)

    def gradients(self, loss):
        modules = (self.backbone, self.common, self.heads, self.probe)
        for module in modules:
            module.zero_grad()
        loss.backward()
        return [
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.parameters()]
            for m in modules
        ]


@pytest.mark.parametrize("name", sorted(set(WEIGHTINGS) - {"supervised"}))
def test_every_rule_steers_backbone_heads_and_probe_as_its_keys_say(name):
    """One step through the surrogate against plain backward passes of weighted losses."""
    problem = Problem()
    weighting = rule(name, REFERENCE)
    step = balance(problem.backbone(problem.x), problem.terms, problem.downstream, weighting)
    backbone, common, heads, probe = problem.gradients(step.loss)
    e, h = step.weights, weighting.head_weights(step.weights)

    def expected(weights, down):
        z = problem.backbone(problem.x)
        losses = problem.terms(z)
        total = sum(w * losses[k] for w, k in zip(weights, TERMS))
        return problem.gradients(total + down * problem.downstream(z))

    for found, right in zip(backbone, expected(e, weighting.downstream_weight)[0]):
        torch.testing.assert_close(found, right)
    for found, right in zip((*common, *heads), (*expected(h, 0)[1], *expected(h, 0)[2])):
        torch.testing.assert_close(found, right)
    for found, right in zip(probe, expected(e, 1)[3]):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("name", ["equal", "mgda", "pcgrad", "grap", "dwa"])
@pytest.mark.parametrize("heads", ["weighted", "unweighted", "reference"])
@pytest.mark.parametrize("scale", ["none", "reference", "unit", 1.5])
def test_scale_and_heads_are_a_choice(name, heads, scale):
    rows = gradients(0)
    stats = statistics(rows)
    weighting = rule(name, REFERENCE, heads=heads, scale=scale)
    plain = rule(name, REFERENCE, scale="none")(stats)
    weights = weighting(stats)
    reference = torch.tensor(list(REFERENCE.values()), dtype=torch.float64)
    norm = (weights @ rows).norm()
    if scale == "none":
        torch.testing.assert_close(weights, plain)
    else:
        torch.testing.assert_close(weights / weights.sum(), plain / plain.sum())
        wanted = {"reference": (reference @ rows).norm(), "unit": 1.0, 1.5: 1.5}[scale]
        assert norm.item() == pytest.approx(float(wanted))
    wanted = {"weighted": weights, "unweighted": torch.ones(4).double(), "reference": reference}
    torch.testing.assert_close(weighting.head_weights(weights), wanted[heads])
    assert weighting.needs_gradients == (
        WEIGHTINGS[name].uses_gradients or heads != "weighted" or scale != "none"
    )


def test_reference_heads_are_the_authors_mix():
    problem = Problem()
    weighting = rule("grap", REFERENCE, heads="reference")
    step = balance(problem.backbone(problem.x), problem.terms, problem.downstream, weighting)
    _, common, heads, _ = problem.gradients(step.loss)
    z = problem.backbone(problem.x)
    loss = sum(REFERENCE[k] * each for k, each in problem.terms(z).items())
    _, right_common, right_heads, _ = problem.gradients(loss)
    for found, right in zip((*common, *heads), (*right_common, *right_heads)):
        torch.testing.assert_close(found, right)


def test_a_fixed_weight_on_the_gradient_path_is_the_plain_training():
    problem = Problem()
    found = []
    for keys in ({}, {"scale": "reference"}):
        weighting = rule("fixed", REFERENCE, **keys)
        step = balance(problem.backbone(problem.x), problem.terms, problem.downstream, weighting)
        found.append(problem.gradients(step.loss))
        assert (step.alignment is None) == (not keys)
    for plain, surrogate in zip(*found):
        for a, b in zip(plain, surrogate):
            torch.testing.assert_close(a, b)


def test_a_term_of_weight_0_need_not_be_computed():
    problem = Problem()
    weights = {"a": 0.5, "b": 0.0, "c": 2.5, "d": 2.5}
    for keys in ({}, {"scale": "reference"}):
        weighting = rule("fixed", REFERENCE, weights=weights, **keys)
        assert weighting.active == ("a", "c", "d")

        def terms(z):
            return problem.terms(z, ["a", "c", "d"])

        step = balance(problem.backbone(problem.x), terms, problem.downstream, weighting)
        step.loss.backward()
        assert list(step.losses) == ["a", "c", "d"] and step.weights[1] == 0
        with pytest.raises(ConfigError, match="the weighting is for a, c, d"):
            balance(
                problem.backbone(problem.x),
                lambda z: problem.terms(z, ["a", "c"]),
                problem.downstream,
                weighting,
            )


def test_supervised_is_the_downstream_loss_alone():
    problem = Problem()
    weighting = build_weighting({"name": "supervised"}, TERMS).double()
    step = balance(problem.backbone(problem.x), lambda z: {}, problem.downstream, weighting)
    found = problem.gradients(step.loss)
    right = problem.gradients(problem.downstream(problem.backbone(problem.x)))
    for a, b in zip(found, right):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y)
    assert step.weights.tolist() == [0, 0, 0, 0] and step.losses == {}


# ---- GraP's variants ------------------------------------------------------------------------


def test_held_out_labels_give_the_weights_and_train_the_probe_and_nothing_else():
    problem = Problem()
    weighting, twin = (
        GraP(TERMS, REFERENCE, recipe="alg1").double(),
        GraP(TERMS, REFERENCE, recipe="alg1").double(),
    )
    with torch.no_grad():
        seen = problem.backbone(problem.other)
    for _ in range(3):  # The twin sees the held-out batch as its only one.
        held_out = HeldOut([seen], problem.terms)
        z = problem.backbone(problem.x)
        step = balance(z, problem.terms, problem.downstream, weighting, held_out=held_out)
        alone = balance(problem.backbone(problem.other), problem.terms, problem.downstream, twin)
    torch.testing.assert_close(weighting.weights, twin.weights)
    assert weighting.weights.std() > 0.01
    torch.testing.assert_close(step.statistics.gramian, alone.statistics.gramian)
    # The composite has the reference norm on the batch that it trains with.
    backbone, common, heads, probe = problem.gradients(step.loss)
    right = problem.gradients(alone.loss)
    for a, b in zip(probe, right[3]):
        torch.testing.assert_close(a, b)
    losses = problem.terms(problem.backbone(problem.x))
    right = problem.gradients(sum(w * losses[k] for w, k in zip(step.weights, TERMS)))
    for a, b in zip(backbone, right[0]):
        torch.testing.assert_close(a, b)
    right = problem.gradients(sum(problem.terms(problem.backbone(problem.x)).values()))
    for a, b in zip((*common, *heads), (*right[1], *right[2])):
        torch.testing.assert_close(a, b)
    with pytest.raises(ConfigError, match="held_out: the downstream loss trains the backbone"):
        auxiliary = rule("auxiliary")
        balance(z, problem.terms, problem.downstream, auxiliary, held_out=held_out)


def test_ema_averages_gramian_and_products_with_bias_correction():
    weighting = GraP(TERMS, ema=0.9, optimizer="sgd", lr=0.05, recipe="alg1").double()
    plain = GraP(TERMS, optimizer="sgd", lr=0.05, recipe="alg1").double()
    gramians, products = [], []
    for step in range(6):
        stats = statistics(gradients(step))
        gramians.append(stats.gramian)
        products.append(stats.products / stats.downstream_norm)
        share = torch.tensor([0.9**i for i in range(step, -1, -1)], dtype=torch.float64)
        share = share / share.sum()
        mean = Statistics(
            stats.losses,
            torch.einsum("i,ijk->jk", share, torch.stack(gramians)),
            share @ torch.stack(products),
            torch.ones((), dtype=torch.float64),
        )
        weighting(stats)
        plain(mean)
        torch.testing.assert_close(weighting.weights, plain.weights)
    before = weighting.average.clone()
    weighting(
        Statistics(stats.losses, stats.gramian * torch.nan, stats.products, torch.tensor(1.0))
    )
    assert torch.equal(weighting.average, before)


def test_the_cause_of_a_step_that_is_left_out_is_named():
    from grap_solo.weighting import CAUSES

    stats = statistics(gradients(0))
    cases = {
        "": stats,
        "unlabelled": Statistics(
            stats.losses, stats.gramian, 0 * stats.products, 0 * stats.downstream_norm
        ),
        "not finite": Statistics(
            stats.losses, stats.gramian * torch.inf, stats.products, stats.downstream_norm
        ),
        "no composite gradient": Statistics(
            stats.losses, 0 * stats.gramian, 0 * stats.products, stats.downstream_norm
        ),
    }
    weighting = rule("grap")
    for cause, each in cases.items():
        weighting(each)
        assert CAUSES[weighting.cause] == cause
    opposed = rule("grap", normalization="none", optimizer="sgd", lr=1e6)
    opposed(Statistics(stats.losses, stats.gramian, -stats.losses, torch.ones(())))
    assert CAUSES[opposed.cause] == "every weight 0"
    weighting.eval()
    weighting(stats)
    assert CAUSES[weighting.cause] == "held"
