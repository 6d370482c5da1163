"""A search by many workers: lost trials, storages that are locked or away, and other faults."""

import contextlib
import dataclasses
import os
import pickle
import resource
import signal
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from cluster import clusters
from database import PASSWORD, Server
from helpers import CONFIGS, SMALL, digits, output_of, start_command, start_process
from optuna.samplers import TPESampler
from optuna.trial import TrialState

import grap_solo.experiments.search_storage as storage_module
import grap_solo.experiments.search_trials as trials_module
from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.experiments.search import search
from grap_solo.experiments.search_places import (
    Search,
    claim_trial,
    finished_trials,
    make_sampler,
)
from grap_solo.experiments.search_storage import (
    check_for_slurm,
    explained_failures,
    open_study,
    parse_storage,
    patiently,
)
from grap_solo.experiments.search_trials import run_trial, split_in_halves
from grap_solo.experiments.tasks import make_launcher
from grap_solo.records.files import read_json

# 3 steps of 16 images an epoch, with small heads.
FEW = ["++data.fraction=0.05", "optimizer.batch_size=16", "+enable_progress_bar=false",
       "checkpoint.enabled=false", "method_kwargs.proj_hidden_dim=32",
       "method_kwargs.proj_output_dim=16"]  # fmt: skip
REFERENCE = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def small(*overrides):
    return digits("runs", *FEW, *overrides, file="grap_vicreg")


def command(directory, *arguments):
    file = ["--config-path", str(CONFIGS / "digits"), "--config-name", "grap_vicreg"]
    return ["search", str(directory), *file, *SMALL, *FEW, *map(str, arguments)]


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.remove()


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def kept(request, tmp_path):
    """A search with a study in each kind of storage, for workers that train nothing."""
    (tmp_path / "search").mkdir()
    text = None
    if request.param == "journal":
        text = f"journal:{tmp_path / 'study'}"
    if request.param == "postgresql":
        text = request.getfixturevalue("server").url
    return search_of(tmp_path / "search", text, study=str(tmp_path))


def search_of(directory, storage=None, study="search", **others):
    where = parse_storage(storage, directory)
    found = Search(directory, where, study, 3, "tpe", "none", 0, {}, REFERENCE, True)
    return dataclasses.replace(found, **others)


def wait_for(output, text, process):
    while text not in (output.read_text() if output.exists() else ""):
        assert process.is_alive(), output.read_text()
        time.sleep(0.02)


def claim_and_hold(search, beats=False):
    storage_module.HEARTBEAT = 1  # The process lives for this one trial.
    with open_study(search.storage, search.study) as study:
        claim = claim_trial(search, study)
        with storage_module.beating(study, claim.trial) if beats else contextlib.nullcontext():
            time.sleep(0.5)
            print(f"holds {claim.place}", flush=True)
            time.sleep(600)


# ---- lost trials ------------------------------------------------------------------------------


def test_a_killed_workers_trial_is_tried_again_and_counts_once(kept, tmp_path):
    output = tmp_path / "output"
    process = start_process(output, claim_and_hold, kept)
    wait_for(output, "holds 0\n", process)
    with open_study(kept.storage, kept.study) as study:
        second = claim_trial(kept, study)
        assert second.place == 1  # The first one still runs.
        study.tell(second.trial, 1.0)
        second.lock.close()
        process.kill()
        output_of(process, output, -signal.SIGKILL)
        lost = study.trials[0]
        assert lost.state == TrialState.RUNNING
        again = claim_trial(kept, study)
        assert study.trials[0].state == TrialState.FAIL
        assert (again.place, again.weights) == (0, lost.params)
        assert again.weights != second.weights
        study.tell(again.trial, 2.0)
        again.lock.close()
        third = claim_trial(kept, study)
        study.tell(third.trial, 3.0)
        third.lock.close()
        assert third.place == 2 and third.weights not in (again.weights, second.weights)
        assert claim_trial(kept, study) is None
        assert [each.value for each in finished_trials(study)] == [2.0, 1.0, 3.0]


def test_a_database_takes_a_trial_without_a_heartbeat_for_lost(server, tmp_path, monkeypatch):
    """As of a machine that is gone while the file system keeps its locks."""
    own = search_of(tmp_path, server.url, study=str(tmp_path))
    outputs, processes = [tmp_path / "silent", tmp_path / "beating"], []
    with open_study(own.storage, own.study):  # Makes the tables.
        pass
    for place, output in enumerate(outputs):
        processes.append(start_process(output, claim_and_hold, own, place == 1))
        wait_for(output, f"holds {place}\n", processes[-1])
    monkeypatch.setattr(storage_module, "HEARTBEAT", 1)
    monkeypatch.setattr(storage_module, "GRACE", 3)
    with open_study(own.storage, own.study) as study:
        study._storage.record_heartbeat(study.trials[0]._trial_id)  # The only one.
        time.sleep(4.5)
        again = claim_trial(own, study)
        assert [each.state for each in study.trials] == [
            TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING,
        ]  # fmt: skip
        assert (again.place, again.weights) == (0, study.trials[0].params)
        again.lock.close()
    for process in processes:
        process.kill()
        process.join()


def test_workers_of_a_search_draw_apart_and_one_worker_as_before():
    samplers = [make_sampler("tpe", 0, place, True) for place in range(20)]
    seeds = {each._rng.rng.randint(1 << 30) for each in samplers}
    assert len(seeds) == 20
    assert samplers[0]._constant_liar
    alone = make_sampler("tpe", 0, 3)  # Optuna's own defaults, whatever they are.
    assert type(alone) is TPESampler
    assert alone._constant_liar == TPESampler()._constant_liar


# ---- halves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1, 1], [10, 7, 3, 1], [54] * 10])
def test_the_validation_images_are_split_evenly_by_seed(counts):
    labels = np.repeat([-1, *range(len(counts))], [5, *counts])
    labels = np.random.default_rng(0).permutation(labels)
    halves = split_in_halves(labels, 0)
    assert (halves[labels == -1] == -1).all()
    first, second = (np.bincount(labels[halves == half], minlength=len(counts)) for half in (0, 1))
    assert (first + second == counts).all() and abs(first - second).max() <= 1
    assert abs(first.sum() - second.sum()) <= 1
    assert (split_in_halves(labels, 0) == halves).all()
    if len(labels) > 20:
        assert (split_in_halves(labels, 1) != halves).any()


@pytest.mark.parametrize("block", ["null", "{ink: {task: regression, column: ink}, digit: {}}"])
def test_what_is_climbed_differs_from_what_is_reported(block, tmp_path):
    """With downstream heads, by the first one that classifies."""
    block = block.replace("{}", "{task: classification}")
    changes = [f"+downstream={block}", "max_epochs=4", "optimizer.lr=0.002"]
    own = search_of(tmp_path, plain=plain_of(small(*changes)))
    run_trial(own)
    with open_study(own.storage, own.study) as study:
        (trial,) = finished_trials(study)
    metrics = (tmp_path / "trial-000" / "metrics.csv").read_text().splitlines()
    names = metrics[0].split(",")
    last = [row for row in map(lambda line: dict(zip(names, line.split(","))), metrics[1:])
            if row["val_acc1"]][-1]  # fmt: skip
    accuracy = trial.user_attrs["accuracy"]
    assert (trial.value + accuracy) / 2 == pytest.approx(float(last["val_acc1"]), abs=1e-3)
    assert trial.value == pytest.approx(round(trial.value * 2.7) / 2.7)  # Of 270 images.


def plain_of(cfg):
    from grap_solo.experiments.search import _shared_keys

    return _shared_keys(cfg)


# ---- storages that are locked or away ---------------------------------------------------------


@contextlib.contextmanager
def locked_for(file, seconds):
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(seconds, lambda: other.execute("ROLLBACK"))
    timer.start()
    yield
    timer.cancel()
    timer.join()
    other.close()


def after_first_epoch(monkeypatch, act):
    """Acts in the middle of the first trial, whose score then is to be reported."""
    report = trials_module.Reporter.on_validation_end
    done = []

    def act_and_report(self, trainer, module):
        if not trainer.sanity_checking and not done:
            done.append(act())
        report(self, trainer, module)

    monkeypatch.setattr(trials_module.Reporter, "on_validation_end", act_and_report)


def test_a_worker_waits_for_a_locked_file(tmp_path, monkeypatch):
    own = search_of(tmp_path, plain=plain_of(small()))
    stack = contextlib.ExitStack()
    start = time.monotonic()
    after_first_epoch(
        monkeypatch, lambda: stack.enter_context(locked_for(tmp_path / "study.db", 20))
    )
    with stack:  # SQLite itself waits for 5 seconds.
        assert run_trial(own)
    assert time.monotonic() - start > 20
    with open_study(own.storage, own.study) as study:
        assert [each.state for each in study.trials] == [TrialState.COMPLETE]
        assert list(study.trials[0].intermediate_values) == [0, 1]


def test_a_file_that_stays_locked_ends_the_command_and_the_trial_is_tried_again(
    tmp_path, monkeypatch
):
    own = search_of(tmp_path, plain=plain_of(small()))
    monkeypatch.setattr(storage_module, "PATIENCE", 1)
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        lock = locked_for(tmp_path / "study.db", 600)
        after_first_epoch(patch, lambda: stack.enter_context(lock))
        message = "study.db: out of reach for 1 seconds .database is locked.: nothing is lost"
        with pytest.raises(ConfigError, match=message) as caught:
            run_trial(own)
        assert "\n" not in str(caught.value)
    assert run_trial(own)
    with open_study(own.storage, own.study) as study:
        assert [each.state for each in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
        assert study.trials[0].params == study.trials[1].params
        assert [each.number for each in finished_trials(study)] == [1]


@pytest.mark.slow
def test_a_search_goes_on_when_its_database_is_back(server, tmp_path, monkeypatch, capsys):
    def restart():
        server.stop()
        threading.Timer(20, server.start).start()

    after_first_epoch(monkeypatch, restart)
    start = time.monotonic()
    search(small("max_epochs=1", "scheduler.warmup_epochs=0"), tmp_path / "s", 2,
           storage=server.url)  # fmt: skip
    assert time.monotonic() - start > 20
    saved = read_json(tmp_path / "s" / "storage.json")
    with open_study(parse_storage(server.url, tmp_path), saved["study"]) as study:
        assert [each.state for each in study.trials] == [TrialState.COMPLETE] * 2
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert not any(PASSWORD.encode() in path.read_bytes() for path in files)
    assert "trial-001" in (tmp_path / "s" / "search.csv").read_text()
    printed = capsys.readouterr()
    assert PASSWORD not in printed.out + printed.err
    with pytest.raises(ConfigError, match="the study of .* is in postgresql.*, not in study.db"):
        search(small(), tmp_path / "s", 2)


def test_a_database_that_is_away_at_the_start_is_one_line(tmp_path):
    url = f"postgresql://solo:{PASSWORD}@127.0.0.1:9/x"
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match="cannot be used: .*refused") as caught:
        search(small(), tmp_path, 1, storage=url)
    assert PASSWORD not in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_damaged_journal_is_one_line(tmp_path):
    storage = parse_storage(f"journal:{tmp_path / 'study'}", tmp_path)
    (tmp_path / "study").write_text("no journal\n" * 3)
    message = "study: not a study, or a damaged one"
    with (
        pytest.raises(ConfigError, match=message),
        explained_failures(storage),
        open_study(storage, "search"),
    ):
        pass


@pytest.mark.parametrize("storage", ["server", "sqlite"])
def test_an_error_that_stays_is_not_waited_for(storage, tmp_path):
    where = parse_storage(None, tmp_path)
    calls = []

    def refuse():
        calls.append(1)
        raise sqlite3.IntegrityError("no such trial")

    with pytest.raises(sqlite3.IntegrityError):
        patiently(dataclasses.replace(where, kind=storage), refuse)
    assert len(calls) == 1


# ---- what --storage takes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "label"),
    [
        (None, "sqlite", "DIR/study.db"),
        ("sqlite:///DIR/own.db", "sqlite", "DIR/own.db"),
        ("journal:DIR/own", "journal", "DIR/own"),
        ("DIR/own.journal", "journal", "DIR/own.journal"),
        ("DIR/own.log", "journal", "DIR/own.log"),
        (
            "postgresql://me:geheim@h:5/x?password=geheim",
            "server",
            "postgresql+psycopg://me:***@h:5/x",
        ),
    ],
)
def test_storages(text, kind, label, tmp_path):
    if kind == "server":
        pytest.importorskip("psycopg")
    found = parse_storage(text and text.replace("DIR", str(tmp_path)), tmp_path)
    assert (found.kind, found.label) == (kind, label.replace("DIR", str(tmp_path)))
    assert PASSWORD not in repr(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study", "expected journal:PATH, or a database's URL"),
        ("nothing://h/x", "expected journal:PATH, or a database's URL"),
        ("mysql+nothing://h/x", "expected journal:PATH, or a database's URL"),
        ("mysql+asyncmy://me:geheim@h/x", "asyncmy is not installed"),
        ("journal:", "expected a path"),
        ("journal:/no/such/folder/study", "no such folder /no/such/folder"),
        ("sqlite://", "expected a path"),
        ("journal:DIR", "is a folder"),
    ],
)
def test_storages_that_are_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^--storage: .*{message}") as caught:
        parse_storage(text.replace("DIR", str(tmp_path)), tmp_path)
    assert PASSWORD not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "SQLite is for one machine"),
        ("postgresql://me:geheim@h/x", "~/.pgpass"),
        ("postgresql://h/x?user=me&password=geheim", "~/.pgpass"),
    ],
)
def test_storages_that_jobs_cannot_use(text, message, tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match=message) as caught:
        check_for_slurm(parse_storage(text, tmp_path))
    assert PASSWORD not in str(caught.value)
    check_for_slurm(parse_storage("postgresql://me@h/x", tmp_path))
    check_for_slurm(parse_storage(f"journal:{tmp_path / 'x'}", tmp_path))


# ---- faults of runs ---------------------------------------------------------------------------


def test_a_full_disk_in_one_trial_leaves_it_to_another_worker(tmp_path, monkeypatch):
    own = search_of(tmp_path, f"journal:{tmp_path / 'study'}",
                    plain=plain_of(small("checkpoint.enabled=true")))  # fmt: skip
    original = trials_module.pretrain

    def with_little_room(*arguments):
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
        try:
            return original(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, [resource.RLIM_INFINITY] * 2)
            signal.signal(signal.SIGXFSZ, before)

    with monkeypatch.context() as patch:
        patch.setattr(trials_module, "pretrain", with_little_room)
        with pytest.raises(ConfigError, match="trial-000 cannot be written to"):
            run_trial(own)
    assert run_trial(own)
    with open_study(own.storage, own.study) as study:
        assert [each.params for each in study.trials] == [study.trials[0].params] * 2
        assert [each.user_attrs["place"] for each in finished_trials(study)] == [0]


def test_a_trial_whose_folder_cannot_be_made_fails_alone(tmp_path):
    own = search_of(tmp_path, plain=plain_of(small()), trials=2)
    (tmp_path / "trial-000").write_text("a file")
    assert run_trial(own) and run_trial(own) and not run_trial(own)
    with open_study(own.storage, own.study) as study:
        failed, good = finished_trials(study)
    assert failed.user_attrs["reason"].startswith("NotADirectoryError")
    assert good.state == TrialState.COMPLETE


def test_a_search_of_an_earlier_version_is_refused(tmp_path):
    with open_study(parse_storage(None, tmp_path), "search") as study:
        study.set_user_attr("settings", {"sampler": "tpe", "pruner": "none", "seed": 0})
        study.add_trial(
            optuna.trial.create_trial(value=1.0, user_attrs={"seconds": 1.0, "reason": ""})
        )
    with pytest.raises(ConfigError, match="holds a search of an earlier version"):
        search(small(), tmp_path, 2)


def workers_of(parent):
    """The worker processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (folder / "status").read_text()
            line = (folder / "cmdline").read_text()
            if f"PPid:\t{parent}\n" in status and "spawn_main" in line:
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_worker_and_then_the_command_are_killed(server, tmp_path):
    directory, output = tmp_path / "search", tmp_path / "output"
    line = command(directory, "--trials", 4, "--parallel", 2, "--storage", server.url,
                   "max_epochs=5")  # fmt: skip
    process = start_command(output, *line)
    logs = [directory / "logs" / f"worker-{at:03d}.log" for at in range(2)]
    for log in logs:
        wait_for(log, "files in", process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    wait_for(output, "killed by SIGKILL (out of memory?): its trial is tried again", process)
    wait_for(output, "trial-00", process)
    left = workers_of(process.pid)
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while any(Path("/proc", str(each)).exists() for each in left):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    search(small("max_epochs=5"), directory, 4, storage=server.url)
    study_name = read_json(directory / "storage.json")["study"]
    with open_study(parse_storage(server.url, directory), study_name) as study:
        places = [each.user_attrs["place"] for each in finished_trials(study)]
        lost = [each for each in study.trials if each.state == TrialState.FAIL]
        again = {each.user_attrs.get("again"): each for each in study.trials}
    assert places == [0, 1, 2, 3] and lost
    for each in lost:
        assert again[each.number].params == each.params
    names = {path.name for path in directory.glob("trial-*")}
    assert names == {f"trial-00{at}" for at in range(4)}


@pytest.mark.slow
def test_a_run_that_is_refused_everywhere_ends_the_search_with_one_line(tmp_path, capfd):
    line = command(tmp_path / "search", "--trials", 9, "--parallel", 2, "+limit_val_batches=0")
    assert main(line) == 2
    error = capfd.readouterr().err.splitlines()
    assert [each for each in error if each.startswith("grap-solo: search: limit_val_batches")]
    assert "Traceback" not in "\n".join(error)
    with open_study(parse_storage(None, tmp_path / "search"), "search") as study:
        assert finished_trials(study) == [] and len(study.trials) <= 5


@pytest.mark.slow
def test_one_worker_process_has_the_history_of_none(tmp_path):
    cfg = small("max_epochs=1", "scheduler.warmup_epochs=0")
    histories = []
    for name, launcher in (("none", None), ("one", make_launcher(parallel=1))):
        search(cfg, tmp_path / name, 2, launcher=launcher)
        with open_study(parse_storage(None, tmp_path / name), "search") as study:
            trials = finished_trials(study)
        histories.append(
            [(each.params, each.value, each.user_attrs["accuracy"]) for each in trials]
        )
    assert histories[0] == histories[1]
    assert read_json(tmp_path / "one" / "grap_tuned" / "result.json")["accuracy"] > 0


@pytest.fixture(scope="module")
def on_a_cluster(tmp_path_factory):
    yield from clusters(tmp_path_factory)


@pytest.mark.slow
def test_a_search_on_a_cluster(on_a_cluster, capfd):
    root = on_a_cluster()
    line = command("found", "--trials", 2, "--launcher", "slurm", "--parallel", 2,
                   "accelerator=cpu", "hydra.launcher.timeout_min=9")  # fmt: skip
    assert main(line) == 2
    assert "SQLite is for one machine" in capfd.readouterr().err
    assert not (root / "found").exists()
    line += ["--storage", "journal:found/study.journal"]
    assert main(line) == 0
    printed = capfd.readouterr().out
    assert "submitted 3 runs" in printed and "submitted 1 run " in printed  # grap_tuned waits.
    assert "trial-001: " in printed and "grap_tuned" in (root / "found" / "search.md").read_text()


def test_a_search_can_be_sent_to_a_worker(tmp_path):
    own = search_of(tmp_path, plain=plain_of(small()))
    assert pickle.loads(pickle.dumps(own)) == own
