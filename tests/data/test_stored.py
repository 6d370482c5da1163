"""Images as people have them: partly labelled folders, lists of files, shards, saved datasets."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data import class_folders, config, data, picture, write_parquet

from grap_solo import ConfigError
from grap_solo.data import evaluation_loader, kind_of, load_both, load_images, parquet


def labels_of(block):
    return load_images(block, train=True).targets.tolist()


def same_images(images, seeds):
    assert len(images) == len(seeds)
    for index, seed in enumerate(seeds):
        assert images[index][0].tobytes() == picture(seed).tobytes()
        assert images[index][1] == images.targets[index]


# ---- folders and lists of files ------------------------------------------------------------------


def test_images_in_the_unlabelled_folder_have_no_label_and_no_class(tmp_path):
    path = class_folders(tmp_path, ["a", "b", "_unlabelled"])
    class_folders(tmp_path / "_unlabelled", ["deeper"], 2)
    images = load_images(data("custom", train_path=path), train=True)
    assert images.class_names == ["a", "b"] and images.classes == 2
    assert images.targets.tolist() == [0, 0, 0, 1, 1, 1] + [-1] * 5
    assert images[8][1] == -1 and images.describe(10).endswith("_unlabelled/deeper/1.png")
    (tmp_path / "alone").mkdir()
    (tmp_path / "_unlabelled").rename(tmp_path / "alone" / "_unlabelled")
    assert labels_of(data("custom", train_path=f"{path}/alone")) == [-1] * 5


@pytest.mark.parametrize("below", ["", "b/empty/"])
def test_without_labels_folders_are_read_however_they_nest(below, tmp_path):
    path = class_folders(tmp_path, ["a", "b"])
    (tmp_path / "c" / below).mkdir(parents=True)
    images = load_images(data("custom", train_path=path, no_labels=True), train=True)
    assert len(images) == 6 and set(images.targets) == {-1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,label\na/0.png,cat\na/1.png,\na/2.png,ant\n", [1, -1, 0]),
        ("label,file\n 3, a/0.png\n,a/1.png\n-1,a/2.png\n", [3, -1, -1]),
        ("\ufefffile,label\na/0.png,\n\na/1.png,\n", [-1, -1]),
        ('file,label,more\na/0.png,"cat, dog",x\na/1.png,2,y\n', [1, 0]),
        ("file,label\na/0.png,1\na/nowhere.png,1\n", "no such file .*a/nowhere.png: correct"),
        ("file,label\na/0.png,1,2\n", "the row a/0.png,1,2 has 3 columns, not 2"),
        ("path,label\na/0.png,1\n", "no column 'file' among path, label: set data.image_key to"),
        ("file,class\na/0.png,1\n", "no column 'label' among file, class: set data.label_key to"),
        ("file,label\na/0.png,-2\n", "a/0.png: its label is -2.0: give whole numbers"),
        ("file,label\n", "no images in"),
        ("", "no column 'file' among"),
    ],
)
def test_a_csv_file_lists_images_and_labels(text, expected, tmp_path):
    class_folders(tmp_path, ["a"])
    file = tmp_path / "images.csv"
    file.write_text(text, encoding="utf-8")
    block = data("custom", train_path=str(file))
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected) as error:
            load_images(block, train=True)
        assert "\n" not in str(error.value)
        return
    assert labels_of(block) == expected
    same_images(load_images(block, train=True), range(len(expected)))
    block.no_labels = True
    assert labels_of(block) == [-1] * len(expected)


def test_a_csv_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.train_path: no such file .*x.csv"):
        load_images(data("custom", train_path=f"{tmp_path}/x.csv"), train=True)
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00file")
    with pytest.raises(ConfigError, match="x.csv: not a CSV file that can be read"):
        load_images(data("custom", train_path=f"{tmp_path}/x.csv"), train=True)


def test_csv_columns_may_have_other_names(tmp_path):
    class_folders(tmp_path, ["a"])
    (tmp_path / "x.csv").write_text("path,kind\na/0.png,5\n")
    block = data("custom", train_path=f"{tmp_path}/x.csv", image_key="path", label_key="kind")
    assert labels_of(block) == [5]


# ---- Parquet -------------------------------------------------------------------------------------


def rename(path, image="img", label="label"):
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([image, label]), path)


@pytest.mark.parametrize(
    ("names", "keys", "message"),
    [
        (("image", "label"), {}, None),
        (("pixels", "fine"), {"image_key": "pixels", "label_key": "fine"}, None),
        (("pixels", "label"), {}, "no column 'img' or 'image' among pixels, label: set data.image"),
        (("img", "fine"), {}, "no column 'label' among img, fine: set data.label_key"),
        (("img", "fine"), {"no_labels": True}, None),
        (("img", "fine"), {"label_key": "coarse"}, "no column 'coarse' among img, fine"),
        (("img", "fine"), {"image_key": "fine"}, "its column 'fine' is no column of images"),
    ],
)
def test_parquet_columns_may_have_other_names(names, keys, message, tmp_path):
    file = tmp_path / "train.parquet"
    write_parquet(file, [2, 0])
    rename(file, *names)
    block = data("custom", format="parquet", train_path=str(file), **keys)
    if message is None:
        assert labels_of(block) == ([-1, -1] if "no_labels" in keys else [2, 0])
    else:
        with pytest.raises(ConfigError, match=f"^{file}: {message}"):
            load_images(block, train=True)


def write_shards(folder, name, shards):
    """Writes shards with row groups of two images, whose seeds count on over the shards."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, labels in enumerate(shards):
        file = folder / f"{name}-{number:05}-of-{len(shards):05}.parquet"
        write_parquet(file, [None] * first + labels, pa.string())
        pq.write_table(pq.read_table(file).slice(first), file, row_group_size=2)
        first += len(labels)


SHARDS = [["b", "a", None], ["c"], ["a", "b", "c", "c", "a"]]


def test_shards_are_one_set_of_images_with_their_classes_in_common(tmp_path):
    write_shards(tmp_path, "train", SHARDS)
    write_shards(tmp_path, "validation", [["c", "b"]])
    paths = {"train_path": str(tmp_path), "val_path": str(tmp_path)}
    train, validation = load_both(data("custom", format="parquet", **paths))
    assert train.targets.tolist() == [1, 0, -1, 2, 0, 1, 2, 2, 0]
    assert validation.targets.tolist() == [2, 1]
    same_images(train, range(9))
    assert train.describe(5) == (f"{tmp_path}/train-00002-of-00003.parquet, row 1 (the first is 0)")
    pattern = data("custom", format="parquet", train_path=f"{tmp_path}/train-*-of-*.parquet")
    assert labels_of(pattern) == train.targets.tolist()
    assert kind_of(str(tmp_path)) == ("custom", "parquet")
    for file in tmp_path.glob("validation*"):
        file.unlink()
    with pytest.raises(ConfigError, match="data.val_path: no such file .*: give a Parquet"):
        load_both(data("custom", format="parquet", **paths))


def test_shards_that_label_in_two_ways_are_refused(tmp_path):
    write_parquet(tmp_path / "0.parquet", [1, 2])
    write_parquet(tmp_path / "1.parquet", ["a", "b"], pa.string())
    with pytest.raises(ConfigError, match="labels of its files are of several types .int64, str"):
        load_images(data("custom", format="parquet", train_path=str(tmp_path)), train=True)


def test_parquet_images_stay_on_the_disk_until_they_are_asked_for(tmp_path, monkeypatch):
    size, count = 2**18, 64  # 16 MiB in row groups of 1 MiB.
    noise = np.random.default_rng(0).bytes(size)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 4 * 2**20)
    for shard in range(2):
        images = [{"bytes": bytes([shard, k]) + noise} for k in range(count // 2)]
        table = pa.table({"image": images, "label": [0] * len(images)})
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=4)
    del images, table
    before = pa.total_allocated_bytes()
    loaded = load_images(data("custom", format="parquet", train_path=str(tmp_path)), train=True)
    assert len(loaded) == count and pa.total_allocated_bytes() - before < 2**20
    for index in np.random.default_rng(1).permutation(count).tolist():
        found = loaded._encoded(index).as_py()
        assert found == bytes([index // 32, index % 32]) + noise
        assert pa.total_allocated_bytes() - before < 6 * 2**20
    assert len(loaded._kept) > 1  # It keeps what it may.


@pytest.mark.parametrize("form", ["parquet", "huggingface", "csv"])
def test_worker_processes_read_what_this_process_reads(form, tmp_path):
    if form == "parquet":
        write_shards(tmp_path, "train", SHARDS)
        path = str(tmp_path)
    elif form == "huggingface":
        path = str(save(tmp_path, {"train": range(9)}))
    else:
        class_folders(tmp_path, ["a", "b", "c"])
        rows = [f"{name}/{index}.png,{name}" for name in "abc" for index in range(3)]
        (tmp_path / "x.csv").write_text("\n".join(["file,label", *rows]))
        path = f"{tmp_path}/x.csv"
    form = "image_folder" if form == "csv" else form
    block = data("custom", format=form, train_path=path)
    images = load_images(block, train=True)
    found = []
    for workers in (0, 2):
        cfg = config(block, batch_size=2)
        cfg.data.num_workers = workers
        loader = evaluation_loader(cfg, images)
        found.append([torch.cat(each) for each in zip(*loader, strict=True)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    again = pickle.loads(pickle.dumps(images))  # As a worker that is spawned gets them.
    assert again[8][0].tobytes() == images[8][0].tobytes() and len(pickle.dumps(images)) < 10_000


# ---- Hugging Face's datasets ---------------------------------------------------------------------


def save(folder, splits):
    """Writes what ``save_to_disk`` of ``datasets`` 5.2 writes, as far as it is read: two shards for
    each split, labels that are the images' seeds modulo 3."""
    encoded = folder / "encoded.parquet"
    for split, seeds in splits.items():
        inside = folder / split
        inside.mkdir(parents=True)
        write_parquet(encoded, [seed % 3 for seed in range(max(seeds) + 1)])
        table = pq.read_table(encoded).take(list(seeds)).rename_columns(["image", "label"])
        parts = [table.slice(0, 1), table.slice(1)]
        files = [f"data-{k:05}-of-00002.arrow" for k in range(2)]
        for name, part in zip(files, parts):
            with pa.ipc.new_stream(inside / name, part.schema) as writer:
                writer.write_table(part)
        state = {"_data_files": [{"filename": name} for name in files]}
        (inside / "state.json").write_text(json.dumps(state))
    encoded.unlink()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
    return folder


def test_a_saved_dataset_is_read_with_its_splits(tmp_path):
    path = str(save(tmp_path, {"train": range(5), "test": range(5, 8)}))
    paths = {"train_path": path, "val_path": path}
    train, validation = load_both(data("custom", format="huggingface", **paths))
    assert train.targets.tolist() == [0, 1, 2, 0, 1] and validation.targets.tolist() == [2, 0, 1]
    same_images(train, range(5))
    same_images(validation, range(5, 8))
    one = data("custom", format="huggingface", train_path=f"{path}/test", no_labels=True)
    assert labels_of(one) == [-1] * 3
    for each in (path, f"{path}/test"):
        assert kind_of(each) == ("custom", "huggingface")


def test_saved_datasets_that_cannot_be_read_are_refused(tmp_path):
    path = save(tmp_path, {"test": range(4)})
    block = data("custom", format="huggingface", train_path=str(path))
    with pytest.raises(ConfigError, match="^data.train_path: .* the splits test, and none"):
        load_images(block, train=True)
    block.train_path = f"{path}/test"
    block.image_key = "picture"
    with pytest.raises(ConfigError, match="no column 'picture' among image, label: set data.image"):
        load_images(block, train=True)
    (path / "test" / "data-00000-of-00002.arrow").write_bytes(b"text")
    with pytest.raises(ConfigError, match="^data.train_path: .*cannot be read .*: save it again"):
        load_images(block, train=True)
    block.train_path = "nowhere"
    with pytest.raises(ConfigError, match="nowhere is no saved dataset .*save_to_disk"):
        load_images(block, train=True)


def test_what_the_package_itself_has_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(seed) for seed in range(6)], "label": [0, 1, 2, 0, 1, 2]}
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
    parts.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2})
    block = data("custom", format="huggingface", train_path=str(tmp_path / "saved"))
    same_images(load_images(block, train=True), range(6))
