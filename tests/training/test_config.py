"""The configuration files, and what is refused before any data is read."""

import pytest
from helpers import CONFIGS
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.compose import compose
from grap_solo.methods import METHODS, GrapAll4One, find_method
from grap_solo.training.config import prepare

GRIDS = sorted((CONFIGS / "table3").glob("*.yaml"))
DATASETS = ("digits", "cifar10", "cifar100", "imagenet100", "custom")
FILES = sorted(file for dataset in DATASETS for file in (CONFIGS / dataset).glob("*.yaml"))


def digits(*overrides, file="grap"):
    return compose(CONFIGS / "digits" / f"{file}.yaml", overrides)


def test_there_is_a_default_and_a_grap_file_for_each_dataset():
    found = {(file.parent.name, file.stem) for file in FILES}
    plain = {(dataset, method) for dataset in DATASETS for method in METHODS}
    learned = {(d, "grap" if m == "all4one" else f"grap_{m}") for d, m in plain}
    assert found == plain | learned


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_file_composes_and_builds(file):
    source = compose(file, ["accelerator=cpu", "devices=1"])
    cfg = prepare(source)
    cfg.data.num_classes = {"digits": 10, "cifar10": 10}.get(cfg.data.dataset, 100)
    model = find_method(cfg.method)(cfg)
    learned = file.stem.startswith("grap")
    assert type(model.weighting).__name__ == ("GraP" if learned else "Fixed")
    assert cfg.method == ("grap_all4one" if file.stem == "grap" else file.stem)
    assert cfg.name == f"{file.stem}-{file.parent.name}"
    if cfg.optimizer.name == "lars":
        assert model.cfg.optimizer.kwargs.eta == 0.02
    small = file.parent.name == "digits" and model.weighting.terms[0] != "nnclr"
    assert cfg.optimizer.name == ("adamw" if small else "lars")


@pytest.mark.parametrize(
    ("dataset", "batch", "devices", "epochs", "stem"),
    [
        ("cifar10", 256, 1, 1000, 3),
        ("cifar100", 256, 1, 1000, 3),
        ("imagenet100", 128, 2, 400, 7),
    ],
)
def test_the_papers_settings(dataset, batch, devices, epochs, stem):
    source = compose(CONFIGS / dataset / "grap.yaml")
    assert len(source.devices) == devices and source.precision == "32-true"
    cfg = prepare(OmegaConf.merge(source, {"accelerator": "cpu", "sync_batchnorm": False}))
    assert (cfg.optimizer.batch_size, cfg.max_epochs) == (batch, epochs)
    assert cfg.optimizer.lr == 1.0 and cfg.optimizer.classifier_lr == 0.1  # 256 images a step.
    assert cfg.optimizer.weight_decay == 1e-5 and cfg.scheduler.warmup_epochs == 10
    assert cfg.optimizer.kwargs.momentum == 0.9
    cfg.data.num_classes = 100
    model = GrapAll4One(cfg)
    conv1 = model.backbone.conv1
    assert conv1.kernel_size == (stem, stem)
    if stem == 3:
        assert conv1.stride == (1, 1) and conv1.padding == (2, 2)
        assert not list(model.backbone.maxpool.children())
    transformer = set(model.transformer_encoder.parameters())
    groups = [{**group, "params": list(group["params"])} for group in model.learnable_params]
    (own,) = [group for group in groups if group["params"][0] in transformer]
    assert own["lr"] == 0.1


def test_learning_rates_scale_with_the_images_of_a_step():
    cfg = prepare(digits("optimizer.batch_size=64", "optimizer.lr=1.0"))
    assert cfg.optimizer.lr == 0.25
    source = digits("optimizer.batch_size=64")
    before = OmegaConf.to_yaml(source)
    prepare(source)
    assert OmegaConf.to_yaml(source) == before


@pytest.mark.parametrize(("devices", "count"), [("2", 2), ("[0,1,2]", 3), ("'2'", 2), ("[0]", 1)])
def test_devices_are_counted_once(devices, count):
    cfg = prepare(digits(f"devices={devices}"))
    assert cfg.devices == count and cfg.optimizer.lr == count * 64 / 256


def test_method_and_block_are_all_that_turns_all4one_into_grap():
    plain = digits(file="all4one")
    OmegaConf.set_struct(plain, False)
    plain.method = "grap_all4one"
    plain.weighting = {"name": "grap"}
    cfg = prepare(plain)
    cfg.data.num_classes = 10
    assert type(GrapAll4One(cfg).weighting).__name__ == "GraP"


BAD = [
    (["method=grap_all4on"], r"method: .*did you mean 'grap_all4one'"),
    (
        ["method=all4one"],
        r"method: all4one .*takes no 'weighting:'.*set method=grap_all4one",
    ),
    (["weighting.name=grp"], r"weighting\.name: .*did you mean 'grap'"),
    (["+weighting.learning_rate=1"], r"unknown name 'learning_rate'"),
    (["weighting.lr=-1"], r"weighting\.lr"),
    (["weighting=grap"], r"weighting: expected a block|configuration: "),
    (["+weighting.weights={nnclr: 1}"], r"unknown name 'weights'"),
    (["weighting.name=dwa"], r"weighting\.\w+: a key of 'grap', whose block is in the file"),
    (["weighting={name: mgda}"], r"take the block out first, as in: ~weighting '\+weighting="),
    (["data.dataset=cifar"], r"data\.dataset: .*did you mean 'cifar10"),
    (["data.dataset=cifar10"], r"data\.train_path: missing"),
    (["+data.format=dali"], r"data\.format: unknown name 'dali'.*image_folder"),
    (["backbone.name=resnet81"], r"backbone\.name: .*did you mean 'resnet"),
    (["optimizer.name=lamb"], r"optimizer\.name: .*lars"),
    (
        ["+optimizer.kwargs.trust_coeff=1"],
        r"optimizer\.kwargs: unknown name 'trust_coeff'",
    ),
    (["scheduler.name=cosine"], r"scheduler\.name: .*did you mean 'warmup_cosine'"),
    (["optimizer.batch_size=0"], r"optimizer\.batch_size: .*of 1 or more, got 0"),
    (["optimizer.lr=fast"], r"optimizer\.lr: .*above 0, got 'fast'"),
    (["max_epochs=-1"], r"max_epochs: .*of 1 or more"),
    (["~method_kwargs.temperature"], r"method_kwargs\.temperature: missing: add it"),
    (["method_kwargs.queue_size=4"], r"method_kwargs\.queue_size: .*of 5 or more, got 4"),
    (["method_kwargs.queue_size=big"], r"queue_size: expected a whole number .*'big'"),
    (["method_kwargs.proj_hidden_dim=256.5"], r"proj_hidden_dim: expected a whole number"),
    (["optimizer.weight_decay=-1"], r"weight_decay: expected a number of 0 or more, got -1"),
    (["name=5"], r"name: expected a text, got 5"),
    (["momentum=0.9"], r"momentum: expected a block of keys, got 0\.9|configuration: "),
    (["weighting.scale=[1]"], r"weighting\.scale"),
    (["scheduler.name=step"], r"scheduler\.lr_decay_steps: missing"),
    (["scheduler.warmup_epochs=ten"], r"scheduler\.warmup_epochs: expected a number"),
    (["knn_eval.enabled=true", "+knn_eval.distance_func=cosin"], r"did you mean 'cosine'"),
    (["precision=bf16-true"], r"precision: unknown name 'bf16-true': did you mean '64-true'"),
    (["checkpoint.frequency=-1"], r"checkpoint\.frequency: .*of 1 or more, got -1"),
    (["augmentations.0.num_crops=two"], r"num_crops: expected a whole number"),
    (["devices=auto"], r"devices: expected a number of devices or a list"),
    (["devices=-1"], r"devices: expected a number of devices or a list"),
    (["+backbone.kwargs={foo: 1}"], r"backbone\.kwargs: .*foo"),
    (["method_kwargs.proj_output_dim=100"], r"proj_output_dim: 100 .*multiple of 8"),
    (["augmentations.0.num_crops=2"], r"augmentations: grap_all4one takes two views, not 3"),
    (["augmentations.0.crop_size=16"], r"augmentations: .*one crop_size"),
    (["augmentations=[]"], r"augmentations: missing"),
    (["devices=0"], r"devices: expected a number of devices"),
    (["devices=2", "+sync_batchnorm=true"], r"sync_batchnorm: .*GPUs only"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        prepare(digits(*overrides))
    assert "\n" not in str(error.value)


FIXED = "weighting={{name: fixed, weights: {{nnclr: {}, attn_nnclr: {}, byol: {}, barlow: {}}}}}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 1, 1, -0.5), r"weighting\.weights\.barlow: .*0 or more, got -0\.5"),
        ((0, 0, 0, 0), r"every weight is 0"),
    ],
)
def test_negative_and_all_zero_weights_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        prepare(digits("~weighting", "+" + FIXED.format(*values)))


def test_unknown_terms_are_refused():
    block = "+weighting={name: fixed, weights: {nnclr: 1, attn_nncl: 1, byol: 1, barlow: 1}}"
    with pytest.raises(ConfigError, match="unknown name 'attn_nncl': did you mean 'attn_nnclr'"):
        prepare(digits("~weighting", block))
