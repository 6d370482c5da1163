"""Which trial of a search a worker runs next: its place, its weights, and whether one was lost.

Workers share nothing but the study and the search's folder. There, a worker locks a file for as
long as its trial runs. The system releases the lock when the process ends, however it ends, so that
another worker can tell a trial that runs from one that is lost. A lost trial is not counted, and
its weights are tried again under the same name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from grap_solo.experiments.search_storage import Storage

RANGE = 10.0
"""A weight is searched between its reference divided by this and its reference times this."""

SAMPLERS: dict[str, type[TPESampler] | type[RandomSampler]] = {
    "tpe": TPESampler,
    "random": RandomSampler,
}

RUNNING_FOLDER = ".running"
"""In the search's folder: the locked file of each trial that runs, by its number."""


@dataclass(frozen=True)
class Search:
    """All that a worker must know to run a trial.

    Attributes:
        directory: the search's folder.
        storage: where its study is.
        study: the study's name there.
        trials: the total number of trials.
        sampler: see :func:`~grap_solo.experiments.search.search`, as for the next two.
        pruner: see there.
        seed: see there.
        plain: the configuration that all runs share.
        reference: the reference weight of each term.
        parallel: whether several trials may run at a time.
    """

    directory: Path
    storage: Storage
    study: str
    trials: int
    sampler: str
    pruner: str
    seed: int
    plain: dict[str, Any]
    reference: dict[str, float]
    parallel: bool


# ---- the history ------------------------------------------------------------------------------


def finished_trials(study: optuna.study.Study) -> list[FrozenTrial]:
    """Lists the finished trials by place: complete, pruned and failed, but not lost."""
    trials = [
        each
        for each in study.get_trials(deepcopy=False)
        if each.state.is_finished() and not _is_lost(each)
    ]
    return sorted(trials, key=lambda trial: trial.user_attrs.get("place", trial.number))


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial's worker has ended before it. A trial that failed has a reason."""
    return trial.state == TrialState.FAIL and not trial.user_attrs.get("reason")


def make_sampler(name: str, seed: int, place: int, parallel: bool = False) -> BaseSampler:
    """Makes a sampler whose draws depend only on the seed, the trial's place and the study.

    Args:
        name: one of :data:`SAMPLERS`.
        seed: the search's seed.
        place: the trial's. With one worker, it is the number of finished trials.
        parallel: whether trials that still run count as bad ones, so that workers do not draw
            weights near each other's (the "constant liar" of Ginsbourger et al., 2010).
    """
    derived = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
    if name == "tpe" and parallel:
        return TPESampler(seed=derived, constant_liar=True)
    return SAMPLERS[name](seed=derived)


# ---- which trials run -------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the lock of a file, and holds it."""
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _lock_trial(directory: Path, number: int) -> TextIO | None:
    """Locks the file of a trial, until it is closed; returns None if another process holds it."""
    file = (directory / RUNNING_FOLDER / str(number)).open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return None
    return file


def give_up_lost(study: optuna.study.Study, directory: Path) -> None:
    """Takes trials whose worker has ended out of the history.

    Their lock is free, or a database server has seen no sign of life of them for long, such as of
    a machine that is gone while the file system still keeps its locks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = _lock_trial(directory, trial.number)
        if lock is None:
            continue
        with lock, contextlib.suppress(UpdateFinishedTrialError):  # It has just finished.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        (directory / RUNNING_FOLDER / str(trial.number)).unlink(missing_ok=True)


@dataclass
class Claim:
    """A trial that this process runs, until its lock is closed."""

    trial: Trial
    place: int
    weights: dict[str, float]
    lock: TextIO


def claim_trial(search: Search, study: optuna.study.Study) -> Claim | None:
    """Takes the next place and draws its weights, one worker at a time; returns None if none is
    left. If the storage fails on the way, the begun trial is lost, and the next claim says so."""
    (search.directory / RUNNING_FOLDER).mkdir(exist_ok=True)
    with _locked(search.directory / RUNNING_FOLDER / "claim"):
        give_up_lost(study, search.directory)
        trials = study.get_trials(deepcopy=False)
        running = [each for each in trials if each.state == TrialState.RUNNING]
        taken = {each.user_attrs["place"] for each in [*finished_trials(study), *running]}
        if len(taken) >= search.trials:
            return None
        place = next(each for each in range(search.trials) if each not in taken)
        space: dict[str, BaseDistribution] = {
            term: FloatDistribution(value / RANGE, value * RANGE, log=True)
            for term, value in search.reference.items()
        }
        if not any(each.state == TrialState.WAITING for each in trials):
            _try_again(study, trials, space)
        study.sampler = make_sampler(search.sampler, search.seed, place, search.parallel)
        trial = study.ask()
        lock = _lock_trial(search.directory, trial.number)
        assert lock is not None  # Its number is new.
        try:
            trial.set_user_attr("place", place)
            weights = {
                term: trial.suggest_float(term, value / RANGE, value * RANGE, log=True)
                for term, value in search.reference.items()
            }
        except BaseException:
            lock.close()
            raise
        return Claim(trial, place, weights, lock)


def _try_again(
    study: optuna.study.Study, trials: Sequence[FrozenTrial], space: dict[str, BaseDistribution]
) -> None:
    """Puts the weights of the first lost trial first, unless they have been tried again. Those of
    a trial that was lost before all were drawn are drawn anew, which gives the same."""
    again = {each.user_attrs.get("again") for each in trials}
    for trial in trials:
        if _is_lost(trial) and trial.number not in again and trial.distributions == space:
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
            return
