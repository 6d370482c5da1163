"""The expensive baseline: a search over the loss weights with one training for each trial.

Both samplers are Optuna's: tree-structured Parzen estimators (Bergstra et al., "Algorithms for
Hyper-Parameter Optimization", 2011) and random search (Bergstra & Bengio, "Random Search for
Hyper-Parameter Optimization", 2012).
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from grap_solo.data import load_run
from grap_solo.errors import ConfigError, Diverged, unknown_name
from grap_solo.experiments.retrain import learned_weighting
from grap_solo.experiments.search_report import REPORT_FILES, trial_name, write_report
from grap_solo.methods import weighted_name
from grap_solo.records.files import (
    CONFIG_FILE,
    RESULT_FILE,
    make_folder,
    only_one,
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

STUDY_FILE = "study.db"
UNWRITABLE_DATABASE = ("readonly", "unable to open", "is full", "disk I/O error")
"""SQLite's words for a file that is whole but cannot be used."""

RANGE = 10.0
"""A weight is searched between its reference divided by this and its reference times this."""

SAMPLERS: dict[str, type[TPESampler] | type[RandomSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
}
PRUNERS: dict[str, type[BasePruner]] = {"none": NopPruner, "median": MedianPruner}


def search(
    source: DictConfig,
    directory: Path,
    trials: int,
    sampler: str = "tpe",
    pruner: str = "none",
    seed: int = 0,
) -> Path:
    """Searches the loss weights, trains GraP beside it, and writes ``search.md``, ``search.csv``
    and ``search.png``.

    Each trial is a run with constant weights, each drawn log-uniformly within a factor of 10 of
    its reference; the best has the highest validation accuracy of the online probe. GraP is run
    once, and once more with the median of its weights.

    Called again with the same arguments, it resumes; ``trials`` may have grown. An interrupted run
    starts over, and the time of its interrupted part is not counted. Where training is
    reproducible (on one machine's CPU), the search then has the history of an uninterrupted one.

    Args:
        source: a composed configuration. Each run has a name, ``checkpoint.dir`` and weighting of
            its own; the GraP run takes the weighting from here if it is a ``grap`` one.
        directory: the folder for the study and all runs.
        trials: the total number of trials, pruned and failed ones included.
        sampler: ``tpe`` or ``random``.
        pruner: ``none``; or ``median``, which stops a trial whose accuracy after an epoch is below
            the median of the earlier trials'.
        seed: the sampler's seed. All runs train with the configuration's seed.

    Returns:
        The path of ``search.md``.

    Raises:
        ConfigError: bad input, or a directory that holds something else.
    """
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    if pruner not in PRUNERS:
        raise unknown_name("pruner", pruner, PRUNERS)
    for key, value, least in (("trials", trials, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{key}: expected a whole number of {least} or more, got {value}")
    source = expand_paths(source)
    cfg = prepare_one_of_many(source, "a search")
    zero = [term for term, value in terms_of(cfg).items() if value == 0]
    if zero:
        raise ConfigError(
            f"method_kwargs: the reference weight of {', '.join(zero)} is 0, and a search looks "
            f"within a factor of {RANGE:g} of it: give it some weight"
        )
    plain = keep_config(_shared_keys(source))
    settings = {"sampler": sampler, "pruner": pruner, "seed": seed, "configuration": plain}
    settings = json.loads(json.dumps(settings, default=str))  # As the study returns them.
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    _claim_directory(directory)
    with only_one(directory), _explained_failures(directory / STUDY_FILE):
        study = _open_study(directory, PRUNERS[pruner](), settings)
        while (done := len(_history(study))) < trials:
            study.sampler = _sampler(sampler, seed, done)
            _run_trial(study, plain, directory, terms_of(cfg))
        write_report(_history(study), settings, directory, cfg)  # GraP's runs may fail.
        _train_grap_and_tuned(plain, directory)
        table = write_report(_history(study), settings, directory, cfg)
    print(f"\n{table}")
    print("files:", ", ".join(str(directory / file) for file in REPORT_FILES))
    return directory / REPORT_FILES[0]


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


def _run_config(
    plain: dict[str, Any], directory: Path, name: str, weighting: dict[str, Any]
) -> DictConfig:
    """Makes the configuration of one run of the search."""
    own = {"name": name, "method": weighted_name(plain["method"]), "weighting": weighting}
    cfg = OmegaConf.create({**plain, **own})
    OmegaConf.update(cfg, "checkpoint.dir", str(directory), force_add=True)
    return cfg


def _claim_directory(directory: Path) -> None:
    """Makes the search's folder, and refuses one of anything else: runs in it may be removed."""
    make_folder(directory, "search")
    names = {path.name for path in directory.iterdir()} - {".lock"}
    if names and STUDY_FILE not in names:
        raise ConfigError(f"{directory}: not empty and not a search: give another folder")


def _remove_unfinished(directory: Path) -> None:
    """Removes the files of an interrupted run, which then starts over."""
    if directory.exists():
        shutil.rmtree(directory)


# ---- the study --------------------------------------------------------------------------------


def _open_study(
    directory: Path, pruner: BasePruner, settings: dict[str, Any]
) -> optuna.study.Study:
    """Opens the directory's study, or makes a new one.

    Raises:
        ConfigError: the study has other settings.
    """
    file = directory / STUDY_FILE
    # A URL would take a meaning from some characters of the path.
    connect = functools.partial(sqlite3.connect, file.absolute(), check_same_thread=False)
    study = optuna.create_study(
        storage=optuna.storages.RDBStorage(f"sqlite:///{STUDY_FILE}", {"creator": connect}),
        study_name="search",
        direction="maximize",
        pruner=pruner,
        load_if_exists=True,
    )
    if not _history(study):  # No trial yet, so other settings do no harm.
        study.set_user_attr("settings", settings)
    _check_settings(study.user_attrs.get("settings", {}), settings, directory)
    _abandon_running(study)
    return study


@contextlib.contextmanager
def _explained_failures(file: Path) -> Iterator[None]:
    """Turns the failures of the study's file into errors that say what to do.

    Raises:
        ConfigError: another process uses it, it cannot be written, or it is no study.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, sqlite3.Error):
            cause = getattr(cause, "orig", None) or cause.__cause__
        line = (str(cause or error).splitlines() or [type(error).__name__])[0]
        text = f"not a study, or a damaged one: {line}"
        if "locked" in line:  # Python 3.10 has no error codes.
            text = f"another process uses it ({line}): end that process, or wait for it"
        elif any(words in line for words in UNWRITABLE_DATABASE):
            text = f"cannot be read or written ({line}): make room, or let the file be written"
        raise ConfigError(f"{file}: {text}") from None


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


def _abandon_running(study: optuna.study.Study) -> None:
    """Takes the trial of a killed search out of the history, so that it is run again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # In this order: if killed in between, the next start finds the trial, still running.
        study.set_user_attr("abandoned", [*study.user_attrs.get("abandoned", []), trial.number])
        study.tell(trial.number, state=TrialState.FAIL)


def _history(study: optuna.study.Study) -> list[FrozenTrial]:
    """Lists the finished trials in order: complete, pruned and failed, but not abandoned."""
    abandoned = study.user_attrs.get("abandoned", [])
    trials = study.get_trials(deepcopy=False)
    return [each for each in trials if each.state.is_finished() and each.number not in abandoned]


def _sampler(name: str, seed: int, done: int) -> BaseSampler:
    """Makes a sampler whose draws depend only on the seed and the finished trials."""
    derived = np.random.SeedSequence([seed, done]).generate_state(1)[0]
    return SAMPLERS[name](seed=int(derived))


class Reporter(Callback):
    """Reports the accuracy to the trial after each epoch, and ends the run if it is pruned.

    Args:
        trial: the trial of the run.

    Raises:
        optuna.TrialPruned: the pruner stops the run. After the last epoch it never does, since
            nothing would be saved.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.trial.report(trainer.callback_metrics["val_acc1"].item(), trainer.current_epoch)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if not last and self.trial.should_prune():
            raise optuna.TrialPruned


def _run_trial(
    study: optuna.study.Study, plain: dict[str, Any], directory: Path, reference: dict[str, float]
) -> None:
    """Draws weights, trains with them and records the result.

    If the run raises, its trial has failed and keeps the reason.

    Raises:
        ConfigError: the configuration is wrong, so that every trial would fail.
    """
    name = trial_name(len(_history(study)))
    trial = study.ask()
    weights = {
        term: trial.suggest_float(term, value / RANGE, value * RANGE, log=True)
        for term, value in reference.items()
    }
    cfg = _run_config(plain, directory, name, {"name": "fixed", "weights": weights})
    _remove_unfinished(run_dir(cfg))
    state, accuracy, reason = TrialState.COMPLETE, None, ""
    start = time.monotonic()
    try:
        accuracy = pretrain(cfg, [Reporter(trial)]).accuracy
        if accuracy is None:
            raise ConfigError(
                "limit_val_batches, check_val_every_n_epoch: the run was never validated, and a "
                "search compares validation accuracies: remove these keys"
            )
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Diverged as error:  # The weights are at fault: other trials may go well.
        state, reason = TrialState.FAIL, str(error)
    except ConfigError:
        raise
    except Exception as error:
        state, reason = TrialState.FAIL, " ".join(f"{type(error).__name__}: {error}".split())
    trial.set_user_attr("seconds", time.monotonic() - start)
    trial.set_user_attr("reason", reason)
    study.tell(trial, accuracy, state=state)
    outcome = f"{accuracy:.2f} %" if accuracy is not None else f"{state.name.lower()} {reason}"
    print(f"{name}: {outcome}", flush=True)


# ---- GraP to compare with -----------------------------------------------------------------------


def _train_grap_and_tuned(plain: dict[str, Any], directory: Path) -> None:
    """Trains ``grap``, then ``grap_tuned`` with the median of its weights."""
    block = plain.get("weighting") or {}
    if block.get("name") != "grap":
        block = {"name": "grap"}
    _run_once(_run_config(plain, directory, "grap", block))
    block = learned_weighting([directory / "grap"])
    _run_once(_run_config(plain, directory, "grap_tuned", block))


def _run_once(cfg: DictConfig) -> None:
    """Trains, unless the run is finished, and records accuracy and seconds."""
    file = run_dir(cfg) / RESULT_FILE
    if file.is_file():
        return
    _remove_unfinished(run_dir(cfg))
    start = time.monotonic()
    run = pretrain(cfg)
    write_json(file, {"accuracy": run.accuracy, "seconds": time.monotonic() - start})
