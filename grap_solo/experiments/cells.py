"""Runs of a comparison or a map: checks them, trains and evaluates them by the launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
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
    shared_arrays,
)
from grap_solo.errors import ConfigError
from grap_solo.evaluation.offline import device_of, evaluate
from grap_solo.experiments.grid import Cell
from grap_solo.experiments.retrain import AS_LEARNED, learned_weighting, newest_checkpoint
from grap_solo.experiments.tasks import Launcher, Task, run_tasks
from grap_solo.experiments.workers import share_out
from grap_solo.methods import find_method
from grap_solo.records.files import (
    CONFIG_FILE,
    RESULT_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    read_json,
    write_json,
)
from grap_solo.records.weights import median_weights
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


def check_cell(cell: Cell) -> list[Difference]:
    """Checks that the run's folder is new, or holds this run of a comparison.

    Returns:
        The keys in which that run differs, none of which can change what is trained.

    Raises:
        ConfigError: it holds another run, or something else.
    """
    if cell.directory.exists() and not log_of(cell).exists():
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


def check_launcher(cells: Sequence[Cell], launcher: Launcher) -> None:
    """Checks that a launcher can run cells, before anything is written.

    Raises:
        ConfigError: a run would get several GPUs or another one than it names, or there are too few
            GPUs.
    """
    if launcher.gpus_per_run > 1:
        raise ConfigError(
            f"gpus_per_run: each of these runs trains on one GPU, got {launcher.gpus_per_run:g}: "
            "give 1, or less to share a GPU"
        )
    if launcher.name == "local" and launcher.parallel is None:
        return
    for cell in cells:
        devices = OmegaConf.select(cell.cfg, "devices")
        if OmegaConf.is_list(devices) and list(devices) != [0]:
            raise ConfigError(
                f"devices: the launcher gives each run its GPU, got {devices}: set devices=1, and "
                "choose among the GPUs by CUDA_VISIBLE_DEVICES"
            )
    if launcher.name == "local":
        share_out(launcher.parallel or 1, launcher.gpus_per_run, use_gpus(cells))


def use_gpus(cells: Sequence[Cell]) -> bool:
    """Whether some of the runs train on a GPU, if there is one."""
    return any(OmegaConf.select(cell.cfg, "accelerator") != "cpu" for cell in cells)


def run_all(cells: Sequence[Cell], directory: Path, launcher: Launcher) -> dict[Path, str]:
    """Trains and evaluates the cells that are not finished, parents before their children.

    Returns:
        Why runs have failed, by their folder.
    """
    missing = [cell for cell in cells if not (cell.directory / RESULT_FILE).exists()]
    done = len(cells) - len(missing)
    if done:
        print(f"{done} of {len(cells)} runs are finished already", flush=True)
    tasks = {_make_task(cell): cell for cell in missing}
    reasons: dict[Path, str] = {}
    local = launcher.name == "local" and missing
    with shared_arrays(directory / ".shared") if local else nullcontext():
        for task, reason in run_tasks(list(tasks), launcher, directory, use_gpus(cells)):
            done, cell = done + 1, tasks[task]
            result = read_json(cell.directory / RESULT_FILE)
            if result is None:  # A job that ended badly may have written one before.
                reasons[cell.directory] = reason or "it has left no result"
            said = f"failed: {reason}" if result is None else _say_linear(result)
            print(f"[{done}/{len(cells)}] {cell.method}, seed {cell.seed}: {said}", flush=True)
    return reasons


def _make_task(cell: Cell) -> Task:
    """Makes the task that trains a cell, and the folder of its log."""
    log = log_of(cell)
    log.parent.mkdir(exist_ok=True)
    after = None if cell.parent is None else cell.parent.name
    return Task(cell.directory.name, partial(train_and_evaluate, cell), log, after)


def _say_linear(result: Mapping[str, Any]) -> str:
    """Says a run's linear probe, or why it has none."""
    if result["linear"] is None:
        return f"no linear probe: {result['notes']['linear']}"
    return f"linear {result['linear']:.2f} %"


def log_of(cell: Cell) -> Path:
    return cell.directory.parent / "logs" / f"{cell.cfg.name}.log"


def train_and_evaluate(cell: Cell) -> None:
    """Trains the cell unless it is trained, evaluates it, and writes its result."""
    if (cell.directory / RESULT_FILE).exists():  # A job of an earlier command has ended meanwhile.
        return
    trained = read_json(cell.directory / TRAINED_FILE)
    if trained is None:
        run = pretrain(_with_parent(cell))  # It resumes an interrupted run.
        model, cfg = run.model, run.cfg
        trained = read_json(cell.directory / TRAINED_FILE)
    else:
        cfg = prepare_finished(cell)
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


def result_of(cell: Cell, reasons: Mapping[Path, str]) -> dict[str, Any]:
    """Reads a run's ``result.json``; of a failed run, makes a result with the reason."""
    result: dict[str, Any] | None = read_json(cell.directory / RESULT_FILE)
    if result is not None:
        return result
    return {"method": cell.method, "seed": cell.seed, "reason": reasons[cell.directory]}


def prepare_finished(cell: Cell) -> DictConfig:
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
