"""Weights that carry over: the median with the heads as they were learned, and the whole course."""

import copy

import numpy as np
import pytest
import torch
from helpers import Killed, digits, killed_at, method_digits, quiet_digits
from omegaconf import OmegaConf
from torch import nn

from grap_solo import ConfigError, balance, build_weighting
from grap_solo.experiments.retrain import learned_weighting, retrain
from grap_solo.records.files import WEIGHTS_FILE
from grap_solo.records.weights import course_of_weights, read_weights
from grap_solo.training.run import pretrain

TERMS = ["invariance", "variance", "covariance"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # Weights that are held have the digits of float32.


class Network(nn.Module):
    """A backbone, a projector that three terms share, and a probe."""

    def __init__(self):
        super().__init__()
        self.backbone, self.projector = nn.Linear(6, 5), nn.Linear(5, 4)
        self.probe = nn.Linear(5, 3)

    def step(self, weighting, x):
        z = self.backbone(x)

        def terms(leaf):
            p = self.projector(leaf)
            return {
                "invariance": (p - p.flip(0)).square().mean(),
                "variance": (1 - p.std(0)).relu().mean(),
                "covariance": (p.T @ p).square().mean(),
            }

        labels = torch.arange(len(x)) % 3
        step = balance(z, terms, lambda leaf: nn.functional.cross_entropy(self.probe(leaf), labels),
                       weighting)  # fmt: skip
        step.loss.backward()
        return step, {name: each.grad for name, each in self.named_parameters()}


@pytest.mark.parametrize("heads", ["unweighted", "reference", "weighted"])
def test_held_weights_train_backbone_and_heads_as_the_run_did(heads):
    """The run's last weights gave covariance nothing. Its projector was trained by all terms."""
    torch.manual_seed(0)
    network, x = Network().double(), torch.randn(8, 6, dtype=torch.float64)
    reference = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    block = {"name": "grap", "recipe": "alg1", "heads": heads}
    learned = build_weighting(block, TERMS, reference)
    learned.weights.copy_(torch.tensor([1.0, 0.4, 0.0]))
    learned.eval()
    step, expected = copy.deepcopy(network).step(learned, x)
    effective = dict(zip(TERMS, step.weights.tolist(), strict=True))
    assert effective["covariance"] == 0

    held = {"name": "fixed", "weights": effective}
    as_learned = held if heads == "weighted" else {**held, "heads": heads}
    _, found = copy.deepcopy(network).step(build_weighting(as_learned, TERMS, reference), x)
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, **CLOSE)
    # Plain training gives the backbone the same, but the projector no covariance term.
    _, plain = copy.deepcopy(network).step(build_weighting(held, TERMS, reference), x)
    torch.testing.assert_close(plain["backbone.weight"], expected["backbone.weight"], **CLOSE)
    same = torch.allclose(plain["projector.weight"], expected["projector.weight"], **CLOSE)
    assert same == (heads == "weighted")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of VICReg whose heads are trained with the reference weights."""
    directory = tmp_path_factory.mktemp("runs")
    cfg = method_digits("vicreg", directory, "+weighting.heads=reference", "max_epochs=3")
    return pretrain(cfg).directory


def test_the_block_has_the_heads_of_the_run(learned):
    block = learned_weighting([learned])
    assert block["name"] == "fixed" and block["heads"] == "reference"
    assert list(block["weights"]) == TERMS and set(block) == {"name", "weights", "heads"}
    assert set(learned_weighting([learned], heads="weighted")) == {"name", "weights"}
    with pytest.raises(ConfigError, match="--schedule replays all steps"):
        learned_weighting([learned], last=3, schedule=True)


def test_a_retraining_replays_the_weights_of_the_run(learned):
    run = retrain([learned], lambda path: OmegaConf.load(path), schedule=True)
    assert run.directory.name == f"{learned.name}_scheduled"
    assert run.cfg.weighting.heads == "reference"
    _, _, before = read_weights(learned / WEIGHTS_FILE)
    _, _, after = read_weights(run.directory / WEIGHTS_FILE)
    assert len(before) < 100  # So each step is a point of its own.
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert np.ptp(before, axis=0).max() > 0.1  # The weights of the run have moved.


def test_a_replay_resumes_where_it_was(learned, tmp_path):
    cfg = OmegaConf.load(learned / "config.yaml")
    cfg.weighting = learned_weighting([learned], schedule=True)
    cfg.checkpoint.dir, cfg.name = str(tmp_path), "killed"
    with pytest.raises(Killed):
        pretrain(cfg, [killed_at("on_train_batch_start", 2)])
    run = pretrain(cfg)
    _, _, weights = read_weights(run.directory / WEIGHTS_FILE)
    _, _, expected = read_weights(learned / WEIGHTS_FILE)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


def write_record(folder, steps, slope):
    folder.mkdir()
    rows = [f"{i + 1},0,{slope * (i + 0.5) / steps},1" for i in range(steps)]
    (folder / "weights.csv").write_text("\n".join(["step,epoch,a,b", *rows]) + "\n")
    return folder / "weights.csv"


def test_a_course_is_taken_over_shares_of_the_run_and_is_independent_of_its_length(tmp_path):
    short, long = write_record(tmp_path / "s", 40, 8), write_record(tmp_path / "l", 4000, 8)
    for file in (short, long):
        course = course_of_weights([file], points=4)
        assert course["a"] == pytest.approx([1, 3, 5, 7]) and course["b"] == [1] * 4
    both = course_of_weights([short, write_record(tmp_path / "t", 80, 4)], points=2)
    assert both["a"] == pytest.approx([1.5, 4.5])  # The mean over the runs.
    assert len(course_of_weights([short, long])["a"]) == 40  # Not more than the shortest has.


def test_weights_between_two_points_are_interpolated_over_the_run():
    rule = build_weighting({"name": "scheduled", "weights": {"a": [0, 4], "b": [1, 1]}}, ["a", "b"])
    rule.set_total_steps(8)
    statistics = type("Statistics", (), {})()
    found = [rule.direction(statistics)[0].item() for _ in range(8)]
    # The points stand at a quarter and three quarters of the run.
    assert found == pytest.approx([0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"a": [1, 2], "b": [1]}, "as many for each term"),
        ({"a": [1, 2]}, "no weight for b"),
        ({"a": [0, 1], "b": [0, 1]}, "every weight is 0"),
        ({"a": [], "b": []}, "weighting.weights.a: expected a list of numbers of 0 or more"),
        ({"a": [-1, 1], "b": [1, 1]}, "weighting.weights.a: expected a list of numbers"),
        ({"a": 1, "b": 1}, "weighting.weights.a: expected a list of numbers"),
        ({}, "no weight for a, b"),
    ],
)
def test_a_course_that_cannot_be_followed_is_refused(weights, text):
    with pytest.raises(ConfigError, match=text):
        build_weighting({"name": "scheduled", "weights": weights}, ["a", "b"])


def test_a_course_in_a_configuration_is_checked_too(tmp_path):
    block = "+weighting={name: scheduled, weights: {nnclr: [1, x]}}"
    with pytest.raises(ConfigError, match=r"weighting.weights.nnclr.1: expected a number"):
        pretrain(quiet_digits(tmp_path, "method=grap_all4one", block, file="all4one"))
    with pytest.raises(ConfigError, match="number of steps of the run is not known"):
        rule = build_weighting({"name": "scheduled", "weights": {"a": [1, 2]}}, ["a"])
        rule.direction(None)
    assert digits(tmp_path).weighting.name == "grap"
