"""The launcher on this machine: the GPUs and cores of each worker, and how runs and workers end."""

import itertools
import json
import os
import re
import signal
import time
from functools import partial

import pytest
import small_tasks
import torch
from helpers import output_of, start_process

from grap_solo import ConfigError
from grap_solo.arguments import LAUNCHER_NAMES
from grap_solo.experiments import tasks as package
from grap_solo.experiments.tasks import Launcher, Task, make_launcher, run_tasks
from grap_solo.experiments.workers import share_out, visible_gpus


def task(folder, name, call, after=None):
    return Task(name, call, folder / f"{name}.log", after)


def recorded(folder, count, seconds=0.0):
    return [
        task(folder, f"t{at}", partial(small_tasks.record, str(folder), f"t{at}", seconds))
        for at in range(count)
    ]


def run(tasks, folder, parallel=1, gpus_per_run=1, uses_gpu=False):
    launcher = Launcher("local", parallel, gpus_per_run)
    return {each.name: reason for each, reason in run_tasks(tasks, launcher, folder, uses_gpu)}


def records(folder):
    return [json.loads(file.read_text()) for file in sorted(folder.glob("t*.json"))]


@pytest.fixture(params=["cuda", "hip"])
def four_gpus(request, monkeypatch):
    """A machine of four GPUs that are made up, and the platform's variable."""
    for name in small_tasks.VARIABLES[:2]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "hip", "7.0" if request.param == "hip" else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return f"{request.param.upper()}_VISIBLE_DEVICES"


def preset_gpus(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(value.split(",")))


# ---- sharing out ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [None, "2,3", "GPU-8a, GPU-1b,GPU-77,GPU-c0"])
@pytest.mark.parametrize("size", [1, 2])
def test_no_two_tasks_of_one_time_share_a_gpu(four_gpus, preset, size, tmp_path, monkeypatch):
    if preset is not None:
        preset_gpus(monkeypatch, four_gpus, preset)
    gpus = ["0", "1", "2", "3"] if preset is None else [x.strip() for x in preset.split(",")]
    parallel = len(gpus) // size
    reasons = run(recorded(tmp_path, 2 * parallel, 0.3), tmp_path, parallel, size, uses_gpu=True)
    assert list(reasons.values()) == [None] * 2 * parallel
    found = records(tmp_path)
    used = [each[four_gpus].split(",") for each in found]
    assert {*itertools.chain(*used)} == {*gpus} and {len(each) for each in used} == {size}
    other = next(name for name in small_tasks.VARIABLES if name != four_gpus)
    assert {each[other] for each in found} == {None}
    for (a, mine), (b, theirs) in itertools.combinations(zip(found, used, strict=True), 2):
        if a["began"] < b["ended"] and b["began"] < a["ended"]:
            assert not {*mine} & {*theirs}
    # The variable was there before anything was imported, and each worker ran several tasks.
    assert len({each["pid"] for each in found}) == parallel
    assert os.environ.get(four_gpus) == preset


def test_runs_share_a_gpu_only_if_they_are_told_to(four_gpus, monkeypatch):
    with pytest.raises(ConfigError, match=r"--parallel: 6 runs .* \(0, 1, 2, 3\): give --parallel "
                       r"4, or --gpus-per-run 0.5 to put up to 2 on a GPU"):  # fmt: skip
        share_out(6, 1, uses_gpu=True)
    with pytest.raises(ConfigError, match="give --parallel 2, or --gpus-per-run 1 "):
        share_out(3, 2, uses_gpu=True)
    shared = [each[four_gpus] for each in share_out(6, 0.5, uses_gpu=True)]
    assert shared == ["0", "1", "2", "3", "0", "1"]
    for runs in range(5, 60):  # What the line says is accepted.
        with pytest.raises(ConfigError) as error:
            share_out(runs, 1, uses_gpu=True)
        given = float(re.findall(r"--gpus-per-run (\S+) to put", str(error.value))[0])
        assert len(share_out(runs, given, uses_gpu=True)) == runs
    assert all(four_gpus not in each for each in share_out(6, 1, uses_gpu=False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert all(four_gpus not in each for each in share_out(6, 1, uses_gpu=True))


@pytest.mark.parametrize(
    ("preset", "counted", "expected"),
    [
        ("", 0, []),
        ("-1", 0, []),
        ("0,1,7", 2, ["0", "1"]),  # There is no eighth GPU: torch stops there.
        ("MIG-a,MIG-b", 1, ["MIG-a", "MIG-b"]),
    ],
)
def test_gpus_that_are_hidden_stay_hidden(four_gpus, preset, counted, expected, monkeypatch):
    monkeypatch.setenv(four_gpus, preset)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    assert visible_gpus() == expected


def test_rocm_reads_cudas_variable_where_its_own_is_missing(monkeypatch):
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    preset_gpus(monkeypatch, "CUDA_VISIBLE_DEVICES", "2,3")
    first = share_out(2, 1, uses_gpu=True)[0]
    assert first["HIP_VISIBLE_DEVICES"] == "2" and first["CUDA_VISIBLE_DEVICES"] is None


def test_workers_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = tmp_path / "threads"
    calls = [task(tmp_path, "threads", partial(small_tasks.count_threads, str(file)))]
    assert run([*recorded(tmp_path, 2), *calls], tmp_path, parallel=2)["threads"] is None
    assert [each["OMP_NUM_THREADS"] for each in records(tmp_path)] == ["1", "1"]
    assert not any(each["torch"] for each in records(tmp_path)[:1])  # A worker starts at once.
    assert file.read_text() == "1"


def test_a_task_starts_when_the_one_it_waits_for_has_ended(tmp_path):
    first, second, third = recorded(tmp_path, 3, 0.2)
    waits = Task(second.name, second.call, second.log, after=first.name)
    assert [*run([first, waits, third], tmp_path, parallel=2)][-1] == "t1"
    a, b, c = records(tmp_path)
    assert b["began"] >= a["ended"] and c["began"] < b["began"]


# ---- faults ---------------------------------------------------------------------------------


FAULTS = {
    "killed": (partial(small_tasks.kill_itself), "its process was killed by SIGKILL (out of"),
    "crashed": (partial(small_tasks.kill_itself, signal.SIGSEGV), "was killed by SIGSEGV"),
    "left": (partial(small_tasks.leave, 3), "its process ended with exit code 3: see its log"),
    "refused": (small_tasks.refuse, "key: bad value: give another"),
    "failed": (small_tasks.fail, "RuntimeError: CUDA error: device-side assert triggered"),
    "full": (None, "OSError: [Errno 27] File too large"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One worker's tasks: one of each fault, and a good one after each."""
    folder = tmp_path_factory.mktemp("faulty")
    good = recorded(folder, len(FAULTS))
    bad = []
    for name, (call, _) in FAULTS.items():
        call = call or partial(small_tasks.fill_disk, str(folder / "big"))
        bad.append(task(folder, name, call))
    return folder, run([each for pair in zip(bad, good, strict=True) for each in pair], folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_its_own_task_alone_and_says_why(faulty, fault):
    folder, reasons = faulty
    assert FAULTS[fault][1] in reasons[fault] and "\n" not in reasons[fault]
    assert [reasons[f"t{at}"] for at in range(len(FAULTS))] == [None] * len(FAULTS)
    assert len(records(folder)) == len(FAULTS)


def test_a_worker_is_kept_unless_its_task_failed_unexpectedly(faulty):
    """An error of CUDA's outlives its task, and a refusal leaves nothing behind."""
    pids = [each["pid"] for each in records(faulty[0])]
    after = dict(zip(FAULTS, pids, strict=True))
    assert after["refused"] == after["left"] and len({*pids}) == len(FAULTS) - 1


def test_a_log_has_what_a_task_printed_and_where_it_failed(faulty):
    folder, _ = faulty
    assert (folder / "t0.log").read_text() == "t0 has run\n"
    assert (folder / "refused.log").read_text() == "grap-solo: key: bad value: give another\n"
    assert "in fail\n" in (folder / "failed.log").read_text()


def test_without_workers_tasks_run_here_with_the_same_reasons(tmp_path):
    bad = task(tmp_path, "bad", small_tasks.fail)
    found = run([bad, *recorded(tmp_path, 1)], tmp_path, parallel=None)
    assert found == {"bad": FAULTS["failed"][1], "t0": None}
    assert records(tmp_path)[0]["pid"] == os.getpid()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run_two(folder, file):
    calls = [partial(small_tasks.train_until, file, folder, name) for name in ("t0", "t1")]
    path = small_tasks.Path(folder)
    print(run([task(path, f"t{at}", call) for at, call in enumerate(calls)], path, parallel=2))


@pytest.fixture
def training(tmp_path):
    """A launcher in a process of its own whose two tasks have begun; it, and their processes."""
    process = start_process(tmp_path / "out", run_two, str(tmp_path), str(tmp_path / "go"))
    files = [tmp_path / f"t{at}.pid" for at in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    yield process, [int(file.read_text()) for file in files]
    process.kill()
    process.join()


def test_workers_end_with_their_parent(training, tmp_path):
    process, workers = training
    process.kill()
    wait_for(lambda: not any(map(is_running, workers)), 5)
    assert list(tmp_path.glob("*.ckpt")) == []


def test_ctrl_c_lets_runs_end_their_step(training, tmp_path):
    """The terminal sends SIGINT to all of them."""
    process, workers = training
    os.killpg(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1 and "KeyboardInterrupt" in (tmp_path / "out").read_text()
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["t0.ckpt", "t1.ckpt"]
    assert not any(map(is_running, workers))


def test_a_worker_that_is_told_to_end_ends_alone(training, tmp_path):
    process, workers = training
    os.kill(workers[0], signal.SIGTERM)
    wait_for(lambda: not is_running(workers[0]))
    (tmp_path / "go").touch()
    text = output_of(process, tmp_path / "out")
    assert "'t0': 'its process was told to end (SIGTERM)', 't1': None" in text


def test_a_task_that_another_process_runs_is_refused(training, tmp_path):
    again = task(tmp_path, "t0", partial(small_tasks.record, str(tmp_path), "t0"))
    reasons = run([again], tmp_path)
    assert "t0.log: a process of an earlier command still writes it" in reasons["t0"]
    assert not (tmp_path / "t0.json").exists()


# ---- what is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "lokal"}, "launcher: unknown name 'lokal': did you mean 'local'"),
        ({"parallel": 0}, "parallel: expected a whole number of 1 or more, got 0"),
        ({"parallel": "two"}, "parallel: expected a whole number of 1 or more, got 'two'"),
        ({"parallel": True}, "parallel: expected a whole number of 1 or more, got True"),
        ({"gpus_per_run": 0}, "gpus_per_run: expected a whole number, or a fraction such as 0.5"),
        ({"gpus_per_run": 1.5}, "gpus_per_run: expected a whole number"),
        ({"gpus_per_run": float("nan")}, "gpus_per_run: expected a whole number"),
        ({"name": "slurm", "gpus_per_run": 0.5}, "gpus_per_run: SLURM's jobs share no GPU"),
        ({"slurm": ["hydra.launcher.qos=x"]}, "hydra.launcher.qos: it is for SLURM's jobs: add --"),
        ({"cancel": True}, "--cancel-on-interrupt: it is for SLURM's jobs: add --launcher slurm"),
    ],
)
def test_a_launcher_that_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError) as error:
        make_launcher(**given)
    assert message in str(error.value)


def test_the_command_line_names_the_launchers():
    assert LAUNCHER_NAMES == package.LAUNCHERS
