"""The expensive baseline: a search over the loss weights with one training for each trial.

Both samplers are Optuna's: tree-structured Parzen estimators (Bergstra et al., "Algorithms for
Hyper-Parameter Optimization", 2011) and random search (Bergstra & Bengio, "Random Search for
Hyper-Parameter Optimization", 2012).
"""

from __future__ import annotations

import contextlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
from omegaconf import DictConfig, OmegaConf

from grap_solo.data import load_run, shared_arrays
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.experiments.cells import check_launcher, use_gpus
from grap_solo.experiments.grid import Cell
from grap_solo.experiments.retrain import learned_weighting
from grap_solo.experiments.search_places import RANGE, SAMPLERS, Search, finished_trials
from grap_solo.experiments.search_report import GRAP_RUNS, REPORT_FILES, trial_name, write_report
from grap_solo.experiments.search_storage import (
    STUDY_FILE,
    Storage,
    check_for_slurm,
    explained_failures,
    open_study,
    parse_storage,
    patiently,
)
from grap_solo.experiments.search_trials import (
    PRUNERS,
    Halves,
    patient_study,
    remove_unfinished,
    run_config,
    run_trial,
    say_outcome,
)
from grap_solo.experiments.tasks import Launcher, Task, run_tasks
from grap_solo.records.files import (
    CONFIG_FILE,
    RESULT_FILE,
    make_folder,
    only_one,
    read_json,
    write_json,
)
from grap_solo.training.config import expand_paths, prepare, run_dir, terms_of
from grap_solo.training.run import prepare_one_of_many, pretrain
from grap_solo.training.same_run import (
    PATHS,
    Difference,
    check_same_data,
    data_fingerprints,
    describe_free,
    find_differences,
    keep_config,
    of_its_version,
    refuse_differences,
)

STORAGE_FILE = "storage.json"
"""In the search's folder: where its study is, if not in :data:`STUDY_FILE`."""

SCORED_ON = "half of the validation images"
SECONDS_BETWEEN_READS = 2.0


def search(
    source: DictConfig,
    directory: Path,
    trials: int,
    sampler: str = "tpe",
    pruner: str = "none",
    seed: int = 0,
    storage: str | None = None,
    launcher: Launcher | None = None,
) -> Path:
    """Searches the loss weights, trains GraP beside it, and writes ``search.md``, ``search.csv``
    and ``search.png``.

    Each trial is a run with constant weights, each drawn log-uniformly within a factor of 10 of
    its reference; the best has the highest accuracy of the online probe on one half of the
    validation images. The report has the accuracies on the other half, so that the choice of the
    best does not flatter it. GraP is run once, and once more with the median of its weights.

    Called again with the same arguments, it resumes; ``trials`` may have grown. An interrupted run
    starts over, and the time of its interrupted part is not counted. Where training is
    reproducible (on one machine's CPU), the search then has the history of an uninterrupted one.
    With several trials at a time, the history depends on which of them ends first.

    Args:
        source: a composed configuration. Each run has a name, ``checkpoint.dir`` and weighting of
            its own; the GraP run takes the weighting from here if it is a ``grap`` one.
        directory: the folder for the study and all runs. All workers must reach it.
        trials: the total number of trials, pruned and failed ones included.
        sampler: ``tpe`` or ``random``.
        pruner: ``none``; or ``median``, which stops a trial whose score after an epoch is below
            the median of the earlier trials'.
        seed: of the sampler, and of the split of the validation images. All runs train with the
            configuration's seed.
        storage: where the study is kept: see
            :func:`~grap_solo.experiments.search_storage.parse_storage`.
        launcher: where the runs train, and how many at a time; None trains one after the other in
            this process.

    Returns:
        The path of ``search.md``.

    Raises:
        ConfigError: bad input, a directory that holds something else, a storage that cannot be
            used, or workers none of which can train.
    """
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    if pruner not in PRUNERS:
        raise unknown_name("pruner", pruner, PRUNERS)
    for key, value, least in (("trials", trials, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{key}: expected a whole number of {least} or more, got {value}")
    launcher = launcher or Launcher()
    source = expand_paths(source)
    cfg = prepare_one_of_many(source, "a search")
    zero = [term for term, value in terms_of(cfg).items() if value == 0]
    if zero:
        raise ConfigError(
            f"method_kwargs: the reference weight of {', '.join(zero)} is 0, and a search looks "
            f"within a factor of {RANGE:g} of it: give it some weight"
        )
    check_launcher([Cell("grap", cfg.seed, source, None)], launcher)
    where = parse_storage(storage, directory)
    if launcher.name == "slurm":
        check_for_slurm(where)
    plain = keep_config(_shared_keys(source))
    settings = {"sampler": sampler, "pruner": pruner, "seed": seed, "configuration": plain}
    settings["scored_on"] = SCORED_ON
    settings = json.loads(json.dumps(settings, default=str))  # As the study returns them.

    _make_search_folder(directory, where)
    with only_one(directory), explained_failures(where):
        name = find_study(directory, where)
        with open_study(where, name) as study:
            start_study(study, settings, directory)
        write_json(
            directory / STORAGE_FILE, {"storage": _say_place(directory, where), "study": name}
        )
        workers = launcher.parallel or (1 if launcher.name == "local" else trials)
        own = Search(
            directory, where, name, trials, sampler, pruner, seed, plain, terms_of(cfg), workers > 1
        )
        if launcher.name == "local" and launcher.parallel is None:
            while len(history := _read_history(own)) < trials:
                if not run_trial(own):  # A worker of an earlier command runs the last ones.
                    time.sleep(SECONDS_BETWEEN_READS)
            write_report(history, settings, directory, cfg)  # GraP's runs may fail.
            for name in GRAP_RUNS:
                train_grap_run(own, name)
        else:
            local = launcher.name == "local"
            with shared_arrays(directory / ".shared") if local else contextlib.nullcontext():
                failed = _run_by_launcher(own, launcher, workers, use_gpus_of(source))
            history = _read_history(own)
            if failed:
                write_report(history, settings, directory, cfg)
                raise ConfigError(failed)
        table = write_report(history, settings, directory, cfg)
    print(f"\n{table}")
    print("files:", ", ".join(str(directory / file) for file in REPORT_FILES))
    return directory / REPORT_FILES[0]


def use_gpus_of(source: DictConfig) -> bool:
    return use_gpus([Cell("grap", 0, source, None)])


# ---- the configuration and the directory ------------------------------------------------------


def _shared_keys(source: DictConfig) -> dict[str, Any]:
    """The configuration that all runs share, as plain values: without each run's own keys."""
    plain = OmegaConf.to_container(source, resolve=True)
    assert isinstance(plain, dict)
    for key in ("hydra", "name", "resume_from_checkpoint"):
        plain.pop(key, None)
    if isinstance(plain.get("checkpoint"), dict):
        plain["checkpoint"].pop("dir", None)
    return {str(key): value for key, value in plain.items()}


def _make_search_folder(directory: Path, storage: Storage) -> None:
    """Makes the search's folder, and refuses one of anything else: runs in it may be removed."""
    make_folder(directory, "search")
    names = {path.name for path in directory.iterdir()} - {".lock", Path(storage.place).name}
    if names and not names & {STUDY_FILE, STORAGE_FILE}:
        raise ConfigError(f"{directory}: not empty and not a search: give another folder")


def find_study(directory: Path, storage: Storage) -> str:
    """Finds the name of the search's study in its storage; makes one for a new search.

    Raises:
        ConfigError: the folder holds a search whose study is elsewhere.
    """
    saved, here = read_json(directory / STORAGE_FILE), _say_place(directory, storage)
    if saved is None:
        if here == STUDY_FILE or (directory / STUDY_FILE).exists():
            saved = {"storage": STUDY_FILE, "study": "search"}
        else:  # A database may have the studies of many searches.
            study = f"{directory.resolve().name}-{uuid4().hex[:8]}"
            saved = {"storage": here, "study": study}
    if saved["storage"] != here:
        raise ConfigError(
            f"--storage: the study of {directory} is in {saved['storage']}, not in {here}: give "
            "that, or another folder"
        )
    return str(saved["study"])


def _say_place(directory: Path, storage: Storage) -> str:
    """Names a storage without a password; a file in the search's folder, by its name alone, so that
    the folder may be moved."""
    place = Path(storage.place)
    if storage.kind != "server" and place.parent == directory.absolute():
        return place.name
    return storage.label


# ---- the study --------------------------------------------------------------------------------


def start_study(study: optuna.study.Study, settings: dict[str, Any], directory: Path) -> None:
    """Gives a new study its settings, and checks those of one that was there.

    Raises:
        ConfigError: the study has other settings, or is of an earlier version.
    """
    if not finished_trials(study):  # No trial yet, so other settings do no harm.
        study.set_user_attr("settings", settings)
    old = study.user_attrs.get("settings", {})
    if old.get("scored_on") != SCORED_ON:
        raise ConfigError(
            f"{directory}: holds a search of an earlier version, which climbs and reports on the "
            "same images: give another folder"
        )
    _check_settings(old, settings, directory)


def _check_settings(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    """Refuses a search with other settings than the one in the directory.

    Raises:
        ConfigError: a setting, a key that changes what is trained, or the images differ.
    """
    flags = ("sampler", "pruner", "seed")
    own = [Difference(f"--{key}", old.get(key), new.get(key)) for key in flags]
    found = [each for each in own if each.old != each.new]
    both = [
        {"name": STUDY_FILE, **of_its_version(each.get("configuration", {}))} for each in (old, new)
    ]
    found += find_differences(*both)
    free = refuse_differences(found, f"{directory}: holds a search", "another folder")
    if not free:
        return
    print(describe_free(free), flush=True)
    runs = sorted(each.parent for each in directory.glob(f"*/{CONFIG_FILE}"))
    if runs and any(each.key in PATHS.values() for each in free):
        cfg = prepare(OmegaConf.create(both[1]))
        images = load_run(cfg.data, cfg.labels, cfg.downstream)
        check_same_data(cfg, runs[0], data_fingerprints(cfg, images))


def _read_history(search: Search) -> list[optuna.trial.FrozenTrial]:
    """Reads the finished trials, and waits for the storage if need be."""
    with patient_study(search.storage, search.study) as study:
        return patiently(search.storage, lambda: finished_trials(study))


# ---- the runs ---------------------------------------------------------------------------------


def _run_by_launcher(search: Search, launcher: Launcher, workers: int, uses_gpu: bool) -> str:
    """Runs the missing trials, and GraP's runs, by a launcher.

    A task is one trial, whichever is next. A task that fails or dies leaves its trial to another.

    Returns:
        Why a run of GraP has failed; empty if none has.

    Raises:
        ConfigError: more tasks than workers have failed one after the other.
    """
    logs = search.directory / "logs"
    logs.mkdir(exist_ok=True)
    print(f"{workers} at a time; their output is in {logs}", flush=True)
    history = _read_history(search)
    known, failed_in_a_row = {each.number for each in history}, 0
    runs, failed = _grap_tasks(search, logs), ""
    while len(history) < search.trials or runs:
        tasks = [
            Task(f"worker-{each:03d}", partial(run_trial, search), logs / f"worker-{each:03d}.log")
            for each in range(search.trials - len(history))
        ]
        before = len(history)
        ended = run_tasks([*tasks, *runs], launcher, search.directory, uses_gpu)
        with contextlib.closing(ended):
            for task, reason in ended:
                if task.name in GRAP_RUNS:
                    print(f"{task.name}: {reason or 'finished'}", flush=True)
                    failed = failed or (f"{task.name}: {reason}" if reason else "")
                    continue
                history = _read_history(search)
                new = [each for each in history if each.number not in known]
                for each in new:
                    outcome = say_outcome(each.state, each.value, each.user_attrs["reason"])
                    print(f"{trial_name(each.user_attrs['place'])}: {outcome}", flush=True)
                known |= {each.number for each in new}
                failed_in_a_row = failed_in_a_row + 1 if reason and not new else 0
                if reason:
                    print(f"{task.name}: {reason}: its trial is tried again", flush=True)
                if failed_in_a_row > workers:
                    raise ConfigError(f"search: {reason}")
        runs = []
        if len(history) == before < search.trials:  # Others of an earlier command still run.
            time.sleep(SECONDS_BETWEEN_READS)
    return failed


def _grap_tasks(search: Search, logs: Path) -> list[Task]:
    """Makes the tasks of GraP's runs that are not finished."""
    grap, tuned = (
        Task(name, partial(train_grap_run, search, name), logs / f"{name}.log", after)
        for name, after in zip(GRAP_RUNS, (None, GRAP_RUNS[0]), strict=True)
    )
    if not (search.directory / grap.name / RESULT_FILE).exists():
        return [grap, tuned]
    if not (search.directory / tuned.name / RESULT_FILE).exists():
        return [Task(tuned.name, tuned.call, tuned.log)]
    return []


def train_grap_run(search: Search, name: str) -> None:
    """Trains ``grap``, or ``grap_tuned`` with the median of its weights, unless it is finished, and
    records its accuracy and seconds.

    Raises:
        ConfigError: ``grap`` is not finished.
    """
    file = search.directory / name / RESULT_FILE
    if file.is_file():
        return
    parent = search.directory / GRAP_RUNS[0]
    if name != GRAP_RUNS[0]:
        if not (parent / RESULT_FILE).is_file():
            raise ConfigError(f"the run that it starts from, {parent.name}, has failed")
        block = learned_weighting([parent])
    else:
        block = search.plain.get("weighting") or {}
        block = block if block.get("name") == "grap" else {"name": "grap"}
    cfg = run_config(search.plain, search.directory, name, block)
    remove_unfinished(run_dir(cfg))
    start, halves = time.monotonic(), Halves(search.seed)
    pretrain(cfg, [halves])
    seconds = time.monotonic() - start
    found = {"score": halves.score, "accuracy": halves.accuracy, "seconds": seconds}
    write_json(file, found)
