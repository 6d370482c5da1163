"""Methods x seeds into one table: trained where they are missing, evaluated, compared."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from grap_solo.data import evaluation_loader, load_images, resolve_num_classes
from grap_solo.errors import ConfigError, unknown_name
from grap_solo.evaluation.offline import device_of, evaluate
from grap_solo.experiments.bench import step_costs
from grap_solo.experiments.retrain import newest_checkpoint
from grap_solo.methods import find_method, weighted_name
from grap_solo.records.files import (
    CONFIG_FILE,
    COST_FILE,
    FAILURE_FILE,
    RESULT_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    only_one,
    read_json,
    write_json,
)
from grap_solo.records.weights import median_weights
from grap_solo.report.page import report
from grap_solo.report.tables import BASE, table_of_methods, table_of_runs, write_summary
from grap_solo.training.config import prepare, run_dir
from grap_solo.training.run import prepare_one_of_many, pretrain
from grap_solo.weighting import WEIGHTINGS

CHILDREN = ("_tuned", "_finetuned")
GRID_KEYS = ("methods", "seeds", "processes", "definitions")


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    Attributes:
        method: its name in the table.
        seed: its seed.
        cfg: its configuration; what its parent's run gives is still missing from it.
        parent: the run that it starts from, by its folder; None if it starts from nothing.
    """

    method: str
    seed: int
    cfg: DictConfig
    parent: Path | None

    @property
    def directory(self) -> Path:
        return run_dir(self.cfg)


def compare(
    cfg: DictConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    definitions: Mapping[str, Any] | None = None,
    processes: int = 1,
) -> Path:
    """Trains every method with every seed, evaluates them, and writes the table and its pictures.

    A run that is finished is skipped and one that was cut short goes on from its checkpoint, so a
    comparison that was killed goes on where it was. A run that fails is a row that says why; it is
    tried again the next time. Everything goes to ``checkpoint.dir`` / ``name``: ``summary.md``,
    ``summary.csv``, ``runs.csv``, ``cost.json``, ``report.html`` with its pictures, the runs, and
    their ``logs``.

    Args:
        cfg: a composed configuration that all runs share; what differs is the ``weighting``.
        methods: names of weightings or of ``definitions``; with ``_tuned`` behind it, the method
            retrained with the median of the weights that the run with the same seed has learned;
            with ``_finetuned``, that run's backbone trained on with the labels.
        seeds: each method's seeds.
        definitions: by name, the keys of a configuration in which a method differs.
        processes: how many runs at a time, each in a process of its own with its share of the
            cores; 1 trains here.

    Raises:
        ConfigError: a name or configuration that cannot be used, a run of another configuration
            in a place that is needed, or another comparison that is writing there.
    """
    cells = plan(cfg, methods, seeds, definitions or {})
    directory = cells[0].directory.parent
    directory.mkdir(parents=True, exist_ok=True)
    with only_one(directory):
        for cell in cells:
            _check(cell)
        _run_all(cells, directory, processes)
        results = [read_json(c.directory / RESULT_FILE) or _failure(c, directory) for c in cells]
        runs = table_of_runs(results)
        rows = [each for each in dict.fromkeys(methods)]
        notes = _notes(cells, runs)
        costs = read_json(directory / COST_FILE) or {}
        # Once before what may yet fail.
        write_summary(directory, runs, table_of_methods(runs, rows, costs), notes)
        costs = _costs(cells, directory)
        text = write_summary(directory, runs, table_of_methods(runs, rows, costs), notes)
        if any((cell.directory / RESULT_FILE).exists() for cell in cells):
            report([directory], directory)
        print(f"\n{text}\nfiles: {directory}/summary.md, summary.csv, runs.csv, report.html")
    return directory


# ---- what to run ----------------------------------------------------------------------------


def plan(
    cfg: DictConfig, methods: Sequence[str], seeds: Sequence[int], definitions: Mapping[str, Any]
) -> list[Cell]:
    """Every run of a comparison, parents before their children.

    A child's parent is planned too, if only the child was asked for.

    Raises:
        ConfigError: an unknown method, no methods or seeds, or a configuration that cannot be used.
    """
    for key, values in (("methods", methods), ("seeds", seeds)):
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(f"{key}: expected a list such as [a,b], got {values!r}")
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"seeds: expected whole numbers of 0 or more, got {seed!r}")
    if not isinstance(definitions, Mapping):
        raise ConfigError(f"definitions: expected a block for each name, got {definitions!r}")
    for name in definitions:
        if "/" in str(name):
            raise ConfigError(
                f"definitions: '{name}' is to be part of a file's name: leave out '/'"
            )
    wanted: dict[str, None] = {}
    for method in methods:
        root, _ = _root(str(method), definitions)
        wanted.update({root: None, str(method): None})
    ordered = sorted(wanted, key=lambda name: _root(name, definitions)[1] is not None)
    cells = []
    for method in ordered:
        root, suffix = _root(method, definitions)
        for seed in dict.fromkeys(seeds):
            mine = _configuration(cfg, root, seed, definitions)
            parent = None
            if suffix is not None:
                parent = run_dir(mine)
                if isinstance(mine.get("method"), str):  # A definition may hold the plain name.
                    mine.method = weighted_name(mine.method)
                mine.weighting = {"name": "fixed"}
                if suffix == "_finetuned":
                    mine.weighting = {"name": "supervised"}
                    OmegaConf.update(mine, "labels.split", "train", force_add=True)
            mine.name = f"{method}-seed{seed}"
            prepare_one_of_many(mine, "a comparison")
            cells.append(Cell(method, seed, mine, parent))
    return cells


def _root(method: str, definitions: Mapping[str, Any]) -> tuple[str, str | None]:
    """The method that trains from nothing, and what is done with its run; None if nothing is."""
    if method in definitions or method in WEIGHTINGS:
        return method, None
    for suffix in CHILDREN:
        root = method.removesuffix(suffix)
        if root == "supervised":
            continue  # Its weights are all 0, and its backbone has had the labels.
        if root != method and (root in definitions or root in WEIGHTINGS):
            return root, suffix
    names = {*definitions, *WEIGHTINGS}
    children = {f"{name}{suffix}" for name in names - {"supervised"} for suffix in CHILDREN}
    raise unknown_name("methods", method, names | children)


def _configuration(
    cfg: DictConfig, root: str, seed: int, definitions: Mapping[str, Any]
) -> DictConfig:
    """A method's own: the common configuration without its weighting, and what differs."""
    mine: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    mine.pop("weighting", None)
    if isinstance(mine.get("method"), str):
        mine.method = weighted_name(mine.method)
    differs = definitions.get(root, {"weighting": {"name": root}})
    try:
        mine = OmegaConf.merge(mine, OmegaConf.create(differs))
    except (ValueError, TypeError):
        raise ConfigError(
            f"definitions.{root}: expected keys of a configuration, got {differs}"
        ) from None
    mine.seed, mine.name = seed, f"{root}-seed{seed}"
    runs = Path(OmegaConf.select(cfg, "checkpoint.dir", default="runs"))
    OmegaConf.update(mine, "checkpoint.dir", str(runs / str(cfg.name)), force_add=True)
    mine.enable_progress_bar = False
    return mine


def _check(cell: Cell) -> None:
    """Whether what lies in the run's folder is this run, begun by a comparison.

    Raises:
        ConfigError: it is another, or something else.
    """
    if cell.directory.exists() and not _log(cell).exists():
        raise ConfigError(
            f"name: {cell.directory} is there, but not from a comparison: give another name"
        )
    file = cell.directory / CONFIG_FILE
    if not file.exists():
        return
    theirs: Any = OmegaConf.to_container(OmegaConf.load(file))
    ours: Any = OmegaConf.to_container(cell.cfg, resolve=True)
    if cell.parent is not None:  # What comes of the parent is in theirs alone.
        for key in ("weighting", "tuned_from", "pretrained_feature_extractor"):
            theirs.pop(key, None)
            ours.pop(key, None)
    ours.pop("hydra", None)
    differing = [key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)]
    if differing:
        raise ConfigError(
            f"name: {cell.directory} holds a run with another '{sorted(differing)[0]}': give the "
            "comparison another name"
        )


# ---- running --------------------------------------------------------------------------------


def _run_all(cells: Sequence[Cell], directory: Path, processes: int) -> None:
    """First the runs that start from nothing, then those that start from these."""
    (directory / "logs").mkdir(exist_ok=True)
    missing = [cell for cell in cells if not (cell.directory / RESULT_FILE).exists()]
    done = len(cells) - len(missing)
    if done:
        print(f"{done} of {len(cells)} runs are finished already", flush=True)
    for children in (False, True):
        wave = [cell for cell in missing if (cell.parent is not None) == children]
        for cell, reason in _run(wave, directory, processes):
            done += 1
            result = read_json(cell.directory / RESULT_FILE)
            said = f"failed: {reason}" if result is None else f"linear {result['linear']:.2f} %"
            print(f"[{done}/{len(cells)}] {cell.method}, seed {cell.seed}: {said}", flush=True)


def _run(
    cells: Sequence[Cell], directory: Path, processes: int
) -> Iterator[tuple[Cell, str | None]]:
    """Each cell with the reason of its failure, in the order in which they end."""
    if processes == 1:
        for cell in cells:
            yield cell, _attempt(cell)
        return
    threads = max(1, torch.get_num_threads() // processes)
    local = threading.local()

    def attempt(cell: Cell) -> str | None:
        # A process for each thread, used again and again: it dies alone, and imports once.
        if getattr(local, "pool", None) is None:
            local.pool = ProcessPoolExecutor(
                1, get_context("spawn"), _start_worker, (os.getpid(), threads)
            )
        try:
            reason: str | None = local.pool.submit(_attempt, cell).result()
        except BrokenProcessPool:
            local.pool = None
            reason = "its process died (out of memory?)"
            write_json(_log(cell).with_suffix(f".{FAILURE_FILE}"), {"reason": reason})
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
    """Takes a share of the cores, and ends with the process that started it."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _log(cell: Cell) -> Path:
    return cell.directory.parent / "logs" / f"{cell.cfg.name}.log"


def _attempt(cell: Cell) -> str | None:
    """Trains and evaluates a cell, its output in a log; the reason if that fails."""
    log = _log(cell)
    failure = log.with_suffix(f".{FAILURE_FILE}")
    try:
        with (
            log.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            _train_and_evaluate(cell)
    except Exception as error:  # Whatever it is, the other runs go on.
        text = str(error).strip()
        line = text.splitlines()[0] if text else ""
        reason = line if isinstance(error, ConfigError) else f"{type(error).__name__}: {line}"
        write_json(failure, {"reason": reason})
        return reason
    failure.unlink(missing_ok=True)
    return None


def _train_and_evaluate(cell: Cell) -> None:
    """Trains, unless that has been done; evaluates; and writes down what came of both."""
    trained = read_json(cell.directory / TRAINED_FILE)
    if trained is None:
        run = pretrain(_with_parent(cell))  # From its newest checkpoint, if it was cut short.
        model, cfg = run.model, run.cfg
        trained = read_json(cell.directory / TRAINED_FILE)
    else:
        cfg = _prepared(cell)
        state = torch.load(newest_checkpoint(cell.directory), "cpu", weights_only=True)
        model = find_method(cfg.method)(cfg)
        model.load_state_dict(state["state_dict"])
        if not cfg.performance.disable_channel_last:
            model = model.to(memory_format=torch.channels_last)  # As it was trained, to the bit.
    train, validation = (load_images(cfg.data, train=part) for part in (True, False))
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
    """The cell's configuration with what its parent's run gives.

    Raises:
        ConfigError: the parent has no finished run.
    """
    cfg: Any = OmegaConf.create(OmegaConf.to_container(cell.cfg))
    if cell.parent is None:
        return cfg
    if not (cell.parent / RESULT_FILE).exists():
        raise ConfigError(f"the run that it starts from, {cell.parent.name}, has failed")
    if cfg.weighting.name == "supervised":
        cfg.pretrained_feature_extractor = str(newest_checkpoint(cell.parent))
    else:
        parent = OmegaConf.load(cell.parent / CONFIG_FILE)
        warmup = OmegaConf.select(parent, "weighting.warmup_epochs", default=0)
        cfg.weighting.weights = median_weights(cell.parent / WEIGHTS_FILE, warmup)
        cfg.tuned_from = {"runs": [str(cell.parent)], "epochs": None, "last": None}
    return cfg


def _failure(cell: Cell, directory: Path) -> dict[str, Any]:
    """A failed run's row."""
    found = read_json(directory / "logs" / f"{cell.cfg.name}.{FAILURE_FILE}") or {}
    reason = found.get("reason", "cut short")
    return {"method": cell.method, "seed": cell.seed, "reason": reason}


# ---- what it cost ---------------------------------------------------------------------------


def _costs(cells: Sequence[Cell], directory: Path) -> dict[str, dict[str, float]]:
    """The cost of each method's training by that of ``fixed``: its step's time and its epochs, and
    its parent's on top. Measured once for the methods that have a finished run, and kept."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if (cell.directory / RESULT_FILE).exists():
            first.setdefault(cell.method, cell)
    file = directory / COST_FILE
    known = read_json(file) or {}
    if BASE in first and not set(first) <= set(known):
        configs = {method: _prepared(cell) for method, cell in first.items()}
        steps = step_costs(configs, BASE)
        epochs = {
            method: cfg.max_epochs / configs[BASE].max_epochs for method, cfg in configs.items()
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
    """The configuration that a run was trained with, prepared to build its model from."""
    source = OmegaConf.load(cell.directory / CONFIG_FILE)
    assert isinstance(source, DictConfig)
    source.pretrained_feature_extractor = None
    cfg = prepare(source)
    cfg.data.num_classes = resolve_num_classes(cfg.data, load_images(cfg.data, train=False))
    return cfg


def _notes(cells: Sequence[Cell], runs: Any) -> str:
    cfg = cells[0].cfg
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(cell.seed for cell in cells))
    trained = runs["seconds"].sum()
    return (
        f"{cfg.data.dataset}, {cfg.max_epochs} epochs, seeds {seeds}. Top-1 on the validation "
        "images in percent, mean ± standard deviation over the seeds; the linear probe and k-NN "
        "are offline, on frozen embeddings. cost: training time by that of fixed, from step times "
        "taken in turns in one process, with the run that a method starts from. p: Welch's t-test "
        "of the linear probe against fixed, Holm-corrected over the table. The weights are the "
        f"median over a run's steps, averaged over the seeds. All trainings together took "
        f"{trained:.0f} s."
    )


# ---- the grid's file ------------------------------------------------------------------------


def read_grid(
    file: Path, overrides: Sequence[str], load: Callable[[Path, Sequence[str]], DictConfig]
) -> tuple[DictConfig, dict[str, Any]]:
    """The common configuration and the grid's own keys, from a grid's file or any other.

    A grid's file has ``base``, a configuration file beside it, ``overrides`` of it, and ``name``,
    ``methods``, ``seeds``, ``processes`` and ``definitions``: see :func:`compare`. Any other
    configuration can be compared with these keys on the command line.

    Args:
        file: the file.
        overrides: of the command line: the grid's keys, or hydra's overrides of the base.
        load: composes a configuration file.

    Raises:
        ConfigError: keys in it that a grid does not have, or no such base.
    """
    given = [each for each in overrides if each.lstrip("+").partition("=")[0] in GRID_KEYS]
    others = [each for each in overrides if each not in given]
    grid: Any = OmegaConf.load(file)
    if "base" not in grid:
        grid, cfg = OmegaConf.create({}), load(file, others)
    else:
        valid = {"base", "overrides", "name", *GRID_KEYS}
        for key in grid:
            if key not in valid:
                raise unknown_name(str(file), key, valid)
        if not OmegaConf.is_list(grid.get("overrides", OmegaConf.create([]))):
            raise ConfigError(f"{file}: overrides: expected a list, got {grid.overrides!r}")
        base = file.parent / str(grid.base)
        if not base.is_file():
            raise ConfigError(f"{file}: base: no such file {base}")
        named = [f"name={grid.name}"] if "name" in grid else []
        cfg = load(base, [*named, *grid.get("overrides", []), *others])
    keys = OmegaConf.merge(grid, OmegaConf.from_dotlist([each.lstrip("+") for each in given]))
    container: Any = OmegaConf.to_container(keys, resolve=True)
    return cfg, {key: container[key] for key in GRID_KEYS if container.get(key) is not None}
