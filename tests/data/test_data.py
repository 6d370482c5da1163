"""Datasets, formats and augmentations from solo-learn's keys, on small real files."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from grap_solo import ConfigError
from grap_solo.data import (
    evaluation_loader,
    load_images,
    pretrain_loader,
    resolve_num_classes,
)
from grap_solo.data.augmentations import GaussianBlur, build_pipeline, build_views
from grap_solo.data.datasets import Digits

PLAIN = {
    "rrc": {"enabled": False, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
    "color_jitter": {"prob": 0.0},
    "grayscale": {"prob": 0.0},
    "gaussian_blur": {"prob": 0.0},
    "solarization": {"prob": 0.0},
    "equalization": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.0},
    "crop_size": 8,
    "num_crops": 1,
}


def data(dataset, **keys):
    defaults = {
        "dataset": dataset,
        "format": "image_folder",
        "train_path": None,
        "val_path": None,
        "no_labels": False,
        "fraction": -1,
        "download": False,
        "num_workers": 0,
    }
    return OmegaConf.create({**defaults, **keys})


def config(block, batch_size=4, **changes):
    pipelines = [{**PLAIN, **changes, "num_crops": 2}]
    return OmegaConf.create(
        {
            "seed": 0,
            "data": block,
            "augmentations": pipelines,
            "optimizer": {"batch_size": batch_size},
            "devices": 1,
            "num_nodes": 1,
        }
    )


def picture(seed, size=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for label in range(3):
        (tmp_path / f"class{label}").mkdir()
        for index in range(4):
            picture(10 * label + index).save(tmp_path / f"class{label}" / f"{index}.png")
    return tmp_path


def write_parquet(path, labels):
    encoded = []
    for seed in range(len(labels)):
        buffer = io.BytesIO()
        picture(seed).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": f"{seed}.png"})
    pq.write_table(pa.table({"img": encoded, "label": pa.array(labels, pa.int64())}), path)


def test_digits_are_stratified_and_apart():
    train, validation = Digits(True), Digits(False)
    assert (len(train), len(validation)) == (1257, 540)
    share = np.bincount(train.targets) / (
        np.bincount(train.targets) + np.bincount(validation.targets)
    )
    assert np.allclose(share, 0.7, atol=0.005)
    image, label = train[0]
    assert image.size == (32, 32) and image.mode == "RGB" and label in range(10)
    # No image stands in both parts: pixel-equal duplicates are not in the source.
    seen = {each.tobytes() for each in train.images}
    assert len(seen & {each.tobytes() for each in validation.images}) == 0


def test_loaders_give_solo_learns_batches():
    cfg = config(data("digits"), batch_size=100)
    images = load_images(cfg.data, train=True)
    batches = list(pretrain_loader(cfg, images, 100))
    assert len(batches) == 12  # The last 57 images make no batch.
    indexes, views, labels = batches[0]
    assert [view.shape for view in views] == [(100, 3, 8, 8)] * 2
    assert labels.tolist() == images.targets[indexes.numpy()].tolist()
    assert len({index for batch in batches for index in batch[0].tolist()}) == 1200
    evaluated = list(evaluation_loader(cfg, images))
    assert sum(len(y) for _, y in evaluated) == 1257
    assert torch.cat([y for _, y in evaluated]).tolist() == images.targets.tolist()


def test_parquet_is_decoded_bit_for_bit(tmp_path):
    labels = [3, 1, 4, 1, 5]
    write_parquet(tmp_path / "train.parquet", labels)
    for path in (tmp_path, tmp_path / "train.parquet"):
        images = load_images(data("cifar10", format="parquet", train_path=str(path)), train=True)
        assert images.targets.tolist() == labels
        for seed in range(5):
            assert images[seed][0].tobytes() == picture(seed).tobytes()
            assert images[seed][1] == labels[seed]


def test_image_folder_and_unlabelled_folder(folder):
    labelled = load_images(data("custom", train_path=str(folder)), train=True)
    assert len(labelled) == 12 and labelled.classes == 3
    assert labelled[5][1] == 1
    flat = str(folder / "class1")
    plain = load_images(data("custom", train_path=flat, no_labels=True), train=True)
    assert len(plain) == 4 and set(plain.targets) == {-1}
    assert plain[2][0].tobytes() == picture(12).tobytes()
    # Labels that are there are not looked at either.
    for block in (data("custom", train_path=str(folder), no_labels=True),
                  data("digits", no_labels=True)):  # fmt: skip
        hidden = load_images(block, train=True)
        assert set(hidden.targets) == {-1} and hidden[5][1] == -1


def test_torchvisions_own_cifar_files(tmp_path, monkeypatch):
    import torchvision

    # The files of the real dataset, with few images: names as torchvision reads them.
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    rows = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name in names:
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [7, 8, 9]}))
    classes = [f"class{k}" for k in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    train = load_images(data("cifar10", train_path=str(tmp_path)), train=True)
    assert len(train) == 15 and train.classes == 10 and train[1][1] == 8
    expected = rows[1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(train[1][0]), expected)


def test_fraction_is_stratified_and_repeatable():
    some = load_images(data("digits", fraction=0.1), train=True)
    again = load_images(data("digits", fraction=0.1), train=True)
    assert len(some) == 125 and np.array_equal(some.kept, again.kept)
    assert np.bincount(some.targets).min() >= 11


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            data("custom", train_path="nowhere"),
            "data.train_path: no such folder nowhere",
        ),
        (data("imagenet100", train_path="nowhere"), "data.train_path: no such folder"),
        (
            data("cifar10", format="parquet", train_path="no.parquet"),
            "no such file no.parquet",
        ),
        (
            data("cifar100", train_path="nowhere"),
            "no CIFAR100 in nowhere: put its 'cifar-100",
        ),
        (data("digits", fraction=1.5), "data.fraction: 1.5 of 1257"),
        (data("digits", fraction=0.001), "data.fraction: 0.001 of 1257"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(block, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_images(block, train=True)
    assert "\n" not in str(error.value)


def test_empty_sources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train_path: .*class folder"):
        load_images(data("custom", train_path=str(tmp_path)), train=True)
    with pytest.raises(ConfigError, match="no images in"):
        load_images(data("custom", train_path=str(tmp_path), no_labels=True), train=True)
    write_parquet(tmp_path / "train.parquet", [1])
    table = pq.read_table(tmp_path / "train.parquet").slice(0, 0)
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="no images in"):
        load_images(data("cifar10", format="parquet", train_path=str(tmp_path)), train=True)
    pq.write_table(pa.table({"img": [b"x"], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="columns 'img'"):
        load_images(data("cifar10", format="parquet", train_path=str(tmp_path)), train=True)
    pq.write_table(pa.table({"image": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="columns 'img'"):
        load_images(data("cifar10", format="parquet", train_path=str(tmp_path)), train=True)
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        load_images(data("cifar10", format="parquet", train_path=str(tmp_path)), train=True)


def test_class_counts_that_do_not_fit(folder, tmp_path_factory):
    custom = load_images(data("custom", train_path=str(folder)), train=True)
    assert resolve_num_classes(data("custom"), custom) == 3
    assert resolve_num_classes(data("custom", num_classes=5), custom) == 5
    with pytest.raises(ConfigError, match=r"data\.num_classes: 2 does not fit.*3 classes"):
        resolve_num_classes(data("custom", num_classes=2), custom)
    with pytest.raises(ConfigError, match="100 does not fit"):
        resolve_num_classes(data("imagenet100"), custom)
    with pytest.raises(ConfigError, match="digits has 10 classes, not 9: remove the key"):
        resolve_num_classes(data("digits", num_classes=9), Digits(False))


def test_a_batch_larger_than_the_dataset_is_refused():
    cfg = config(data("digits"), batch_size=1258)
    with pytest.raises(ConfigError, match=r"optimizer\.batch_size: 1258 .* only 1257"):
        pretrain_loader(cfg, load_images(cfg.data, train=True), 1258)


def test_each_key_does_what_it_says():
    image = picture(0, size=16)

    def pipeline(**changes):
        return build_pipeline("digits", OmegaConf.create({**PLAIN, "crop_size": 16, **changes}))

    plain = pipeline()(image)
    mean, std = 0.31, 0.35
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(plain, (raw - mean) / std, atol=1e-5, rtol=1e-5)

    pixels = plain * std + mean
    flipped = pipeline(horizontal_flip={"prob": 1.0})(image)
    torch.testing.assert_close(flipped, plain.flip(-1))
    gray = pipeline(grayscale={"prob": 1.0})(image)
    assert torch.equal(gray[0], gray[1]) and not torch.equal(plain[0], plain[1])
    solarized = pipeline(solarization={"prob": 1.0})(image) * std + mean
    expected = torch.where(pixels * 255 >= 127.5, 1 - pixels, pixels)
    torch.testing.assert_close(solarized, expected, atol=1e-4, rtol=0)
    equalized = pipeline(equalization={"prob": 1.0})(image)
    assert not torch.equal(equalized, plain)
    jitter = {"prob": 1.0, "brightness": 0.8, "contrast": 0, "saturation": 0, "hue": 0}
    brighter = pipeline(color_jitter=jitter)(image) * std + mean
    ratio = brighter.mean() / pixels.mean()
    assert 0.2 <= ratio <= 1.8 and ratio != 1
    blurred = pipeline(gaussian_blur={"prob": 1.0})(image)
    assert blurred.std() < plain.std()
    cropped = pipeline(rrc={"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 0.3})
    assert cropped(image).shape == (3, 16, 16)
    assert not torch.equal(cropped(image), plain)


def test_blur_radius_is_uniform_in_its_range(monkeypatch):
    radii = []
    monkeypatch.setattr("PIL.ImageFilter.GaussianBlur", lambda radius: radii.append(radius))
    monkeypatch.setattr(Image.Image, "filter", lambda self, kernel: self)
    torch.manual_seed(0)
    for _ in range(2000):
        GaussianBlur()(picture(0))
    assert 0.1 <= min(radii) < 0.12 and 1.98 < max(radii) <= 2.0
    assert np.mean(radii) == pytest.approx(1.05, abs=0.05)


def test_views_follow_the_list_and_unknown_keys_are_named():
    two = OmegaConf.create([{**PLAIN, "num_crops": 2}, {**PLAIN, "grayscale": {"prob": 1.0}}])
    assert len(build_views("digits", two)) == 3
    with pytest.raises(ConfigError, match="unknown name 'grayscal': did you mean 'grayscale'"):
        build_pipeline("digits", OmegaConf.create({**PLAIN, "grayscal": {"prob": 1.0}}))
