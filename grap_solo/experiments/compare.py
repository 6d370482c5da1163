"""Compares methods over seeds: trains the missing runs, evaluates them, and writes one table."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from grap_solo.data import (
    evaluation_loader,
    fill_in_classes,
    fill_in_scales,
    load_both,
    load_run,
)
from grap_solo.errors import ConfigError
from grap_solo.evaluation.offline import device_of, evaluate
from grap_solo.experiments.grid import Cell, plan
from grap_solo.experiments.retrain import AS_LEARNED, learned_weighting, newest_checkpoint
from grap_solo.experiments.timing import step_costs
from grap_solo.methods import find_method
from grap_solo.records.files import (
    CONFIG_FILE,
    COST_FILE,
    FAILURE_FILE,
    RESULT_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    make_folder,
    only_one,
    read_json,
    write_json,
)
from grap_solo.records.runs import MEASURES, read_run
from grap_solo.records.weights import median_weights
from grap_solo.report.page import report
from grap_solo.report.tables import BASELINE, table_of_methods, table_of_runs, write_summary
from grap_solo.training.checkpoints import resolve_source
from grap_solo.training.config import prepare
from grap_solo.training.run import pretrain
from grap_solo.training.same_run import (
    PATHS,
    Difference,
    check_same_data,
    data_fingerprints,
    describe_free,
    find_differences,
    read_run_config,
    refuse_differences,
)


def compare(
    cfg: DictConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    definitions: Mapping[str, Any] | None = None,
    processes: int = 1,
) -> Path:
    """Trains every method with every seed, evaluates them, and writes the table and its pictures.

    Called again, it resumes: finished runs are skipped, interrupted ones resume from their
    checkpoints, and failed ones are tried again. A failed run has a row with the reason. Everything
    is written to ``checkpoint.dir`` / ``name``: ``summary.md``, ``summary.csv``, ``runs.csv``,
    ``cost.json``, ``report.html`` with its pictures, the runs, and their ``logs``.

    Args:
        cfg: a composed configuration that all runs share, except for its ``weighting``.
        methods: names of weightings or of ``definitions``. The suffix ``_tuned`` retrains with the
            median weights of the method's run with the same seed and its heads,
            ``_tuned_weighted`` with plainly weighted heads, as the paper does; ``_scheduled``
            replays the weights of that run; ``_finetuned`` trains its backbone further with the
            labels.
        seeds: the seeds of every method.
        definitions: the configuration keys in which a method differs, by name.
        processes: how many runs train at a time, each in a process with its share of the cores;
            1 trains in this process.

    Raises:
        ConfigError: an unknown name, a configuration that cannot be used, a folder with a run of
            another configuration, or another comparison that is writing there.
    """
    cells = plan(cfg, methods, seeds, definitions or {})
    directory = cells[0].directory.parent
    make_folder(directory, "checkpoint.dir")
    with only_one(directory):
        say_what_differs([(cell, check_cell(cell)) for cell in cells])
        run_all(cells, directory, processes)
        results = [result_of(cell) for cell in cells]
        runs = table_of_runs(results)
        rows = list(dict.fromkeys(methods))
        notes = _table_notes(cells, runs) + _notes_of_runs(results)
        notes = "\n\n".join([notes, *_say_collapsed(cells)])
        costs = read_json(directory / COST_FILE) or {}
        # Once before the measurement of costs, which may fail.
        write_summary(directory, runs, table_of_methods(runs, rows, costs), notes)
        costs = _costs(cells, directory)
        text = write_summary(directory, runs, table_of_methods(runs, rows, costs), notes)
        if any((cell.directory / RESULT_FILE).exists() for cell in cells):
            report([directory], directory)
        print(f"\n{text}\nfiles: {directory}/summary.md, summary.csv, runs.csv, report.html")
    return directory


def check_cell(cell: Cell) -> list[Difference]:
    """Checks that the run's folder is new, or holds this run of a comparison.

    Returns:
        The keys in which that run differs, none of which can change what is trained.

    Raises:
        ConfigError: it holds another run, or something else.
    """
    if cell.directory.exists() and not _log(cell).exists():
        raise ConfigError(
            f"name: {cell.directory} exists but is not a comparison's: give another name"
        )
    if not (cell.directory / CONFIG_FILE).exists():
        return []
    theirs = read_run_config(cell.directory)
    ours = resolve_source(cell.cfg)
    if cell.parent is not None:  # The saved file has the parent's weights or backbone.
        for key in ("weighting", "tuned_from", "pretrained_feature_extractor"):
            theirs.pop(key, None)
            ours.pop(key, None)
    where = f"name: {cell.directory} holds a run"
    found = find_differences(theirs, ours)
    return refuse_differences(found, where, "the comparison another name")


def say_what_differs(found: Sequence[tuple[Cell, Sequence[Difference]]]) -> None:
    """Says which keys differ from earlier runs, and checks that these had the same images.

    Raises:
        ConfigError: a finished run had other images. The others are checked when they resume.
    """
    keys = {each.key: each for _, differences in found for each in differences}
    if keys:
        print(describe_free(keys.values()), flush=True)
    for cell, differences in found:
        moved = any(each.key in PATHS.values() for each in differences)
        if moved and (cell.directory / RESULT_FILE).exists():
            cfg = prepare(cell.cfg)
            data = data_fingerprints(cfg, load_run(cfg.data, cfg.labels, cfg.downstream))
            if cell.parent is not None:  # It starts from that run.
                data.pop("weights")
            check_same_data(cfg, cell.directory, data)


# ---- running --------------------------------------------------------------------------------


def run_all(cells: Sequence[Cell], directory: Path, processes: int) -> None:
    """Trains the runs that start from scratch, then their children."""
    (directory / "logs").mkdir(exist_ok=True)
    missing = [cell for cell in cells if not (cell.directory / RESULT_FILE).exists()]
    done = len(cells) - len(missing)
    if done:
        print(f"{done} of {len(cells)} runs are finished already", flush=True)
    for children in (False, True):
        wave = [cell for cell in missing if (cell.parent is not None) == children]
        for cell, reason in _run_cells(wave, directory, processes):
            done += 1
            result = read_json(cell.directory / RESULT_FILE)
            said = f"failed: {reason}" if result is None else _say_linear(result)
            print(f"[{done}/{len(cells)}] {cell.method}, seed {cell.seed}: {said}", flush=True)


def _say_linear(result: Mapping[str, Any]) -> str:
    """Says a run's linear probe, or why it has none."""
    if result["linear"] is None:
        return f"no linear probe: {result['notes']['linear']}"
    return f"linear {result['linear']:.2f} %"


def _run_cells(
    cells: Sequence[Cell], directory: Path, processes: int
) -> Iterator[tuple[Cell, str | None]]:
    """Trains the cells; yields each one as it ends, with the reason if it failed."""
    if processes == 1:
        for cell in cells:
            yield cell, _attempt(cell)
        return
    threads = max(1, torch.get_num_threads() // processes)
    local = threading.local()

    def attempt(cell: Cell) -> str | None:
        # One process for each thread: it imports once, and a crash ends only its own run.
        if getattr(local, "pool", None) is None:
            local.pool = ProcessPoolExecutor(
                1, get_context("spawn"), _start_worker, (os.getpid(), threads)
            )
        try:
            reason: str | None = local.pool.submit(_attempt, cell).result()
        except BrokenProcessPool:
            local.pool = None
            reason = "its process died (out of memory?)"
            write_json(_failure_file(cell), {"reason": reason})
        return reason

    with ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(attempt, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _start_worker(parent: int, threads: int) -> None:
    """Limits a worker's threads, and ends it when the process that started it ends."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _log(cell: Cell) -> Path:
    return cell.directory.parent / "logs" / f"{cell.cfg.name}.log"


def _failure_file(cell: Cell) -> Path:
    return _log(cell).with_suffix(f".{FAILURE_FILE}")


def _attempt(cell: Cell) -> str | None:
    """Trains and evaluates a cell with its output in a log; returns the reason if it fails."""
    log, failure = _log(cell), _failure_file(cell)
    try:
        with (
            log.open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            _train_and_evaluate(cell)
    except Exception as error:  # Of any kind: the other runs are still trained.
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        reason = line if isinstance(error, ConfigError) else f"{type(error).__name__}: {line}"
        write_json(failure, {"reason": reason})
        return reason
    failure.unlink(missing_ok=True)
    return None


def _train_and_evaluate(cell: Cell) -> None:
    """Trains the cell unless it is trained, evaluates it, and writes its result."""
    trained = read_json(cell.directory / TRAINED_FILE)
    if trained is None:
        run = pretrain(_with_parent(cell))  # It resumes an interrupted run.
        model, cfg = run.model, run.cfg
        trained = read_json(cell.directory / TRAINED_FILE)
    else:
        cfg = _prepared(cell)
        state = torch.load(newest_checkpoint(cell.directory), "cpu", weights_only=True)
        model = find_method(cfg.method)(cfg)
        model.load_state_dict(state["state_dict"])
        if not cfg.performance.disable_channel_last:
            model = model.to(memory_format=torch.channels_last)  # As in training.
    train, validation = load_both(cfg.data, cfg.labels)
    found = evaluate(
        model.backbone,
        evaluation_loader(cfg, train),
        evaluation_loader(cfg, validation),
        device_of(cfg),
    )
    warmup = model.weighting.warmup_epochs
    result = {"method": cell.method, "seed": cell.seed, **trained, **asdict(found)}
    result["weights"] = median_weights(cell.directory / WEIGHTS_FILE, warmup)
    write_json(cell.directory / RESULT_FILE, result)


def _with_parent(cell: Cell) -> DictConfig:
    """Makes the cell's configuration with the weights or backbone of its parent's run.

    Raises:
        ConfigError: the parent's run is not finished.
    """
    cfg: Any = OmegaConf.create(OmegaConf.to_container(cell.cfg))
    if cell.parent is None:
        return cfg
    if not (cell.parent / RESULT_FILE).exists():
        raise ConfigError(f"the run that it starts from, {cell.parent.name}, has failed")
    if cell.suffix == "_finetuned":
        cfg.pretrained_feature_extractor = str(newest_checkpoint(cell.parent))
    else:
        heads = "weighted" if cell.suffix == "_tuned_weighted" else AS_LEARNED
        schedule = cell.suffix == "_scheduled"
        cfg.weighting = learned_weighting([cell.parent], heads=heads, schedule=schedule)
        cfg.tuned_from = {"runs": [str(cell.parent)], "epochs": None, "last": None}
    return cfg


def result_of(cell: Cell) -> dict[str, Any]:
    """Reads a run's ``result.json``; of a failed run, makes a result with the reason."""
    result: dict[str, Any] | None = read_json(cell.directory / RESULT_FILE)
    if result is not None:
        return result
    found = read_json(_failure_file(cell)) or {}
    reason = found.get("reason", "cut short")
    return {"method": cell.method, "seed": cell.seed, "reason": reason}


# ---- what it cost ---------------------------------------------------------------------------


def _costs(cells: Sequence[Cell], directory: Path) -> dict[str, dict[str, float]]:
    """Computes each method's training cost relative to ``fixed``: step time times epochs, plus its
    parent's. Measured once, for the methods with a finished run, and kept in ``cost.json``."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if (cell.directory / RESULT_FILE).exists():
            first.setdefault(cell.method, cell)
    file = directory / COST_FILE
    known = read_json(file) or {}
    if BASELINE in first and not set(first) <= set(known):
        configs = {method: _prepared(cell) for method, cell in first.items()}
        steps = step_costs(configs, BASELINE)
        epochs = {
            method: cfg.max_epochs / configs[BASELINE].max_epochs for method, cfg in configs.items()
        }
        known = {}
        for method, cell in first.items():
            chain = [method]
            if cell.parent is not None:
                chain.append(next(c.method for c in cells if c.directory == cell.parent))
            known[method] = {
                key: sum(steps[each][key] * epochs[each] for each in chain)
                for key in ("median", "min", "max")
            } | {"step_ms": steps[method]["ms"]}
        write_json(file, known)
    return known


def _prepared(cell: Cell) -> DictConfig:
    """Prepares the configuration of a finished run, to build its model again."""
    source = OmegaConf.create(read_run_config(cell.directory))
    source.pretrained_feature_extractor = None
    cfg = prepare(source)
    train, validation, labelled = load_run(cfg.data, cfg.labels, cfg.downstream)
    with_labels = train if labelled is None else labelled
    fill_in_classes(cfg, *(each for each in (with_labels, validation) if each is not None))
    if cfg.downstream is not None:
        fill_in_scales(cfg.downstream, with_labels)
    return cfg


def _say_collapsed(cells: Sequence[Cell]) -> list[str]:
    """Says which of the finished runs have collapsed, and which term's weight fell in each."""
    done = [cell for cell in cells if (cell.directory / RESULT_FILE).exists()]
    found = [(cell, read_run(cell.directory).collapse) for cell in done]
    return [
        f"{cell.method}, seed {cell.seed}: {collapse.describe()}."
        for cell, collapse in found
        if collapse is not None
    ]


def _table_notes(cells: Sequence[Cell], runs: Any) -> str:
    cfg = cells[0].cfg
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(cell.seed for cell in cells))
    trained = runs["seconds"].sum()
    return (
        f"{cfg.data.dataset}, {cfg.max_epochs} epochs, seeds {seeds}. Top-1 on the validation "
        "images in percent, mean ± standard deviation over the seeds; the linear probe and k-NN "
        "are offline, on frozen embeddings; the probe's regulariser is chosen on a split of the "
        "training embeddings, and k-NN is weighted (k = 20, cosine, T = 0.07). cost: "
        "training time divided by that of fixed, from step times taken in turns in one process; "
        "it includes the run that a method starts from. "
        "p: Welch's t-test of the linear probe against fixed, Holm-corrected over the table. The "
        "weights are the median over a run's steps, averaged over the seeds. All trainings "
        f"together took {trained:.0f} s."
    )


def _notes_of_runs(results: Sequence[Mapping[str, Any]]) -> str:
    """Says which measures of which runs have no value, or an unsure one, and why."""
    lines = [
        f"{result['method']}, seed {result['seed']}: {MEASURES[name]}: {note}."
        for result in results
        for name, note in (result.get("notes") or {}).items()
        if name in MEASURES
    ]
    old = sum("linear" in result and "regulariser" not in result for result in results)
    if old:
        lines.append(
            f"{old} of the runs were evaluated by an earlier version (k-NN with equal votes, "
            f"C = 1): remove their {RESULT_FILE} to evaluate them again."
        )
    return "".join(f" {line}" for line in lines)
