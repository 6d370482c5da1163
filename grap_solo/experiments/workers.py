"""Worker processes on this machine, each with GPUs and a share of the cores of its own.

Of the libraries for this, none does all that is needed here: ``concurrent.futures`` has one
environment for all of its processes and ends them all when one dies; submitit's local executor
pins its processes, but starts one for each task, and imports take longer than a small run; loky
takes an environment, but only for a whole pool, and says of a dead process neither which one nor
how it died. A process and a pipe for each worker are as short as a wrapper of these.

A worker's memory is not limited. ``RLIMIT_AS``, the limit that a process can set itself, counts
addresses, of which CUDA reserves far more than it uses.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from grap_solo.errors import ConfigError
from grap_solo.experiments.tasks import Failure, Task, attempt

SECONDS_TO_END = 60
"""How long a worker that is told to end may take for its current step and a checkpoint."""

SPAWN = multiprocessing.get_context("spawn")


def run_in_workers(
    tasks: Sequence[Task], parallel: int, gpus_per_run: float, uses_gpu: bool
) -> Iterator[tuple[Task, str | None]]:
    """Runs tasks in worker processes; yields each one as it ends, with the reason if it failed.

    A worker imports once and runs many tasks. It is replaced after a task that died or failed
    unexpectedly, since an error of the GPU can outlive its task.

    Args:
        tasks: see :func:`~grap_solo.experiments.tasks.run_tasks`.
        parallel: the number of workers.
        gpus_per_run: see :class:`~grap_solo.experiments.tasks.Launcher`.
        uses_gpu: see :func:`~grap_solo.experiments.tasks.run_tasks`.

    Raises:
        ConfigError: more workers than the GPUs allow.
    """
    environments = share_out(parallel, gpus_per_run, uses_gpu)
    workers = [Worker(each) for each in environments[: len(tasks)]]
    waiting, unended = list(tasks), {task.name for task in tasks}
    try:
        while unended:
            for worker in workers:
                ready = next((task for task in waiting if task.after not in unended), None)
                if worker.task is None and ready is not None:
                    waiting.remove(ready)
                    worker.start(ready)
            pipes: dict[Any, Worker] = {
                each.pipe: each for each in workers if each.task is not None
            }
            for pipe in wait(list(pipes)):
                task, failure = pipes[pipe].finish()
                unended.remove(task.name)
                yield task, None if failure is None else failure.reason
    finally:
        end_workers(workers)


# ---- what each worker gets ------------------------------------------------------------------


def share_out(parallel: int, gpus_per_run: float, uses_gpu: bool) -> list[dict[str, str | None]]:
    """Shares this machine's cores and GPUs out among workers.

    Returns:
        the environment variables of each worker; None removes a variable.

    Raises:
        ConfigError: more workers than the GPUs allow.
    """
    import torch

    threads = max(1, torch.get_num_threads() // parallel)
    environments: list[dict[str, str | None]] = [
        {"OMP_NUM_THREADS": str(threads)} for _ in range(parallel)
    ]
    gpus = visible_gpus() if uses_gpu else []
    if not gpus:
        return environments
    if gpus_per_run < 1:
        groups = [[each] for each in gpus] * int(1 / gpus_per_run)
    else:
        size = int(gpus_per_run)
        groups = [gpus[at : at + size] for at in range(0, len(gpus) - size + 1, size)]
    if parallel > len(groups):
        sharing = -(-parallel // len(gpus))
        fewer = f"give --parallel {len(groups)}, or " if groups else "give "
        raise ConfigError(
            f"--parallel: {parallel} runs at a time with --gpus-per-run {gpus_per_run:g} need more "
            f"than the GPUs here ({', '.join(gpus)}): {fewer}--gpus-per-run "
            f"{_fraction_for(sharing):g} to put up to {sharing} on a GPU"
        )
    for environment, group in zip(environments, groups, strict=False):
        if _is_rocm():
            environment["CUDA_VISIBLE_DEVICES"] = None  # ROCm would number this one's again.
        environment["HIP_VISIBLE_DEVICES" if _is_rocm() else "CUDA_VISIBLE_DEVICES"] = ",".join(
            group
        )
    return environments


def _fraction_for(runs: int) -> float:
    """The largest fraction of two digits of which as many fit into 1."""
    return 1 if runs == 1 else int(100 / runs) / 100


def visible_gpus() -> list[str]:
    """Lists the GPUs that this process may use, each as the platform's variable names it."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _is_rocm():
        given = os.environ.get("HIP_VISIBLE_DEVICES", given)
    if given is None or not count:
        return [str(index) for index in range(count)]
    listed = [each.strip() for each in given.split(",")]
    # Of the parts of a shared GPU (MIG) a process sees only one, so torch counts no more.
    return listed if listed[0].startswith("MIG-") else listed[:count]


def _is_rocm() -> bool:
    import torch

    return torch.version.hip is not None


# ---- the processes --------------------------------------------------------------------------


class Worker:
    """A process that runs one task after the other.

    Args:
        environment: the variables that differ from this process's, from its first import on.

    Attributes:
        task: the task that it runs; None if it waits for one.
        pipe: sends tasks; has something to read once the task or the process has ended.
    """

    def __init__(self, environment: Mapping[str, str | None]) -> None:
        self.environment = environment
        self.task: Task | None = None
        self.pipe: Any = None
        self.process: Any = None

    def start(self, task: Task) -> None:
        """Starts a task, in a new process if there is none."""
        if self.process is None or not self.process.is_alive():
            self.pipe, theirs = SPAWN.Pipe()
            self.process = SPAWN.Process(target=_serve, args=(theirs, os.getpid()))
            with _environment(self.environment):
                self.process.start()
            theirs.close()  # So that the pipe ends with the process.
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # It has died: finish() says so.
            self.pipe.send(task)

    def finish(self) -> tuple[Task, Failure | None]:
        """Returns the task that has ended, and why if it failed."""
        assert self.task is not None
        task, self.task = self.task, None
        try:
            failure: Failure | None = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            failure = Failure(f"its process {_say_end(self.process.exitcode)}")
        if failure is not None and not failure.refused:
            self.pipe.close()
            self.process.join()
        return task, failure


def end_workers(workers: Sequence[Worker]) -> None:
    """Ends workers. One that trains ends its step and leaves a checkpoint."""
    started = [each for each in workers if each.process is not None]
    for each in started:
        if each.task is not None:
            each.process.terminate()
        each.pipe.close()
    deadline = time.monotonic() + SECONDS_TO_END
    try:
        for each in started:
            each.process.join(max(0, deadline - time.monotonic()))
    finally:  # Also at a second Ctrl-C.
        for each in started:
            each.process.kill()


def _say_end(code: int) -> str:
    """Says how a process has ended."""
    if code >= 0:
        return f"ended with exit code {code}: see its log"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Changes this process's environment for a while: a new process starts with it, so that a
    variable is there before anything is imported."""
    before = {key: os.environ.get(key) for key in changes}
    _set_variables(changes)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for key, value in values.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


def _serve(pipe: Any, parent: int) -> None:
    """Runs the tasks that a pipe brings, until it ends or a task fails unexpectedly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # At Ctrl-C the parent ends the workers.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            failure = attempt(task)
        except SystemExit:  # A training ends so at SIGTERM.
            failure = Failure("its process was told to end (SIGTERM)")
        with contextlib.suppress(BrokenPipeError):  # The parent ends its workers.
            pipe.send(failure)
        if failure is not None and not failure.refused:
            return
        gc.collect()  # A run's model may be part of a cycle, and the next run needs the memory.


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
