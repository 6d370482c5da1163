"""Weights of other tools start a backbone, or the keys that do not fit are named."""

import argparse

import pytest
import timm
import torch
from helpers import method_config
from safetensors.torch import save_file

from grap_solo import ConfigError
from grap_solo.methods import find_method
from grap_solo.training.starting_weights import start_backbone


def build(seed, method="all4one", backbone="test_resnet"):
    torch.manual_seed(seed)
    changes = {"backbone": {"name": backbone}, "data": {"dataset": "digits"}}
    return find_method(method)(method_config(method, **changes))


@pytest.fixture(scope="module")
def donor():
    """A method whose running statistics are not a new network's."""
    model = build(1)
    for name, value in model.backbone.state_dict().items():
        if "running" in name:
            value.fill_(0.25)
    return model


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def zeros(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


HEAD = {"fc.weight": torch.zeros(10, 96), "fc.bias": torch.zeros(10)}
PREFIXES = [
    "", "backbone.", "module.", "encoder.", "module.backbone.", "student.", "teacher.",
    "momentum_backbone.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "module.encoder_q.",
    "backbone._orig_mod.", "my_network.trunk.",
]  # fmt: skip
ENTRIES = ["", "state_dict", "model", "teacher", "student", "encoder", "model_ema", "model.inner"]


@pytest.mark.parametrize(
    ("entry", "prefix"),
    [("state_dict", each) for each in PREFIXES] + [(each, "module.backbone.") for each in ENTRIES],
)
def test_a_backbone_is_found_under_any_prefix_and_entry(entry, prefix, donor, tmp_path):
    content = prefixed({**donor.backbone.state_dict(), **HEAD}, prefix)
    for name in reversed(entry.split(".") if entry else []):
        content = {name: content, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "file.pth")
    model = build(2)
    line = start_backbone(model, tmp_path / "file.pth")
    for network in (model.backbone, model.momentum_backbone):
        for name, value in network.state_dict().items():
            assert torch.equal(value, donor.backbone.state_dict()[name]), name
    assert line.endswith(", without fc")
    assert entry in line and prefix in line


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_of_both_kinds_are_read(suffix, donor, tmp_path):
    state, file = donor.backbone.state_dict(), tmp_path / f"file{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    model = build(2, "vicreg")
    assert start_backbone(model, file) == f"backbone from {file}: its state dict"
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())


def test_a_runs_own_checkpoint_gives_its_backbone_not_its_momentum_copy(donor, tmp_path):
    state = donor.state_dict()
    state |= prefixed(zeros(donor.backbone.state_dict()), "momentum_backbone.")
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    model = build(2, "vicreg")
    line = start_backbone(model, tmp_path / "run.ckpt")
    assert "its entry 'state_dict', keys 'backbone.*', without " in line
    assert "keys 'momentum_backbone.*' would fit too" in line
    expected = donor.backbone.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.backbone.state_dict().items())


def test_of_teacher_and_student_the_teacher_is_taken_unless_it_is_empty(donor, tmp_path):
    state = donor.backbone.state_dict()
    both = {"student": prefixed(zeros(state), "module."), "teacher": prefixed(state, "module.")}
    torch.save(both, tmp_path / "both.pth")
    model = build(2, "vicreg")
    line = start_backbone(model, tmp_path / "both.pth")
    assert "its entry 'teacher'" in line and "entry 'student', keys 'module.*' would fit" in line
    assert torch.equal(model.backbone.conv1[0].weight, donor.backbone.conv1[0].weight)
    torch.save({**both, "teacher": {}}, tmp_path / "student.pth")
    assert "its entry 'student'" in start_backbone(model, tmp_path / "student.pth")
    assert not model.backbone.conv1[0].weight.any()


def test_a_classifier_within_a_part_of_the_backbone_is_left_out(tmp_path):
    """As ConvNeXt's, whose ``head`` has a norm that the backbone keeps."""
    theirs = timm.create_model("convnext_atto", num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    model = build(2, "vicreg", "convnext_atto")
    line = start_backbone(model, tmp_path / "file.pth")
    assert line.endswith("its state dict, without head.fc")
    assert torch.equal(model.backbone.head.norm.weight, theirs.head.norm.weight)
    assert torch.equal(model.backbone.stem[0].weight, theirs.stem[0].weight)


def test_a_misfit_names_the_first_missing_and_unexpected_keys_and_the_first_shape(tmp_path):
    state = build(2, "vicreg").backbone.state_dict()
    state |= {"layer1.9.bn.bias": torch.ones(1), "bn1.weight": torch.ones(3)}
    torch.save(without(state, "bn1.bias"), tmp_path / "file.pth")
    message = (
        r"it lacks bn1\.bias; it also has layer1\.9\.bn\.bias; bn1\.weight has shape \(3,\), not"
    )
    with pytest.raises(ConfigError, match=message):
        start_backbone(build(2, "vicreg"), tmp_path / "file.pth")


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


BAD = {
    "missing": (lambda s: without(s, "bn1.weight"), "it lacks bn1.weight: set backbone.name"),
    "unexpected": (lambda s: {**s, "layer4.7.x": torch.ones(1)}, "it also has layer4.7.x"),
    "shape": (
        lambda s: {**s, "bn1.weight": torch.ones(3)},
        r"test_resnet: bn1.weight has shape \(3,\), not \(32,\)",
    ),
    "half": (lambda s: dict(list(s.items())[:20]), r"it lacks \S+, \S+, \S+, \S+ and \d+ more"),
    "foreign": (lambda s: {"a": torch.ones(1)}, "its keys are a: give weights with keys such as"),
    "empty": (lambda s: {}, "there are no weights in it"),
    "nan": (
        lambda s: {**s, "bn1.weight": torch.full_like(s["bn1.weight"], torch.nan)},
        "'bn1.weight' of its state dict is not finite: give an earlier checkpoint",
    ),
    "too large": (
        lambda s: {**s, "bn1.weight": s["bn1.weight"].double() + 1e300},
        "'bn1.weight' of its state dict is not finite",
    ),
    "number": (lambda s: 3, "there are no weights in it"),
    "code": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
        "holds a argparse.Namespace besides weights",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(name, donor, tmp_path):
    change, message = BAD[name]
    torch.save(change(donor.backbone.state_dict()), tmp_path / "file.pth")
    model = build(2)
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    with pytest.raises(ConfigError, match=message) as error:
        start_backbone(model, tmp_path / "file.pth")
    assert str(error.value).startswith("pretrained_feature_extractor: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(name, tmp_path):
    (tmp_path / name).write_text("foreign")
    with pytest.raises(ConfigError, match="not a checkpoint, or one cut short"):
        start_backbone(build(2), tmp_path / name)
