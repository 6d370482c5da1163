"""Compares methods over seeds: trains the missing runs, evaluates them, and writes one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from grap_solo.experiments.cells import (
    check_cell,
    check_launcher,
    log_of,
    prepare_finished,
    result_of,
    run_all,
    say_what_differs,
    use_gpus,
)
from grap_solo.experiments.grid import Cell, plan
from grap_solo.experiments.tasks import Launcher, Task, run_tasks
from grap_solo.experiments.timing import step_costs
from grap_solo.records.files import (
    COST_FILE,
    RESULT_FILE,
    make_folder,
    only_one,
    read_json,
    write_json,
)
from grap_solo.records.runs import MEASURES, counted, read_run
from grap_solo.report.page import report
from grap_solo.report.tables import BASELINE, table_of_methods, table_of_runs, write_summary


def compare(
    cfg: DictConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    definitions: Mapping[str, Any] | None = None,
    launcher: Launcher | None = None,
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
        launcher: where the runs train, and how many at a time; None trains one after the other in
            this process.

    Raises:
        ConfigError: an unknown name, a configuration that cannot be used, a folder with a run of
            another configuration, another comparison that is writing there, or a launcher that
            cannot run them.
    """
    launcher = launcher or Launcher()
    cells = plan(cfg, methods, seeds, definitions or {})
    check_launcher(cells, launcher)
    directory = cells[0].directory.parent
    make_folder(directory, "checkpoint.dir")
    with only_one(directory):
        say_what_differs([(cell, check_cell(cell)) for cell in cells])
        reasons = run_all(cells, directory, launcher)
        results = [result_of(cell, reasons) for cell in cells]
        runs = table_of_runs(results)
        rows = list(dict.fromkeys(methods))
        notes = _table_notes(cells, runs) + _notes_of_runs(results)
        notes = "\n\n".join([notes, *_say_collapsed(cells)])
        costs = read_json(directory / COST_FILE) or {}
        # Once before the measurement of costs, which may fail.
        write_summary(directory, runs, table_of_methods(runs, rows, costs), notes)
        costs = _costs(cells, directory, launcher)
        text = write_summary(directory, runs, table_of_methods(runs, rows, costs), notes)
        if any((cell.directory / RESULT_FILE).exists() for cell in cells):
            report([directory], directory)
        print(f"\n{text}\nfiles: {directory}/summary.md, summary.csv, runs.csv, report.html")
    return directory


# ---- what it cost ---------------------------------------------------------------------------


def _costs(
    cells: Sequence[Cell], directory: Path, launcher: Launcher
) -> dict[str, dict[str, float]]:
    """Reads each method's training cost, which is measured once for the methods with a finished
    run and kept in ``cost.json``. SLURM measures it in a job, since the runs' machine counts."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if (cell.directory / RESULT_FILE).exists():
            first.setdefault(cell.method, cell)
    file = directory / COST_FILE
    known: dict[str, dict[str, float]] = read_json(file) or {}
    if BASELINE not in first or set(first) <= set(known):
        return known
    log = log_of(cells[0]).with_name("cost.log")
    task = Task("cost", partial(measure_costs, first, file), log)
    here = launcher if launcher.name == "slurm" else Launcher()
    for _, reason in run_tasks([task], here, directory, use_gpus(cells)):
        if reason is not None:
            print(f"the cost could not be measured: {reason}", flush=True)
    return read_json(file) or {}


def measure_costs(cells: Mapping[str, Cell], file: Path) -> None:
    """Measures the training cost of methods relative to ``fixed``: step time times epochs, plus
    that of the run that a method starts from.

    Args:
        cells: a finished run of each method, by its name.
        file: the JSON file to write.
    """
    configs = {method: prepare_finished(cell) for method, cell in cells.items()}
    steps = step_costs(configs, BASELINE)
    epochs = {
        method: cfg.max_epochs / configs[BASELINE].max_epochs for method, cfg in configs.items()
    }
    costs = {}
    for method, cell in cells.items():
        chain = [method] if cell.suffix is None else [method, method.removesuffix(cell.suffix)]
        costs[method] = {
            key: sum(steps[each][key] * epochs[each] for each in chain)
            for key in ("median", "min", "max")
        } | {"step_ms": steps[method]["ms"]}
    write_json(file, costs)


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
        f"{cfg.data.dataset}, {counted(cfg.max_epochs, 'epoch')}, seeds {seeds}. Top-1 on the "
        "validation images in percent, mean ± standard deviation over the seeds; the linear probe "
        "and k-NN are offline, on frozen embeddings; the probe's regulariser is chosen on a split "
        "of the training embeddings, and k-NN is weighted (k = 20, cosine, T = 0.07). cost: "
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
