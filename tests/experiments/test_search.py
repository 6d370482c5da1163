"""The search over the weights: its files, its exact resumption, and what it refuses."""

import contextlib
import csv
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from helpers import digits, output_of, start_process
from omegaconf import OmegaConf
from optuna.trial import TrialState

from grap_solo import ConfigError
from grap_solo.experiments.search import find_study, search
from grap_solo.experiments.search_places import finished_trials, make_sampler
from grap_solo.experiments.search_report import SearchRow, _table
from grap_solo.experiments.search_storage import explained_failures, open_study, parse_storage
from grap_solo.experiments.search_trials import Reporter
from grap_solo.methods import GrapAll4One

# 3 steps of 16 images an epoch, with small heads.
FEW = ["++data.fraction=0.05", "optimizer.batch_size=16", "+enable_progress_bar=false",
       "checkpoint.enabled=false", "method_kwargs.proj_hidden_dim=32",
       "method_kwargs.pred_hidden_dim=32", "method_kwargs.proj_output_dim=16",
       "method_kwargs.queue_size=128"]  # fmt: skip
REFERENCE = {"nnclr": 0.5, "attn_nnclr": 0.5, "byol": 2.5, "barlow": 2.5}
TERMS = list(REFERENCE)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def configuration(*overrides, file="grap"):
    return digits("runs", *FEW, *overrides, file=file)


def study_of(directory):
    return optuna.load_study(study_name="search", storage=f"sqlite:///{directory / 'study.db'}")


def rows_of(directory):
    return list(csv.DictReader((directory / "search.csv").open()))


def times(directory):
    """When each file of its runs was written."""
    files = [path for path in directory.glob("*/*") if path.is_file()]
    return {path.relative_to(directory): path.stat().st_mtime_ns for path in files}


def add_trials(directory, count, value, intermediate=None):
    """Finished trials that cost no training; the values count down from ``value``."""
    study = study_of(directory)
    space = {
        term: optuna.distributions.FloatDistribution(weight / 10, weight * 10, log=True)
        for term, weight in REFERENCE.items()
    }
    for index in range(count):
        study.add_trial(
            optuna.trial.create_trial(
                params={term: each.low * 1.3 ** (index + 1) for term, each in space.items()},
                distributions=space,
                value=value - index,
                intermediate_values=intermediate or {},
                user_attrs={
                    "place": len(study.trials),
                    "seconds": 1.0,
                    "reason": "",
                    "accuracy": 1.0,
                },
            )
        )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A search of two trials, for the tests that read it or go on from a copy."""
    directory = tmp_path_factory.mktemp("runs") / "search"
    assert search(configuration("weighting.lr_per_run=1"), directory, 2) == directory / "search.md"
    return directory


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "search"))


def go_on(directory, trials, **settings):
    return search(configuration("weighting.lr_per_run=1"), directory, trials, **settings)


def test_what_a_search_leaves_behind(done):
    rows = rows_of(done)
    names = ["trial-000", "trial-001", "grap", "grap_tuned"]
    assert [row["name"] for row in rows] == names

    for row in rows:
        saved = yaml.safe_load((done / row["name"] / "config.yaml").read_text())
        assert saved["method"] == "grap_all4one" and saved["name"] == row["name"]
        metrics = list(csv.DictReader((done / row["name"] / "metrics.csv").open()))
        probe = [each["val_acc1"] for each in metrics if each["val_acc1"]][-1]
        both = (float(row["score"]) + float(row["accuracy"])) / 2  # The halves are of 270 images.
        assert both == pytest.approx(float(probe), abs=1e-3)
        assert row["state"] == "complete" and row["reason"] == "" and float(row["seconds"]) > 0
        weights = {term: float(row[term]) for term in TERMS}
        if row["name"] == "grap":
            assert saved["weighting"]["name"] == "grap" and saved["weighting"]["lr_per_run"] == 1
            median = yaml.safe_load((done / "grap" / "median_weights.yaml").read_text())
            assert weights == pytest.approx(median["weighting"]["weights"])
            continue
        assert saved["weighting"]["name"] == "fixed"
        assert weights == pytest.approx(saved["weighting"]["weights"], rel=1e-5)
        for term in TERMS:
            assert REFERENCE[term] / 10 <= weights[term] <= REFERENCE[term] * 10
    first, second, grap, tuned = rows
    assert first["byol"] != second["byol"]  # Not the same draw each time.
    assert [tuned[term] for term in TERMS] == [grap[term] for term in TERMS]
    for before, row in ((first, second), (grap, tuned)):
        total = float(before["seconds"]) + float(row["seconds"])
        assert float(row["cumulative_seconds"]) == pytest.approx(total, abs=0.02)
    assert (done / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_search_only_writes_its_report_again(done, capfd):
    before, text = times(done), (done / "search.md").read_text()
    for name in ("search.md", "search.csv", "search.png"):
        (done / name).unlink()
    go_on(done, 2)
    assert times(done) == before and (done / "search.md").read_text() == text
    printed = capfd.readouterr().out
    assert text.strip() in printed and "one seed is no ranking" in text
    for name in ("search.md", "search.csv", "search.png"):
        assert str(done / name) in printed and (done / name).stat().st_size > 0


def row(place, score, state="complete"):
    weights = {"a": 0.5, "b": place}
    return SearchRow(
        f"trial-{place:03d}",
        weights,
        score,
        None if score is None else 100 - score,
        state,
        "",
        10.0,
        place + 1,
        10.0 * (1 + place),
    )


def test_the_table_has_the_best_complete_trial_so_far():
    trials = [row(0, None, "fail"), row(1, 99.0, "pruned"), row(2, 40.0), row(3, 60.0)]
    trials += [row(4, 50.0)]
    grap = [SearchRow("grap", {"a": 1.0, "b": 2.0}, 60.0, 55.0, "complete", "", 12.0, 1, 12.0)]
    lines = _table(trials, grap, ["a", "b"]).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["best of 1 trial", "1", "10", "-", "-", "-", "-"],
        ["best of 2 trials", "2", "20", "-", "-", "-", "-"],
        ["best of 4 trials", "4", "40", "40.00", "60.00", "0.5", "3"],
        ["best of 5 trials", "5", "50", "40.00", "60.00", "0.5", "3"],
        ["grap", "1", "12", "55.00", "60.00", "1", "2"],
    ]
    assert len({len(line) for line in lines}) == 1


def search_and_wait(file, directory, threads):
    """A search that never comes back from its last trial's first validation."""
    torch.set_num_threads(threads)
    report = Reporter.on_validation_end

    def report_and_wait(self, trainer, module):
        report(self, trainer, module)
        if self.trial.number == 13 and not trainer.sanity_checking:
            print("in the middle", flush=True)
            time.sleep(600)

    # The process lives for this one search: what is changed need not be changed back.
    Reporter.on_validation_end = report_and_wait
    search(OmegaConf.load(file), directory, 14)


def test_a_killed_search_goes_on_as_if_it_had_not_been(copy, tmp_path):
    add_trials(copy, 11, value=30.0)  # With those before, enough for TPE to leave random search.
    killed = Path(shutil.copytree(copy, tmp_path / "killed"))
    before = times(copy)
    go_on(copy, 14)  # One is missing.
    assert before.items() <= times(copy).items()

    file = tmp_path / "config.yaml"
    OmegaConf.save(configuration("weighting.lr_per_run=1"), file)
    output = tmp_path / "output"
    process = start_process(output, search_and_wait, file, killed, torch.get_num_threads())
    while "in the middle\n" not in (output.read_text() if output.exists() else ""):
        assert process.is_alive(), output.read_text()
        time.sleep(0.02)
    process.kill()
    text = output_of(process, output, -signal.SIGKILL)
    assert "study" not in text  # Optuna is silent.
    left = study_of(killed).trials[-1]
    assert left.state == TrialState.RUNNING and list(left.intermediate_values) == [0]
    (killed / "trial-013" / "junk").write_text("of the run that was cut off")

    go_on(killed, 14)
    whole, resumed = (finished_trials(study_of(directory)) for directory in (copy, killed))
    assert len(whole) == len(resumed) == 14
    for one, other in zip(whole, resumed):
        assert one.params == other.params and one.value == other.value
        assert one.state == other.state and one.intermediate_values == other.intermediate_values
    one, other = (directory / "trial-013" / "metrics.csv" for directory in (copy, killed))
    assert one.read_bytes() == other.read_bytes()  # Every loss, and no line of the first attempt.
    assert [row["name"] for row in rows_of(killed)] == [row["name"] for row in rows_of(copy)]
    assert not (killed / "trial-013" / "junk").exists() and not (killed / "trial-014").exists()
    abandoned = study_of(killed).trials[13]
    assert abandoned.state == TrialState.FAIL and abandoned.params == whole[13].params
    # It was TPE's draw, not a random one.
    random = optuna.create_study(sampler=make_sampler("random", 0, 13)).ask()
    drawn = {term: random.suggest_float(term, w / 10, w * 10, log=True)
             for term, w in REFERENCE.items()}  # fmt: skip
    assert whole[13].params != drawn


def test_a_trial_that_fails_is_a_row_with_its_reason(copy, monkeypatch):
    start = GrapAll4One.on_train_start

    def refuse(self):
        start(self)
        if self.trainer.default_root_dir.endswith("trial-002"):
            raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(GrapAll4One, "on_train_start", refuse)
    go_on(copy, 4)
    failed, after = rows_of(copy)[2:4]
    assert failed["name"] == "trial-002" and failed["state"] == "fail"
    assert failed["reason"] == "RuntimeError: out of memory" and failed["accuracy"] == ""
    assert float(failed["byol"]) > 0 and float(failed["seconds"]) > 0
    assert after["name"] == "trial-003" and after["state"] == "complete"
    assert after["byol"] != failed["byol"]
    assert "of 4 trials 0 were pruned and 1 failed" in (copy / "search.md").read_text()
    before = times(copy)
    go_on(copy, 4)  # It is one of the four.
    assert times(copy) == before


@pytest.mark.parametrize(
    ("epoch", "state", "reported"), [(0, "pruned", [0]), (1, "complete", [0, 1])]
)
def test_the_pruner_sees_every_epoch_and_spares_a_run_at_its_end(copy, epoch, state, reported):
    study = study_of(copy)
    settings = {**study.user_attrs["settings"], "sampler": "random", "pruner": "median"}
    study.set_user_attr("settings", settings)
    # After the epoch they are better than any run, before it worse.
    add_trials(copy, 5, value=1.0, intermediate={0: 0.0, epoch: 101.0})
    go_on(copy, 8, sampler="random", pruner="median")
    trials = finished_trials(study_of(copy))
    for trial in trials[:2]:
        assert list(trial.intermediate_values) == [0, 1]
        assert trial.intermediate_values[1] == trial.value
    assert trials[7].state.name.lower() == state
    assert list(trials[7].intermediate_values) == reported
    last = rows_of(copy)[7]
    assert last["name"] == "trial-007" and last["state"] == state and last["reason"] == ""
    assert float(last["accuracy"]) == pytest.approx(trials[7].user_attrs["accuracy"], abs=1e-3)
    best = "best of 8 trials |          8 |"
    assert best in (copy / "search.md").read_text()


def test_a_grap_run_that_was_cut_off_is_done_again(copy):
    before = times(copy)
    file = copy / "grap_tuned" / "result.json"
    result = json.loads(file.read_text())
    file.unlink()
    go_on(copy, 2)
    assert json.loads(file.read_text())["accuracy"] == result["accuracy"]
    changed = {path for path, written in times(copy).items() if written != before[path]}
    assert {path.parts[0] for path in changed} == {"grap_tuned"}
    assert Path("grap_tuned/config.yaml") in changed


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["max_epochs=3"], {}, "max_epochs 2, not 3"),
        (["seed=6"], {}, "seed 5, not 6"),
        ([], {"sampler": "random"}, "--sampler 'tpe', not 'random'"),
        ([], {"pruner": "median"}, "--pruner 'none', not 'median'"),
        ([], {"seed": 1}, "--seed 0, not 1"),
    ],
    ids=str,
)
def test_other_settings_in_the_same_folder_are_refused(done, overrides, settings, message):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.name[-4:] != "lock"}
    with pytest.raises(ConfigError, match=f"holds a search with {message}: set it back"):
        search(configuration("weighting.lr_per_run=1", *overrides), done, 3, **settings)
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written


def test_a_search_of_the_version_with_other_defaults_is_told_apart(copy):
    study = study_of(copy)
    settings = study.user_attrs["settings"]
    assert settings["configuration"]["weighting"]["parametrization"] == "exp"
    settings["configuration"]["weighting"] = {"name": "grap", "lr_per_run": 1}
    study.set_user_attr("settings", settings)
    with pytest.raises(ConfigError, match="weighting.parametrization 'clip', not 'exp'"):
        go_on(copy, 3)


def test_where_the_runs_go_and_what_they_are_called_is_no_difference(done):
    before = times(done)
    search(
        configuration("weighting.lr_per_run=1", "name=other", "checkpoint.dir=elsewhere"), done, 1
    )
    assert times(done) == before and len(rows_of(done)) == 4


def test_keys_that_change_no_training_may_differ(done, capsys):
    before = times(done)
    search(
        configuration("weighting.lr_per_run=1", "data.num_workers=1", "+weighting.ema=0"), done, 1
    )
    assert "resuming with data.num_workers=1 (before: 0)\n" in capsys.readouterr().out
    assert times(done) == before


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ([], {"sampler": "tpee"}, "sampler: unknown name 'tpee': did you mean 'tpe'"),
        ([], {"pruner": "hyper"}, "pruner: unknown name 'hyper': use one of median, none"),
        ([], {"trials": 0}, "trials: expected a whole number of 1 or more, got 0"),
        ([], {"seed": -1}, "seed: expected a whole number of 0 or more, got -1"),
        (["max_epochs=0"], {}, "max_epochs: expected a whole number"),
        (["devices=2", "+strategy=ddp"], {}, "devices: a search trains each run on one device"),
        (
            ["data.dataset=custom", "+data.train_path=images"],
            {},
            "data.val_path: .* labelled validation images: give some",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_before_anything_is_made(
    tmp_path, overrides, settings, message
):
    arguments = {"trials": 1, **settings}
    with pytest.raises(ConfigError, match=message):
        search(configuration(*overrides), tmp_path / "search", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_configuration_ends_the_search_and_can_be_mended(tmp_path):
    for path in ("nowhere", "elsewhere"):  # The second is not another search's configuration.
        paths = [f"+data.{part}_path={tmp_path / path}" for part in ("train", "val")]
        with pytest.raises(ConfigError, match=f"data.train_path: no such folder .*{path}"):
            search(configuration("data.dataset=custom", *paths), tmp_path / "search", 3)
    assert [trial.state for trial in study_of(tmp_path / "search").trials] == [
        TrialState.FAIL,
        TrialState.RUNNING,
    ]
    assert finished_trials(study_of(tmp_path / "search")) == []
    with pytest.raises(ConfigError, match="limit_val_batches.*never validated"):
        search(configuration("+limit_val_batches=0", "max_epochs=1"), tmp_path / "search", 3)


def test_an_interrupt_ends_the_search_and_is_no_failed_trial(copy, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("grap_solo.experiments.search_trials.pretrain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go_on(copy, 3)
    assert len(finished_trials(study_of(copy))) == 2


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not empty and not a search"):
        search(configuration(), tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="mine.txt cannot be made"):
        search(configuration(), tmp_path / "mine.txt", 1)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.db").write_text("no database" * 100)
    with pytest.raises(ConfigError, match="study.db: not a study, or a damaged one") as caught:
        search(configuration(), tmp_path / "damaged", 1)
    assert len(str(caught.value).splitlines()) == 1


LOCKED = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_searches_do_not_write_one_folder(done):
    command = [sys.executable, "-c", LOCKED, str(done / ".lock")]
    before = times(done)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError, match="another command is writing there"):
            go_on(done, 3)
        process.stdin.close()
    go_on(done, 2)  # The lock has ended with its process.
    assert times(done) == before


@pytest.mark.parametrize(
    "name", ["a?b", "a#b", "a%20b", "lr=1", "{x}", "[x] é", "a&b;c", ":memory:"]
)
def test_a_study_lies_in_its_folder_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (Path(name), tmp_path / name):  # Relative and absolute.
        folder.mkdir(exist_ok=True)
        storage = parse_storage(None, folder)
        with open_study(storage, find_study(folder, storage)) as study:
            study.set_user_attr("is", name)
        assert sorted(path.name for path in tmp_path.iterdir()) == [name]
        assert [path.name for path in folder.iterdir()] == ["study.db"]
    with open_study(parse_storage(None, Path(name)), "search") as study:
        assert study.user_attrs == {"is": name}


def test_a_study_that_another_process_uses_is_not_damaged(tmp_path):
    storage, file = parse_storage(None, tmp_path), tmp_path / "study.db"
    with open_study(storage, "search") as study:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            message = f"^{file}: another process uses it .*locked"
            with pytest.raises(ConfigError, match=message), explained_failures(storage):
                study.ask()
            other.execute("ROLLBACK")
        study.ask()


def test_a_study_that_cannot_be_opened_is_not_damaged(tmp_path):
    file = tmp_path / "study.db"
    file.mkdir()
    message = f"^{file}: cannot be read or written .unable to open"
    storage = parse_storage(None, tmp_path)
    with (
        pytest.raises(ConfigError, match=message),
        explained_failures(storage),
        open_study(storage, "search"),
    ):
        pass
