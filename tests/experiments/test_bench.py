"""The contenders of the step benchmark do a step's work, and the tables hold what was measured."""

import json
import runpy

import pytest
import torch
from helpers import DIGITS, ROOT

from grap_solo.cli import main
from grap_solo.compose import compose
from grap_solo.experiments.bench import k_backwards, torchjd_step
from grap_solo.experiments.counting import peak_memory
from grap_solo.experiments.timing import Contender, random_batch, step_costs
from grap_solo.training.config import prepare


def configuration(rule):
    changes = ["method=grap_all4one", f"+weighting={{name: {rule}}}", "optimizer.batch_size=16"]
    cfg = prepare(compose(DIGITS / "all4one.yaml", changes))
    cfg.data.num_classes = 10
    return cfg


@pytest.mark.parametrize("surrogate", [None, k_backwards, torchjd_step])
def test_a_step_gives_backbone_heads_and_probe_gradients_and_moves_them(surrogate):
    cfg = configuration("grap")
    mine = Contender(cfg, random_batch(cfg), surrogate=surrogate)
    before = {name: each.clone() for name, each in mine.model.named_parameters()}
    assert mine.seconds() > 0
    for name, each in mine.model.named_parameters():
        if each.requires_grad:
            assert each.grad is not None and each.grad.isfinite().all(), name
    moved = {n.split(".")[0] for n, p in mine.model.named_parameters() if (p != before[n]).any()}
    assert moved >= {"backbone", "classifier", "projector", "predictor", "transformer_encoder"}
    assert "momentum_backbone" in moved


@pytest.mark.parametrize(
    "rule", ["grap, recipe: paper", "grap, lr_per_run: 1.0, lr_schedule: optimizer"]
)
def test_a_learning_rate_that_depends_on_the_trainer_is_timed_without_one(rule):
    cfg = configuration(rule)
    mine = Contender(cfg, random_batch(cfg))
    assert mine.seconds() > 0 and mine.model.weighting.updates == 1


def test_k_backwards_trains_the_heads_as_the_surrogate_does():
    gradients = []
    for surrogate in (None, k_backwards):
        cfg = configuration("grap, recipe: alg1")
        mine = Contender(cfg, random_batch(cfg), surrogate=surrogate)
        torch.manual_seed(0)
        mine.seconds()
        gradients.append([p.grad for p in mine.model.projector.parameters()])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients):
        assert a is not None and a.any()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_peak_memory_is_that_of_the_step_and_grows_with_what_it_keeps():
    cfg = configuration("grap")
    mine = Contender(cfg, random_batch(cfg))
    plain = peak_memory(mine)
    assert plain == pytest.approx(peak_memory(mine), rel=0.01)
    original, size = mine._backward, 2**20
    mine._backward = lambda: (torch.empty(size), original())
    assert 3.9 < peak_memory(mine) - plain < 5
    mine._backward = lambda: (torch.empty(size) is None, original())  # Gone before the peak.
    assert peak_memory(mine) < plain + 1


def test_costs_are_ratios_to_the_base():
    found = step_costs(
        {"fixed": configuration("fixed"), "grap": configuration("grap")}, "fixed", 2, 1
    )
    assert found["fixed"]["median"] == found["fixed"]["min"] == 1
    assert 0 < found["grap"]["min"] < found["grap"]["max"] and found["grap"]["ms"] > 0
    median = found["grap"]["ms"] / found["fixed"]["ms"]  # Two rounds: near the ratios' median.
    assert found["grap"]["min"] / 2 < median < 2 * found["grap"]["max"]


def test_the_command_prints_a_table_and_writes_it(tmp_path, monkeypatch, capsys):
    import grap_solo.experiments.bench as bench

    terms = bench.bench_terms
    monkeypatch.setattr(bench, "bench_terms", lambda **keys: terms(counts=(1, 2), **keys))
    file = tmp_path / "terms.json"
    assert main(["bench", "terms", "--batch", "4", "--rounds", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found["ratios"]) == ["1", "2"] and found["batch_size"] == 4
    assert f"{found['ratios']['2']['median']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "bench: the following arguments are required: what"),
        (["bench", "step", "--rounds", "0"], "--rounds: expected a whole number of 1 or more"),
        (
            ["bench", "step", "--only", "gra"],
            "--only: contender: unknown name 'gra': did you mean 'grap'",
        ),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_what_is_beside_the_backbone_is_timed_alone(monkeypatch, capsys):
    script = ROOT / "benchmarks" / "heads.py"
    monkeypatch.setattr("sys.argv", [str(script), "fixed", "grap", "--batch", "8", "--rounds", "1"])
    runpy.run_path(str(script), run_name="__main__")
    header, _, *rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    columns = ["contender", "step, ms", "optimiser, ms", "momentum update, ms"]
    assert [cell.strip() for cell in header] == columns
    assert [row[0].strip() for row in rows] == ["fixed", "grap"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
