"""Runs many tasks at a time, by workers on this machine or as jobs on a SLURM cluster.

A task is any function that can be pickled, so that comparisons, maps and searches share one
launcher. Nothing slow is imported here: a worker starts with this module.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grap_solo.errors import ConfigError, refusal, unknown_name

LAUNCHERS = ("local", "slurm")
SLURM_KEYS = "hydra.launcher."
"""The start of the keys that set up SLURM's jobs, as those of ``pretrain +launch=submitit``."""


@dataclass(frozen=True)
class Task:
    """A function to call, in a process that may be anywhere.

    Attributes:
        name: the task's own among all tasks of a folder.
        call: takes no arguments and leaves its results in files. It can be pickled.
        log: the file to which its output is added.
        after: the name of the task that must end first; None if there is none.
    """

    name: str
    call: Callable[[], object]
    log: Path
    after: str | None = None


@dataclass(frozen=True)
class Launcher:
    """Where tasks run, and how many at a time.

    Attributes:
        name: one of :data:`LAUNCHERS`.
        parallel: the most tasks that run at a time. None runs them one after the other in this
            process (``local``), or as many as SLURM lets (``slurm``).
        gpus_per_run: the GPUs that each task gets; below 1, several tasks share a GPU.
        cancel: whether Ctrl-C cancels SLURM's jobs. They go on otherwise.
        slurm: the jobs' settings, as :func:`~grap_solo.experiments.jobs.read_settings` makes them.
    """

    name: str = "local"
    parallel: int | None = None
    gpus_per_run: float = 1
    cancel: bool = False
    slurm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a task has failed.

    Attributes:
        reason: one line.
        refused: whether the task has said so itself, so that its process is as good as before.
    """

    reason: str
    refused: bool = False


def make_launcher(
    name: str | None = None,
    parallel: int | None = None,
    gpus_per_run: float | None = None,
    cancel: bool = False,
    slurm: Sequence[str] = (),
) -> Launcher:
    """Makes a launcher of what the command line and a grid's file give; None takes the default.

    Args:
        name: see :class:`Launcher`, as for the next three.
        parallel: see there.
        gpus_per_run: see there.
        cancel: see there.
        slurm: settings of SLURM's jobs, such as ``hydra.launcher.partition=gpu``.

    Raises:
        ConfigError: a value that cannot be used, or a setting without ``slurm``.
    """
    name = "local" if name is None else name
    gpus = 1 if gpus_per_run is None else gpus_per_run
    if name not in LAUNCHERS:
        raise unknown_name("launcher", name, LAUNCHERS)
    if parallel is not None and (type(parallel) is not int or parallel < 1):
        raise ConfigError(f"parallel: expected a whole number of 1 or more, got {parallel!r}")
    number = type(gpus) in (int, float) and 0 < gpus < math.inf
    if not number or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(
            f"gpus_per_run: expected a whole number, or a fraction such as 0.5 to share a GPU, got "
            f"{gpus!r}"
        )
    if name == "slurm":
        if gpus < 1:
            raise ConfigError("gpus_per_run: SLURM's jobs share no GPU: give a whole number")
        from grap_solo.experiments.jobs import read_settings

        return Launcher(name, parallel, gpus, cancel, read_settings(slurm))
    if slurm or cancel:
        given = slurm[0].lstrip("+").partition("=")[0] if slurm else "--cancel-on-interrupt"
        raise ConfigError(f"{given}: it is for SLURM's jobs: add --launcher slurm")
    return Launcher(name, parallel, gpus)


def run_tasks(
    tasks: Sequence[Task], launcher: Launcher, folder: Path, uses_gpu: bool
) -> Generator[tuple[Task, str | None], None, None]:
    """Runs tasks; yields each one as it ends, with the reason if it failed.

    A task that fails or dies ends alone: the others run on.

    Args:
        tasks: a task comes after the one that it waits for.
        launcher: where they run.
        folder: the folder of all tasks, for SLURM's scripts and the jobs' numbers.
        uses_gpu: whether a task computes on a GPU, if there is one.

    Raises:
        ConfigError: the launcher cannot run them.
    """
    if not tasks:
        return
    if launcher.name == "slurm":
        from grap_solo.experiments.jobs import run_jobs

        yield from run_jobs(tasks, launcher, folder, uses_gpu)
    elif launcher.parallel is None:
        for task in tasks:
            failure = attempt(task)
            yield task, None if failure is None else failure.reason
    else:
        from grap_solo.experiments.workers import run_in_workers

        yield from run_in_workers(tasks, launcher.parallel, launcher.gpus_per_run, uses_gpu)


def attempt(task: Task) -> Failure | None:
    """Calls a task with its output in its log; says why if it fails."""
    try:
        with (
            task.log.open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            _lock(file)
            try:
                task.call()
            except Exception as error:
                with contextlib.suppress(OSError):  # The disk may be full, and the error says so.
                    _print_error(error)
                raise
    except Exception as error:  # Of any kind: the other tasks still run.
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        if isinstance(error, ConfigError):
            return Failure(line, refused=True)
        return Failure(f"{type(error).__name__}: {line}")
    return None


def _print_error(error: Exception) -> None:
    """Prints the line of a refusal, or the traceback of any other error."""
    if isinstance(error, ConfigError):
        print(refusal(error), flush=True)
    else:
        traceback.print_exception(error)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Lets Ctrl-C wait until the block ends, so that what it starts is written down.

    Processes that it starts do not get Ctrl-C at all, unless they ask for it.
    """
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C reaches the main one.
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    # New processes inherit the mask. Another thread of this one may still take the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _lock(log: Any) -> None:
    """Keeps a second process from running the same task, such as a job of an earlier command.

    Takes a record lock, which the system releases when this process closes the log or ends.

    Raises:
        ConfigError: another process runs it.
    """
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ConfigError(
            f"{log.name}: a process of an earlier command still writes it: wait for it, or end it"
        ) from None
