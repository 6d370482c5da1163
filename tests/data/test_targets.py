"""Targets of downstream heads, from every kind of file that has columns."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from test_data import picture, write_parquet

from grap_solo import ConfigError
from grap_solo.data import fill_in_classes, fill_in_scales, load_run, split_labels
from grap_solo.data.fingerprint import fingerprint
from grap_solo.data.images import Part, drop_labels

COUNT = 8
COLUMNS = {
    "label": [0, 1, 2, None, 0, 1, 2, 0],
    "kind": ["cat", "dog", None, "ant", "cat", "dog", "ant", "cat"],
    "size": [1.5, None, 2.5, 3.0, float("nan"), -4.0, 5.0, 6.0],
    "red": [0, 1, 1, 0, None, 1, 0, 1],
    "round": [1, 0, None, 0, None, 1, 1, 0],
}
HEADS = {
    "label": {"task": "classification"},
    "kind": {"task": "classification", "column": "kind"},
    "size": {"task": "regression", "column": "size"},
    "tags": {"task": "multi_label", "columns": ["red", "round"]},
}


def write_csv(folder, columns):
    for seed in range(COUNT):
        picture(seed).save(folder / f"{seed}.png")
    names = [*columns]
    rows = [[f"{k}.png", *("" if columns[n][k] is None else str(columns[n][k]) for n in names)]
            for k in range(COUNT)]  # fmt: skip
    lines = [",".join(row) for row in [["file", *names], *rows]]
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return {"train_path": f"{folder}/images.csv"}


def write_table(folder, columns, file="images.parquet"):
    write_parquet(folder / file, [0] * COUNT)
    table = pq.read_table(folder / file).drop(["label"])
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, from_pandas=False))
    pq.write_table(table, folder / file)
    return {"train_path": f"{folder}/{file}", "format": "parquet"}


def write_saved(folder, columns):
    write_table(folder, columns, "whole.parquet")
    table = pq.read_table(folder / "whole.parquet")
    saved = folder / "saved"
    saved.mkdir()
    with (
        pa.OSFile(str(saved / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return {"train_path": str(saved), "format": "huggingface"}


WRITERS = {"csv": write_csv, "parquet": write_table, "saved": write_saved}


def configuration(heads, labels=None, **data):
    block = {"dataset": "custom", "format": "image_folder", "val_path": None, "no_labels": False,
             "fraction": -1, **data}  # fmt: skip
    return OmegaConf.create({"data": block, "labels": labels or {}, "downstream": heads})


def load(heads, labels=None, **data):
    cfg = configuration(heads, labels, **data)
    return cfg, load_run(cfg.data, cfg.labels, cfg.downstream)


def same(values, expected):
    wanted = [np.nan if each is None else each for each in expected]
    return np.array_equal(values, np.array(wanted, np.float32), equal_nan=True)


@pytest.mark.parametrize("form", WRITERS)
def test_each_head_gets_its_columns_from_every_kind_of_file(form, tmp_path):
    cfg, (train, validation, labelled) = load(HEADS, **WRITERS[form](tmp_path, COLUMNS))
    assert validation is None and labelled is None and len(train) == COUNT
    values = train.values
    assert values["label"].tolist() == [0, 1, 2, -1, 0, 1, 2, 0]
    assert values["kind"].tolist() == [1, 2, -1, 0, 1, 2, 0, 1]  # Sorted: ant, cat, dog.
    assert same(values["size"], COLUMNS["size"])
    assert same(values["tags"][:, 0], COLUMNS["red"])
    assert same(values["tags"][:, 1], COLUMNS["round"])
    assert values["label"].dtype == np.int64 and values["tags"].dtype == np.float32
    assert (cfg.downstream.label.classes, cfg.downstream.kind.classes) == (3, 3)
    assert train.targets.tolist() == values["label"].tolist()
    image, found = train[7]
    assert image.tobytes() == picture(7).tobytes()
    assert found["kind"] == 1 and found["size"] == 6 and found["tags"].tolist() == [1, 0]


@pytest.mark.parametrize("form", WRITERS)
def test_labels_are_not_needed_where_no_head_learns_them(form, tmp_path):
    columns = {name: each for name, each in COLUMNS.items() if name != "label"}
    heads = {name: HEADS[name] for name in ("size", "kind")}
    cfg, (train, _, _) = load(heads, **WRITERS[form](tmp_path, columns))
    assert train.targets.tolist() == [1, 2, -1, 0, 1, 2, 0, 1] and train.classes == 3
    fill_in_classes(cfg, train)
    assert cfg.data.num_classes == 3  # The first head that classifies.
    (tmp_path / "new").mkdir()
    keys = WRITERS[form](tmp_path / "new", columns)
    with pytest.raises(ConfigError, match="no column 'label'"):
        load(HEADS, **keys)


def test_validation_classes_are_trainings_by_name(tmp_path):
    (tmp_path / "val").mkdir()
    train = write_csv(tmp_path, COLUMNS)
    other = {**COLUMNS, "kind": ["dog"] * COUNT}
    val = write_csv(tmp_path / "val", other)["train_path"]
    _, images = load(HEADS, **train, val_path=val)
    assert images.validation.values["kind"].tolist() == [2] * COUNT
    other["kind"] = ["cow"] * COUNT
    write_csv(tmp_path / "val", other)
    with pytest.raises(ConfigError, match="^downstream.kind.column: its class 'cow' is not one of"):
        load(HEADS, **train, val_path=val)


def test_a_labelled_set_of_its_own_has_the_targets(tmp_path):
    (tmp_path / "plain").mkdir()
    for seed in range(5):
        picture(seed).save(tmp_path / "plain" / f"{seed}.png")
    path = write_csv(tmp_path, COLUMNS)["train_path"]
    _, images = load(HEADS, {"path": path}, train_path=f"{tmp_path}/plain")
    assert not images.train.labelled.any() and len(images.train) == 5
    assert set(images.train.values) == set(HEADS) and images.train.values["tags"].shape == (5, 2)
    assert images.labelled.labelled.all()


def test_images_keep_and_lose_their_targets_with_their_labels(tmp_path):
    cfg, (train, _, _) = load(HEADS, **write_csv(tmp_path, COLUMNS))
    assert train.labelled.all()
    assert Part(train, np.array([1, 3])).values["kind"].tolist() == [2, 0]
    assert not drop_labels(train).labelled.any() and set(drop_labels(train)[0][1]) == set(HEADS)
    sizes = {"size": HEADS["size"]}
    cfg, (train, _, _) = load(sizes, **write_csv(tmp_path, COLUMNS))
    assert train.labelled.tolist() == [
        each is not None and each == each for each in COLUMNS["size"]
    ]
    rest, held_out, kept = split_labels(train, 0.5, True, seed=1)
    assert train.labelled[kept].all() and len(kept) == 3 and held_out.labelled.all()
    assert len(rest) == COUNT - 3 and not rest.labelled.any()
    some, _, kept = split_labels(train, 0.5, False, seed=1)
    assert np.flatnonzero(some.labelled).tolist() == kept.tolist()
    fill_in_scales(cfg.downstream, some)
    known = train.values["size"][kept]
    assert cfg.downstream.size.mean == pytest.approx(known.mean())
    assert cfg.downstream.size.sd == pytest.approx(known.std())


def test_other_targets_are_other_data(tmp_path):
    path = write_csv(tmp_path, COLUMNS)
    _, (first, _, _) = load(HEADS, **path)
    _, (second, _, _) = load(HEADS, **write_csv(tmp_path, {**COLUMNS, "red": [1] * COUNT}))
    assert fingerprint(first, "") != fingerprint(second, "")


def test_the_digits_columns_are_computed_from_them():
    heads = {
        "ink": {"task": "regression", "column": "ink"},
        "tags": {"task": "multi_label", "columns": ["even", "large"]},
        "label": {"task": "classification", "column": "label"},
    }
    _, (train, validation, _) = load(heads, dataset="digits")
    for images in (train, validation):
        digit = images.values["label"]
        assert np.array_equal(images.values["tags"], np.stack([digit % 2 == 0, digit > 4], 1))
        brightness = [np.asarray(images[k][0]).mean() / 255 for k in range(50)]
        # Of the images as they are enlarged: bicubic interpolation nearly keeps the mean.
        assert np.allclose(images.values["ink"][:50], brightness, atol=0.02)
        assert np.ptp(images.values["ink"]) > 0.2


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("heads", "changes", "message"),
    [
        ({"size": {"task": "regression", "column": "siez"}}, {},
         "no column 'siez' among .*: set downstream.size.column to the one that is meant"),
        ({"size": {"task": "regression", "column": "kind"}}, {},
         "^downstream.size.column: 'kind' holds no numbers, .* 'cat': give a finite number"),
        ({"size": {"task": "regression", "column": "size"}}, {"size": [float("inf")] * COUNT},
         "^downstream.size.column: 'size' has inf at .*: give a finite number"),
        ({"size": {"task": "regression", "column": "size"}}, {"size": [None] * COUNT},
         "^downstream.size: no training image has a target: fill in some"),
        ({"tags": {"task": "multi_label", "columns": ["red", "size"]}}, {},
         "^downstream.tags.columns: 'size' has 1.5 at .*: give 0 or 1 in each row, or nothing"),
        ({"tags": {"task": "multi_label", "columns": ["red"]}}, {"red": [-1.0] * COUNT},
         "^downstream.tags.columns: 'red' has -1.0 at "),
        ({"kind": {"task": "classification", "column": "size"}}, {},
         "^downstream.kind.column: 'size' at .*: its label is 1.5: give whole numbers"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_refused(form, heads, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load(heads, **WRITERS[form](tmp_path, {**COLUMNS, **changes}))
    assert "\n" not in str(error.value)


def test_images_without_columns_say_so(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "0.png")
    with pytest.raises(ConfigError, match="^downstream.size.column: these images have no columns"):
        load({"size": HEADS["size"]}, train_path=str(tmp_path))


@pytest.mark.parametrize(
    ("size", "message"),
    [([2.0] * COUNT, "^downstream.size: every training target is 2, so there is nothing to learn")],
)
def test_a_regression_needs_targets_that_differ(size, message, tmp_path):
    cfg, (train, _, _) = load({"size": HEADS["size"]}, **write_csv(tmp_path, {"size": size}))
    with pytest.raises(ConfigError, match=message):
        fill_in_scales(cfg.downstream, train)
    train = drop_labels(train)
    with pytest.raises(ConfigError, match="^labels.fraction: leaves the head downstream.size no"):
        fill_in_scales(cfg.downstream, train)


def test_batches_have_the_targets_of_each_head(tmp_path):
    """The collated types: whole numbers for classes, float32 otherwise."""
    _, (train, _, _) = load(HEADS, **write_csv(tmp_path, COLUMNS))
    batch = torch.utils.data.default_collate([train[k][1] for k in (1, 7)])
    assert batch["kind"].tolist() == [2, 1] and batch["kind"].dtype == torch.int64
    assert batch["size"].dtype == batch["tags"].dtype == torch.float32
    assert batch["tags"].shape == (2, 2)
