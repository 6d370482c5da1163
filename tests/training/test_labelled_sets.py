"""Labels from a set of their own, and images without any."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Killed, in_two_processes, killed_at, quiet_digits, same_in_both
from PIL import Image
from test_resume import assert_equal, left

from grap_solo import ConfigError
from grap_solo.compose import compose
from grap_solo.data import load_run
from grap_solo.experiments.evaluate import evaluate_source
from grap_solo.experiments.retrain import finetune
from grap_solo.methods.composite import CompositeMethod
from grap_solo.training.config import prepare
from grap_solo.training.run import pretrain


def draw(path, count, seed):
    """Writes images of 16x16, whose brightness tells their number."""
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index:03}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """``plain``: 48 images below two folders. ``labelled``: two classes of 12, and 4 images of
    neither. ``val``: 4 of one class."""
    root = tmp_path_factory.mktemp("images")
    draw(root / "plain" / "deep" / "deeper", 32, 0)
    draw(root / "plain", 16, 1)
    for seed, name in enumerate(("cat", "dog", "_unlabelled")):
        draw(root / "labelled" / name, 4 if name.startswith("_") else 12, 10 + seed)
    draw(root / "val" / "dog", 4, 20)
    return root


def configuration(images, directory, *overrides, file="grap_vicreg"):
    size = [f"augmentations.{k}.crop_size=16" for k in range(2)]
    changes = ["data.dataset=custom", f"+data.train_path={images}/plain", "data.fraction=-1",
               f"+labels.path={images}/labelled", "optimizer.batch_size=16", *size]  # fmt: skip
    return quiet_digits(directory, *changes, *overrides, file=file)


def load(images, *overrides):
    cfg = prepare(configuration(images, "runs", *overrides))
    return load_run(cfg.data, cfg.labels)


def test_labels_come_from_a_set_of_their_own_and_classes_match_by_name(images):
    train, validation, labelled = load(images, f"+labels.val_path={images}/val")
    assert len(train) == 48 and set(train.targets) == {-1}
    assert sorted(np.bincount(labelled.targets + 1)) == [4, 12, 12]
    assert validation.targets.tolist() == [1] * 4  # The labelled set's number for "dog".
    _, validation, _ = load(images, f"+data.val_path={images}/val")
    assert validation.targets.tolist() == [1] * 4
    _, validation, _ = load(images, f"+data.val_path={images}/val", "+data.no_labels=true")
    assert validation is None


def test_the_labelled_set_steers_the_weights_and_is_never_pretrained_on(
    images, tmp_path, monkeypatch
):
    seen = {"train": [], "labelled": []}
    original = CompositeMethod.training_step

    def watched(self, batch, batch_idx):
        for name, (indexes, _, labels) in batch.items():
            seen[name].append((indexes, labels))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CompositeMethod, "training_step", watched)
    val = f"+labels.val_path={images}/val"
    run = pretrain(configuration(images, tmp_path, val, "max_epochs=1"))
    indexes, labels = (torch.cat(each) for each in zip(*seen["train"], strict=True))
    assert len(set(indexes.tolist())) == 48 and set(labels.tolist()) == {-1}
    indexes, labels = (torch.cat(each) for each in zip(*seen["labelled"], strict=True))
    assert set(indexes.tolist()) <= set(range(24)) and set(labels.tolist()) == {0, 1}
    weights = np.loadtxt(run.directory / "weights.csv", delimiter=",", skiprows=1)
    assert np.ptp(weights[:, 2:], axis=0).min() > 0 and run.accuracy is not None
    kept = np.loadtxt(run.directory / "labels.csv", skiprows=1)
    assert len(kept) == 24  # Of 28: the others have no label.

    def plain(file):
        return compose(file)

    found = evaluate_source(str(run.directory), plain, ["linear", "knn"])
    assert found["images"] == {"train": 28, "validation": 4} and found["knn"] is not None
    monkeypatch.undo()
    tuned = finetune(run.directory, plain)
    assert tuned.cfg.data.train_path == f"{images}/labelled" and tuned.cfg.labels.path is None
    assert tuned.accuracy is not None


@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_validation_end"])
def test_a_run_with_a_labelled_set_resumes_to_the_bit(moment, images, tmp_path):
    changes = [f"+labels.val_path={images}/val", "+labels.fraction=0.7", "data.num_workers=1"]
    pretrain(configuration(images, tmp_path / "whole", *changes))
    with pytest.raises(Killed):
        pretrain(configuration(images, tmp_path / "parts", *changes), [killed_at(moment, 1)])
    pretrain(configuration(images, tmp_path / "parts", *changes))
    assert_equal(left(tmp_path / "parts"), left(tmp_path / "whole"))


def train_and_list(images, directory, *changes):
    """Trains, and writes the images of each step and their labels into ``directory/DEVICES.json``,
    with those of both processes together."""
    steps = {"train": [], "labelled": []}
    step = CompositeMethod.training_step

    def watched(self, batch, batch_idx):
        for name, (indexes, _, labels) in batch.items():
            pairs = torch.stack([indexes, labels])
            if self.trainer.world_size > 1:
                both = [torch.empty_like(pairs) for _ in range(2)]
                torch.distributed.all_gather(both, pairs)
                pairs = torch.cat(both, dim=1)
            steps[name].append(sorted(pairs.T.tolist()))
        return step(self, batch, batch_idx)

    CompositeMethod.training_step = watched  # In a process of two, which ends after this.
    try:
        run = pretrain(configuration(images, directory, *changes))
    finally:
        CompositeMethod.training_step = step
    state = list(run.model.weighting.state_dict().values())
    count = run.cfg.devices if isinstance(run.cfg.devices, int) else len(run.cfg.devices)
    same = count == 1 or same_in_both(state)
    Path(directory, f"{count}.json").write_text(json.dumps({"steps": steps, "same": same}))


def test_two_processes_see_the_images_and_labels_of_one(images, tmp_path):
    changes = [f"+labels.val_path={images}/val", "+labels.fraction=0.7", "max_epochs=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    train_and_list(str(images), str(one), *changes)
    both = ["devices=2", "+strategy=ddp", "optimizer.batch_size=8"]
    in_two_processes(train_and_list, str(images), str(two), *changes, *both)
    alone, together = (json.loads(next(each.glob("?.json")).read_text()) for each in (one, two))
    assert together["same"] and len(alone["steps"]["labelled"]) == 6
    assert together["steps"] == alone["steps"]


def test_a_run_resumes_with_the_same_labelled_set_alone(images, tmp_path):
    with pytest.raises(Killed):
        pretrain(configuration(images, tmp_path), [killed_at("on_train_batch_end", 1)])
    draw(tmp_path / "others" / "cat", 12, 30)
    draw(tmp_path / "others" / "dog", 12, 31)
    others = f"labels.path={tmp_path}/others"
    with pytest.raises(ConfigError, match="^labels.path: the run in .*28 images before, 24 now"):
        pretrain(configuration(images, tmp_path, others))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["+labels.split=held_out"], "labels.path: .*held out already: leave out labels.split"),
        (
            ["weighting.name=supervised"],
            "labels.path: 'supervised' trains the backbone with the labels, .*data.train_path",
        ),
        (["weighting.name=auxiliary"], "labels.path: 'auxiliary' trains the backbone"),
        (["labels.path=nowhere"], "labels.path: no such folder nowhere"),
        (["+labels.val_path=nowhere"], "labels.val_path: no such folder nowhere"),
        (["labels.path={images}/plain"], "{images}/plain/0.*lies beside the class folders"),
        (["labels.path={images}/val", "+labels.val_path={images}/labelled"],
         "labels.val_path: its class 'cat' is not one of training's"),
        (["labels.path={images}/none"], "labels.path: no image of .*none has a label"),
        (["+labels.val_path={images}/none"], "labels.val_path: no validation image has a label"),
        (["labels.path=null", "data.train_path={images}/none"],
         "data.train_path: no training image has a label, but 'grap' learns from labels: give"),
        (["labels.path=null", "+data.no_labels=true"],
         "data.no_labels: no image has a label, but 'grap' .* labelled images as labels.path"),
        (["labels.path=null", "+data.no_labels=true", "+labels.val_path={images}/val",
          "weighting.name=fixed"], "labels.val_path: data.no_labels leaves the probe no label"),
        (["+labels.fraction=0.01"], "labels.fraction: 0.01 of 24 labelled images"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_used_are_refused_before_training(changes, message, images, tmp_path):
    if not (images / "none").exists():
        draw(images / "none" / "_unlabelled", 16, 40)
    changes = [each.format(images=images) for each in changes]
    named = [each for each in changes if each.startswith("weighting.name")]
    rest = [each for each in changes if each not in named]
    rule = ["~weighting", f"+weighting={{name: {named[0].partition('=')[2]}}}"] if named else []
    cfg = configuration(images, tmp_path, *rule, *rest)
    with pytest.raises(ConfigError, match=message.format(images=images)) as error:
        pretrain(cfg)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
