"""Tasks as jobs on a SLURM cluster, by submitit: the engine of ``pretrain +launch=submitit`` too.

The jobs do not need the command that has submitted them. It only waits, and writes down which job
runs which task, so that the same command waits for jobs that still run instead of starting others.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.experiments.tasks import (
    SLURM_KEYS,
    Failure,
    Launcher,
    Task,
    attempt,
    hold_interrupts,
)
from grap_solo.extras import require
from grap_solo.packaged import find_packaged
from grap_solo.records.files import read_config, read_json, write_json

JOBS_FOLDER = ".submitit"
JOBS_FILE = "jobs.json"
"""In the jobs' folder: the number of the newest job of each task."""

SECONDS_TO_APPEAR = 600
"""How long SLURM's accounting may not know a new job yet."""

SECONDS_BETWEEN_LOOKS = 1.0

FIXED = {"submitit_folder": "it lies in the folder of the runs", "nodes": "a run has one node",
         "tasks_per_node": "a run has one process"}  # fmt: skip
"""The settings that the launcher sets itself, and why."""


class Attempt:
    """The function that submitit calls in a job."""

    def __call__(self, task: Task) -> Failure | None:
        return attempt(task)

    def checkpoint(self, task: Task) -> Any:
        """Puts the job back into the queue. submitit calls this shortly before the time limit."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, task)


def read_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads the jobs' settings: those of ``configs/slurm/launch/submitit.yaml``, with changes.

    Args:
        overrides: such as ``hydra.launcher.partition=gpu``.

    Raises:
        ConfigError: an unknown setting, one that the launcher sets itself, or no SLURM here.
    """
    require("--launcher slurm", "slurm")
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    packaged = read_config(find_packaged("slurm/launch/submitit"))
    settings: Any = OmegaConf.merge(
        OmegaConf.structured(SlurmQueueConf),
        packaged.hydra.launcher,
        {"gpus_per_node": None, "nodes": 1, "tasks_per_node": 1, "submitit_folder": ""},
    )
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        name = key.removeprefix(SLURM_KEYS).partition(".")[0]
        if name not in settings or name == "_target_":
            raise unknown_name(key, name, {*settings} - {"_target_", *FIXED})
        if name in FIXED:
            raise ConfigError(f"{key}: {FIXED[name]}: leave it out")
        try:
            given = OmegaConf.from_dotlist([f"{key.removeprefix(SLURM_KEYS)}={value}"])
            settings = OmegaConf.merge(settings, given)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ConfigError(f"{key}: cannot take {value}: {line}") from None
    if shutil.which("sbatch") is None:
        raise ConfigError("--launcher slurm: no sbatch here: start it on a SLURM cluster")
    found: Any = OmegaConf.to_container(settings, resolve=True)
    return {key: value for key, value in found.items() if key != "_target_" and value is not None}


def run_jobs(
    tasks: Sequence[Task], launcher: Launcher, folder: Path, uses_gpu: bool
) -> Iterator[tuple[Task, str | None]]:
    """Submits tasks that no job runs yet; yields each one as its job ends, with the reason if it
    failed.

    Tasks that wait for no other are one array of jobs. Those that wait for these are another, which
    SLURM starts when the first one has ended.

    Args:
        tasks: see :func:`~grap_solo.experiments.tasks.run_tasks`, as for the others.
        launcher: see there.
        folder: see there.
        uses_gpu: see there.

    Raises:
        ConfigError: SLURM refuses the jobs.
        KeyboardInterrupt: Ctrl-C. The jobs go on unless the launcher cancels them.
    """
    records = folder / JOBS_FOLDER
    records.mkdir(exist_ok=True)
    running = _find_running(tasks, records)
    if running:
        print(f"{len(running)} jobs of an earlier command still run: waiting for them", flush=True)
    try:
        for wave in _waves(tasks):
            new = [task for task in wave if task.name not in running]
            # All of a parent's array: SLURM takes no list of a thousand jobs.
            parents = {
                running[task.after].job_id.split("_")[0] for task in new if task.after in running
            }
            with hold_interrupts():
                running.update(_submit(new, launcher, records, uses_gpu, sorted(parents)))
        yield from _wait(tasks, running)
    except (KeyboardInterrupt, GeneratorExit):
        _leave_or_cancel(sorted({job.job_id.split("_")[0] for job in running.values()}), launcher)
        raise


def _leave_or_cancel(numbers: Sequence[str], launcher: Launcher) -> None:
    """Cancels jobs if the launcher shall at Ctrl-C, and says what becomes of them."""
    if not numbers:
        print("\nno job is submitted", flush=True)
    elif launcher.cancel:
        subprocess.run(["scancel", *numbers])
        print("\nthe jobs are cancelled", flush=True)
    else:
        print(
            "\nthe jobs go on: the same command takes up their results, and "
            f"scancel {' '.join(numbers)} cancels them",
            flush=True,
        )


def _waves(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Groups tasks by how many others each waits for, one after the other."""
    depths: dict[str, int] = {}
    for task in tasks:
        depths[task.name] = depths.get(task.after or "", -1) + 1
    ordered = sorted(tasks, key=lambda task: depths[task.name])
    for _, wave in itertools.groupby(ordered, lambda task: depths[task.name]):
        yield list(wave)


def _submit(
    tasks: Sequence[Task],
    launcher: Launcher,
    records: Path,
    uses_gpu: bool,
    parents: Sequence[str],
) -> dict[str, Any]:
    """Submits one array of jobs, to start when others have ended; returns the jobs by task."""
    if not tasks:
        return {}
    import submitit

    settings = dict(launcher.slurm)
    if uses_gpu and "gres" not in settings:
        settings.setdefault("gpus_per_node", int(launcher.gpus_per_run))
    if launcher.parallel is not None:
        settings["array_parallelism"] = launcher.parallel
    if parents:
        settings["dependency"] = f"afterany:{':'.join(parents)}"
    try:
        executor = submitit.AutoExecutor(
            records / "%j", "slurm", slurm_max_num_timeout=settings.pop("max_num_timeout")
        )
        executor.update_parameters(**_named_for_submitit(settings))
        jobs = executor.map_array(Attempt(), tasks)
    except RuntimeError as error:
        raise ConfigError(f"{SLURM_KEYS.rstrip('.')}: {error}") from None
    found = {task.name: job for task, job in zip(tasks, jobs, strict=True)}
    numbers = read_json(records / JOBS_FILE) or {}
    numbers |= {name: job.job_id for name, job in found.items()}
    write_json(records / JOBS_FILE, numbers)
    first = jobs[0].job_id.split("_")[0]
    print(f"submitted {len(jobs)} run{'s' if len(jobs) > 1 else ''} as job {first}", flush=True)
    return found


def _named_for_submitit(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Puts ``slurm_`` before the names of settings that submitit has for SLURM alone."""
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    own = {key for key in settings if key not in BaseQueueConf.__dataclass_fields__}
    return {
        f"slurm_{key}" if key in own else key: value
        for key, value in settings.items()
        if key != "submitit_folder"
    }


def _find_running(tasks: Sequence[Task], records: Path) -> dict[str, Any]:
    """Finds the jobs of an earlier command that have not ended yet, by task."""
    file = records / JOBS_FILE
    numbers = read_json(file) or {}
    if not numbers:
        return {}
    from submitit.slurm.slurm import SlurmJob

    new = time.time() - file.stat().st_mtime < SECONDS_TO_APPEAR
    jobs: dict[str, Any] = {
        task.name: SlurmJob(records / "%j", numbers[task.name])
        for task in tasks
        if task.name in numbers
    }
    return {
        name: job
        for name, job in jobs.items()
        if not job.done() and (new or job.state != "UNKNOWN")
    }


def _wait(tasks: Sequence[Task], jobs: Mapping[str, Any]) -> Iterator[tuple[Task, str | None]]:
    """Waits for jobs; yields each task as its job ends, with the reason if it failed."""
    left = {task.name: task for task in tasks}
    while left:
        for name in [name for name in left if jobs[name].done()]:
            yield left.pop(name), _why_failed(jobs[name])
        if left:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _why_failed(job: Any) -> str | None:
    """Says why a job that has ended has failed; None if it has not."""
    ended = f"its SLURM job {job.job_id} ended as {job.state}: see {job.paths.stderr}"
    if not job.paths.result_pickle.exists() and job.state != "COMPLETED":
        return ended
    try:
        failure: Failure | None = job.result()  # Waits for a slow file system.
    except Exception:  # submitit's own: the job wrote nothing, or could not load the task.
        return ended
    return None if failure is None else failure.reason
