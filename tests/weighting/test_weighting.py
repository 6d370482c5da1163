"""GraP's update against autograd and torch's optimisers, its meaning, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grap_solo import (
    ConfigError,
    Equal,
    Fixed,
    GraP,
    Statistics,
    Weighting,
    balance,
    build_weighting,
)
from grap_solo.weighting.grap import objective, objective_gradient
from grap_solo.weighting.grap_keys import NORMALIZATIONS


def statistics(count: int, seed: int, dimension: int = 50) -> tuple[Statistics, torch.Tensor]:
    """Random gradients' statistics in float64, and g_down."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dimension, dtype=torch.float64, generator=generator)
    down = 0.3 * torch.randn(dimension, dtype=torch.float64, generator=generator)
    losses = torch.ones(count, dtype=torch.float64)
    return Statistics(losses, rows @ rows.T, rows @ down, down.norm()), down


def names(count: int) -> list[str]:
    return [f"term{k}" for k in range(count)]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("count", [1, 2, 4, 18])
def test_closed_form_gradient_is_autograds(count, normalization):
    stats, _ = statistics(count, seed=count)
    weights = torch.rand(count, dtype=torch.float64).add(0.1).requires_grad_()
    value = objective(weights, stats.gramian, stats.products, normalization)
    (expected,) = torch.autograd.grad(value, weights)
    actual = objective_gradient(weights.detach(), stats.gramian, stats.products, normalization)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_weights_follow_torchs_optimiser_on_the_normalised_objective(optimizer, normalization):
    weighting = GraP(
        names(4), optimizer=optimizer, lr=0.05, normalization=normalization, recipe="alg1"
    ).double()
    weights = torch.ones(4, dtype=torch.float64, requires_grad=True)
    make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    reference = make([weights], lr=0.05, maximize=True)
    for step in range(40):
        stats, down = statistics(4, seed=step)
        before = weights.detach().clone()
        effective = weighting(stats)
        # The weights in force are those from before the update, on the reference norm.
        norm = (before @ stats.gramian @ before).sqrt()
        target = stats.gramian.sum().sqrt()
        torch.testing.assert_close(effective, before * target / norm)

        reference.zero_grad()
        products = stats.products / down.norm()
        objective(weights, stats.gramian, products, normalization).backward()
        reference.step()
        with torch.no_grad():
            weights.clamp_(min=0)
        torch.testing.assert_close(weighting.weights, weights.detach())


def test_state_dict_continues_the_same_path():
    first, second = GraP(names(3), recipe="alg1"), GraP(names(3), recipe="alg1")
    for step in range(5):
        first(statistics(3, step)[0])
    second.load_state_dict(first.state_dict())
    for step in range(5, 10):
        a, b = first(statistics(3, step)[0]), second(statistics(3, step)[0])
        assert torch.equal(a, b)


def test_eval_mode_holds_the_weights():
    weighting = GraP(names(3), recipe="alg1").eval()
    weighting(statistics(3, 0)[0])
    assert torch.equal(weighting.weights, torch.ones(3)) and weighting.updates == 0


def unlabelled(stats):
    return Statistics(stats.losses, stats.gramian, 0 * stats.products, 0 * stats.downstream_norm)


def not_finite(stats):
    return Statistics(stats.losses, stats.gramian * torch.nan, stats.products, torch.tensor(1.0))


def vanished(stats):
    zero = torch.zeros_like(stats.gramian)
    return Statistics(stats.losses, zero, 0 * stats.products, stats.downstream_norm)


@pytest.mark.parametrize("keys", [{}, {"recipe": "paper", "regularization": 1.0}])
@pytest.mark.parametrize("spoil", [unlabelled, not_finite, vanished])
def test_a_step_that_cannot_be_used_changes_no_state(spoil, keys):
    weighting = GraP(names(3), **({"recipe": "alg1"} | keys)).double()
    for step in range(3):
        weighting(statistics(3, step)[0])
    before = {key: value.clone() for key, value in weighting.state_dict().items()}
    effective = weighting(spoil(statistics(3, 3)[0]))
    for key, value in weighting.state_dict().items():
        assert torch.equal(value, before[key]), key
    if spoil is not not_finite:
        assert effective.isfinite().all()


def test_an_update_that_would_zero_every_weight_is_not_applied():
    weighting = GraP(names(2), optimizer="sgd", lr=100.0, normalization="none", recipe="alg1")
    gramian = torch.eye(2)
    weighting(Statistics(torch.ones(2), gramian, torch.tensor([-1.0, -1.0]), torch.tensor(1.0)))
    assert torch.equal(weighting.weights, torch.ones(2))
    weighting(Statistics(torch.ones(2), gramian, torch.tensor([-1.0, 1.0]), torch.tensor(1.0)))
    assert weighting.weights.tolist() == [0.0, 101.0]


def test_direction_does_not_depend_on_the_scale_of_the_downstream_gradient():
    small, large = GraP(names(4), recipe="alg1").double(), GraP(names(4), recipe="alg1").double()
    for step in range(20):
        stats, _ = statistics(4, step)
        scaled = Statistics(
            stats.losses,
            stats.gramian,
            1e4 * stats.products,
            1e4 * stats.downstream_norm,
        )
        small(stats)
        large(scaled)
    torch.testing.assert_close(small.weights, large.weights)


def test_products_predict_the_downstream_loss_after_a_real_step():
    """Eq. 8: dL_down/dw_k after one SGD step of the backbone is -lr p_k, to first order.

    Orthonormal inputs make the map from backbone parameters to embeddings an isometry, so that
    the embedding-space products are the parameter-space ones and the ratio is exact.
    """
    torch.manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64)).Q.T
    backbone = nn.Linear(16, 6, bias=False).double()
    heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(4)).double()
    targets = torch.randn(4, 8, 3, dtype=torch.float64)
    probe, labels = nn.Linear(6, 5).double(), torch.randint(0, 5, (8,))

    def terms(z):
        return {f"term{k}": F.mse_loss(torch.tanh(h(z)), targets[k]) for k, h in enumerate(heads)}

    def downstream(z):
        return F.cross_entropy(probe(z), labels)

    step = balance(backbone(inputs), terms, downstream, GraP(names(4), recipe="alg1").double())
    lr, eps = 1e-4, 1e-3

    def downstream_after_step(weights):
        loss = sum(w * each for w, each in zip(weights, terms(backbone(inputs)).values()))
        (gradient,) = torch.autograd.grad(loss, [backbone.weight])
        return downstream(inputs @ (backbone.weight - lr * gradient).T).item()

    unit = torch.eye(4, dtype=torch.float64)
    numerical = torch.tensor(
        [
            (downstream_after_step(1 + eps * unit[k]) - downstream_after_step(1 - eps * unit[k]))
            / (2 * eps)
            for k in range(4)
        ]
    )
    expected = (-lr * step.statistics.products).float()
    assert (numerical.sign() == expected.sign()).all()
    torch.testing.assert_close(numerical, expected, rtol=1e-3, atol=0)
    assert expected.abs().max() > 3 * expected.abs().min()  # The ratio is a real test.


@pytest.mark.parametrize("seed", range(8))
def test_grap_finds_the_useful_term_and_is_never_negative(seed):
    """One term pulls the classes apart, one pulls them together, one pulls to noise.

    The weights are held for 20 steps: a probe that has learned nothing yet points anywhere.
    """
    torch.manual_seed(seed)
    classes = torch.eye(4)
    backbone, probe = nn.Linear(10, 4), nn.Linear(4, 4)
    images = torch.randn(4, 10)
    weighting = GraP(["useful", "harmful", "noise"], lr=0.1, recipe="alg1")
    optimizer = torch.optim.SGD([*backbone.parameters(), *probe.parameters()], lr=0.05)
    lowest = 1.0
    for iteration in range(200):
        weighting.train(iteration >= 20)
        labels = torch.randint(0, 4, (64,))
        x = images[labels] + 0.3 * torch.randn(64, 10)
        noise, member = torch.randn(64, 4), F.one_hot(labels, 4).T.float()

        def terms(z, labels=labels, noise=noise, member=member):
            return {
                "useful": F.mse_loss(z, 3 * classes[labels]),
                "harmful": (member @ z / 16).sub(z.mean(0)).square().mean(),
                "noise": F.mse_loss(z, 3 * noise),
            }

        def downstream(z, labels=labels):
            return F.cross_entropy(probe(z), labels)

        step = balance(backbone(x), terms, downstream, weighting)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        lowest = min(lowest, weighting.weights.min().item(), step.weights.min().item())
    useful, harmful, noise = step.weights.tolist()
    assert lowest >= 0
    assert useful > 3 * noise and useful > 10 * harmful
    accuracy = (probe(backbone(x)).argmax(1) == labels).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "weighting.name: missing"),
        ({"name": "gradp"}, "did you mean 'grap'"),
        ({"name": "grap", "terms": ["a"]}, "unknown name 'terms'"),
        ({"name": "grap", "learning_rate": 1}, "unknown name 'learning_rate'.*lr"),
        ({"name": "equal", "lr": 1}, "unknown name 'lr': use one of heads, scale"),
        ({"name": "supervised", "lr": 1}, "weighting: takes no key besides its name: remove 'lr'"),
        ({"name": "equal", "heads": "weigted"}, "did you mean 'weighted'"),
        ({"name": "grap", "ema": 1.0}, "weighting.ema: .*below 1"),
        ({"name": "gradnorm", "alpha": -1.0}, "weighting.alpha"),
        ({"name": "dwa", "temperature": 0}, "weighting.temperature: .*above 0"),
        ({"name": "aligned_mtl", "scale_mode": "max"}, "weighting.scale_mode"),
        ({"name": "random", "seed": -1}, "weighting.seed: .*whole number"),
        ({"name": "auxiliary", "downstream_weight": 0}, "weighting.downstream_weight"),
        ({"name": "grap", "lr": 0}, "weighting.lr: .*above 0"),
        ({"name": "grap", "lr": "big"}, "weighting.lr: .*above 0"),
        ({"name": "grap", "optimizer": "adamm"}, "weighting.optimizer: .*'adam'"),
        ({"name": "grap", "normalization": "gradients"}, "did you mean 'gradient'"),
        ({"name": "grap", "scale": "refrence"}, "did you mean 'reference'"),
        ({"name": "grap", "scale": -1.0}, "weighting.scale: .*above 0"),
        ({"name": "grap", "shared_heads": "mean"}, "weighting.shared_heads"),
        ({"name": "grap", "warmup_epochs": -1}, "weighting.warmup_epochs"),
        ({"name": "grap", "recipe": "papr"}, "weighting.recipe: .*did you mean 'paper'"),
        ({"name": "grap", "recipe": 1}, "weighting.recipe: expected one of alg1, paper, got 1"),
        ({"name": "grap", "recipe": "paper", "ema": 1}, "weighting.ema: .*below 1"),
        ({"name": "grap", "lr": 0.1}, "weighting.lr: say what a step of it does: weighting.rec"),
        ({"name": "grap", "lr": 0.1, "lr_per_run": 1.0}, "weighting.lr_per_run: weighting.lr is"),
        ({"name": "grap", "lr_per_run": 0}, "weighting.lr_per_run: .*above 0"),
        ({"name": "grap", "lr_schedule": "cosine"}, "weighting.lr_schedule"),
        ({"name": "grap", "norm_ema": 1.0}, "weighting.norm_ema: .*below 1"),
        ({"name": "grap", "average_first": 2.5}, "weighting.average_first: .*whole number"),
        ({"name": "grap", "regularization": -1.0}, "weighting.regularization: .*0 or more"),
        ({"name": "grap", "parametrization": "linear"}, "weighting.parametrization"),
        ({"name": "fixed", "weights": {"a": 1.0}}, "no weight for b: add it"),
        (
            {"name": "fixed", "weights": {"a": 1.0, "b": 1.0, "c": 1.0}},
            "unknown name 'c'",
        ),
        ({"name": "fixed", "weights": {"a": -1.0, "b": 1.0}}, "weights.a: .*0 or more"),
        ({"name": "fixed", "weights": {"a": 0.0, "b": 0.0}}, "every weight is 0"),
        (
            {"name": "fixed", "weights": {"a": float("nan"), "b": 1.0}},
            "weights.a: .*finite",
        ),
        (
            {"name": "fixed", "weights": [1.0, 2.0]},
            "weighting.weights: expected a block with a number of 0 or more for each term",
        ),
    ],
)
def test_bad_blocks_are_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_weighting(config, ["a", "b"])
    assert "\n" not in str(error.value)


def test_registry_builds_what_it_names():
    reference = {"a": 0.5, "b": 2.5}
    assert isinstance(build_weighting({"name": "equal"}, ["a", "b"]), Equal)
    fixed = build_weighting({"name": "fixed"}, ["a", "b"], reference)
    assert isinstance(fixed, Fixed) and fixed.weights.tolist() == [0.5, 2.5]
    grap = build_weighting({"name": "grap", "recipe": "alg1", "lr": 0.01}, ["a", "b"], reference)
    assert isinstance(grap, GraP) and grap.lr == 0.01
    default = GraP.read_options({})
    assert (default["parametrization"], default["start"]) == ("exp", "balanced")
    assert (default["lr_per_run"], default["lr"], default["heads"]) == (2, None, "weighted")
    with pytest.raises(ConfigError, match="one or more different names"):
        GraP(["a", "a"], recipe="alg1")


def test_a_rule_without_a_direction_is_refused_when_it_is_made():
    class Unfinished(Weighting):
        pass

    with pytest.raises(TypeError, match="direction"):
        Unfinished(["a", "b"])
