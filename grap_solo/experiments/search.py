"""The expensive baseline: a search over the loss weights, in one training run for each trial.

Samplers, both of Optuna: tree-structured Parzen estimators (Bergstra et al., "Algorithms for
Hyper-Parameter Optimization", 2011) and random search (Bergstra & Bengio, "Random Search for
Hyper-Parameter Optimization", 2012).
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.methods import weighted_name
from grap_solo.records.files import MEDIAN_FILE, RESULT_FILE, only_one, read_json, write_json
from grap_solo.records.weights import read_median
from grap_solo.report.plots import COLORS
from grap_solo.report.tables import markdown
from grap_solo.training.config import run_dir, terms_of
from grap_solo.training.run import prepare_one_of_many, pretrain

STUDY_FILE = "study.db"
REPORT_FILES = ("search.md", "search.csv", "search.png")

RANGE = 10.0
"""A weight is searched from its reference divided by this to its reference times this."""

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

    Started again with the same arguments, it does what is missing; ``trials`` may have grown. A
    run that was cut off is done again from its start, so that the history of an interrupted
    search is that of an uninterrupted one (as far as training repeats itself, which it does on
    one machine's CPU). What a cut-off run had cost is not counted.

    Args:
        source: a composed configuration. Its name, ``checkpoint.dir`` and weighting give way to
            each run's own; a ``grap`` weighting is that of the GraP run.
        directory: where the study and all runs go.
        trials: how many trials there are to be in all; pruned and failed ones count.
        sampler: ``tpe`` or ``random``.
        pruner: ``none``, or ``median``: stops a trial whose accuracy after an epoch is below the
            median of the earlier trials'.
        seed: of the sampler. The runs' own is the configuration's, the same for all.

    Returns:
        The path of ``search.md``.

    Raises:
        ConfigError: input that cannot be used, or a directory that holds something else.
    """
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    if pruner not in PRUNERS:
        raise unknown_name("pruner", pruner, PRUNERS)
    for key, value, least in (("trials", trials, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{key}: expected a whole number of {least} or more, got {value}")
    cfg = prepare_one_of_many(source, "a search")
    zero = [term for term, value in terms_of(cfg).items() if value == 0]
    if zero:
        raise ConfigError(
            f"method_kwargs: the reference weight of {', '.join(zero)} is 0, and a search looks "
            f"within a factor of {RANGE:g} of it: give it some weight"
        )
    plain = _plain(source)
    settings = {"sampler": sampler, "pruner": pruner, "seed": seed, "configuration": plain}
    settings = json.loads(json.dumps(settings, default=str))  # As the study gives them back.
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    _make_directory(directory)
    with only_one(directory):
        study = _open_study(directory, PRUNERS[pruner](), settings)
        while (done := len(_history(study))) < trials:
            study.sampler = _sampler(sampler, seed, done)
            _run_trial(study, plain, directory, terms_of(cfg))
        _write_report(study, directory, cfg)  # Before what may yet fail.
        _run_comparison(plain, directory)
        table = _write_report(study, directory, cfg)
    print(f"\n{table}\n")
    print("files:", ", ".join(str(directory / file) for file in REPORT_FILES))
    return directory / REPORT_FILES[0]


# ---- the configuration and the directory ------------------------------------------------------


def _plain(source: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, without what each run sets for itself."""
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
    """The configuration of one run of the search."""
    own = {"name": name, "method": weighted_name(plain["method"]), "weighting": weighting}
    cfg = OmegaConf.create({**plain, **own})
    OmegaConf.update(cfg, "checkpoint.dir", str(directory), force_add=True)
    return cfg


def _make_directory(directory: Path) -> None:
    """Makes it, unless something other than a search lies there, whose runs would be removed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be made: {error.strerror}") from None
    names = {path.name for path in directory.iterdir()} - {".lock"}
    if names and STUDY_FILE not in names:
        raise ConfigError(f"{directory}: not empty and not a search: give another folder")


def _remove_unfinished(directory: Path) -> None:
    """Removes what a run that was cut off has left, so that it can be done again."""
    if directory.exists():
        shutil.rmtree(directory)


# ---- the study --------------------------------------------------------------------------------


def _open_study(
    directory: Path, pruner: BasePruner, settings: dict[str, Any]
) -> optuna.study.Study:
    """The directory's study, new or as it was left.

    Raises:
        ConfigError: it was made with other settings, or its file is damaged.
    """
    file = directory / STUDY_FILE
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{file}",
            study_name="search",
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"{file}: not a study, or a damaged one: {line}") from None
    if not _history(study):  # Nothing that other settings could contradict.
        study.set_user_attr("settings", settings)
    difference = _difference(study.user_attrs.get("settings", {}), settings)
    if difference is not None:
        raise ConfigError(f"{directory}: holds a search with {difference}: give another folder")
    _abandon_running(study)
    return study


def _difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first key that differs between two settings, in words; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            inner = f"{key}.{name}" if key else name
            found = _difference(old.get(name), new.get(name), inner)
            if found is not None:
                return found
        return None
    return None if old == new else f"{key} {old!r}, not {new!r}"


def _abandon_running(study: optuna.study.Study) -> None:
    """Takes the trial that a killed search has left out of the history, to be done again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # In this order: killed in between, it is found again.
        study.set_user_attr("abandoned", [*study.user_attrs.get("abandoned", []), trial.number])
        study.tell(trial.number, state=TrialState.FAIL)


def _history(study: optuna.study.Study) -> list[FrozenTrial]:
    """The finished trials in order: complete, pruned and failed, but not abandoned."""
    abandoned = study.user_attrs.get("abandoned", [])
    trials = study.get_trials(deepcopy=False)
    return [each for each in trials if each.state.is_finished() and each.number not in abandoned]


def _sampler(name: str, seed: int, done: int) -> BaseSampler:
    """A sampler whose draws depend on nothing but the seed and the finished trials."""
    derived = np.random.SeedSequence([seed, done]).generate_state(1)[0]
    return SAMPLERS[name](seed=int(derived))


class Reporter(Callback):
    """Tells a trial its accuracy after each epoch, and ends the run when the trial is pruned.

    Args:
        trial: whose run it is.

    Raises:
        optuna.TrialPruned: the pruner gives the run up. After the last epoch there is nothing
            left to save, and the trial is complete.
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
    """Draws weights, trains with them and records what came of it.

    A run that raises is a failed trial with its reason.

    Raises:
        ConfigError: the configuration's fault, not the weights': no trial would do better.
    """
    name = _trial_name(len(_history(study)))
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
                "search compares validation accuracies: leave them out"
            )
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except ConfigError:
        raise
    except Exception as error:
        state, reason = TrialState.FAIL, " ".join(f"{type(error).__name__}: {error}".split())
    trial.set_user_attr("seconds", time.monotonic() - start)
    trial.set_user_attr("reason", reason)
    study.tell(trial, accuracy, state=state)
    outcome = f"{accuracy:.2f} %" if accuracy is not None else f"{state.name.lower()} {reason}"
    print(f"{name}: {outcome}", flush=True)


def _trial_name(place: int) -> str:
    return f"trial-{place:03d}"


# ---- GraP beside it ---------------------------------------------------------------------------


def _run_comparison(plain: dict[str, Any], directory: Path) -> None:
    """Trains ``grap`` and, with the median of its weights, ``grap_tuned``."""
    block = plain.get("weighting") or {}
    if block.get("name") != "grap":
        block = {"name": "grap"}
    _run_once(_run_config(plain, directory, "grap", block))
    median = read_median(directory / "grap" / MEDIAN_FILE)
    block = {"name": "fixed", "weights": median}
    _run_once(_run_config(plain, directory, "grap_tuned", block))


def _run_once(cfg: DictConfig) -> None:
    """Trains unless that has been finished already, and records accuracy and seconds."""
    file = run_dir(cfg) / RESULT_FILE
    if file.is_file():
        return
    _remove_unfinished(run_dir(cfg))
    start = time.monotonic()
    run = pretrain(cfg)
    write_json(file, {"accuracy": run.accuracy, "seconds": time.monotonic() - start})


# ---- the report -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: its folder.
        weights: the weight of each term; the median for GraP.
        accuracy: the online probe's top-1 in percent: the last, also of a pruned trial.
        state: ``complete``, ``pruned`` or ``fail``.
        reason: why it failed.
        seconds: what its training took.
        runs: how many runs it has taken to get there, this one among them.
        total: how many seconds of training that was.
    """

    name: str
    weights: dict[str, float]
    accuracy: float | None
    state: str
    reason: str
    seconds: float
    runs: int
    total: float


def _trial_rows(history: Sequence[FrozenTrial]) -> list[Row]:
    seconds = [trial.user_attrs["seconds"] for trial in history]
    return [
        Row(
            _trial_name(place),
            trial.params,
            trial.value,
            trial.state.name.lower(),
            trial.user_attrs["reason"],
            seconds[place],
            place + 1,
            total,
        )
        for place, (trial, total) in enumerate(zip(history, accumulate(seconds), strict=True))
    ]


def _grap_rows(directory: Path) -> list[Row]:
    """``grap`` and ``grap_tuned``, as far as they have finished; tuning needs both."""
    rows: list[Row] = []
    for name in ("grap", "grap_tuned"):
        result = read_json(directory / name / RESULT_FILE)
        if result is None:
            break
        seconds = result["seconds"]
        total = sum(row.seconds for row in rows) + seconds
        weights = read_median(directory / name / MEDIAN_FILE)
        runs = len(rows) + 1
        rows.append(Row(name, weights, result["accuracy"], "complete", "", seconds, runs, total))
    return rows


def _best(rows: Sequence[Row]) -> Row | None:
    """The best complete trial: a pruned one was trained for less. The earliest of equals."""
    complete = [row for row in rows if row.state == "complete"]
    return max(complete, key=lambda row: row.accuracy or 0.0, default=None)


def _write_report(study: optuna.study.Study, directory: Path, cfg: DictConfig) -> str:
    """Writes ``search.csv``, ``search.md`` and ``search.png`` from what has been recorded.

    Returns:
        The text of ``search.md``.
    """
    trials, grap = _trial_rows(_history(study)), _grap_rows(directory)
    terms = list(terms_of(cfg))
    _write_csv(directory / "search.csv", [*trials, *grap], terms)
    text = f"{_table(trials, grap, terms)}\n\n{_notes(trials, study, cfg)}"
    (directory / "search.md").write_text(f"{text}\n")
    _plot(directory / "search.png", trials, grap)
    return text


def _write_csv(file: Path, rows: Sequence[Row], terms: Sequence[str]) -> None:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        header = ["name", *terms, "accuracy", "state", "reason", "seconds", "cumulative_seconds"]
        writer.writerow(header)
        for row in rows:
            weights = [f"{row.weights[term]:.6g}" for term in terms]
            accuracy = "" if row.accuracy is None else f"{row.accuracy:.4f}"
            cost = [f"{row.seconds:.2f}", f"{row.total:.2f}"]
            writer.writerow([row.name, *weights, accuracy, row.state, row.reason, *cost])


def _table(trials: Sequence[Row], grap: Sequence[Row], terms: Sequence[str]) -> str:
    """The best trial so far after 1, 2, 4, ... trials, and GraP's rows, in Markdown."""
    cells = [["run", "cost: runs", "cost: seconds", "online probe", *terms]]
    budgets = [2**n for n in range(len(trials).bit_length()) if 2**n < len(trials)]
    for budget in [*budgets, len(trials)]:
        name = f"best of {budget} trial{'s' * (budget > 1)}"
        cells.append(_cells(name, trials[budget - 1], _best(trials[:budget]), terms))
    cells += [_cells(row.name, row, row, terms) for row in grap]
    return markdown(cells)


def _cells(name: str, cost: Row, found: Row | None, terms: Sequence[str]) -> list[str]:
    """One line: what has been spent by the end of ``cost``, and the best that it has found."""
    spent = [name, str(cost.runs), f"{cost.total:.0f}"]
    if found is None:
        return [*spent, "-", *("-" for _ in terms)]
    return [*spent, f"{found.accuracy:.2f}", *(f"{found.weights[term]:.3g}" for term in terms)]


def _notes(trials: Sequence[Row], study: optuna.study.Study, cfg: DictConfig) -> str:
    """How to read the table."""
    settings = study.user_attrs["settings"]
    states = [row.state for row in trials]
    return (
        f"Top-1 of the online probe on the validation images of {cfg.data.dataset} in percent, "
        f"after {cfg.max_epochs} epochs. The weights are the best trial's; GraP's are the median "
        f"of those that it learned. All runs have one training seed ({cfg.seed}), and one seed is "
        "no ranking; the search's best was also chosen on these very images. "
        f"Sampler {settings['sampler']}, pruner {settings['pruner']}, seed {settings['seed']}; "
        f"of {len(trials)} trials {states.count('pruned')} were pruned and "
        f"{states.count('fail')} failed."
    )


def _plot(file: Path, trials: Sequence[Row], grap: Sequence[Row]) -> None:
    """The best accuracy so far against what has been spent on training."""
    longest = max(row.total for row in [*trials, *grap])
    unit, divisor = ("hours", 3600) if longest > 7200 else ("seconds", 1)
    figure = Figure(figsize=(7, 4.2), layout="constrained")  # Without pyplot: no global state.
    axes = figure.subplots()
    best = [_best(trials[: place + 1]) for place in range(len(trials))]
    spent = [row.total / divisor for row in trials]
    heights = [_height(row) for row in best]
    label = f"search: best of {len(trials)} trials so far"
    axes.plot(spent, heights, color=COLORS[0], drawstyle="steps-post", marker=".", label=label)
    for row, color in zip(grap, (COLORS[4], COLORS[2]), strict=False):
        label = f"{row.name}: {row.runs} run{'s' * (row.runs > 1)}"
        axes.plot(row.total / divisor, _height(row), "o", color=color, label=label)
    axes.set_xlabel(f"{unit} of training in all")
    axes.set_ylabel("online probe, top-1 in percent")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def _height(row: Row | None) -> float:
    """Where a row is drawn; nowhere as long as no trial is complete."""
    return np.nan if row is None or row.accuracy is None else row.accuracy
