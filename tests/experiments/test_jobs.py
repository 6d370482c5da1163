"""The launcher on a SLURM cluster that is a few small programs: what it asks for, how jobs end."""

import itertools
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import small_tasks
from cluster import asked_of_sbatch, clusters, how_jobs_ended
from helpers import DIGITS, ROOT, SMALL, output_of, start_process

from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.experiments.jobs import JOBS_FILE, JOBS_FOLDER, read_settings
from grap_solo.experiments.tasks import Task, make_launcher, run_tasks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def on_a_cluster(tmp_path_factory):
    yield from clusters(tmp_path_factory)


@pytest.fixture
def root(on_a_cluster):
    """A folder to start from; the jobs can import the tests' modules."""
    path = f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return on_a_cluster(PYTHONPATH=path)


def task(folder, name, call, after=None):
    return Task(name, call, Path(folder, f"{name}.log"), after)


def run(tasks, folder, uses_gpu=False, **launcher):
    found = run_tasks(tasks, make_launcher("slurm", **launcher), Path(folder), uses_gpu)
    return {each.name: reason for each, reason in found}


def recorded(folder, name, seconds=0.0, after=None):
    return task(folder, name, partial(small_tasks.record, str(folder), name, seconds), after)


def submissions(root):
    """The options of each submission to SLURM, in order."""
    files = sorted((root / "cluster").glob("submission-*.sh"))
    return [asked_of_sbatch(file.read_text()) for file in files]


def test_parents_are_an_array_and_children_another_that_waits_for_it(root, capsys):
    tasks = [recorded(root, f"t{at}", 1.0) for at in range(3)]
    tasks += [recorded(root, f"t{at}", after=f"t{at - 3}") for at in (3, 4)]
    given = ["hydra.launcher.partition=gpu", "+hydra.launcher.additional_parameters.nice=5"]
    given += ["hydra.launcher.timeout_min=60", "hydra.launcher.mem_gb=16"]
    reasons = run(tasks, root, uses_gpu=True, parallel=2, slurm=given)
    assert reasons == {f"t{at}": None for at in range(5)}
    first, second = submissions(root)
    assert (first["array"], second["array"]) == ("0-2%2", "0-1%2")
    number = os.environ["JOB_ID"]
    assert second["dependency"] == f"afterany:{number}" and "dependency" not in first
    for asked in (first, second):
        assert (asked["partition"], asked["time"], asked["mem"]) == ("gpu", "60", "16GB")
        assert asked["nodes"] == asked["ntasks-per-node"] == asked["gpus-per-node"] == "1"
        assert asked["nice"] == "5" and asked["signal"] == "USR2@120" and "requeue" in asked
        assert (
            asked["output"].startswith(f"{root}/{JOBS_FOLDER}/") and asked["cpus-per-task"] == "8"
        )
    found = {f"t{at}": json.loads((root / f"t{at}.json").read_text()) for at in range(5)}
    ends = [(each["began"], 1) for each in found.values()]
    ends += [(each["ended"], -1) for each in found.values()]
    assert max(itertools.accumulate(change for _, change in sorted(ends))) == 2
    assert found["t3"]["began"] > max(found[f"t{at}"]["ended"] for at in range(3))
    assert f"submitted 3 runs as job {number}\n" in capsys.readouterr().out
    assert (root / "t0.log").read_text() == "t0 has run\n"


@pytest.mark.parametrize(
    ("uses_gpu", "gpus", "slurm", "expected"),
    [
        (False, None, [], (None, None)),
        (True, 2, [], ("2", None)),
        (True, 1, ["hydra.launcher.gres=gpu:a100:1"], (None, "gpu:a100:1")),
    ],
)
def test_a_job_asks_for_the_gpus_of_its_run(root, uses_gpu, gpus, slurm, expected):
    run([recorded(root, "t0")], root, uses_gpu, gpus_per_run=gpus, slurm=slurm)
    (asked,) = submissions(root)
    assert (asked.get("gpus-per-node"), asked.get("gres")) == expected


def test_a_job_that_fails_says_why_and_is_submitted_again(root):
    bad = {
        "killed": partial(small_tasks.kill_itself),
        "refused": small_tasks.refuse,
        "failed": small_tasks.fail,
    }
    tasks = [task(root, name, call) for name, call in bad.items()]
    reasons = run([*tasks, recorded(root, "t0")], root)
    number = os.environ["JOB_ID"]
    log = root / JOBS_FOLDER / f"{number}_0" / f"{number}_0_0_log.err"
    assert reasons == {
        "killed": f"its SLURM job {number}_0 ended as FAILED: see {log}",
        "refused": "key: bad value: give another",
        "failed": "RuntimeError: CUDA error: device-side assert triggered",
        "t0": None,
    }
    assert log.exists()
    again = [recorded(root, name) for name in bad]
    assert run(again, root) == dict.fromkeys(bad)
    numbers = json.loads((root / JOBS_FOLDER / JOBS_FILE).read_text())
    assert numbers["t0"] == f"{number}_3" and numbers["killed"] == f"{int(number) + 50}_0"


def wait_in_jobs(folder, cancel, environment):
    """Runs two tasks and one that waits for the first, until a file is there."""
    os.environ.update(environment)  # The server of processes has that of an earlier test.
    call = partial(small_tasks.train_until, f"{folder}/go", folder)
    tasks = [task(folder, name, partial(call, name)) for name in ("t0", "t1")]
    print(run([*tasks, recorded(folder, "t2", after="t0")], folder, cancel=cancel), flush=True)


@pytest.fixture
def start_waiting(root):
    """A function that starts this in a process of its own, and waits for a text in its output."""
    started = []

    def start(output, text, cancel=False):
        file = root / output
        started.append(start_process(file, wait_in_jobs, str(root), cancel, {**os.environ}))
        deadline = time.monotonic() + 60
        while not file.exists() or text not in file.read_text():
            assert time.monotonic() < deadline, file.read_text()
            time.sleep(0.05)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_jobs_go_on_without_the_command_and_the_same_one_takes_them_up(root, start_waiting, number):
    first = start_waiting("first", "submitted 1 run ")
    os.killpg(first.pid, number)
    first.join()
    said = "the jobs go on: the same command takes up" in (root / "first").read_text()
    assert said == (number == signal.SIGINT)
    second = start_waiting("second", "waiting for them")
    (root / "go").touch()
    text = output_of(second, root / "second")
    assert "3 jobs of an earlier command still run: waiting for them" in text
    assert "{'t0': None, 't1': None, 't2': None}" in text and "submitted" not in text
    assert len(submissions(root)) == 2


def test_ctrl_c_cancels_the_jobs_if_it_is_told_to(root, start_waiting):
    process = start_waiting("out", "submitted 1 run ", cancel=True)
    os.killpg(process.pid, signal.SIGINT)
    process.join()
    assert "the jobs are cancelled" in (root / "out").read_text()
    assert how_jobs_ended(root, 3) == ["CANCELLED"] * 3
    (root / "go").touch()
    assert run([recorded(root, "t0")], root) == {"t0": None}  # They are submitted again.


@pytest.mark.parametrize("submission", [1, 2])
@pytest.mark.parametrize("cancel", [True, False])
def test_ctrl_c_during_a_submission_loses_no_job(root, start_waiting, submission, cancel):
    """The terminal sends SIGINT to sbatch too."""
    os.environ["CTRL_C_AT_SBATCH"] = str(submission)
    process = start_waiting("out", "KeyboardInterrupt", cancel)
    process.join()
    text = (root / "out").read_text()
    assert ("the jobs are cancelled" in text, "the jobs go on" in text) == (cancel, not cancel)
    assert len(submissions(root)) == submission
    jobs = [2, 3][submission - 1]
    assert len(json.loads((root / JOBS_FOLDER / JOBS_FILE).read_text())) == jobs
    (root / "go").touch()
    expected = "CANCELLED" if cancel else "COMPLETED"
    assert how_jobs_ended(root, jobs) == [expected] * jobs


@pytest.mark.slow
def test_a_comparisons_run_is_requeued_at_its_time_limit_and_goes_on(on_a_cluster, capfd):
    root = on_a_cluster(SIGNAL_AT="runs/grid/grap-seed1/checkpoints/grap-seed1-ep0.ckpt")
    tiny = [*SMALL, "max_epochs=3", "data.fraction=0.05", "optimizer.batch_size=16"]
    line = ["compare", "--config-path", str(DIGITS), "--config-name", "vicreg", *tiny]
    line += ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16", "name=grid"]
    line += ["accelerator=cpu", "methods=[grap,fixed,grap_tuned,mgda]", "seeds=[1]"]
    line += ["--launcher", "slurm", "--parallel", "3", "hydra.launcher.timeout_min=1"]
    line += ["definitions={mgda: {weighting: {name: mgda}, optimizer: {batch_size: 5000}}}"]
    assert main(line) == 0
    output = capfd.readouterr().out
    number = int(os.environ["JOB_ID"])
    assert re.findall(r"submitted (\d) runs? as job (\d+)", output) == [
        ("3", str(number)), ("1", str(number + 50)), ("1", str(number + 100)),
    ]  # fmt: skip
    assert submissions(root)[1]["dependency"] == f"afterany:{number}"
    (requeued,) = (root / "cluster").glob("requeued-*")
    assert requeued.name == f"requeued-{number}_0.done"
    grid = root / "runs" / "grid"
    assert "resuming after epoch 0" in (grid / "logs" / "grap-seed1.log").read_text()
    runs = pd.read_csv(grid / "runs.csv").fillna({"linear": -1}).set_index("method")
    assert (runs["linear"] > 0).to_dict() == {
        "grap": True, "fixed": True, "grap_tuned": True, "mgda": False,
    }  # fmt: skip
    assert "batch_size" in runs["reason"]["mgda"]
    assert json.loads((grid / "cost.json").read_text())["grap_tuned"]["median"] > 0
    assert main(line) == 0
    assert "submitted 1 run as job" in capfd.readouterr().out  # What failed, alone.


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "hydra.launcher.partitoin=gpu",
            "partitoin: unknown name 'partitoin': did you mean 'parti",
        ),
        ("hydra.launcher.nodes=2", "hydra.launcher.nodes: a run has one node: leave it out"),
        ("hydra.launcher.tasks_per_node=2", "tasks_per_node: a run has one process: leave it out"),
        ("hydra.launcher.timeout_min=soon", "hydra.launcher.timeout_min: cannot take soon: Value"),
        ("hydra.launcher.setup=[a", "hydra.launcher.setup: cannot take [a: "),
        ("hydra.launcher._target_=x", "unknown name '_target_'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(root, override, message):
    with pytest.raises(ConfigError) as error:
        read_settings([override])
    assert message in str(error.value) and "\n" not in str(error.value)


def compare_line(*more):
    files = ["compare", "--config-path", str(DIGITS), "--config-name", "vicreg", "name=grid"]
    return [*files, "methods=[fixed]", "seeds=[1]", "--launcher", "slurm", *more]


def test_without_slurm_it_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert main(compare_line()) == 2
    assert "--launcher slurm: no sbatch here: start it on a SLURM" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_sbatch_refuses_is_one_line(on_a_cluster, capfd):
    on_a_cluster(SBATCH_REFUSES="invalid partition specified")
    assert main(compare_line("hydra.launcher.partition=gpu")) == 2
    error = capfd.readouterr().err
    assert re.search(r"grap-solo: hydra.launcher: .*invalid partition specified", error)
    assert "Traceback" not in error
