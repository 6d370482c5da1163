"""One training run, from a configuration to the files that it leaves behind."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from grap_solo.data import (
    evaluation_loader,
    fill_in_classes,
    fill_in_scales,
    has_validation,
    holds_out,
    labelled_loader,
    load_run,
    pretrain_loader,
    split_labels,
    stop_workers,
)
from grap_solo.errors import ConfigError, Diverged, RunStopped
from grap_solo.methods import CompositeMethod
from grap_solo.records.files import (
    ARGS_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LABELS_FILE,
    PICTURE_FILE,
    TRAINED_FILE,
    WEIGHTS_FILE,
    make_folder,
    whole_file,
    write_json,
)
from grap_solo.records.runs import counted
from grap_solo.report.plots import plot_weights
from grap_solo.solo import describe_base
from grap_solo.training.building import build_model, check_batch_norms
from grap_solo.training.checkpoints import (
    Start,
    check_fits,
    epoch_checkpoints,
    find_not_finite,
    find_start,
    resolve_source,
)
from grap_solo.training.config import (
    expand_paths,
    images_per_step,
    prepare,
    run_dir,
    terms_of,
)
from grap_solo.training.label_keys import learns_labels, missing_labels
from grap_solo.training.loggers import head_measures, is_first_process, wandb_run
from grap_solo.training.same_run import (
    check_same_data,
    data_fingerprints,
    keep_config,
    write_fingerprints,
)
from grap_solo.training.signals import (
    AGAIN,
    TERMINATED,
    end_after_step_on_sigterm,
    explain_machine_failure,
)
from grap_solo.training.starting_weights import start_backbone
from grap_solo.training.trainer import key_that_ended, make_trainer
from grap_solo.training.trials import folder_of_trial, set_trial_aside
from grap_solo.weighting import find_weighting


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: the folder of its files. That of a trial run (``fast_dev_run``) is gone.
        model: the trained method, in eval mode.
        cfg: the prepared configuration from which the method was built.
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

    Starting an interrupted run again with the same configuration resumes it from its newest whole
    checkpoint. On a CPU it then ends with the same numbers, to the bit, as an uninterrupted run:
    random numbers depend only on the seed, the epoch and the image.

    A run is finished when all its epochs are trained, or when one of ``callbacks`` has ended it.
    With ``fast_dev_run`` it leaves nothing.

    Args:
        source: a composed configuration with solo-learn's keys.
        callbacks: Lightning callbacks to add to those of every run.

    Raises:
        ConfigError: a key that cannot be used, or a run folder that is taken.
        RunStopped: the run is not finished: ``max_time`` or ``max_steps`` has ended it, too many
            steps in a row were not finite, or none of the last epoch was.
        KeyboardInterrupt: Ctrl-C. It leaves a checkpoint of that moment, ``<name>-interrupted``.
        SystemExit: SIGTERM. It leaves the same checkpoint, of the end of the current step.
    """
    source = expand_paths(source)
    cfg = prepare(source)
    with folder_of_trial(cfg):
        return _train_into_folder(source, cfg, callbacks)


def _train_into_folder(source: DictConfig, cfg: DictConfig, callbacks: Sequence[Callback]) -> Run:
    """Trains into the run's folder. See :func:`pretrain`."""
    directory = run_dir(cfg)
    start = Start() if set_trial_aside(source, cfg) else find_start(source, cfg, directory)
    _quiet()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)

    train_loader, val_loader, held_out, labelled, fingerprints = _loaders(cfg, start.epoch)
    if start.path is not None:
        check_same_data(cfg, directory, fingerprints)
    model = build_model(cfg)
    check_batch_norms(model, cfg, held_out)
    if cfg.resume_from_checkpoint is not None:
        check_fits(cfg, model, start, "resume_from_checkpoint")
    if cfg.pretrained_feature_extractor is not None and start.path is None:
        loaded = start_backbone(model, Path(cfg.pretrained_feature_extractor))
        if is_first_process():
            print(f"{cfg.name}: {loaded}", flush=True)
    _make_run_folder(directory)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    trainer = make_trainer(cfg, directory, callbacks, start)
    end_after_step_on_sigterm(trainer)
    if trainer.is_global_zero:
        _write_configs(source, cfg, directory)
        write_fingerprints(directory, fingerprints)
        if labelled is not None:
            np.savetxt(directory / LABELS_FILE, labelled, fmt="%d", header="index", comments="")
        resumed = f", resuming after epoch {start.epoch - 1}" if start.epoch else ""
        base = describe_base(type(model))
        print(f"{cfg.name}: {cfg.method}, {base}, files in {directory}{resumed}", flush=True)
    began = time.monotonic()
    _fit(trainer, model, (train_loader, val_loader), cfg, start)
    if not cfg.get("fast_dev_run"):
        _check_finished(trainer, model, cfg, start)
    accuracy = trainer.callback_metrics.get("val_acc1")
    measures = head_measures(trainer, model)  # All processes: it may synchronise.
    if trainer.is_global_zero and measures:
        print(f"{cfg.name}: {', '.join(f'{k} {v}' for k, v in measures.items())}", flush=True)
    # A run that was killed after its last checkpoint has no epoch left to validate.
    online = start.online if accuracy is None else accuracy.item()
    if trainer.is_global_zero and trainer.global_step:
        record, picture = directory / WEIGHTS_FILE, directory / PICTURE_FILE
        plot_weights(record, picture, terms_of(cfg), model.weighting.warmup_epochs)
        seconds = start.seconds + time.monotonic() - began
        write_json(directory / TRAINED_FILE, {"online": online, "seconds": seconds})
    return Run(directory, model.eval(), cfg, online)


def _fit(
    trainer: pl.Trainer,
    model: CompositeMethod,
    loaders: tuple[Any, Any],
    cfg: DictConfig,
    start: Start,
) -> None:
    """Trains a model from where the run starts. See :func:`pretrain` for the errors."""
    directory = run_dir(cfg)
    with wandb_run():
        try:
            trainer.fit(model, *loaders, ckpt_path=start.path, weights_only=True)
        except SystemExit as end:  # Lightning raises it for both signals.
            terminated = isinstance(end, SIGTERMException)
            if not terminated and not isinstance(end.__context__, KeyboardInterrupt):
                raise
            if trainer.is_global_zero:
                saved = epoch_checkpoints(directory / CHECKPOINTS_FOLDER)
                advice = AGAIN if saved else "start it again"
                stopped = f"{cfg.name}: stopped after step {trainer.global_step}"
                print(f"{stopped}: {advice}", file=sys.stderr)
            raise (SystemExit(TERMINATED) if terminated else KeyboardInterrupt) from None
        except Diverged as error:
            raise Diverged(f"{error}{_newest(cfg)}") from None
        except ConfigError:
            raise
        except (MisconfigurationException, ValueError) as error:
            line = str(error).strip().partition("\n")[0]
            if isinstance(error, ValueError) and "`val_check_interval`" not in line:
                raise
            raise ConfigError(f"trainer: {line}") from None
        except (OSError, RuntimeError) as error:
            raise explain_machine_failure(error, directory) from error
        finally:
            stop_workers()  # Lightning ends the workers of its own kind of loader only.


def _check_finished(
    trainer: pl.Trainer, model: CompositeMethod, cfg: DictConfig, start: Start
) -> None:
    """Raises a :class:`~grap_solo.errors.RunStopped` if a run is not finished."""
    key, step = key_that_ended(trainer, cfg.max_epochs), trainer.global_step
    if key is not None:
        saved = epoch_checkpoints(run_dir(cfg) / CHECKPOINTS_FOLDER)
        again = AGAIN if saved else "start it again"
        raise RunStopped(
            f"{key}: {cfg.name} stopped after step {step}, before the end of "
            f"its {counted(cfg.max_epochs, 'epoch')}, and is not finished: {again}; {key} may then "
            "be larger, or left out"
        )
    bad = find_not_finite(model.state_dict())
    cause = None if bad is None else f"'{bad}' is not finite at its end"
    if step > start.steps and not model.usable_in_epoch:
        cause = "no step of the last epoch was finite"
    if cause is not None:
        raise Diverged(
            f"{cfg.name}: {cause}, so the run is not finished: try a lower optimizer.lr, or "
            f"precision 32-true{_newest(cfg)}"
        )


def _newest(cfg: DictConfig) -> str:
    """Names a run's newest checkpoint, if there is one."""
    saved = epoch_checkpoints(run_dir(cfg) / CHECKPOINTS_FOLDER)
    return f"; {saved[0]} is from before" if saved else ""


def _loaders(
    cfg: DictConfig, epoch: int
) -> tuple[Any, Any, int | None, np.ndarray | None, dict[str, Any]]:
    """The loaders for training, from an epoch on, and validation, the number of held-out images if
    there are any, the indexes of the images that keep their labels if not all do, and the data's
    fingerprints. Fills in ``data.num_classes``, and the sizes of the downstream heads."""
    heads = cfg.get("downstream")
    train_images, val_images, own = images = load_run(cfg.data, cfg.labels, heads)
    fingerprints = data_fingerprints(cfg, images)
    processes = images_per_step(cfg) // cfg.optimizer.batch_size
    if val_images is not None and len(val_images) < processes:
        key = "data.val_path" if cfg.labels.val_path is None else "labels.val_path"
        raise ConfigError(
            f"{key}: {len(val_images)} images for {processes} processes: give one for each"
        )
    source = train_images if own is None else own
    parts = [each for each in (source, val_images) if each is not None]
    fill_in_classes(cfg, *parts)
    rule = cfg.weighting.name
    if find_weighting(rule).needs_labels and not source.labelled.any():
        raise missing_labels("data.train_path: no training image has a label", rule)
    rest, held_out, labelled = split_labels(
        source, cfg.labels.fraction, holds_out(cfg.labels), cfg.seed
    )
    if heads is not None:
        fill_in_scales(heads, rest if held_out is None else held_out)
    if own is None:
        train_images = rest
    elif labelled is not None and len(labelled) == len(own):
        labelled = None
    together = images_per_step(cfg)
    train_loader: Any = pretrain_loader(cfg, train_images, together, epoch)
    if held_out is not None:
        seen = labelled_loader(cfg, held_out, together, epoch)
        train_loader = CombinedLoader({"train": train_loader, "labelled": seen}, "max_size_cycle")
    val_loader = None if val_images is None else evaluation_loader(cfg, val_images, keep=True)
    seen_apart = None if held_out is None else len(held_out)
    return train_loader, val_loader, seen_apart, labelled, fingerprints


def _make_run_folder(directory: Path) -> None:
    """Makes a run's folders and removes unfinished checkpoints from them.

    Raises:
        ConfigError: they cannot be made, or written to.
    """
    for folder in (directory, directory / CHECKPOINTS_FOLDER):
        make_folder(folder, "checkpoint.dir")
    if is_first_process():
        for path in (directory / CHECKPOINTS_FOLDER).glob("*.ckpt.new"):
            path.unlink()


def _write_configs(source: DictConfig, cfg: DictConfig, directory: Path) -> None:
    """Writes ``config.yaml``, to train from again, and ``args.json`` for solo-learn's scripts."""
    with whole_file(directory / CONFIG_FILE) as file:
        OmegaConf.save(OmegaConf.create(keep_config(resolve_source(source))), file)
    arguments = OmegaConf.to_container(cfg, resolve=True)
    text = json.dumps(arguments, indent=1)
    (directory / CHECKPOINTS_FOLDER / ARGS_FILE).write_text(text, encoding="utf-8")


def prepare_one_of_many(source: DictConfig, what: str) -> DictConfig:
    """Prepares the configuration of a run to be compared with others on validation images.

    Args:
        source: as :func:`pretrain` takes it.
        what: the name of the comparison, for the errors.

    Raises:
        ConfigError: no labelled validation images, several devices, a trial run, or what
            ``prepare`` refuses.
    """
    cfg = prepare(source)
    if cfg.get("fast_dev_run"):
        raise ConfigError(
            f"fast_dev_run: {what} needs the files of its runs, and a trial run keeps none: leave "
            "it out, or set max_epochs=1"
        )
    if no_validation(cfg):
        raise ConfigError(
            f"data.val_path: {what} compares accuracies on labelled validation images: give some, "
            "and leave out data.no_labels"
        )
    if not learns_labels(cfg):
        raise ConfigError(
            f"downstream: {what} compares accuracies by the images' own labels: let the first head "
            "of task classification have no column, or set data.label_key to its column"
        )
    if images_per_step(cfg) != cfg.optimizer.batch_size:
        raise ConfigError(
            f"devices: {what} trains each run on one device: set devices=1, num_nodes=1, and "
            "optimizer.batch_size to the images of a step"
        )
    return cfg


def no_validation(cfg: DictConfig) -> bool:
    """Whether a run has no labelled images to validate on."""
    return not has_validation(cfg.data, cfg.labels)


def _quiet() -> None:
    """Hides messages that say nothing about this run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Experiment logs directory.*exists and is not empty.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*recommended to use .self.log..skipped/.*sync_dist=True.*",  # It is equal everywhere.
    ):
        warnings.filterwarnings("ignore", message)
