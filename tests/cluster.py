"""A SLURM cluster that is a few small programs, for the tests of jobs."""

import itertools
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress

import pytest
from helpers import ROOT

# What submitit, the batch script and the launcher use of SLURM. All nodes are this machine. The
# jobs of an array run side by side, as many as it allows; those that depend on others wait. When
# the file named by SIGNAL_AT is there, the first job's tasks are sent the signal that it asks for,
# once, as they are when its time is nearly over. The submission that CTRL_C_AT_SBATCH counts up to
# gets Ctrl-C, as all of a terminal's programs do.
CLUSTER = r"""
import fcntl, os, re, signal, subprocess, sys, time
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
    earlier = len(list(cluster.glob("submission-*.sh")))
    number = str(int(os.environ["JOB_ID"]) + 50 * earlier)
    if os.environ.get("CTRL_C_AT_SBATCH") == str(earlier + 1):
        os.killpg(0, signal.SIGINT)
        time.sleep(0.3)
    own = cluster / f"submission-{number}.sh"
    own.write_text(text)
    last = re.match(r"0-(\d+)%?(\d*)", asked.get("array", ""))
    for index in range(int(last[1]) + 1) if last else [None]:
        job = {
            "SLURM_JOB_ID": number,
            "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(nodes * tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks),
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": asked.get("gpus-per-node", ""),
            "SLURM_JOB_NODELIST": "127.0.0.1",
            "SLURM_NODELIST": "127.0.0.1",
            "ASKED_SIGNAL": asked.get("signal", ""),
            "ASKED_AFTER": asked.get("dependency", "afterany:").partition(":")[2],
            "AT_A_TIME": last[2] if last else "",
        }
        if index is not None:
            job["SLURM_JOB_ID"] = str(int(number) + index)
            job.update(SLURM_ARRAY_JOB_ID=number, SLURM_ARRAY_TASK_ID=str(index))
        name = number if index is None else f"{number}_{index}"
        (cluster / f"state-{name}").write_text("PENDING")
        with (cluster / "jobs.log").open("a") as log:
            process = subprocess.Popen(
                [cluster / "cluster.py", "job", own, *arguments],
                env={**os.environ, **job}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )
        with (cluster / "groups").open("a") as groups:
            print(process.pid, file=groups)
        (cluster / f"group-{name}").write_text(str(process.pid))
    print(f"Submitted batch job {number}")


def name_of_this_job():
    if "SLURM_ARRAY_JOB_ID" not in os.environ:
        return os.environ["SLURM_JOB_ID"]
    return os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]


def jobs_of(number):
    names = [file.name.removeprefix("state-") for file in cluster.glob("state-*")]
    return [name for name in names if name == number or name.startswith(f"{number}_")]


def wait_for_a_turn():
    for number in filter(None, os.environ["ASKED_AFTER"].split(":")):
        while any((cluster / f"state-{name}").read_text() in ("", "PENDING", "RUNNING")
                  for name in jobs_of(number)):
            time.sleep(0.05)
    places = int(os.environ["AT_A_TIME"] or 0)
    while places:
        for place in range(places):
            lock = open(cluster / f"place-{os.environ['SLURM_ARRAY_JOB_ID']}-{place}", "w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                lock.close()
        time.sleep(0.05)


def job(script, *arguments):
    name = name_of_this_job()
    again, state = cluster / f"requeued-{name}", cluster / f"state-{name}"
    place = wait_for_a_turn()
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


def scancel(*numbers):
    for name in (each for number in numbers for each in jobs_of(number)):
        if (cluster / f"state-{name}").read_text() in ("PENDING", "RUNNING"):
            os.killpg(int((cluster / f"group-{name}").read_text()), signal.SIGKILL)
            (cluster / f"state-{name}").write_text("CANCELLED")


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


def clusters(tmp_path_factory):
    """For a fixture: a function that makes a folder to start from, with a cluster of its own on the
    path, and takes variables for its environment."""
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
        for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
            (cluster / name).symlink_to(program)
        patch.chdir(root)
        patch.setattr(sys, "argv", ["grap-solo"])
        patch.setenv("PATH", str(cluster), prepend=os.pathsep)
        patch.setenv("CLUSTER", str(cluster))
        patch.setenv("HYDRA_FULL_ERROR", "1")  # As main() sets it, and taken back here.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JOB_ID", str(free_port() - 5000))  # Whose last four digits make the port.
        for key in ("SIGNAL_AT", "SBATCH_REFUSES", "CTRL_C_AT_SBATCH"):
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
        if len(states) == count and not {"", "PENDING", "RUNNING"} & {*states}:
            break
        time.sleep(0.1)
    return states


def logs(root):
    return {file.name: file.read_text() for file in root.rglob("*_log.*")}
