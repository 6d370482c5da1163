"""solo-learn's own scripts and files with the plugin, and what happens with an old solo-learn."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grap_solo.data.datasets import Digits
from grap_solo.records.weights import read_weights


def solo_learn_root() -> Path:
    import solo

    return Path(solo.__file__).parents[1]


def run(arguments, cwd, path=()):
    pythonpath = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": pythonpath},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of digits by class: what solo-learn calls a custom dataset."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        digits = Digits(part == "train")
        for index in range(48):
            image, label = digits[index]
            (root / part / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(root / part / str(label) / f"{index}.png")
    return root


# What solo-learn's file needs to train on a CPU in seconds, on a folder of 48 small images.
SMALL = [
    "accelerator=cpu",
    "devices='1'",  # solo-learn takes len(devices), Lightning a number or its text.
    "strategy=auto",
    "sync_batchnorm=False",
    "precision=32-true",
    "max_epochs=2",
    "wandb.enabled=False",
    "optimizer.batch_size=16",
    "data.dataset=custom",
    "data.num_workers=0",
    "augmentations.0.crop_size=32",
    "augmentations.1.crop_size=32",
    "method_kwargs.queue_size=64",
    "method_kwargs.proj_hidden_dim=64",
    "method_kwargs.pred_hidden_dim=64",
    "method_kwargs.proj_output_dim=32",
]


@pytest.mark.solo_learn
def test_main_pretrain_trains_grap_and_main_linear_loads_it(images, tmp_path):
    root = solo_learn_root()
    data = [f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}"]
    config = ["--config-path", root / "scripts/pretrain/cifar", "--config-name", "all4one.yaml"]
    block = ["method=grap_all4one", "++weighting={name: grap, lr_per_run: 1}", "name=plugin"]
    script = root / "main_pretrain.py"
    run(
        ["-m", "grap_solo.cli", "run", script, *config, *SMALL, *data, *block],
        tmp_path,
        path=[root],
    )
    # The weights are recorded beside solo-learn's own checkpoint.
    (checkpoint,) = (tmp_path / "trained_models" / "grap_all4one").rglob("*.ckpt")
    terms, steps, weights = read_weights(checkpoint.parent / "weights.csv")
    assert terms == ["nnclr", "attn_nnclr", "byol", "barlow"] and len(steps) == 6
    assert (checkpoint.parent / "median_weights.yaml").exists()
    assert (checkpoint.parent / "args.json").exists()
    assert (weights > 0).all() and (weights[0] != weights[-1]).all()

    # main_linear.py loads with strict=False: that every key fits is asserted here.
    from solo.backbones import resnet18

    backbone = resnet18("byol")
    backbone.fc = torch.nn.Identity()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    prefix = "backbone."
    backbone.load_state_dict(
        {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    )

    linear = ["--config-path", root / "scripts/linear/imagenet-100", "--config-name", "byol.yaml"]
    output = run(
        [
            root / "main_linear.py",
            *linear,
            f"pretrained_feature_extractor='{checkpoint}'",
            "max_epochs=1",
            "accelerator=cpu",
            "devices='1'",
            "strategy=auto",
            "++sync_batchnorm=False",
            "precision=32-true",
            "wandb.enabled=False",
            "checkpoint.enabled=False",
            "optimizer.batch_size=16",
            "data.dataset=custom",
            "data.format=image_folder",
            "auto_resume.enabled=False",
            "data.num_workers=0",
            "+limit_train_batches=1",
            "+limit_val_batches=1",
            *data,
        ],
        tmp_path,
        path=[root],
    )
    assert "Epoch 0" in output


@pytest.mark.solo_learn
@pytest.mark.parametrize(
    ("file", "method", "terms"),
    [
        ("vicreg", "grap_vicreg", ["invariance", "variance", "covariance"]),
        ("vibcreg", "grap_vibcreg", ["invariance", "variance", "covariance"]),
        ("barlow", "grap_barlow_twins", ["on_diagonal", "off_diagonal"]),
        ("vicreg", "lejepa:LeJEPA", ["invariance", "sigreg"]),
    ],
)
def test_main_pretrain_trains_every_method(file, method, terms, images, tmp_path):
    root, crops = solo_learn_root(), 2 if file == "barlow" else 1
    small = [each for each in SMALL if "queue" not in each and "pred_" not in each]
    small = [each for each in small if not each.startswith("augmentations.1") or crops == 2]
    run(
        ["-m", "grap_solo.cli", "run", root / "main_pretrain.py",
         "--config-path", root / "scripts/pretrain/cifar", "--config-name", f"{file}.yaml",
         *small, f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}",
         f"method={method}", "++weighting={name: grap}", "name=plugin", "max_epochs=1"],
        tmp_path,
        path=[root, Path(__file__).parent],
    )  # fmt: skip
    (checkpoint,) = (tmp_path / "trained_models" / method).rglob("*.ckpt")
    found, steps, weights = read_weights(checkpoint.parent / "weights.csv")
    assert found == terms and len(steps) == 3 and weights[-1].min() != weights[-1].max()


@pytest.mark.solo_learn
def test_solo_learns_own_file_runs_with_our_command(images, tmp_path):
    """Its wandb is on and cannot be reached here; its strategy, precision and devices are GPU's."""
    config = solo_learn_root() / "scripts/pretrain/cifar"
    small = [each for each in SMALL if "=" in each and each.split("=")[0] not in UNTOUCHED]
    run(
        [
            *["-m", "grap_solo.cli", "pretrain"],
            *["--config-path", config, "--config-name", "all4one.yaml", *small],
            *[f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}"],
        ],
        tmp_path,
        path=[solo_learn_root()],
    )
    directory = tmp_path / "trained_models" / "All4One-cifar100"
    _, _, weights = read_weights(directory / "weights.csv")
    assert weights[-1].tolist() == [0.5, 0.5, 2.5, 2.5]
    rows = list(csv.DictReader((directory / "metrics.csv").open()))
    assert any(row.get("val_acc1") for row in rows)


UNTOUCHED = ("devices", "strategy", "sync_batchnorm", "precision", "wandb.enabled")


@pytest.mark.solo_learn
def test_the_plugin_is_a_method_of_solo_learns_and_a_subclass_of_its_all4one():
    from solo.methods import METHODS
    from solo.methods.all4one import All4One

    import grap_solo.methods

    assert METHODS["grap_all4one"] is grap_solo.methods.GrapAll4One
    assert issubclass(grap_solo.methods.GrapAll4One, All4One)


@pytest.mark.solo_learn
def test_online_knn_works_on_solo_learns_base(monkeypatch):
    from helpers import all4one_config, image_batch, method_over

    method = method_over("solo_learn", monkeypatch)
    model = method(all4one_config(knn_eval={"enabled": True, "k": 3}))
    monkeypatch.setattr(type(model), "log_dict", lambda *args, **kwargs: None)
    model.training_step(image_batch(seed=0), 0)
    assert len(torch.cat(model.knn.train_features)) == 16


def test_an_old_solo_learn_counts_as_absent_and_says_so(tmp_path):
    """The registry's release has methods, but no All4One among them."""
    (tmp_path / "solo" / "methods").mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").write_text("__version__ = '1.0.2'\n")
    (tmp_path / "solo" / "methods" / "__init__.py").write_text("METHODS = {}\n")
    code = "import grap_solo.solo as base; print(base.BASE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == "grap_solo"
    assert "has no usable BaseMethod" in done.stderr
