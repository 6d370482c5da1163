"""The demo: its runs, tables, sentences and picture, and what it refuses."""

import contextlib
import csv
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import SMALL, rows_of

from grap_solo.cli import main
from grap_solo.experiments import demo as module
from grap_solo.experiments.demo import PLANS, demo, path_of_weights
from grap_solo.experiments.verdicts import describe_accuracies, describe_approach
from grap_solo.weighting import Fixed, GraP

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ALL4ONE = {"nnclr": 0.5, "attn_nnclr": 0.5, "byol": 2.5, "barlow": 2.5}
VICREG = {"invariance": 25, "variance": 25, "covariance": 1}
FOLDERS = [plan.folder(run) for plan in PLANS for run in plan.runs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A demo of six steps a run, from the command line: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["demo", *SMALL]) == 0
    return SimpleNamespace(folder=folder / "runs" / "demo", printed=printed.getvalue())


def config_of(trained, run):
    return yaml.safe_load((trained.folder / run / "config.yaml").read_text())


def test_it_says_what_will_happen_and_announces_each_run(trained):
    first, *_ = trained.printed.splitlines()
    assert first.startswith("7 trainings on scikit-learn's digits, with +data.fraction=0.2 max_ep")
    assert first.endswith("results go to runs/demo")
    announced = re.findall(r"^\[(\d)/7\] (\S+), (\w+): ", trained.printed, flags=re.MULTILINE)
    runs = [(plan.title, run) for plan in PLANS for run in plan.runs]
    assert announced == [(str(n), *run) for n, run in enumerate(runs, start=1)]
    folders = [each.name for each in trained.folder.iterdir() if each.is_dir()]
    assert sorted(folders) == sorted(FOLDERS)
    # The bar shows epoch, weights and the probe.
    shown = r"Epoch 1.*nnclr=\d.*attn_nnclr=\d.*byol=\d.*barlow=\d.*probe=\d"
    assert re.search(shown, trained.printed)


def test_the_rows_hold_the_runs_accuracies_and_weights(trained):
    rows = {row["method"]: row for row in rows_of(trained.folder / "summary.csv")}
    assert list(rows) == ["all4one_untrained", *FOLDERS]
    for name, row in rows.items():
        assert 10 < float(row["linear"]) <= 100 and 10 < float(row["knn"]) <= 100
        reference = ALL4ONE if name.startswith("all4one") else VICREG
        weights = {each: row[f"weight/{each}"] for each in {**ALL4ONE, **VICREG}}
        found = {term: float(value) for term, value in weights.items() if value}
        if name.endswith("untrained"):
            assert found == {} and row["online"] == ""
            continue
        assert 0 < float(row["online"]) <= 100 and set(found) == set(reference)
        if name.endswith("default"):
            assert found == reference
        elif name.endswith("equal"):
            assert set(found.values()) == {1}
        else:
            assert found != reference
    tuned, learned = ([rows[f"all4one_{run}"][f"weight/{each}"] for each in ALL4ONE]
                      for run in ("grap_tuned", "grap"))  # fmt: skip
    assert tuned == learned


def test_the_runs_of_a_table_differ_in_the_weighting_alone(trained):
    for plan in PLANS:
        default = config_of(trained, plan.folder("default"))
        assert default["data"]["batched"] and default["max_epochs"] == 2
        learned = {"name": "grap", **GraP.keep_options({})}  # Its defaults, whatever they are.
        for run, rule in {"equal": {"name": "equal"}, "grap": learned}.items():
            cfg = config_of(trained, plan.folder(run))
            assert cfg.pop("weighting") == rule
            assert cfg == {**default, "name": cfg["name"], "method": f"grap_{plan.method}"}
    # The tuned run trained with the median and its parent's heads, from scratch, beside it.
    median = trained.folder / "all4one_grap" / "median_weights.yaml"
    found = yaml.safe_load(median.read_text())["weighting"]
    options, plain = GraP.read_options({}), Fixed.read_options({})
    heads = {key: options[key] for key in ("heads", "shared_heads") if options[key] != plain[key]}
    assert config_of(trained, "all4one_grap_tuned")["weighting"] == {**found, **heads}


def test_the_tables_and_sentences_are_those_of_the_figures(trained):
    summary = (trained.folder / "summary.md").read_text()
    assert summary in trained.printed
    rows = {row["method"]: row for row in rows_of(trained.folder / "summary.csv")}
    for plan, reference in zip(PLANS, (ALL4ONE, VICREG)):
        linear = {run: float(rows[plan.folder(run)]["linear"]) for run in plan.runs}
        assert describe_accuracies(linear, 540) in summary
        path = path_of_weights(trained.folder / plan.folder("grap") / "weights.csv")
        assert describe_approach(path["first step"], path["last epoch"], reference) in summary
        for moment, weights in path.items():
            shares = [weight / sum(weights.values()) * 100 for weight in weights.values()]
            cells = r" *\| *".join(re.escape(f"{share:.2f}") for share in shares)
            assert re.search(rf"^\| {moment} *\| *{cells} \|$", summary, flags=re.MULTILINE)
    assert "One seed (5); epochs: 2 (All4One), 2 (VICReg); grap-solo 0.1.0, torch 2." in summary
    default = r"^\| default \(hand-tuned\) *\| *49\.02 \| *49\.02 \| *1\.96 \|$"
    assert re.search(default, summary, flags=re.MULTILINE)


def test_it_names_the_files_that_it_wrote_and_they_can_be_reported(trained, tmp_path):
    for name in ("summary.md", "summary.csv", "weights.png"):
        assert (trained.folder / name).stat().st_size > 0
        assert f"runs/demo/{name}" in trained.printed
    assert (trained.folder / "weights.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["report", str(trained.folder), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(folder in page for folder in FOLDERS)


def test_a_demo_that_is_there_is_moved_aside(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("kept")
    monkeypatch.setattr(module, "pretrain", lambda cfg: (_ for _ in ()).throw(EOFError))
    with pytest.raises(EOFError):
        demo(tmp_path / "demo")
    assert (tmp_path / "demo.1" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=mine", "name: the demo sets it for each of its runs: leave it out"),
        ("method=vicreg", "method: the demo sets it"),
        ("checkpoint.dir=elsewhere", "checkpoint.dir: the demo sets it"),
        ("+fast_dev_run=true", "fast_dev_run: the demo sets it"),
        ("max_epochs=-2", "max_epochs: "),
        ("max_epoch=2", "max_epoch"),
        ("weighting.lr=0.1", "weighting"),  # The default weights have no such key.
        ("method_kwargs.queue_size=1000", "queue_size"),  # VICReg has no queue.
    ],
)
def test_an_override_that_a_run_cannot_take_is_one_line_before_any_training(
    override, message, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs" / "demo" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    assert main(["demo", override]) == 2
    out, error = capfd.readouterr()
    assert message in error and error.count("\n") == 1 and out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_the_path_is_the_first_step_and_then_medians_of_an_epoch(tmp_path):
    weights = np.arange(40.0) ** 2  # Ten epochs of four steps.
    with (tmp_path / "weights.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "a", "b"])
        writer.writerows([i + 1, i // 4, f"{w:.9g}", 1] for i, w in enumerate(weights))
    path = path_of_weights(tmp_path / "weights.csv")
    medians = [np.median(weights[last - 4 : last]) for last in (10, 20, 40)]
    assert [each["a"] for each in path.values()] == pytest.approx([weights[0], *medians])
    assert {each["b"] for each in path.values()} == {1}
    assert list(path) == ["first step", "after a quarter", "halfway", "last epoch"]
