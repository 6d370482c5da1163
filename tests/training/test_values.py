"""Every key with null and with values of every kind: each is used, or refused in one line."""

import functools
import math

import pytest
import torch
from helpers import digits, method_config, quiet_digits
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.data.augmentations import BLOCK_KEYS, NUMBERS, build_views
from grap_solo.methods import METHODS, find_method
from grap_solo.training.blocks import block_of, key_of
from grap_solo.training.building import build_model, check_batch_norms
from grap_solo.training.config import LARGEST_NUMBER, OPTIMIZER_DEFAULTS, prepare
from grap_solo.training.run import pretrain
from grap_solo.training.schema import schema_of
from grap_solo.weighting import WEIGHTINGS

VALUES = [math.nan, -math.inf, 10**30, -1, 1.5, True, [], [1], {"a": 1}, "", "nonsense"]
REQUIRED = {
    "name", "method", "backbone.name", "data.dataset", "optimizer.name", "optimizer.batch_size",
    "optimizer.lr", "optimizer.classifier_lr", "optimizer.weight_decay", "scheduler.name",
    "max_epochs", "augmentations", "method_kwargs.temperature", "method_kwargs.proj_hidden_dim",
    "method_kwargs.proj_output_dim", "method_kwargs.pred_hidden_dim",
}  # fmt: skip


def fields(model, prefix=""):
    """Every field of a model, also the blocks, by its full name."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if block_of(field) is not None:
            yield from fields(block_of(field), f"{prefix}{name}.")


FIELDS = dict(fields(schema_of(METHODS["all4one"], WEIGHTINGS["grap"])))


@functools.cache
def base(*overrides):
    return OmegaConf.to_container(digits("runs", *overrides), resolve=True)


def changed(key, value, source=None):
    cfg = OmegaConf.create(base() if source is None else source)
    OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    return cfg


def without(key):
    cfg = OmegaConf.create(base())
    parent, _, name = key.rpartition(".")
    block = OmegaConf.select(cfg, parent) if parent else cfg
    if block is not None:
        block.pop(name, None)
    return cfg


def outcome(cfg):
    """The prepared configuration, or the text of its one-line refusal."""
    try:
        return OmegaConf.to_container(prepare(cfg))
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize(
    "key",
    [key for key in FIELDS if not key.startswith("downstream.")],  # They need a head's name.
)
def test_null_counts_as_left_out(key):
    expected = outcome(without(key))
    assert isinstance(expected, str) == (
        key in REQUIRED or key in ("backbone", "data", "optimizer", "scheduler", "method_kwargs")
    )
    for null in (None, "None", "???"):
        found = outcome(changed(key, null))
        assert found == expected
        if isinstance(found, str):
            assert found.startswith(key) and ": missing: " in found


@pytest.mark.parametrize("key", FIELDS)
def test_values_of_every_kind_are_used_or_refused_in_one_line(key):
    field = FIELDS[key]
    for value in VALUES:
        found = outcome(changed(key, value))
        fits = field.title is None and block_of(field) is None and key_of(field).fits(value)
        if isinstance(found, str):
            assert found.startswith((key, key.partition(".")[0])), value
            assert key.rpartition(".")[2] in found or value in found or "unknown" in found
        else:
            assert fits or field.title or block_of(field), value
            assert value != 10**30 and value != "" and value == value


@pytest.mark.parametrize("key", ["gradient_clip_val", "optimizer.kwargs.momentum", "data.extra"])
def test_numbers_of_no_use_are_refused_in_any_key(key):
    for value in (math.nan, math.inf, LARGEST_NUMBER + 1):
        assert outcome(changed(key, value)).startswith(f"{key}: expected a ")


AUGMENTED = [f"{block}.{key}" for block, keys in BLOCK_KEYS.items() for key in keys]
AUGMENTED += [*BLOCK_KEYS, *NUMBERS, "mean", "std"]


@pytest.mark.parametrize("key", AUGMENTED)
def test_an_entry_of_the_augmentations_is_used_or_refused_in_one_line(key):
    from PIL import Image

    source = base()
    source = {
        **source,
        "augmentations": [{**each, "num_crops": 1} for each in (source["augmentations"] * 2)[:2]],
    }
    accepted = 0
    for value in [*VALUES, None, 0, 0.2, 1, 24, [0.5, 0.5, 0.5], [1, 2], [0.5, "a", 0.5]]:
        found = outcome(changed(f"augmentations.0.{key}", value, source))
        if isinstance(found, str):
            assert found.startswith("augmentations"), value
            assert key.partition(".")[0] in found or "augmentations" in found
            continue
        accepted += 1
        first, *_ = build_views("digits", OmegaConf.create(found["augmentations"]))
        if found["augmentations"][0]["crop_size"] < 64:
            assert torch.isfinite(first(Image.new("RGB", (8, 8)))).all()
    assert accepted


def test_entries_that_are_no_blocks_are_refused():
    for value in ([1], ["a"], 3, "a", {"a": 1}):
        assert outcome(changed("augmentations", value)).startswith("augmentations"), value


@pytest.mark.parametrize("name", OPTIMIZER_DEFAULTS)
def test_arguments_of_the_optimizer_that_do_not_fit_are_refused(name):
    source = {**base(), "optimizer": {**base()["optimizer"], "name": name, "kwargs": {}}}
    for key in {"sgd": ["momentum"], "lars": ["momentum", "eta"]}.get(name, ["betas", "eps"]):
        for value in ("fast", {"a": 1}):
            found = outcome(changed(f"optimizer.kwargs.{key}", value, source))
            assert isinstance(found, str), (key, value)
            assert found.startswith(f"optimizer.kwargs: {name} cannot use") and key in found
        null = outcome(changed(f"optimizer.kwargs.{key}", None, source))
        assert null == outcome(OmegaConf.create(source))


@pytest.mark.parametrize("name", ["a/b", "..", ".", "/a"])
def test_a_name_that_is_no_files_name_is_refused(name):
    assert outcome(changed("name", name)).startswith(f"name: '{name}': it is a path")


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_leaves_batch_norm_one_image_is_refused(method, tmp_path):
    cfg = (
        quiet_digits(tmp_path, "optimizer.batch_size=1", "+method_kwargs.queue_size=8", file=method)
        if method != "all4one"
        else quiet_digits(tmp_path, "optimizer.batch_size=1")
    )
    with pytest.raises(ConfigError, match=r"^optimizer\.batch_size: 1 image on each device"):
        pretrain(cfg)
    assert not (tmp_path / "run").exists()


def test_held_out_images_that_leave_batch_norm_one_are_refused():
    labels = {"labels": {"split": "held_out", "fraction": 0.01}, "devices": 1, "num_nodes": 1}
    model = find_method("vicreg")(method_config("vicreg"))
    cfg = method_config("vicreg", **labels)
    with pytest.raises(ConfigError, match=r"^labels\.fraction: 1 held-out images for 1 processes"):
        check_batch_norms(model, cfg, 1)
    check_batch_norms(model, cfg, 2)


@pytest.mark.parametrize(
    ("method", "key"), [("all4one", "queue_size"), ("vicreg", "proj_hidden_dim")]
)
def test_networks_beyond_the_memory_are_refused_in_one_line(method, key):
    cfg = method_config(method)
    cfg.method_kwargs[key] = 2**31 - 8
    cfg.method_kwargs.proj_output_dim = 2**20
    with pytest.raises(ConfigError, match=r"^method_kwargs: .*do not fit into memory") as error:
        build_model(cfg)
    assert "\n" not in str(error.value)
