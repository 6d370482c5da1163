"""Comparisons: killed and started again, failing runs, the table's statistics, bad input."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import DIGITS, ROOT, SMALL, digits, output_of, start_command, start_process
from scipy.stats import ttest_ind

import grap_solo.experiments.cells as package
from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.compose import compose
from grap_solo.data.shared import FOLDER_VARIABLE
from grap_solo.evaluation.offline import rankme
from grap_solo.experiments.compare import _notes_of_runs, compare
from grap_solo.experiments.grid import plan, read_grid
from grap_solo.experiments.tasks import Launcher
from grap_solo.records.files import make_folder, only_one
from grap_solo.report.tables import p_values, table_of_methods, table_of_runs, write_summary
from grap_solo.training.config import prepare, terms_of
from grap_solo.weighting import WEIGHTINGS

GRIDS = sorted((ROOT / "configs" / "table3").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METHODS = ["fixed", "grap", "grap_tuned"]


# Three steps of 16 images, with small heads.
TINY = ["data.fraction=0.05", "optimizer.batch_size=16", "max_epochs=1", "name=grid"]
TINY += ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16"]


def configuration(directory, *overrides):
    return digits(directory, *TINY, *overrides, file="vicreg")


def start(directory, *arguments):
    """Starts a comparison in a process of one thread, which prints into ``directory/output``."""
    return start_command(
        directory / "output", "compare", "--config-path", DIGITS, "--config-name", "vicreg",
        *SMALL, *TINY, f"checkpoint.dir={directory}",
        "methods=[fixed,grap,grap_tuned]", "seeds=[1,2]", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted comparison."""
    directory = tmp_path_factory.mktemp("whole")
    output = output_of(start(directory), directory / "output")
    return directory / "grid", output


def measured(directory):
    """Everything of a comparison that does not depend on the clock."""
    runs = pd.read_csv(directory / "runs.csv").drop(columns="seconds")
    files = {
        path.relative_to(directory): path.read_bytes()
        for name in ("weights.csv", "diagnostics.csv", "median_weights.yaml")
        for path in sorted(directory.glob(f"*/{name}"))
    }
    assert len(files) == 14  # Both seeds of three methods; diagnostics of GraP alone.
    return runs, files


def test_what_a_comparison_leaves(whole):
    directory, output = whole
    table = pd.read_csv(directory / "summary.csv")
    assert table["method"].tolist() == METHODS and table["runs"].tolist() == [2, 2, 2]
    runs = pd.read_csv(directory / "runs.csv")
    for _, row in table.iterrows():
        mine = runs[runs["method"] == row["method"]]
        for metric in ("online", "linear", "knn", "rankme"):
            assert row[f"{metric}_mean"] == pytest.approx(mine[metric].mean(), rel=1e-4)
            assert row[f"{metric}_std"] == pytest.approx(mine[metric].std(), rel=1e-3, abs=1e-4)
    assert table["cost"][0] == 1 and table["cost_min"][0] == table["cost_max"][0] == 1
    cost = json.loads((directory / "cost.json").read_text())
    assert cost["grap_tuned"]["median"] > cost["grap"]["median"] > 0  # A second run.
    assert table["cost"].tolist() == pytest.approx([cost[each]["median"] for each in METHODS], 1e-4)
    assert table["weight/variance"][0] == 25
    text = (directory / "summary.md").read_text()
    assert text.splitlines()[0] in output and "Holm-corrected" in text
    for name in ("report.html", "weights.png", "accuracy_cost.png", "cost.json"):
        assert (directory / name).stat().st_size > 0
    # A tuned run trains with the median of the run of the same seed, and its heads.
    for seed in (1, 2):
        parent = yaml.safe_load(
            (directory / f"grap-seed{seed}" / "median_weights.yaml").read_text()
        )
        child = yaml.safe_load((directory / f"grap_tuned-seed{seed}" / "config.yaml").read_text())
        assert child["weighting"] == parent["weighting"]  # Weighted heads, as GraP's.
        assert child["seed"] == seed


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same(whole, tmp_path):
    process = start(tmp_path, "--parallel", 2)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("grid/*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    time.sleep(1)  # Its workers end with it.
    finished = {path.parent.name for path in tmp_path.glob("grid/*/result.json")}
    assert 1 <= len(finished) < 6
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("grid/*/result.json")}
    output = output_of(start(tmp_path, "--parallel", 2), tmp_path / "output")
    assert f"{len(finished)} of 6 runs are finished already" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}
    (runs, files), (expected, others) = measured(tmp_path / "grid"), measured(whole[0])
    pd.testing.assert_frame_equal(runs, expected)
    assert files == others


def test_a_failed_run_is_a_row_that_says_why_and_is_tried_again(tmp_path, monkeypatch, capsys):
    original = package.pretrain

    def refuse(cfg, *args):
        if cfg.weighting.name == "grap" and cfg.seed == 2:
            raise MemoryError("no room\nat all")
        return original(cfg, *args)

    with monkeypatch.context() as patch:
        patch.setattr(package, "pretrain", refuse)
        directory = compare(configuration(tmp_path), METHODS, [1, 2])
    runs = pd.read_csv(directory / "runs.csv").fillna({"reason": ""})
    reasons = {(r["method"], r["seed"]): r["reason"] for _, r in runs.iterrows()}
    assert reasons["grap", 2] == "MemoryError: no room"
    assert reasons["grap_tuned", 2] == "the run that it starts from, grap-seed2, has failed"
    assert list(reasons.values()).count("") == 4
    text = (directory / "summary.md").read_text()
    assert "grap, seed 2" in text and "no room" in text and "1 (1 failed)" in text
    capsys.readouterr()
    compare(configuration(tmp_path), METHODS, [1, 2])
    assert "4 of 6 runs are finished already" in capsys.readouterr().out
    runs = pd.read_csv(directory / "runs.csv").fillna({"reason": ""})
    assert (runs["reason"] == "").all() and "failed run" not in (
        directory / "summary.md"
    ).read_text()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_its_own_run_alone(tmp_path, capsys):
    def kill_first_worker():
        while not (tmp_path / "grid" / "fixed-seed1" / "config.yaml").exists():
            time.sleep(0.01)
        for process in multiprocessing.active_children():
            if isinstance(process, SpawnProcess):
                process.kill()

    killer = threading.Thread(target=kill_first_worker, daemon=True)
    killer.start()
    one = Launcher("local", 1)
    directory = compare(configuration(tmp_path), ["fixed", "equal"], [1], launcher=one)
    killer.join()
    runs = pd.read_csv(directory / "runs.csv").set_index("method")
    assert runs["reason"]["fixed"] == "its process was killed by SIGKILL (out of memory?)"
    assert runs["linear"]["equal"] > 0
    text = (directory / "summary.md").read_text()
    assert "fixed, seed 1" in text and "SIGKILL" in text
    capsys.readouterr()
    compare(configuration(tmp_path), ["fixed", "equal"], [1], launcher=one)
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert pd.read_csv(directory / "runs.csv")["linear"].min() > 0


def test_a_disk_that_is_full_for_one_run_leaves_the_others(tmp_path, monkeypatch):
    original = package.pretrain

    def with_little_room(cfg, *args):
        limit = 1 << 18 if cfg.weighting.name == "fixed" else resource.RLIM_INFINITY
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return original(cfg, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, [resource.RLIM_INFINITY] * 2)
            signal.signal(signal.SIGXFSZ, before)

    with monkeypatch.context() as patch:
        patch.setattr(package, "pretrain", with_little_room)
        directory = compare(configuration(tmp_path), ["fixed", "equal"], [1])
    runs = pd.read_csv(directory / "runs.csv").set_index("method")
    assert "fixed-seed1 cannot be written to" in runs["reason"]["fixed"]
    assert runs["linear"]["equal"] > 0
    compare(configuration(tmp_path), ["fixed", "equal"], [1])
    assert pd.read_csv(directory / "runs.csv")["linear"].min() > 0


@pytest.mark.parametrize("launcher", [Launcher(), Launcher(parallel=2), Launcher("slurm")])
def test_runs_on_one_machine_share_their_images(launcher, tmp_path, monkeypatch):
    cells = plan(configuration(tmp_path), ["fixed"], [1], {})
    folders = []

    def note(*_):
        folders.append(os.environ.get(FOLDER_VARIABLE))
        return iter(())

    monkeypatch.setattr(package, "run_tasks", note)
    cells[0].directory.parent.mkdir(parents=True)
    package.run_all(cells, cells[0].directory.parent, launcher)
    shared = cells[0].directory.parent / ".shared"
    assert folders == [None if launcher.name == "slurm" else str(shared)]
    assert not shared.exists() and FOLDER_VARIABLE not in os.environ


def test_a_second_comparison_in_one_folder_is_refused(tmp_path, capsys):
    """A record lock is a process's own: so the first one is another process."""
    output = tmp_path / "first"
    first = start_process(output, hold, str(tmp_path / "grid"))
    while "held" not in (output.read_text() if output.exists() else ""):
        time.sleep(0.02)
    files = ["compare", "--config-path", str(DIGITS), "--config-name", "vicreg", *SMALL, *TINY]
    given = [f"checkpoint.dir={tmp_path}", "methods=[fixed]", "seeds=[1]", "parallel=2"]
    assert main([*files, *given]) == 2
    first.kill()
    first.join()
    error = capsys.readouterr().err
    assert "another command is writing there" in error and error.count("\n") == 1
    assert [file.name for file in (tmp_path / "grid").iterdir()] == [".lock"]


def hold(directory):
    make_folder(Path(directory), "checkpoint.dir")
    with only_one(Path(directory)):
        print("held", flush=True)
        time.sleep(300)


def test_a_collapsed_run_is_named_below_the_table(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "grid")
    rows = "epoch,val_rankme,val_spread\n0,40,0.6\n1,1.5,0.01\n2,1.2,0.01\n"
    (tmp_path / "grid" / "fixed-seed1" / "metrics.csv").write_text(rows)
    directory = compare(configuration(tmp_path), METHODS, [1, 2])
    text = (directory / "summary.md").read_text()
    assert "\n\nfixed, seed 1: the representation collapsed within 3 epochs" in text
    assert text.count("collapsed") == 1 and "collapsed" not in whole[1]


def test_a_comparison_in_which_all_fails_is_a_table_too(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "pretrain", lambda *args: (_ for _ in ()).throw(OSError("full")))
    directory = compare(configuration(tmp_path), ["fixed"], [1])
    text = (directory / "summary.md").read_text()
    assert "OSError: full" in text and "digits, 1 epoch, seeds 1." in text


def test_what_is_trained_is_not_trained_again_for_its_evaluation(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(package, "evaluate", lambda *args: (_ for _ in ()).throw(OSError("no luck")))
        directory = compare(configuration(tmp_path), ["fixed"], [1])
    assert "OSError: no luck" in (directory / "summary.md").read_text()
    weights = directory / "fixed-seed1" / "weights.csv"
    before = weights.stat().st_mtime_ns
    compare(configuration(tmp_path), ["fixed"], [1])
    assert weights.stat().st_mtime_ns == before
    again = pd.read_csv(directory / "runs.csv")
    compare(configuration(tmp_path, "name=other"), ["fixed"], [1])
    whole = pd.read_csv(tmp_path / "other" / "runs.csv")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_a_folder_that_is_not_its_own_is_not_deleted(tmp_path):
    mine = tmp_path / "grid" / "fixed-seed1"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("kept")
    with pytest.raises(ConfigError, match="exists but is not a comparison's"):
        compare(configuration(tmp_path), ["fixed"], [1])
    assert (mine / "notes.txt").read_text() == "kept"


def test_other_runs_in_its_place_are_refused_and_kept(whole):
    directory, _ = whole
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.json")}
    with pytest.raises(ConfigError, match="holds a run with max_epochs 1, not 2: set it"):
        compare(configuration(directory.parent, "max_epochs=2"), METHODS, [1, 2])
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*.json")}


def test_there_is_a_grid_for_each_data_set():
    names = [file.stem for file in GRIDS]
    assert names == ["cifar10", "cifar100", "digits", "imagenet100"]


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_the_papers_grid_is_planned(file):
    def load(path, overrides):
        return compose(path, list(overrides))

    local = ["accelerator=cpu"]
    cfg, grid, _ = read_grid(file.resolve(), [*local, "++data.train_path=x"], load)
    cells = plan(cfg, grid["methods"], grid["seeds"], grid["definitions"])
    assert len(cells) == 36 and len({cell.directory for cell in cells}) == 36
    assert cells[0].cfg.data.dataset == file.stem
    rows = ["fixed", "without_attn_nnclr", "equal", "gradnorm", "dwa", "mgda", "grap"]
    rows += ["grap_four_terms", "grap_tuned"]  # In the order of training.
    assert list(dict.fromkeys(cell.method for cell in cells)) == rows
    for cell in cells:
        joined = cell.cfg.method_kwargs.get("join_feature_loss", False)
        assert joined == (cell.method in ("grap", "grap_tuned"))
        if cell.method in ("grap", "grap_four_terms"):
            assert cell.cfg.weighting == {"name": "grap", "recipe": "paper"}
        rest = ["feature"] if joined else ["byol", "barlow"]
        assert list(terms_of(prepare(cell.cfg))) == ["nnclr", "attn_nnclr", *rest]
    without = next(cell for cell in cells if cell.method == "without_attn_nnclr")
    assert without.cfg.weighting.weights.attn_nnclr == 0
    tuned = cells[-1]
    assert tuned.parent.name == "grap-seed8" and tuned.cfg.name == "grap_tuned-seed8"
    if file.stem != "digits":
        epochs = {"cifar10": 1000, "cifar100": 1000, "imagenet100": 400}[file.stem]
        assert all(cell.cfg.max_epochs == epochs for cell in cells)


def test_the_grids_keys_come_from_the_command_line_too(tmp_path):
    def load(path, overrides):
        return compose(path, list(overrides))

    given = ["methods=[grap]", "+seeds=[3]", "seed=1", "hydra.launcher.partition=gpu"]
    cfg, grid, settings = read_grid(DIGITS / "grap.yaml", given, load)
    assert grid == {"methods": ["grap"], "seeds": [3]} and cfg.seed == 1
    assert settings == ["hydra.launcher.partition=gpu"]
    file = next(file for file in GRIDS if file.stem == "digits")
    cfg, grid, _ = read_grid(file, ["seeds=[9]", "max_epochs=3"], load)
    assert grid["seeds"] == [9] and cfg.max_epochs == 3 and cfg.name == "table3-digits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=[grapp]", "seeds=[1]"], "methods: unknown name 'grapp': did you mean 'grap'"),
        (["methods=[grap_tune]", "seeds=[1]"], "did you mean 'grap_tuned'"),
        (["methods=[]", "seeds=[1]"], "methods: expected a list"),
        (["methods=grap", "seeds=[1]"], "methods: expected a list such as"),
        (["methods=[grap]", "seeds=[a]"], "seeds: expected whole numbers"),
        (["methods=[grap]"], "seeds: missing: add seeds=[...]"),
        (["methods=[grap]", "seeds=[1]", "parallel=0"], "parallel: expected a whole number of 1"),
        (["methods=[grap]", "seeds=[1]", "parallel=two"], "parallel: expected a whole number of 1"),
        (["methods=[grap]", "seeds=[1]", "processes=2"], "processes: it is called parallel now"),
        (["methods=[grap]", "seeds=[1]", "--parallel", "0"], "--parallel: expected a whole number"),
        (
            ["methods=[grap]", "seeds=[1]", "--processes=2"],
            "'--processes': did you mean --parallel",
        ),
        (["methods=[grap]", "seeds=[1]", "launcher=sge"], "launcher: unknown name 'sge': use one"),
        (["methods=[grap]", "seeds=[1]", "gpus_per_run=2"], "gpus_per_run: each of these runs"),
        (
            ["methods=[grap]", "seeds=[1]", "--gpus-per-run", "x"],
            "--gpus-per-run: expected a whole",
        ),
        (["methods=[grap]", "seeds=[1]", "--cancel-on-interrupt"], "it is for SLURM's jobs"),
        (
            ["methods=[grap]", "seeds=[1]", "hydra.launcher.qos=x"],
            "hydra.launcher.qos: it is for SLURM's jobs: add --launcher slurm",
        ),
        (
            ["methods=[grap]", "seeds=[1]", "--parallel", "1", "devices=[1]"],
            "devices: the launcher gives each run its GPU, got [1]: set devices=1",
        ),
        (["methods=[grap]", "seeds=[1]", "max_epochs=0"], "max_epochs: expected a whole number"),
        (["methods=[supervised_tuned]", "seeds=[1]"], "unknown name 'supervised_tuned'"),
        (["methods=[grap]", "seeds=[1]", "definitions=5"], "definitions: expected a block"),
        (
            ["methods=[a/b]", "seeds=[1]", "definitions={a/b: {}}"],
            "definitions: 'a/b': it is a path",
        ),
        (["methods=[grap]", "seeds=[1]", "devices=2"], "devices: a comparison trains each run on"),
        (["methods=[fixed]", "seeds=[1]", "+data.no_labels=true"], "data.val_path: a comparison"),
        (["methods=[x]", "seeds=[1]", "definitions={x: {weighting: {name: grab}}}"], "'grab'"),
        (["methods=[grap]", "seeds=[1]", "weighting.lr=0.3"], "weighting.lr: each method of a"),
        (["methods=[grap]", "seeds=[1]", "+weighting={name: mgda}"], "weighting: each method of"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["compare", "--config-path", str(DIGITS), "--config-name", "all4one"]
    assert main([*flags, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_weighting_is_a_method(tmp_path):
    names = [*WEIGHTINGS, "mgda_tuned", "grap_tuned_weighted", "dwa_scheduled", "grap_finetuned"]
    cells = plan(configuration(tmp_path), names, [1], {})
    assert {cell.method for cell in cells} == set(names)
    children = {cell.method: cell for cell in cells if cell.parent is not None}
    assert children["grap_finetuned"].cfg.weighting.name == "supervised"
    # A child alone brings its parent.
    cells = plan(configuration(tmp_path), ["grap_tuned"], [1], {})
    assert [cell.method for cell in cells] == ["grap", "grap_tuned"]


# ---- the statistics -------------------------------------------------------------------------


def results(**linear):
    return [
        {"method": m, "seed": s, "online": 1.0, "linear": v, "knn": 2.0, "rankme": 3.0,
         "seconds": 1.0, "weights": {"a": 0.5}}
        for m, values in linear.items() for s, v in enumerate(values)
    ]  # fmt: skip


def test_the_p_values_are_welchs_with_holms_correction():
    linear = {
        "fixed": [90.0, 91.0, 90.5, 90.2],
        "b": [92.0, 92.5, 92.2, 91.9],
        "c": [90.1, 91.2, 90.6, 90.3],
        "d": [88.0, 90.0, 89.0, 89.5],
    }
    methods = list(linear)
    found = p_values(table_of_runs(results(**linear)), methods)
    raw = {m: ttest_ind(linear[m], linear["fixed"], equal_var=False).pvalue for m in "bcd"}
    ordered = sorted(raw, key=raw.get)
    expected, largest = {}, 0.0
    for rank, method in enumerate(ordered):  # Holm 1979: step down, never falling.
        largest = max(largest, min(1.0, (3 - rank) * raw[method]))
        expected[method] = largest
    assert np.isnan(found[0])
    assert found[1:] == pytest.approx([expected[m] for m in "bcd"])
    assert found[1] < 0.05 < found[2]


def test_what_cannot_be_tested_is_left_open():
    runs = table_of_runs(results(fixed=[90.0, 91.0], one=[95.0]))
    assert np.isnan(p_values(runs, ["fixed", "one"])).all()
    same = table_of_runs(results(fixed=[90.0, 90.0], same=[90.0, 90.0]))
    assert np.isnan(p_values(same, ["fixed", "same"])).all()
    without = table_of_runs(results(a=[1.0, 2.0], b=[2.0, 3.0]))
    assert np.isnan(p_values(without, ["a", "b"])).all()
    table = table_of_methods(runs, ["fixed", "one"], {"fixed": {"median": 1, "min": 1, "max": 1}})
    assert table["cost"].tolist()[0] == 1 and np.isnan(table["cost"].tolist()[1])


def test_a_run_without_a_figure_leaves_a_gap_and_says_why(tmp_path):
    found = results(fixed=[90.0, None, 92.0], one=[None, None])
    for each in found:
        each |= {"regulariser": 1.0, "notes": {}}
        if each["linear"] is None:
            each |= {"knn": None, "notes": {"linear": "embeddings are constant"}}
    del found[0]["regulariser"]  # As earlier versions left it.
    runs = table_of_runs(found)
    table = table_of_methods(runs, ["fixed", "one"], {})
    assert table["linear_mean"].tolist()[0] == 91 and np.isnan(table["linear_mean"].tolist()[1])
    assert table["runs"].tolist() == [3, 2] and np.isnan(table["p_value"]).all()
    notes = _notes_of_runs(found)
    assert "fixed, seed 1: linear probe: embeddings are constant." in notes
    assert "1 of the runs were evaluated by an earlier version" in notes
    text = write_summary(tmp_path, runs, table, f"Notes.{notes}")
    assert "| one " in text and "nan" not in text
    assert package._say_linear(found[1]) == "no linear probe: embeddings are constant"
    assert package._say_linear(found[0]) == "linear 90.00 %"


def test_rankme_counts_dimensions():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(400, 400)))[0]
    for rank in (1, 4, 16):
        flat = basis[:, :rank] @ np.linalg.qr(generator.normal(size=(32, 32)))[0][:rank]
        assert rankme(flat) == pytest.approx(rank, rel=0.01)
    spectrum = np.array([4.0, 2.0, 1.0, 1.0])
    shares = spectrum / spectrum.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert rankme(basis[:, :4] * spectrum) == pytest.approx(expected, rel=1e-4)


def test_a_result_cut_short_is_no_result(tmp_path):
    from grap_solo.records.files import read_json, write_json

    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "a.json").write_text(json.dumps({"a": 1})[:-2])
    assert read_json(tmp_path / "a.json") is None and read_json(tmp_path / "b.json") is None
