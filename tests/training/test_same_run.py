"""Which keys may differ when a run resumes, and that moved runs and data are known again."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import METHOD_KWARGS, Killed, digits, killed_at, quiet_digits
from omegaconf import OmegaConf
from PIL import Image

from grap_solo import ConfigError
from grap_solo.data import fingerprint
from grap_solo.data.folders import ClassFolders, Folder
from grap_solo.data.parquet import Parquet
from grap_solo.experiments.retrain import learned_weighting
from grap_solo.methods import METHODS
from grap_solo.training.blocks import block_of
from grap_solo.training.building import build_model
from grap_solo.training.checkpoints import resolve_source
from grap_solo.training.config import prepare
from grap_solo.training.run import pretrain
from grap_solo.training.same_run import (
    find_differences,
    keep_config,
    read_run_config,
    refuse_differences,
)
from grap_solo.training.schema import schema_of
from grap_solo.weighting import WEIGHTINGS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@functools.cache
def plain(*overrides):
    return resolve_source(digits("runs", *overrides))


def with_value(config, key, value):
    cfg = OmegaConf.create(config)
    OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    return OmegaConf.to_container(cfg)


def defaults(model, prefix=""):
    """Every key with a default, by its full name."""
    for name, field in model.model_fields.items():
        block = block_of(field)
        if block is not None:
            yield from defaults(block, f"{prefix}{name}.")
        elif not field.is_required():
            yield prefix + name, field.default


DEFAULTS = dict(defaults(schema_of(METHODS["all4one"], WEIGHTINGS["grap"])))
del DEFAULTS["downstream.weight"]  # A head's name stands in between.
UNFILLED = {
    "momentum.classifier": False,
    "scheduler.min_lr": 0.0,
    "knn_eval.k": 20,
    "optimizer.exclude_bias_n_norm_wd": False,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "devices": [0],
    "strategy": "auto",
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "val_check_interval": 1.0,
    "precision": 32,
    "sync_batchnorm": True,  # A single device has no other to join.
}
"""Defaults that the base class or the Trainer has, or what means the same."""


@pytest.mark.parametrize("key", [*DEFAULTS, *UNFILLED])
def test_a_default_that_is_written_out_is_no_difference(key):
    base = plain("~precision", "~momentum", "~knn_eval")
    without = OmegaConf.create(base)
    if OmegaConf.select(without, key) is not None and key not in METHOD_KWARGS["all4one"]:
        parent, _, name = key.rpartition(".")
        (OmegaConf.select(without, parent) if parent else without).pop(name)
    without = OmegaConf.to_container(without)
    given = with_value(without, key, {**DEFAULTS, **UNFILLED}[key])
    assert find_differences(without, given) == find_differences(given, without) == []
    assert find_differences(without, with_value(without, key, None)) == []


FREE = {
    "data.num_workers": 3,
    "data.download": False,
    "data.train_path": "elsewhere",
    "data.val_path": "elsewhere",
    "labels.path": "elsewhere",
    "labels.val_path": "elsewhere",
    "accelerator": "auto",
    "checkpoint.dir": "elsewhere",
    "checkpoint.frequency": 5,
    "checkpoint.keep_prev": True,
    "checkpoint.enabled": False,
    "wandb.enabled": True,
    "wandb.project": "other",
    "name": "other",
    "log_every_n_steps": 3,
    "enable_progress_bar": False,
    "max_time": "00:01:00:00",
    "max_steps": 4,
    "tuned_from": {"runs": ["elsewhere"]},
}
TRAINED = {
    "seed": 9,
    "data.fraction": 0.5,
    "data.batched": True,
    "optimizer.lr": 3.0,
    "optimizer.batch_size": 32,
    "weighting.lr": 0.3,
    "weighting.ema": 0.5,
    "method_kwargs.temperature": 0.3,
    "momentum.base_tau": 0.5,
    "augmentations.0.color_jitter.prob": 0.1,
    "optimizer.kwargs.momentum": 0.8,
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "precision": "bf16-mixed",
    "backbone.kwargs.drop_rate": 0.1,
    "devices": 2,
}


@pytest.mark.parametrize("key", [*FREE, *TRAINED])
def test_a_difference_is_free_if_it_cannot_change_what_is_trained(key):
    old, value = plain(), {**FREE, **TRAINED}[key]
    found = find_differences(old, with_value(old, key, value))
    assert found and all(each.key.startswith(key) for each in found)
    if key in FREE:
        assert refuse_differences(found, "here", "another name") == found
    else:
        with pytest.raises(
            ConfigError, match=rf"^here with {key} .*, not .*another name$"
        ) as error:
            refuse_differences(found, "here", "another name")
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("key", "old", "new", "same"),
    [
        ("limit_train_batches", 1, 1.0, False),
        ("val_check_interval", 1.0, 1, False),
        ("precision", 16, "16-mixed", True),
        ("precision", "bf16", "bf16-mixed", True),
        ("precision", "16", "bf16", False),
    ],
)
def test_values_are_compared_by_what_they_mean(key, old, new, same):
    found = find_differences(with_value(plain(), key, old), with_value(plain(), key, new))
    assert (found == []) == same


def test_a_run_with_keys_that_are_gone_is_compared_by_what_it_gives():
    old = with_value(plain(), "weighting.gone", 1)
    (found,) = find_differences(old, plain())
    assert str(found) == "weighting.gone 1, not None"


# ---- runs ---------------------------------------------------------------------------------


def draw_folder(root, seed=0, count=16, size=16):
    random = np.random.default_rng(seed)
    for name in ("a", "b", "c"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def custom(directory, *overrides):
    """A run on a folder of images."""
    changes = [
        "data.dataset=custom", "data.fraction=-1", f"+data.train_path={directory}/images",
        f"+data.val_path={directory}/validation", "optimizer.batch_size=16",
        "method_kwargs.queue_size=16", "name=run", "+enable_progress_bar=false",
        "augmentations.0.crop_size=16", "augmentations.1.crop_size=16",
    ]  # fmt: skip
    return digits(directory / "runs", *changes, *overrides)


def custom_start(directory, file, make=True):
    """A run that starts from a file of weights."""
    cfg = quiet_digits(directory, f"+pretrained_feature_extractor={file}", file="grap_vicreg")
    if make:
        file.parent.mkdir()
        ready = prepare(cfg)
        ready.data.num_classes = 10
        torch.save(build_model(ready).backbone.state_dict(), file)
    return cfg


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stopped")
    draw_folder(directory / "images")
    draw_folder(directory / "validation", 1, 2)
    with pytest.raises(Killed):
        pretrain(custom(directory), [killed_at("on_train_batch_end", 1)])
    return directory


@pytest.fixture
def copy(stopped, tmp_path):
    """The whole folder moved: the run and its data."""
    return shutil.copytree(stopped, tmp_path / "copy")


def test_a_moved_and_renamed_run_with_moved_data_resumes(copy, capsys):
    (copy / "runs" / "run").rename(copy / "runs" / "renamed")
    changes = ["name=renamed", "data.num_workers=1", "log_every_n_steps=2"]
    run = pretrain(custom(copy, *changes))
    output = capsys.readouterr().out
    assert "resuming after epoch 0" in output
    for text in (
        "data.num_workers=1 (before: 0)",
        "name=renamed (before: run)",
        "data.train_path=",
    ):
        assert text in output
    assert run.model.weighting.updates == 6
    (checkpoint,) = (run.directory / "checkpoints").glob("*.ckpt")
    assert checkpoint.name == "renamed-ep1.ckpt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: (images / "a/000.png").unlink(), r"48 images before, 47 now"),
        (lambda images: (images / "a/000.png").rename(images / "a/x.png"), "other names, labels"),
        (lambda images: (images / "a/000.png").rename(images / "b/x.png"), "other names, labels"),
        (
            lambda images: (shutil.rmtree(images), draw_folder(images, size=17)),
            "other names, labels or sizes",
        ),
    ],
    ids=["missing", "renamed", "relabelled", "resized"],
)
def test_other_images_elsewhere_are_refused(copy, change, message):
    change(copy / "images")
    with pytest.raises(
        ConfigError, match=rf"^data\.train_path: .*{message}.*give data\.train_path="
    ):
        pretrain(custom(copy))


@pytest.mark.parametrize("change", ["moved", "gone", "other"])
def test_moved_starting_weights_are_known_by_their_content(change, tmp_path, capsys):
    """A fine-tuned run has such a path, which changes with the folder of its parent."""
    old, new = tmp_path / "old" / "x.ckpt", tmp_path / "new" / "x.ckpt"
    start = custom_start(tmp_path, old)
    with pytest.raises(Killed):
        pretrain(start, [killed_at("on_train_batch_end", 1)])
    old.parent.rename(new.parent)
    if change == "other":
        state = torch.load(new, weights_only=True)
        torch.save({**state, "bn1.bias": state["bn1.bias"] + 1}, new)
        message = "^pretrained_feature_extractor: .*another content.*give pretrained_feature"
        with pytest.raises(ConfigError, match=message):
            pretrain(custom_start(tmp_path, new, make=False))
        return
    where = old if change == "gone" else new
    pretrain(custom_start(tmp_path, where, make=False))
    assert "resuming after epoch 0" in capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["weights"]["digest"]


def test_a_run_that_kept_no_fingerprint_stays_with_its_paths(copy):
    (copy / "runs" / "run" / "data.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.train_path: .*keeps no fingerprint"):
        pretrain(custom(copy))


def test_a_fingerprint_knows_the_same_images_in_another_folder(tmp_path):
    import pyarrow
    import pyarrow.parquet

    first, second = draw_folder(tmp_path / "first"), draw_folder(tmp_path / "second")
    for kind in (ClassFolders, Folder):
        assert fingerprint(kind(first), str(first)) == fingerprint(kind(second), str(second))
    found = []
    for spoiled in (b"x", b"x", b"xy"):
        table = pyarrow.table({"img": [{"bytes": b"a"}, {"bytes": spoiled}], "label": [0, 1]})
        file = tmp_path / f"{len(found)}.parquet"
        pyarrow.parquet.write_table(table, file)
        found.append(fingerprint(Parquet([file]), str(file)))
    assert found[0] == found[1] != found[2]


def test_the_command_line_refuses_in_one_line(copy, capfd):
    from grap_solo.cli import main

    source = custom(copy, "seed=9")
    (copy / "run.yaml").write_text(OmegaConf.to_yaml(source))
    assert main(["pretrain", "--config-path", str(copy), "--config-name", "run"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "already holds a run with seed 5, not 9: set it" in error


# ---- runs of a version with other defaults ----------------------------------------------------

EARLIER = [
    {"method": "grap_vicreg"},
    {"method": "lejepa:LeJEPA"},
    {"method": "grap_all4one", "weighting": {"name": "grap", "lr": 0.1, "optimizer": "adam"}},
    {"method": "grap_all4one", "weighting": {"name": "grap", "lr_per_run": 1.0}},
    {"method": "grap_all4one", "weighting": {"name": "grap", "start": "balanced"}},
]


def kept_by(folder, config):
    """A folder whose run has kept this configuration, and a record of weights."""
    folder.mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "weights.csv").write_text("step,epoch,a,b\n1,0,1,2\n2,0,1,3\n")
    return folder


@pytest.mark.parametrize("config", EARLIER)
def test_a_run_of_the_version_whose_default_was_algorithm_1_is_read_as_it_trained(config, tmp_path):
    """It resumes, compares and retrains as what it was, and is told apart from today's."""
    folder = kept_by(tmp_path / "run", config)
    block = read_run_config(folder)["weighting"]
    options = WEIGHTINGS["grap"].read_options({k: v for k, v in block.items() if k != "name"})
    assert options["parametrization"] == "clip" and options["heads"] == "unweighted"
    given = config.get("weighting", {})
    assert options["start"] == given.get("start", "equal")
    assert options["lr_per_run"] == given.get("lr_per_run")
    assert options["lr"] == (None if "lr_per_run" in given else 0.1)
    assert learned_weighting([folder])["heads"] == "unweighted"


@pytest.mark.parametrize(
    "block",
    [
        None,
        {"name": "grap"},
        {"name": "grap", "recipe": "alg1"},
        {"name": "grap", "recipe": "paper", "ema": 0.5},
        {"name": "grap", "lr": None, "lr_per_run": 3.0},
        {"name": "fixed"},
        {"name": "equal"},
    ],
)
def test_what_a_run_keeps_is_what_it_trained_whatever_the_defaults_become(block, tmp_path):
    config = {**plain(), "weighting": block}
    if block is None:
        del config["weighting"]
    kept = keep_config(config)
    read = read_run_config(kept_by(tmp_path / "run", kept))
    assert find_differences(read, config) == []
    if (block or {"name": "grap"})["name"] == "grap":
        assert {"parametrization", "start", "heads"} <= set(read["weighting"])
        assert {"lr", "lr_per_run"} & set(read["weighting"])


def test_a_folder_of_an_earlier_version_is_not_taken_for_todays_run(tmp_path):
    config = {**plain(), "weighting": {"name": "grap"}}
    before = read_run_config(kept_by(tmp_path / "run", config))
    found = {each.key for each in find_differences(before, config)}
    assert found >= {"weighting.parametrization", "weighting.start", "weighting.heads"}
    as_before = {**config, "weighting": {"name": "grap", "recipe": "alg1"}}
    assert find_differences(before, as_before) == []
