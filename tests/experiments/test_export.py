"""An exported backbone gives the same embeddings, to the bit, however it is loaded."""

import json
import re

import pytest
import timm
import torch
import torchvision
import yaml
from run_folders import write_backbone_run
from safetensors.torch import load_file

import grap_solo
from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.experiments.export import export

VIT = {"img_size": 32, "patch_size": 8}
FAMILIES = {
    "resnet18": ("resnet18", "digits", {}),
    "resnet18 with the small stem": ("resnet18", "cifar10", {}),
    "test_resnet": ("test_resnet", "digits", {}),
    "vit_tiny": ("vit_tiny_patch16_224", "digits", VIT),
    "convnext": ("convnext_atto", "digits", {}),
}
FORMATS = {
    "resnet18": ("timm", "torchvision", "state-dict"),
    "resnet18 with the small stem": ("torchvision", "state-dict"),
}


def from_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def from_torchvision(folder):
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """A run's folder with its backbone, and the formats that have it."""
    name, dataset, kwargs = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("runs") / "run"
    backbone = write_backbone_run(folder, name, dataset, kwargs)
    return folder, backbone, FORMATS.get(request.param, ("timm", "state-dict"))


def test_the_round_trip_is_exact_to_the_bit(run, tmp_path):
    folder, backbone, formats = run
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = backbone(images)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    small = "timm" not in formats
    for form in formats:
        written = export(folder, form, tmp_path / form)
        loaders = [grap_solo.load_backbone]
        loaders += [from_timm] if form == "timm" else []
        loaders += [from_torchvision] if form == "torchvision" and not small else []
        for load in loaders:
            model = load(written).eval()
            with torch.no_grad():
                assert torch.equal(model(images), expected), (form, load)
    default = export(folder, None, tmp_path / "default")
    chosen = json.loads((default / "config.json").read_text())["grap_solo"]["format"]
    assert chosen == formats[0]


def test_the_card_has_data_method_weights_metrics_and_a_command(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_backbone_run(run, "test_resnet")
    (run / "weights.csv").write_text(
        "step,epoch,invariance,variance,covariance\n1,0,25,20,5\n2,0,27,20,5\n3,0,26,20,5\n"
    )
    (run / "terms.yaml").write_text(
        "method: grap_vicreg\nweighting: grap\n"
        "reference_weights: {invariance: 25.0, variance: 25.0, covariance: 1.0}\n"
    )
    (run / "trained.json").write_text('{"online": 81.25, "seconds": 3.0}')
    (run / "evaluation.json").write_text('{"linear": 92.5, "knn": null, "rankme": 63.25}')
    assert main(["export", str(run)]) == 0
    card = (run / "export" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "timm" and "grap-solo" in head["tags"]
    for words in ("digits", "grap_vicreg", "run-ep0.ckpt", "96 numbers", "| 81.25 |", "63.25"):
        assert words in card, words
    assert re.search(r"\| invariance \| +26(\.0+)? \| +25 \|", card)
    assert "k-NN" not in card  # It was not measured.
    assert str(tmp_path) not in card + (run / "export" / "training.yaml").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    exec(code.replace("FOLDER", str(run / "export")), names)
    assert names["model"](torch.zeros(1, 3, 32, 32)).shape == (1, 96)
    # The command's configuration can be trained.
    command = re.search(r"```sh\ngrap-solo (.*?)\n```", card)[1]
    line = command.replace("FOLDER", str(run / "export")).split()
    monkeypatch.chdir(tmp_path)
    assert main([*line, "--cfg", "job"]) == 0


def test_what_an_export_needs_is_said_in_one_line(tmp_path, capsys):
    run, small = tmp_path / "run", tmp_path / "small"
    write_backbone_run(run, "test_resnet")
    write_backbone_run(small, "resnet18", "cifar10")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").write_text("mine")
    cases = [
        ([small, "--format", "timm"], "--format timm: timm's resnet18 has no stem for small"),
        ([run, "--format", "torchvision"], "test_resnet is a model of timm: use --format timm"),
        ([run, "--to", tmp_path / "taken"], "taken holds other files: give a new folder"),
        ([run / "config.yaml"], "not a run: give the folder of a run"),
    ]
    for arguments, message in cases:
        assert main(["export", *map(str, arguments)]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert (tmp_path / "taken" / "README.md").read_text() == "mine"
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0
    assert main(["export", str(run), "--to", str(tmp_path / "model"), "--format=state-dict"]) == 0
    assert not (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("damage", ["no config", "not JSON", "no entry", "weights", "no weights"])
def test_a_damaged_export_is_refused_in_one_line(damage, tmp_path):
    write_backbone_run(tmp_path / "run", "test_resnet")
    folder = export(tmp_path / "run", "timm")
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "not JSON":
        config.write_text("{")
    elif damage == "no entry":
        config.write_text("{}")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(ConfigError, match=re.escape(str(folder))) as error:
        grap_solo.load_backbone(folder)
    assert "\n" not in str(error.value)


def test_onnx_gives_the_embeddings_for_any_batch(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from onnx.reference import ReferenceEvaluator

    backbone = write_backbone_run(tmp_path / "run", "test_resnet")
    folder = export(tmp_path / "run", "onnx")
    session = ReferenceEvaluator(str(folder / "model.onnx"))
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(found), backbone(images), rtol=1e-3, atol=1e-4
            )
