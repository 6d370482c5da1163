"""Launches on several processes and nodes, on a SLURM cluster that is four small programs."""

import io
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, suppress

import pytest
import yaml
from helpers import ROOT, SMALL

from grap_solo.cli import main
from grap_solo.records.weights import read_weights

SCRIPT = ROOT / "scripts" / "torchrun.sbatch"
FLAGS = ["--config-path", "configs/digits", "--config-name", "grap"]
# Of two processes each has half of the 64 images of a step: three steps, as with one.
HALVES = ["+data.fraction=0.2", "max_epochs=1", "scheduler.warmup_epochs=0"]
HALVES += ["optimizer.batch_size=32", "name=halves"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="SLURM's scripts are bash"),
]

# What submitit and the batch script use of SLURM. All nodes are this machine, the jobs of an array
# run side by side, and when the file named by SIGNAL_AT is there, the first job's tasks are sent
# the signal that it asks for, once, as they are when its time is nearly over.
CLUSTER = r"""
import os, re, signal, subprocess, sys, time
from pathlib import Path

cluster = Path(os.environ["CLUSTER"])


def sbatch(script, *arguments):
    text = Path(script).read_text()
    (cluster / "submission.sh").write_text(text)
    refusal = os.environ.get("SBATCH_REFUSES")
    if refusal:
        sys.exit(f"sbatch: error: {refusal}")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
    number = os.environ["JOB_ID"]
    last = re.match(r"0-(\d+)", asked.get("array", ""))
    for index in range(int(last[1]) + 1) if last else [None]:
        job = {
            "SLURM_JOB_ID": number,
            "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(nodes * tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks),
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": asked["gpus-per-node"],
            "SLURM_JOB_NODELIST": "127.0.0.1",
            "SLURM_NODELIST": "127.0.0.1",
            "ASKED_SIGNAL": asked.get("signal", ""),
        }
        if index is not None:
            job["SLURM_JOB_ID"] = str(int(number) + index)
            job.update(SLURM_ARRAY_JOB_ID=number, SLURM_ARRAY_TASK_ID=str(index))
        with (cluster / "jobs.log").open("a") as log:
            process = subprocess.Popen(
                [cluster / "cluster.py", "job", cluster / "submission.sh", *arguments],
                env={**os.environ, **job}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )
        with (cluster / "groups").open("a") as groups:
            print(process.pid, file=groups)
    print(f"Submitted batch job {number}")


def name_of_this_job():
    if "SLURM_ARRAY_JOB_ID" not in os.environ:
        return os.environ["SLURM_JOB_ID"]
    return os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]


def job(script, *arguments):
    name = name_of_this_job()
    again, state = cluster / f"requeued-{name}", cluster / f"state-{name}"
    state.write_text("RUNNING")
    ended = "FAILED"
    try:
        while True:
            code = subprocess.run(["bash", script, *arguments], timeout=150).returncode
            if not again.exists():
                break
            again.rename(again.with_suffix(".done"))
        ended = "FAILED" if code else "COMPLETED"
    finally:
        state.write_text(ended)


def srun(*arguments):
    arguments, files, number = list(arguments), {}, name_of_this_job()
    together = "--kill-on-bad-exit=1" in arguments or os.environ.get("SLURM_KILL_BAD_EXIT") == "1"
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option in ("--output", "--error"):
            files[option] = arguments.pop(0)
    tasks, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])

    def start(rank):
        streams = {}
        for option, stream in (("--output", "stdout"), ("--error", "stderr")):
            if option in files:
                path = files[option].replace("%A_%a", number).replace("%j", number)
                streams[stream] = open(path.replace("%t", str(rank)), "a")
        task = {
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank // per_node),
            "SLURM_LOCALID": str(rank % per_node),
        }
        return subprocess.Popen(arguments, env={**os.environ, **task}, **streams)

    processes = [start(rank) for rank in range(tasks)]
    first = os.environ.get("SLURM_ARRAY_TASK_ID", "0") == "0"
    trigger, sent = os.environ.get("SIGNAL_AT") if first else None, cluster / "signal sent"
    while any(process.poll() is None for process in processes):
        if trigger and Path(trigger).exists() and not sent.exists():
            sent.touch()
            name = os.environ["ASKED_SIGNAL"].split("@")[0]
            for process in processes:
                process.send_signal(getattr(signal, f"SIG{name}"))
        if together and any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.02)
    sys.exit(max(abs(process.returncode) for process in processes))


def sacct(*arguments):
    print("JobID|State|NodeList")
    for file in cluster.glob("state-*"):
        print(file.name.removeprefix("state-"), file.read_text(), "127.0.0.1", sep="|")


def scontrol(*arguments):
    *what, name = arguments
    if what == ["requeue"]:
        (cluster / f"requeued-{name}").touch()
    else:
        assert what == ["show", "hostnames"]
        print(name)


called, *arguments = [Path(sys.argv[0]).name, *sys.argv[1:]]
if called == "cluster.py":
    called, *arguments = arguments
globals()[called](*arguments)
"""


@pytest.fixture(scope="module")
def on_a_cluster(tmp_path_factory):
    """Makes a folder to start from, with a cluster of its own on the path."""
    made, patch = [], pytest.MonkeyPatch()

    def make(**environment):
        root = tmp_path_factory.mktemp("root")
        (root / "configs").symlink_to(ROOT / "configs")
        (root / ".venv").symlink_to(sys.prefix)
        cluster = root / "cluster"
        cluster.mkdir()
        program = cluster / "cluster.py"
        program.write_text(f"#!{sys.executable} -SE\n{CLUSTER}")
        program.chmod(0o755)
        for name in ("sbatch", "srun", "sacct", "scontrol"):
            (cluster / name).symlink_to(program)
        patch.chdir(root)
        patch.setattr(sys, "argv", ["grap-solo"])
        patch.setenv("PATH", str(cluster), prepend=os.pathsep)
        patch.setenv("CLUSTER", str(cluster))
        patch.setenv("HYDRA_FULL_ERROR", "1")  # As main() sets it, and taken back here.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JOB_ID", str(free_port() - 5000))  # Whose last four digits make the port.
        for key in ("SIGNAL_AT", "SBATCH_REFUSES"):
            patch.delenv(key, raising=False)
        for key, value in environment.items():
            patch.setenv(key, value)
        made.append(cluster)
        return root

    yield make
    patch.undo()
    for cluster in made:
        groups = cluster / "groups"
        for group in groups.read_text().split() if groups.exists() else []:
            with suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)


PORTS = itertools.count(15000 + os.getpid() * 7 % 9000)


def free_port():
    """A port of those that both launches take, another one each time."""
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def asked_of_sbatch(text):
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))


def how_jobs_ended(root, count=1):
    """The state of each job, once none runs any more."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        states = [file.read_text() for file in sorted((root / "cluster").glob("state-*"))]
        if len(states) == count and not {"", "RUNNING"} & {*states}:
            break
        time.sleep(0.1)
    return states


def logs(root):
    return {file.name: file.read_text() for file in root.rglob("*_log.*")}


@pytest.fixture(scope="module")
def array(on_a_cluster):
    """A sweep of two runs as one array: the first one's time runs out, the second one is refused.

    Returns:
        Where it was started, the exit code, and what was printed on stderr.
    """
    root = on_a_cluster(SIGNAL_AT="runs/sweep-grap-digits/rate2-sum-seed5/checkpoints/"
                        "rate2-sum-seed5-ep0.ckpt")  # fmt: skip
    sweep = ["--config-dir", "configs", "+sweeps/multirun=grap", "+slurm/launch=submitit"]
    sweep += ["weighting.lr_per_run=2,0", "weighting.normalization=sum", "seed=5"]
    # So short a time that submitit takes every signal for the end of it.
    sweep += [*SMALL, "max_epochs=3", "hydra.launcher.timeout_min=1"]
    with redirect_stderr(io.StringIO()) as errors:
        code = main(["pretrain", *FLAGS, *sweep])
    return root, code, errors.getvalue()


@pytest.fixture(scope="module")
def two_tasks(on_a_cluster):
    """The run of two processes that SLURM has started, as submitit asked it to."""
    root = on_a_cluster()
    flags = [*FLAGS, "--config-dir", "configs/slurm", "+launch=submitit", "devices=2"]
    assert main(["pretrain", *flags, *HALVES]) == 0, logs(root)
    return root / "runs" / "halves"


def test_a_submission_asks_for_a_process_for_each_gpu(on_a_cluster, capfd):
    root = on_a_cluster(SBATCH_REFUSES="invalid partition specified")
    flags = ["--config-path", "configs/cifar10", "--config-name", "grap"]
    flags += ["--config-dir", "configs/slurm", "+launch=submitit", "num_nodes=2", "devices=4"]
    assert main(["pretrain", *flags, "hydra.launcher.partition=gpu"]) == 2
    error = capfd.readouterr().err
    assert re.search(r"grap-solo: hydra.launcher: .*invalid partition specified", error)
    assert "Traceback" not in error
    script = root / "cluster" / "submission.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    asked = asked_of_sbatch(script.read_text())
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
    assert asked["cpus-per-task"] == "8" and asked["time"] == "1440"
    assert asked["partition"] == "gpu" and asked["signal"] == "USR2@120" and "requeue" in asked
    assert "gpus-per-task" not in asked and asked["job-name"] == "grap-solo"
    assert asked["output"].startswith(f"{root}/runs/.submitit/")
    assert re.search(r"^srun .* -m submitit.core._submit ", script.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_sweep_is_an_array_of_jobs(array):
    root, *_ = array
    asked = asked_of_sbatch((root / "cluster" / "submission.sh").read_text())
    assert asked["array"] == "0-1%2" and asked["nodes"] == asked["ntasks-per-node"] == "1"
    assert how_jobs_ended(root, 2) == ["COMPLETED", "COMPLETED"]
    sweep = root / "runs" / "sweep-grap-digits"
    assert {path.name for path in sweep.iterdir()} == {
        "rate2-sum-seed5", "multirun.yaml", ".submitit",
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_requeued_and_goes_on(array):
    root, *_ = array
    (requeued,) = (root / "cluster").glob("requeued-*")
    assert requeued.name.endswith("_0.done")
    run = root / "runs" / "sweep-grap-digits" / "rate2-sum-seed5"
    _, steps, _ = read_weights(run / "weights.csv")
    assert steps[:, 0].tolist() == list(range(1, 10))
    assert (run / "trained.json").exists()
    (log,) = (text for name, text in logs(root).items() if name.endswith("_0_0_log.out"))
    first, second = re.findall(r"^rate2-sum-seed5: grap_all4one.*", log, re.MULTILINE)
    assert "resuming" not in first and re.search(r"resuming after epoch [01]$", second)


@pytest.mark.slow
def test_a_job_that_is_refused_is_reported_where_it_was_submitted(array):
    root, code, errors = array
    assert code == 2 and "Traceback" not in errors
    line = "grap-solo: weighting.lr_per_run: expected a number above 0, got 0"
    job, message = errors.strip().splitlines()[-2:]
    assert "weighting.lr_per_run=0'" in job and message == line
    (log,) = (text for name, text in logs(root).items() if name.endswith("_1_0_log.err"))
    assert line in log.splitlines()


@pytest.mark.slow
def test_slurms_two_processes_are_one_training(two_tasks):
    _, steps, weights = read_weights(two_tasks / "weights.csv")
    assert steps[:, 0].tolist() == [1, 2, 3]
    assert (weights[-1] != weights[0]).any()
    config = yaml.safe_load((two_tasks / "config.yaml").read_text())
    assert (config["devices"], config["num_nodes"]) == (2, 1)


@pytest.mark.slow
def test_the_batch_script_trains_on_two_nodes_by_torchrun(on_a_cluster, two_tasks):
    """As SLURM's own two processes do, to the bit."""
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    root = on_a_cluster()
    script = root / "torchrun.sbatch"
    script.write_text(SCRIPT.read_text().replace("--gpus-per-node=4", "--gpus-per-node=1"))
    submitted = subprocess.run(["sbatch", script, *FLAGS, *HALVES])
    assert submitted.returncode == 0
    log = root / "cluster" / "jobs.log"
    assert how_jobs_ended(root) == ["COMPLETED"], log.read_text()[-3000:]
    run = root / "runs" / "halves"
    assert (run / "weights.csv").read_bytes() == (two_tasks / "weights.csv").read_bytes()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["devices"], config["num_nodes"]) == (1, 2)
