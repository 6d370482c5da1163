"""``grap-solo evaluate``: every source, what it writes, and what cannot be measured."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import QUIET
from PIL import Image
from run_folders import write_backbone_run
from safetensors.torch import save_file

from grap_solo import extras
from grap_solo.cli import main
from grap_solo.compose import compose
from grap_solo.data import evaluation_loader, load_both, views_loader
from grap_solo.evaluation.offline import evaluate
from grap_solo.evaluation.ranks import lidar
from grap_solo.experiments.evaluate import embed_views
from grap_solo.experiments.export import export
from grap_solo.experiments.sources import open_source

MEASURES = ["linear", "knn", "rankme", "lidar", "alpha_req"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with an untrained backbone, and the backbone."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, write_backbone_run(folder, "test_resnet", size=24)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of small training and validation images in two classes, bright and dark."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 10)):
        for name, level in (("bright", 200), ("dark", 60)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(level, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def printed_and_written(arguments, file, capsys):
    """Runs the command; returns its output and the content of the file that it wrote."""
    assert main(["evaluate", *map(str, arguments)]) == 0
    return capsys.readouterr().out, json.loads(file.read_text())


def test_a_run_has_a_table_and_a_file_with_every_measure(run, capsys):
    folder, backbone = run
    out, found = printed_and_written([folder], folder / "evaluation.json", capsys)
    cfg = open_source(str(folder), None, compose, None, None).cfg
    train, validation = load_both(cfg.data)
    loaders = (evaluation_loader(cfg, each) for each in (train, validation))
    expected = evaluate(backbone.to(memory_format=torch.channels_last), *loaders)
    assert found["linear"] == expected.linear and found["knn"] == expected.knn
    assert found["rankme"] == expected.rankme and found["alpha_req"] == expected.alpha_req
    views = views_loader(cfg, train, 10)
    assert found["lidar"] == lidar(embed_views(backbone, views, torch.device("cpu")))
    assert found["images"] == {"train": len(train), "validation": len(validation)}
    for name, value in zip(("linear probe", "k-NN", "RankMe", "LiDAR"), map(found.get, MEASURES)):
        line = next(each for each in out.splitlines() if each.startswith(f"| {name} "))
        assert f" {value:.2f} " in line
    assert found["notes"] == {} and 1 < found["lidar"] <= 96


def test_the_views_are_those_of_training_and_differ(run):
    folder, _ = run
    source = open_source(str(folder), None, compose, None, None)
    train, _ = load_both(source.cfg.data)
    indexes, views, labels = next(iter(views_loader(source.cfg, train, 9)))
    assert len(views) == 10 and views[0].shape[1:] == (3, 24, 24)
    assert indexes.tolist() == list(range(len(indexes)))
    assert labels.tolist() == train.targets[: len(labels)].tolist()
    flat = torch.stack(views).flatten(2)
    assert all(len(flat[:, image].unique(dim=0)) == 10 for image in range(5))


def test_a_checkpoint_and_an_export_are_measured_as_the_run(run, tmp_path, capsys):
    folder, _ = run
    checkpoint = folder / "checkpoints" / "run-ep0.ckpt"
    _, of_run = printed_and_written([folder, "--knn"], folder / "evaluation.json", capsys)
    beside = checkpoint.with_name("run-ep0.ckpt.evaluation.json")
    _, of_checkpoint = printed_and_written([checkpoint, "--knn"], beside, capsys)
    written = export(folder, "timm", tmp_path / "model")
    line = [written, "--train", "digits", "--knn", "--linear", "--to", tmp_path / "out"]
    changes = ["+data.fraction=0.06"]
    out, of_export = printed_and_written(
        [*line, *changes], tmp_path / "out" / "evaluation.json", capsys
    )
    assert of_run["knn"] == of_checkpoint["knn"]
    assert of_export["knn"] == pytest.approx(of_run["knn"], abs=0.4)  # Another memory format.
    assert "linear" not in of_run and "rankme" not in of_export and "RankMe" not in out


def torchvisions(folder):
    """A torchvision ResNet's weights, as DDP leaves them."""
    model = torchvision.models.resnet18()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "file.pth")
    return "resnet18", "file.pth", model.conv1.weight, "custom"


def small_stem(folder):
    """A ResNet's weights with solo-learn's stem, as its own checkpoints have them."""
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=2, bias=False)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "file.ckpt")
    return "resnet18", "file.ckpt", model.conv1.weight, "cifar10"


def timms(folder):
    """Weights of one of timm's models with its classifier, in safetensors."""
    model = timm.create_model("convnext_atto", num_classes=5)
    save_file(model.state_dict(), folder / "file.safetensors")
    return "convnext_atto", "file.safetensors", model.stem[0].weight, "custom"


def timms_folder(folder):
    """A model folder as Hugging Face's hub has them."""
    model = timm.create_model("test_resnet", num_classes=5)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return None, ".", model.conv1[0].weight, "custom"


@pytest.mark.parametrize("make", [torchvisions, small_stem, timms, timms_folder])
def test_weights_from_elsewhere_are_measured(make, images, tmp_path, capsys):
    name, file, first, seen = make(tmp_path)
    source = open_source(
        str(tmp_path / file), name, compose, str(images / "train"), str(images / "val")
    )
    assert any(torch.equal(each, first) for each in source.backbone.state_dict().values())
    assert source.seen == seen
    to = tmp_path / "out"
    line = [tmp_path / file, *(["--backbone", name] if name else []), "--to", to]
    line += ["--train", images / "train", "--val", images / "val", "augmentations.0.crop_size=32"]
    out, found = printed_and_written(line, to / "evaluation.json", capsys)
    assert found["linear"] > 90 and found["knn"] > 60
    assert found["images"] == {"train": 80, "validation": 20}
    assert found["lidar"] is None and "no training augmentations" in found["notes"]["lidar"]
    assert "| LiDAR " in out and "no training augmentations" in out


@pytest.mark.parametrize(
    ("factor", "reason"), [(0.0, "embeddings are constant"), (1e36, "embeddings are not finite (")]
)
def test_embeddings_that_cannot_be_measured_are_said_in_the_table(factor, reason, tmp_path, capsys):
    folder = tmp_path / "run"
    write_backbone_run(folder, "test_resnet", size=24)
    (file,) = (folder / "checkpoints").glob("*.ckpt")
    content = torch.load(file, weights_only=True)
    for key, value in content["state_dict"].items():
        if key.endswith(("bn3.weight", "bn2.weight", "conv3.weight")):
            value.mul_(factor)
    if not factor:
        for value in content["state_dict"].values():
            value.zero_()
    torch.save(content, file)
    out, found = printed_and_written([folder], folder / "evaluation.json", capsys)
    assert [found[name] for name in MEASURES] == [None] * 5
    for name in MEASURES:
        assert found["notes"][name].startswith(reason)
    assert out.count(reason) == 5 and "nan" not in out


REFUSED = {
    "no backbone": (["FILE"], "not a run's checkpoint: say whose weights they are, as in --backb"),
    "no images": (["FILE", "--backbone", "test_resnet"], "--train, --val: give the images to fit"),
    "no images for a download": (["timm:resnet18"], "--train, --val: give the images to fit"),
    "one part": (["FILE", "--backbone", "test_resnet", "--train", "IMAGES"], "--val: give both"),
    "another backbone": (
        ["FILE", "--backbone", "resnet18", "--train", "digits"],
        "does not fit resnet18: it lacks conv1.weight, ",
    ),
    "no such backbone": (["FILE", "--backbone", "resnt18"], "did you mean 'resnet18'?"),
    "no such source": (["nowhere"], "SOURCE: nowhere: no such file or folder"),
    "no such model": (["timm:resnt18", "--train", "digits"], "timm: unknown name 'resnt18': did"),
    "fine-tuning weights": (
        ["FILE", "--backbone", "test_resnet", "--train", "IMAGES", "--val", "IMAGES", "--finetune"],
        "--finetune trains on the run's own images: leave --train out",
    ),
    "a bad value": (
        ["FILE", "--backbone", "test_resnet", "--train", "digits", "optimizer.batch_size=0"],
        "optimizer.batch_size: expected a whole number of 1 or more, got 0",
    ),
    "code": (["CODE", "--backbone", "test_resnet", "--train", "digits"], "reading that may run"),
    "no folder of a model": (["IMAGES", "--train", "digits"], "config.json: no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_in_one_line(case, images, tmp_path, capsys):
    import argparse

    arguments, message = REFUSED[case]
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state, tmp_path / "file.pth")
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "code.pth")
    names = {"FILE": tmp_path / "file.pth", "CODE": tmp_path / "code.pth", "IMAGES": images}
    before = sorted(tmp_path.iterdir())
    assert main(["evaluate", *(str(names.get(each, each)) for each in arguments)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_needs_its_package(run, tmp_path, capsys, monkeypatch):
    find = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda name: name != "umap" and find(name))
    assert main(["evaluate", str(run[0]), "--umap", str(tmp_path / "u.png")]) == 2
    line = '--umap: umap is not installed: pip install "grap-solo[umap]"'
    assert line in capsys.readouterr().err


def test_fine_tuning_trains_once_and_is_reported(tmp_path, capsys):
    folder = tmp_path / "run"
    write_backbone_run(folder, "test_resnet", size=24)
    line = [folder, "--knn", "--finetune", "max_epochs=1", "scheduler.warmup_epochs=0", *QUIET]
    file = folder / "evaluation.json"
    out, found = printed_and_written(line, file, capsys)
    trained = json.loads((tmp_path / "run_finetuned" / "trained.json").read_text())
    assert found["finetune"] == trained["online"] and "| fine-tuned " in out
    assert found["notes"]["finetune"].startswith("1 epoch, in ")
    again, found = printed_and_written(line, file, capsys)
    assert found["finetune"] == trained["online"] and "trained before" in again
