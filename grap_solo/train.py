"""One training run, from a configuration to the files that it leaves behind."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    TQDMProgressBar,
)
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import CombinedLoader, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from grap_solo.checkpoint import EpochCheckpoint, EpochSeed, ResumableCSVLogger, newest_whole
from grap_solo.config import images_per_step, prepare, run_dir, terms_of
from grap_solo.data import (
    evaluation_loader,
    labelled_loader,
    load_images,
    pretrain_loader,
    resolve_num_classes,
    split_labels,
)
from grap_solo.errors import ConfigError
from grap_solo.files import read_json, whole_file, write_json
from grap_solo.methods import GrapAll4One
from grap_solo.plots import plot_weights
from grap_solo.solo import describe_base
from grap_solo.stops import AGAIN, TERMINATED, EndOnTerminate, in_words
from grap_solo.trajectory import WEIGHTS_FILE, pooled_weights
from grap_solo.weighting import build_weighting

CONFIG_FILE = "config.yaml"
LABELS_FILE = "labels.csv"
TRAINED_FILE = "trained.json"
WANDB_FILE = "wandb.json"


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
    model: GrapAll4One
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
        SystemExit: SIGTERM; likewise.
    """
    cfg = prepare(source)
    directory = run_dir(cfg)
    start = _where_to_start(source, cfg, directory)
    _quiet()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)

    train_loader, val_loader, labelled = _loaders(cfg, start.epoch)
    model = GrapAll4One(cfg)
    if cfg.pretrained_feature_extractor is not None:
        _load_backbone(model, Path(cfg.pretrained_feature_extractor))
    _make_directory(directory)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    terminate = EndOnTerminate()
    trainer = _trainer(cfg, directory, [terminate, *callbacks], start)
    if trainer.is_global_zero:
        _write_configs(source, cfg, directory)
        if labelled is not None:
            np.savetxt(directory / LABELS_FILE, labelled, fmt="%d", header="index", comments="")
        says = f"{cfg.name}: {cfg.method}, {describe_base()}, files in {directory}"
        print(says + (f", going on after epoch {start.epoch - 1}" * bool(start.epoch)), flush=True)
    began = time.monotonic()
    with _wandb_run():
        try:
            trainer.fit(model, train_loader, val_loader, ckpt_path=start.path, weights_only=True)
        except SystemExit:  # Lightning's answer to both signals.
            if not trainer.interrupted:
                raise
            if trainer.is_global_zero:
                steps = trainer.global_step
                print(f"{cfg.name}: stopped after step {steps}: {AGAIN}", file=sys.stderr)
            if terminate.terminated:
                raise SystemExit(TERMINATED) from None
            raise KeyboardInterrupt from None
        except (OSError, RuntimeError) as error:
            raise in_words(error, directory) from error
    accuracy = trainer.callback_metrics.get("val_acc1")
    online = None if accuracy is None else accuracy.item()
    if trainer.is_global_zero and trainer.global_step:
        record, picture = directory / WEIGHTS_FILE, directory / "weights.png"
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


def retrain(
    parents: Sequence[Path],
    load: Callable[[Path], DictConfig],
    epochs: tuple[int, int] | None = None,
    last: int | None = None,
) -> Run:
    """Trains again with the median weights that runs have found ("tuned", paper 4.2).

    The new run goes beside the first one, with ``_tuned`` behind its name, unless the command line
    gives it another ``name`` or ``checkpoint.dir``. Its ``config.yaml`` is complete: the weights,
    and ``tuned_from``, which says what they come from.

    Args:
        parents: the runs' directories; the first one's configuration is trained.
        load: composes a configuration file, with what the command line changes in it.
        epochs: see :func:`~grap_solo.trajectory.pooled_weights`.
        last: see :func:`~grap_solo.trajectory.pooled_weights`.

    Raises:
        ConfigError: not a run's directory, or what :func:`pretrain` refuses.
    """
    cfg = _child(parents[0], load, "tuned")
    warmup = [OmegaConf.select(_read_config(each), WARMUP, default=0) for each in parents]
    weights = pooled_weights([each / WEIGHTS_FILE for each in parents], warmup, epochs, last)
    cfg.method = "grap_all4one"
    cfg.weighting = {"name": "fixed", "weights": weights}
    cfg.tuned_from = {"runs": [str(each) for each in parents], "epochs": epochs, "last": last}
    return pretrain(cfg)


def finetune(parent: Path, load: Callable[[Path], DictConfig]) -> Run:
    """Trains a run's backbone on with the labels, end to end ("Tuned", paper Table 6).

    The new run goes beside the old one, with ``_finetuned`` behind its name, as in
    :func:`retrain`.

    Args:
        parent: the run's directory.
        load: composes a configuration file, with what the command line changes in it.

    Raises:
        ConfigError: not a run's directory, no checkpoint in it, or what :func:`pretrain` refuses.
    """
    cfg = _child(parent, load, "finetuned")
    cfg.method = "grap_all4one"
    cfg.weighting = {"name": "supervised"}
    cfg.labels = {**cfg.get("labels", {}), "split": "train"}
    cfg.pretrained_feature_extractor = str(newest_checkpoint(parent))
    return pretrain(cfg)


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run.

    Raises:
        ConfigError: there is none.
    """
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{run / 'checkpoints'}: no checkpoint: train with checkpoint.enabled")
    return found[-1]


WARMUP = "weighting.warmup_epochs"


def _read_config(run: Path) -> Any:
    file = run / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"{file}: no such file: give the folder of a run that has been trained")
    return OmegaConf.load(file)


def _child(parent: Path, load: Callable[[Path], DictConfig], suffix: str) -> DictConfig:
    """A run's configuration for another run beside it."""
    saved = _read_config(parent)
    cfg = load(parent / CONFIG_FILE)
    OmegaConf.set_struct(cfg, False)
    if cfg.name == saved.name:
        cfg.name = f"{parent.resolve().name}_{suffix}"
    if OmegaConf.select(cfg, "checkpoint.dir") == OmegaConf.select(saved, "checkpoint.dir"):
        OmegaConf.update(cfg, "checkpoint.dir", str(parent.parent), force_add=True)
    cfg.resume_from_checkpoint = None
    return cfg


class WeightsProgressBar(TQDMProgressBar):
    """Epoch, the current effective weights and the probe's accuracy."""

    accuracy: float | None = None

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, GrapAll4One)
        named = zip(pl_module.weighting.terms, pl_module.shown_weights, strict=True)
        metrics: dict[str, Any] = {name: f"{value:.2f}" for name, value in named}
        if self.accuracy is not None:
            metrics["probe"] = f"{self.accuracy:.1f}%"
        return metrics

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        # Here, for it makes the processes wait for each other, and only the first one has a bar.
        found = trainer.callback_metrics.get("val_acc1")
        self.accuracy = None if found is None else found.item()

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)  # One bar is enough: its probe shows what validation found.


class SafeWandbLogger(WandbLogger):
    """W&B that cannot stop a run: its first failure is a warning, and the CSV files go on."""

    failed = False

    def _guard(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            method(*args, **kwargs)
        except Exception as error:  # Whatever it is, the run matters more.
            self.failed = True
            warnings.warn(
                f"W&B failed and is left out from here on ({error}); metrics.csv goes on. "
                "Set wandb.offline=True or wandb.enabled=False to do without its server",
                stacklevel=2,
            )

    def start(self, hparams: dict[str, Any]) -> bool:
        """Opens the run and logs the configuration; False if that failed."""
        self._guard(lambda: self.experiment)
        self.log_hyperparams(hparams)
        return not self.failed

    def log_hyperparams(self, params: Any) -> None:
        self._guard(super().log_hyperparams, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._guard(super().log_metrics, metrics, step)

    def save(self) -> None:
        self._guard(super().save)

    def finalize(self, status: str) -> None:
        self._guard(super().finalize, status)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        path: the checkpoint that it goes on from; None at the beginning.
        epoch: the first epoch to train.
        steps: the optimiser steps before that.
        seconds: what these took.
    """

    path: Path | None = None
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0


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
        found = newest_whole(directory / "checkpoints", cfg.name)
    if found is None:
        return Start()
    path, state = found
    return Start(path, state["epoch"] + 1, state["global_step"], state.get("seconds", 0.0))


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


@contextlib.contextmanager
def _wandb_run() -> Iterator[None]:
    """Ends W&B's run with the training: the next one in this process would go on in it."""
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            with contextlib.suppress(Exception):  # Whatever it is, the run matters more.
                wandb.finish(int(failed))


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


def _load_backbone(model: GrapAll4One, path: Path) -> None:
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
        model.momentum_backbone.load_state_dict(backbone)
    except RuntimeError:
        raise ConfigError(
            f"{key}: its backbone is not a {model.cfg.backbone.name}: give backbone.name as it was"
        ) from None


def _make_directory(directory: Path) -> None:
    """The run's folders, without what a checkpoint that was cut short has left."""
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"checkpoint.dir: {directory} cannot be made: {error}") from None
    if _is_first_process():
        for path in (directory / "checkpoints").glob("*.ckpt.new"):
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
                directory / "checkpoints",
                cfg.name,
                cfg.checkpoint.frequency,
                cfg.checkpoint.keep_prev,
            )
        )
    loggers: list[Logger] = [ResumableCSVLogger(directory, start.steps)]
    if cfg.wandb.enabled:
        wandb = _wandb_logger(cfg, directory)
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


def _wandb_logger(cfg: DictConfig, directory: Path) -> SafeWandbLogger | None:
    """W&B's logger with its run opened; None, with a warning, if that cannot be done.

    A run that goes on goes on in its W&B run; a sweep's agent says itself which one that is.
    """
    known = {"id": os.environ.get("WANDB_RUN_ID")}
    if known["id"] is None:
        known = read_json(directory / WANDB_FILE) or {"id": secrets.token_hex(4)}
        if _is_first_process():
            write_json(directory / WANDB_FILE, known)
    try:
        logger = SafeWandbLogger(
            name=cfg.name,
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            offline=cfg.wandb.offline,
            save_dir=str(directory),
            id=known["id"],
        )
    except ModuleNotFoundError:
        warnings.warn(
            "W&B failed and is left out: it is not installed (pip install wandb); metrics.csv "
            "goes on",
            stacklevel=2,
        )
        return None
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return logger if logger.start(container) else None


def _write_configs(source: DictConfig, cfg: DictConfig, directory: Path) -> None:
    """``config.yaml`` to train from again, and ``args.json`` as solo-learn's scripts read it."""
    with whole_file(directory / CONFIG_FILE) as file:
        OmegaConf.save(OmegaConf.create(_plain(source)), file)
    arguments = OmegaConf.to_container(cfg, resolve=True)
    (directory / "checkpoints" / "args.json").write_text(json.dumps(arguments, indent=1))


def _is_first_process() -> bool:
    """Whether this is the process that writes, before a trainer is there to say so."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


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
