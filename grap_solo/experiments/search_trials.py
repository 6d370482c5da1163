"""One trial of a search, by any worker: takes a place, trains with its weights and tells the study.

What a trial is scored by is here too; which one is next, in
:mod:`~grap_solo.experiments.search_places`.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import Trial, TrialState
from torch import Tensor

from grap_solo.errors import ConfigError, Diverged
from grap_solo.experiments.search_places import RUNNING_FOLDER, Claim, Search, claim_trial
from grap_solo.experiments.search_report import trial_name
from grap_solo.experiments.search_storage import (
    STORAGE_ERRORS,
    Storage,
    beating,
    explained_failures,
    open_study,
    patiently,
)
from grap_solo.methods import weighted_name
from grap_solo.training.config import run_dir
from grap_solo.training.run import pretrain

PRUNERS: dict[str, type[BasePruner]] = {"none": NopPruner, "median": MedianPruner}


def run_config(
    plain: dict[str, Any], directory: Path, name: str, weighting: dict[str, Any]
) -> DictConfig:
    """Makes the configuration of one run of a search."""
    own = {"name": name, "method": weighted_name(plain["method"]), "weighting": weighting}
    cfg = OmegaConf.create({**plain, **own})
    OmegaConf.update(cfg, "checkpoint.dir", str(directory), force_add=True)
    return cfg


def remove_unfinished(directory: Path) -> None:
    """Removes the files of an interrupted run, which then starts over."""
    if directory.exists():
        shutil.rmtree(directory)


# ---- the score --------------------------------------------------------------------------------


def split_in_halves(labels: np.ndarray, seed: int) -> np.ndarray:
    """Splits images by chance into two halves, every class as evenly as it can be.

    Args:
        labels: of the images, shape (N,); -1 marks an image without one, which is in neither half.
        seed: of the split.

    Returns:
        the half of each image, shape (N,): 0 or 1; -1 for neither.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    order = order[labels[order] >= 0]
    halves = np.full(len(labels), -1)
    halves[order[::2]], halves[order[1::2]] = 0, 1
    return halves


class Halves(Callback):
    """Measures the online probe on each half of the validation images.

    Args:
        seed: of the split.

    Attributes:
        score: the last top-1 on the first half in percent, which a search climbs; None at first.
        accuracy: likewise on the second half, which it reports.

    Raises:
        ConfigError: there are fewer than two labelled images.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.score: float | None = None
        self.accuracy: float | None = None
        self._logits: list[Tensor] = []
        self._hits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._hook: Any = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for kept in (self._logits, self._hits, self._labels):
            kept.clear()
        probe: Any = pl_module.online_probe
        self._hook = probe.register_forward_hook(
            lambda module, inputs, logits: self._logits.append(logits)
        )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        method: Any = pl_module
        labels = method.labels_of(batch[1])
        self._hits.append(self._logits[-1].argmax(1) == labels)
        self._labels.append(labels)
        self._logits.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hook.remove()
        if trainer.sanity_checking:
            return
        hits = torch.cat(self._hits).cpu().numpy()
        halves = split_in_halves(torch.cat(self._labels).cpu().numpy(), self.seed)
        if not (halves == 1).any():
            raise ConfigError(
                "data.val_path: a search needs two labelled validation images, or more: one half "
                "to climb on, the other to report"
            )
        self.score, self.accuracy = (float(100 * hits[halves == half].mean()) for half in range(2))


class Reporter(Halves):
    """Reports the score to the trial after each epoch, and ends the run if it is pruned.

    Args:
        trial: the trial of the run.
        seed: of the split.
        storage: where the trial's study is.

    Raises:
        optuna.TrialPruned: the pruner stops the run. After the last epoch it never does, since
            nothing would be saved.
    """

    def __init__(self, trial: Trial, seed: int, storage: Storage) -> None:
        super().__init__(seed)
        self.trial, self.storage = trial, storage

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        score, epoch = self.score, trainer.current_epoch
        if trainer.sanity_checking or score is None:
            return
        patiently(self.storage, lambda: self.trial.report(score, epoch))
        last = epoch + 1 == trainer.max_epochs
        if not last and patiently(self.storage, self.trial.should_prune):
            raise optuna.TrialPruned


# ---- one run ----------------------------------------------------------------------------------


def run_trial(search: Search) -> bool:
    """Runs the next trial of a search, if one is left.

    If the run raises, its trial has failed and keeps the reason.

    Returns:
        Whether one was left. The last ones may still run elsewhere.

    Raises:
        ConfigError: the configuration is wrong, so that every trial would fail, or the storage
            cannot be used.
    """
    with (
        explained_failures(search.storage),
        patient_study(search.storage, search.study, PRUNERS[search.pruner]()) as study,
    ):
        claim = patiently(search.storage, lambda: claim_trial(search, study))
        if claim is None:
            return False
        with claim.lock, beating(study, claim.trial):
            with contextlib.suppress(UpdateFinishedTrialError):  # It was given up, and taken over.
                _run_claimed(search, study, claim)
            (search.directory / RUNNING_FOLDER / str(claim.trial.number)).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def patient_study(
    storage: Storage, name: str, pruner: BasePruner | None = None
) -> Iterator[optuna.study.Study]:
    """Opens a study that is there, and waits for its storage if need be."""
    with contextlib.ExitStack() as stack:
        yield patiently(storage, lambda: stack.enter_context(open_study(storage, name, pruner)))


def _run_claimed(search: Search, study: optuna.study.Study, claim: Claim) -> None:
    """Trains with the weights of a trial and records the result."""
    name, trial = trial_name(claim.place), claim.trial
    weighting = {"name": "fixed", "weights": claim.weights}
    cfg = run_config(search.plain, search.directory, name, weighting)
    reporter = Reporter(trial, search.seed, search.storage)
    state, reason = TrialState.COMPLETE, ""
    start = time.monotonic()
    try:
        remove_unfinished(run_dir(cfg))
        pretrain(cfg, [reporter])
        if reporter.score is None:
            raise ConfigError(
                "limit_val_batches, check_val_every_n_epoch: the run was never validated, and a "
                "search compares validation accuracies: remove these keys"
            )
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Diverged as error:  # The weights are at fault: other trials may go well.
        state, reason = TrialState.FAIL, str(error)
    except (ConfigError, UpdateFinishedTrialError, *STORAGE_ERRORS):
        raise
    except Exception as error:
        state, reason = TrialState.FAIL, " ".join(f"{type(error).__name__}: {error}".split())
    found = {"seconds": time.monotonic() - start, "accuracy": reporter.accuracy, "reason": reason}
    failed = state == TrialState.FAIL
    score = reporter.score if state == TrialState.COMPLETE else None

    def tell() -> None:
        for key, value in found.items():
            trial.set_user_attr(key, None if failed and key == "accuracy" else value)
        # It may have arrived, and only the answer been lost.
        study.tell(trial, score, state=state, skip_if_finished=True)

    patiently(search.storage, tell)
    print(f"{name}: {say_outcome(state, score, reason)}", flush=True)


def say_outcome(state: TrialState, score: float | None, reason: str) -> str:
    """Says how a trial has ended."""
    if state != TrialState.COMPLETE or score is None:
        return f"{state.name.lower()} {reason}".strip()
    return f"{score:.2f} %"
