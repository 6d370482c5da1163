"""Datasets, formats and augmentations from solo-learn's keys, on small real files."""

import io
import os
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
    load_both,
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


def write_parquet(path, labels, kind=None, spoiled=()):
    encoded = []
    for seed in range(len(labels)):
        buffer = io.BytesIO()
        picture(seed).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": f"{seed}.png"})
    for row in spoiled:
        encoded[row]["bytes"] = spoiled[row]
    labels = pa.array(labels, kind or pa.int64())
    pq.write_table(pa.table({"img": encoded, "label": labels}), path)


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
    with pytest.raises(ConfigError, match="its column 'img' is no column of images"):
        load_images(data("cifar10", format="parquet", train_path=str(tmp_path)), train=True)
    pq.write_table(pa.table({"image": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="its column 'image' is no column of images.*type int64"):
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


# ---- classes by name -----------------------------------------------------------------------------


def class_folders(root, names, count=3, save=lambda seed, path: picture(seed).save(path)):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            save(10 * label + index, root / name / f"{index}.png")
    return str(root)


def test_validation_classes_are_trainings_by_name(tmp_path):
    train = class_folders(tmp_path / "train", ["a", "b", "c"])
    val = class_folders(tmp_path / "val", ["b", "c"])
    both = load_both(data("custom", train_path=train, val_path=val))
    assert both[1].targets.tolist() == [1, 1, 1, 2, 2, 2] and both[1][3][1] == 2
    assert [each.classes for each in both] == [3, 3]
    assert resolve_num_classes(data("custom"), *both) == 3
    class_folders(tmp_path / "val" / "..", ["val/d"])
    with pytest.raises(ConfigError, match=r"data.val_path: its class 'd' is not one of training's"):
        load_both(data("custom", train_path=train, val_path=val))


def test_parquets_texts_are_classes_by_name_and_match(tmp_path):
    for part, labels in (("train", ["fox", "cat", None, "dog"]), ("val", ["fox", "dog"])):
        write_parquet(tmp_path / f"{part}.parquet", labels, pa.string())
    block = data("custom", format="parquet", train_path=str(tmp_path), val_path=str(tmp_path))
    train, validation = load_both(block)
    assert train.class_names == ["cat", "dog", "fox"] and train.targets.tolist() == [2, 0, -1, 1]
    assert validation.targets.tolist() == [2, 1] and train[2][1] == -1
    write_parquet(tmp_path / "val.parquet", [0, 1])
    with pytest.raises(ConfigError, match="data.val_path: its classes are numbers, those of train"):
        load_both(block)
    both = pa.array(["cat", "fox"]).dictionary_encode()
    write_parquet(tmp_path / "val.parquet", both, both.type)
    assert load_both(block)[1].targets.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([None, 0, 2], pa.int64(), [-1, 0, 2]),
        ([None, 1.0, float("nan")], pa.float64(), [-1, 1, -1]),
        ([True, False, None], pa.bool_(), [1, 0, -1]),
        ([-1, 3, 4], pa.int8(), [-1, 3, 4]),
        ([None, None, None], pa.null(), [-1, -1, -1]),
        ([0, 0.5, 1], pa.float64(), "row 1 .*its label is 0.5: give whole numbers"),
        ([0, 1, 10**12], pa.int64(), "row 2 .*its label is 1000000000000: give whole numbers"),
        ([0, 2**64 - 1, 1], pa.uint64(), "row 1 .*its label is 18446744073709551615"),
        ([0, -2, 1], pa.int32(), "row 1 .*its label is -2: give"),
        ([0, float("inf"), 1], pa.float32(), "row 1 .*its label is inf: give"),
        ([b"a", b"b", b"c"], pa.binary(), "its labels are of type binary: give whole numbers or"),
    ],
)
def test_parquets_labels_are_classes_or_refused_by_their_row(labels, kind, expected, tmp_path):
    file = tmp_path / "train.parquet"
    write_parquet(file, labels, kind)
    block = data("custom", format="parquet", train_path=str(file))
    if isinstance(expected, list):
        assert load_images(block, train=True).targets.tolist() == expected
    else:
        with pytest.raises(ConfigError, match=f"{file}.*{expected}"):
            load_images(block, train=True)


# ---- which files are images, and how they are read -----------------------------------------------


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    path = class_folders(tmp_path / "train", ["a", "b", ".ipynb_checkpoints", "a/.thumbnails"])
    picture(0).save(tmp_path / "train" / "b" / "._0.png")
    picture(0).save(tmp_path / "train" / ".cover.png")
    images = load_images(data("custom", train_path=path), train=True)
    assert images.class_names == ["a", "b"] and len(images) == 6
    images = load_images(data("custom", train_path=path, no_labels=True), train=True)
    assert len(images) == 6


def test_images_beside_class_folders_are_all_used_or_refused(tmp_path):
    path = class_folders(tmp_path / "train", ["a", "b"])
    picture(0).save(tmp_path / "train" / "loose.png")
    with pytest.raises(ConfigError, match=r"loose.png: lies beside the class folders of .*train"):
        load_images(data("custom", train_path=path), train=True)
    images = load_images(data("custom", train_path=path, no_labels=True), train=True)
    assert len(images) == 7 and set(images.targets) == {-1}


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        (np.arange(64).reshape(8, 8) * 1040, "uint16.png"),
        (np.arange(64).reshape(8, 8) * 1040, "uint16.tif"),
        (np.arange(64).reshape(8, 8) * 1040, "int32.tif"),
        (np.arange(64).reshape(8, 8) * 34_087_042, "int32.tif"),
        (np.arange(64).reshape(8, 8) * 4, "int32.tif"),
        (np.arange(64).reshape(8, 8) / 63, "float32.tif"),
        (np.arange(64).reshape(8, 8) * 4, "float32.tif"),
        (np.arange(64).reshape(8, 8) * 1040, "float32.tif"),
    ],
)
def test_deep_gray_images_are_scaled_to_8_bit(pixels, name, tmp_path):
    kind, _, suffix = name.partition(".")
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels.astype(kind)).save(tmp_path / "a" / f"0.{suffix}")
    write_parquet(tmp_path / "train.parquet", [0])
    images = load_images(data("custom", train_path=str(tmp_path)), train=True)
    gray = np.asarray(images[0][0])
    assert gray.shape == (8, 8, 3) and gray.dtype == np.uint8
    expected = np.arange(64).reshape(8, 8) * 4.0
    assert np.abs(gray - expected[:, :, None]).max() < 4


def test_a_float_image_without_numbers_is_read(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "0.tif")
    images = load_images(data("custom", train_path=str(tmp_path), no_labels=True), train=True)
    assert np.asarray(images[0][0]).max() == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("spoil", ["truncated", "text", "empty", "dangling", "pipe"])
def test_an_image_that_cannot_be_read_is_named(spoil, batched, workers, tmp_path):
    path = class_folders(tmp_path / "train", ["a", "b"])
    file = tmp_path / "train" / "b" / "1.png"
    if spoil == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif spoil == "dangling":
        file.unlink()
        file.symlink_to("nowhere.png")
    else:
        content = {"truncated": file.read_bytes()[:100], "text": b"<html>404", "empty": b""}
        file.write_bytes(content[spoil])
    block = data("custom", train_path=path, num_workers=workers, batched=batched)
    for make in (lambda c, i: pretrain_loader(c, i, 2), evaluation_loader):
        cfg = config(block, batch_size=2)
        with pytest.raises(ConfigError, match=f"^{file}: cannot be read as an image") as found:
            list(make(cfg, load_images(cfg.data, train=True)))
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("content", ["text", [1, 2], None])
def test_parquet_images_that_are_no_bytes_are_refused(content, tmp_path):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"img": [{"bytes": content}] * 4, "label": [0, 1, 0, 1]}), file)
    block = data("custom", format="parquet", train_path=str(file))
    with pytest.raises(ConfigError, match=f"^{file}: its column 'img' is no.*'bytes' are of type"):
        load_images(block, train=True)


def test_parquet_columns_of_view_types_are_read(tmp_path):
    file = tmp_path / "train.parquet"
    write_parquet(file, ["b", "a"], pa.string_view())
    table = pq.read_table(file)
    kind = pa.struct([("bytes", pa.binary_view()), ("path", pa.string())])
    views = pa.array(table["img"].to_pylist(), kind)
    pq.write_table(table.set_column(0, "img", views), file)
    images = load_images(data("custom", format="parquet", train_path=str(file)), train=True)
    assert [images[0][1], images[1][1]] == [1, 0] and images.stored_size(0)


@pytest.mark.parametrize("content", [None, b"", b"nope"])
def test_a_parquet_row_that_cannot_be_read_is_named(content, tmp_path):
    file = tmp_path / "train.parquet"
    write_parquet(file, [0, 1, 0, 1], spoiled={2: content})
    block = data("custom", format="parquet", train_path=str(file), num_workers=1)
    cfg = config(block, batch_size=2)
    with pytest.raises(ConfigError, match=rf"^{file}, row 2 \(the first is 0\): cannot be read"):
        list(evaluation_loader(cfg, load_images(cfg.data, train=True)))
