"""One training run, from a configuration to the files that it leaves behind."""

from __future__ import annotations

import inspect
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from grap_solo.data import (
    evaluation_loader,
    labelled_loader,
    load_images,
    pretrain_loader,
    resolve_num_classes,
    split_labels,
)
from grap_solo.errors import ConfigError
from grap_solo.methods import CompositeMethod, find_method
from grap_solo.records.files import (
    ARGS_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LABELS_FILE,
    PICTURE_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    whole_file,
    write_json,
)
from grap_solo.report.plots import plot_weights
from grap_solo.solo import BaseMomentumMethod, describe_base
from grap_solo.training.checkpoints import (
    EpochCheckpoint,
    EpochSeed,
    Start,
    epoch_checkpoints,
    newest_whole,
)
from grap_solo.training.config import images_per_step, prepare, run_dir, terms_of
from grap_solo.training.loggers import (
    ResumableCSVLogger,
    WeightsProgressBar,
    is_first_process,
    wandb_logger,
    wandb_run,
)
from grap_solo.training.signals import AGAIN, TERMINATED, in_words, let_sigterm_wait_for_the_step
from grap_solo.weighting import build_weighting


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: where its files are.
        model: the trained method, in eval mode.
        cfg: the configuration that it was built from.
        accuracy: the online probe's last top-1 on the validation set, in percent; None without
            a validation set.
    """

    directory: Path
    model: CompositeMethod
    cfg: DictConfig
    accuracy: float | None


def pretrain(source: DictConfig, callbacks: Sequence[Callback] = ()) -> Run:
    """Trains one method and leaves ``config.yaml``, ``metrics.csv``, ``weights.csv``,
    ``weights.png``, ``median_weights.yaml``, ``trained.json`` and ``checkpoints/`` with
    solo-learn's ``args.json``.

    A run that was cut short goes on from its newest whole checkpoint when it is started again with
    the same configuration. On a CPU it ends with the same numbers, to the bit, as if it had not
    been: nothing random depends on more than the seed, the epoch and the image.

    Args:
        source: a composed configuration with solo-learn's keys.
        callbacks: Lightning's, besides those that every run has.

    Raises:
        ConfigError: anything in it that cannot be used, or a run directory that is taken.
        KeyboardInterrupt: Ctrl-C; a checkpoint of that moment is written, ``<name>-interrupted``.
        SystemExit: SIGTERM; likewise, of the end of its step.
    """
    cfg = prepare(source)
    directory = run_dir(cfg)
    start = _where_to_start(source, cfg, directory)
    _quiet()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)

    train_loader, val_loader, labelled = _loaders(cfg, start.epoch)
    model = find_method(cfg.method)(cfg)
    if cfg.pretrained_feature_extractor is not None:
        _load_backbone(model, Path(cfg.pretrained_feature_extractor))
    _make_directory(directory)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    trainer = _trainer(cfg, directory, callbacks, start)
    let_sigterm_wait_for_the_step(trainer)
    if trainer.is_global_zero:
        _write_configs(source, cfg, directory)
        if labelled is not None:
            np.savetxt(directory / LABELS_FILE, labelled, fmt="%d", header="index", comments="")
        says = f"{cfg.name}: {cfg.method}, {describe_base(type(model))}, files in {directory}"
        print(says + (f", going on after epoch {start.epoch - 1}" * bool(start.epoch)), flush=True)
    began = time.monotonic()
    with wandb_run():
        try:
            trainer.fit(model, train_loader, val_loader, ckpt_path=start.path, weights_only=True)
        except SystemExit as end:  # Lightning's answer to both signals.
            terminated = isinstance(end, SIGTERMException)
            if not terminated and not isinstance(end.__context__, KeyboardInterrupt):
                raise
            if trainer.is_global_zero:
                saved = epoch_checkpoints(directory / CHECKPOINTS_FOLDER, cfg.name)
                says = f"{cfg.name}: stopped after step {trainer.global_step}: "
                print(says + (AGAIN if saved else "start it again"), file=sys.stderr)
            raise (SystemExit(TERMINATED) if terminated else KeyboardInterrupt) from None
        except (OSError, RuntimeError) as error:
            raise in_words(error, directory) from error
    accuracy = trainer.callback_metrics.get("val_acc1")
    # Killed after its last checkpoint, a run has no epoch left to be validated in.
    online = start.online if accuracy is None else accuracy.item()
    if trainer.is_global_zero and trainer.global_step:
        record, picture = directory / WEIGHTS_FILE, directory / PICTURE_FILE
        plot_weights(record, picture, terms_of(cfg), model.weighting.warmup_epochs)
        seconds = start.seconds + time.monotonic() - began
        write_json(directory / TRAINED_FILE, {"online": online, "seconds": seconds})
    return Run(directory, model.eval(), cfg, online)


def _loaders(cfg: DictConfig, epoch: int) -> tuple[Any, Any, np.ndarray | None]:
    """The loaders for training, from an epoch on, and validation, and the indexes of the images
    that keep their labels if not all do. Fills in ``data.num_classes``."""
    train_images = load_images(cfg.data, train=True)
    val_images = None if no_validation(cfg) else load_images(cfg.data, train=False)
    processes = images_per_step(cfg) // cfg.optimizer.batch_size
    if val_images is not None and len(val_images) < processes:
        raise ConfigError(
            f"data.val_path: {len(val_images)} images for {processes} processes: give one for each"
        )
    parts = [each for each in (train_images, val_images) if each is not None]
    cfg.data.num_classes = resolve_num_classes(cfg.data, *parts)
    train_images, held_out, labelled = split_labels(
        train_images, cfg.labels.fraction, cfg.labels.split == "held_out", cfg.seed
    )
    together = images_per_step(cfg)
    train_loader: Any = pretrain_loader(cfg, train_images, together, epoch)
    if held_out is not None:
        seen = labelled_loader(cfg, held_out, together, epoch)
        train_loader = CombinedLoader({"train": train_loader, "labelled": seen}, "max_size_cycle")
    val_loader = None if val_images is None else evaluation_loader(cfg, val_images, keep=True)
    return train_loader, val_loader, labelled


def _where_to_start(source: DictConfig, cfg: DictConfig, directory: Path) -> Start:
    """Keeps what is there: a finished or another run is written over by nothing, and one that was
    cut short is gone on with.

    Raises:
        ConfigError: the directory is taken, or the checkpoint that is asked for is not usable.
    """
    asked = cfg.resume_from_checkpoint
    taken = (directory / CONFIG_FILE).exists()
    found: tuple[Path, dict[str, Any]] | None = None
    if asked is not None:
        path = Path(asked)
        key = f"resume_from_checkpoint: {path}"
        found = path, _read_checkpoint(path, key)
        _check_weighting_state(cfg, found[1]["state_dict"], key)
        if taken and directory.resolve() not in path.resolve().parents:
            raise ConfigError(f"{key}: it is not of the run in {directory}: give another name")
    elif taken:  # Every process: one that is not refused would wait for those that are.
        if (directory / TRAINED_FILE).exists():
            raise ConfigError(
                f"name: {directory} already holds a run: give another name or checkpoint.dir"
            )
        differing = different_keys(source, directory)
        if differing:
            raise ConfigError(
                f"name: {directory} already holds a run with another '{differing[0]}': give "
                "another name or checkpoint.dir"
            )
    if asked is None and taken:
        found = newest_whole(directory / CHECKPOINTS_FOLDER, cfg.name)
    if found is None:
        return Start()
    path, state = found
    return Start(
        path,
        state["epoch"] + 1,
        state["global_step"],
        state.get("seconds", 0.0),
        state.get("online"),
    )


def _read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["state_dict"], state["global_step"], state["epoch"]
    except FileNotFoundError:
        raise ConfigError(f"{key}: no such file") from None
    except Exception:
        raise ConfigError(f"{key}: not a checkpoint, or one cut short") from None
    return state


def different_keys(source: DictConfig, directory: Path) -> list[str]:
    """The first-level keys in which a configuration differs from that of the run in a folder."""
    theirs: Any = OmegaConf.to_container(OmegaConf.load(directory / CONFIG_FILE))
    ours = _plain(source)
    return sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))


def _plain(source: DictConfig) -> dict[Any, Any]:
    """A configuration as its run keeps it: from the start, and without hydra's own."""
    plain = OmegaConf.to_container(source, resolve=True)
    assert isinstance(plain, dict)
    for key in ("hydra", "resume_from_checkpoint"):
        plain.pop(key, None)
    return plain


def _check_weighting_state(cfg: DictConfig, saved: Mapping[str, Any], key: str) -> None:
    """Whether a checkpoint's state is of the same weighting and terms."""
    block: Any = OmegaConf.to_container(cfg.weighting, resolve=True)
    weighting = build_weighting(block, tuple(terms_of(cfg)), terms_of(cfg))
    prefix = "weighting."
    theirs = {
        name.removeprefix(prefix): getattr(value, "shape", None)
        for name, value in saved.items()
        if name.startswith(prefix)
    }
    ours = {name: getattr(value, "shape", None) for name, value in weighting.state_dict().items()}
    if theirs != ours:
        raise ConfigError(f"{key}: it is of a run with another weighting or other terms")


def _load_backbone(model: CompositeMethod, path: Path) -> None:
    """Starts the backbone and its momentum copy where a checkpoint of the same backbone is.

    Raises:
        ConfigError: not such a checkpoint.
    """
    key = f"pretrained_feature_extractor: {path}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except FileNotFoundError:
        raise ConfigError(f"{key}: no such file: give a run's checkpoint") from None
    except Exception:
        raise ConfigError(f"{key}: not a checkpoint, or one cut short") from None
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        model.backbone.load_state_dict(backbone)
        if isinstance(model, BaseMomentumMethod):
            model.momentum_backbone.load_state_dict(backbone)
    except RuntimeError:
        raise ConfigError(
            f"{key}: its backbone is not a {model.cfg.backbone.name}: give backbone.name as it was"
        ) from None


def _make_directory(directory: Path) -> None:
    """The run's folders, without what a checkpoint that was cut short has left."""
    try:
        (directory / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"checkpoint.dir: {directory} cannot be made: {error}") from None
    if is_first_process():
        for path in (directory / CHECKPOINTS_FOLDER).glob("*.ckpt.new"):
            path.unlink()


def _trainer(
    cfg: DictConfig, directory: Path, further: Sequence[Callback], start: Start
) -> pl.Trainer:
    """A Trainer from every key of the configuration that is one of its arguments."""
    callbacks: list[Callback] = [EpochSeed(cfg.seed), *further]
    if cfg.get("enable_progress_bar", True):
        # Lines that cannot be overwritten are better few: one for each epoch.
        refresh = 1 if sys.stdout.isatty() else sys.maxsize
        callbacks.append(WeightsProgressBar(refresh_rate=refresh, leave=True))
    if cfg.checkpoint.enabled:
        callbacks.append(
            EpochCheckpoint(
                directory / CHECKPOINTS_FOLDER,
                cfg.name,
                cfg.checkpoint.frequency,
                cfg.checkpoint.keep_prev,
                start,
            )
        )
    loggers: list[Logger] = [ResumableCSVLogger(directory, start.steps)]
    if cfg.wandb.enabled:
        wandb = wandb_logger(cfg, directory)
        if wandb is not None:
            loggers.append(wandb)
            callbacks.append(LearningRateMonitor(logging_interval="step"))

    valid = inspect.signature(pl.Trainer.__init__).parameters
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    kwargs = {name: value for name, value in container.items() if name in valid}
    kwargs.update(
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=str(directory),
        enable_checkpointing=cfg.checkpoint.enabled,
        enable_model_summary=False,
        use_distributed_sampler=False,  # The loaders' own share the images out.
    )
    try:
        return pl.Trainer(**kwargs)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}".splitlines()[0]) from None


def _write_configs(source: DictConfig, cfg: DictConfig, directory: Path) -> None:
    """``config.yaml`` to train from again, and ``args.json`` as solo-learn's scripts read it."""
    with whole_file(directory / CONFIG_FILE) as file:
        OmegaConf.save(OmegaConf.create(_plain(source)), file)
    arguments = OmegaConf.to_container(cfg, resolve=True)
    (directory / CHECKPOINTS_FOLDER / ARGS_FILE).write_text(json.dumps(arguments, indent=1))


def prepare_one_of_many(source: DictConfig, what: str) -> DictConfig:
    """The prepared configuration of a run that is compared with others on validation images.

    Args:
        source: as :func:`pretrain` takes it.
        what: who compares, for the errors' text.

    Raises:
        ConfigError: no labelled validation images, several devices, or what ``prepare`` refuses.
    """
    cfg = prepare(source)
    if no_validation(cfg):
        raise ConfigError(
            f"data.val_path: {what} compares accuracies on labelled validation images: give some, "
            "and leave out data.no_labels"
        )
    if images_per_step(cfg) != cfg.optimizer.batch_size:
        raise ConfigError(
            f"devices: {what} trains each run on one device: set devices=1, num_nodes=1, and "
            "optimizer.batch_size to the images of a step"
        )
    return cfg


def no_validation(cfg: DictConfig) -> bool:
    """Whether a run has no labelled images to validate on."""
    missing = cfg.data.dataset != "digits" and cfg.data.val_path is None
    return bool(cfg.data.no_labels or missing)


def _quiet() -> None:
    """Leaves out what says nothing about this run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Experiment logs directory.*exists and is not empty.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*recommended to use .self.log..skipped/.*sync_dist=True.*",  # The same everywhere.
    ):
        warnings.filterwarnings("ignore", message)
