"""Runs with a ``downstream:`` block, and the blocks that are refused."""

import pytest
from helpers import Killed, killed_at, quiet_digits, rows_of
from test_resume import assert_equal, left

from grap_solo import ConfigError
from grap_solo.training.config import prepare
from grap_solo.training.run import prepare_one_of_many, pretrain

BLOCK = (
    "+downstream={digit: {task: classification}, ink: {task: regression, column: ink, weight: 0.5},"
    " tags: {task: multi_label, columns: [even, large]}}"
)
REGRESSION = "+downstream={ink: {task: regression, column: ink}}"


def configuration(directory, *overrides, block=BLOCK):
    return quiet_digits(directory, block, *overrides, file="grap_vicreg")


def newest(run, name):
    return [float(row[name]) for row in rows_of(run.directory / "metrics.csv") if row.get(name)][-1]


@pytest.mark.parametrize("changes", [[], ["+labels.split=held_out", "+labels.fraction=0.3"]])
def test_a_run_with_several_heads_logs_each_and_resumes_to_the_bit(changes, tmp_path):
    run = pretrain(configuration(tmp_path / "whole", *changes))
    assert run.accuracy == newest(run, "val_acc1") == newest(run, "val_digit_acc1")
    for name in ("val_ink_r2", "val_ink_mae", "val_tags_map", "downstream/ink_epoch"):
        assert newest(run, name) is not None
    with pytest.raises(Killed):
        pretrain(configuration(tmp_path / "parts", *changes), [killed_at("on_train_batch_end", 1)])
    pretrain(configuration(tmp_path / "parts", *changes))
    assert_equal(left(tmp_path / "parts"), left(tmp_path / "whole"))


@pytest.mark.parametrize(
    "changes", [["data.batched=true"], ["~weighting", "+weighting={name: supervised}"]]
)
def test_a_regression_alone_trains_without_an_accuracy(changes, tmp_path):
    run = pretrain(configuration(tmp_path, "max_epochs=1", *changes, block=REGRESSION))
    assert run.accuracy is None and newest(run, "val_ink_mae") > 0
    (header, *_) = (run.directory / "metrics.csv").read_text().splitlines()
    assert "acc1" not in header and "train_class_loss" not in header


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{size: {task: regresion, column: ink}}", "downstream.size.task: .*regression"),
        ("{size: {column: ink}}", "downstream.size.task: missing"),
        ("{size: {task: regression}}", "downstream.size.column: missing"),
        ("{tags: {task: multi_label, column: even}}", "downstream.tags.column: .*'columns'"),
        ("{tags: {task: multi_label, columns: []}}", "downstream.tags.columns: .*list of columns"),
        ("{tags: {task: multi_label, columns: [even, even]}}", "downstream.tags.columns: .*once"),
        ("{a: {task: regression, column: ink, weight: 0}}", "downstream.a.weight: .*above 0"),
        ("{a: {task: regression, column: ink, wieght: 1}}", "downstream.a: .*wieght.*weight"),
        ("{knn: {task: classification}}", "downstream.knn: a head's name is"),
        ("{3: {task: classification}}", "downstream.3: a head's name is"),
        ("{a: 3}", "downstream.a: expected a block"),
        ("{a: null}", "downstream.a: expected a block"),
        ("{}", "downstream: expected a block of one head or more"),
    ],
)
def test_blocks_that_cannot_be_used_are_refused_in_one_line(block, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        prepare(configuration(tmp_path, block=f"+downstream={block}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("knn_eval.enabled=true", "knn_eval.enabled: it needs classes"),
        ("+data.no_labels=true", "data.no_labels: "),
    ],
)
def test_what_needs_classes_or_labels_is_refused_without(change, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message}"):
        prepare(configuration(tmp_path, change, block=REGRESSION))


def test_a_comparison_needs_a_head_that_learns_the_labels(tmp_path):
    prepare_one_of_many(configuration(tmp_path), "a search")
    with pytest.raises(ConfigError, match="^downstream: a search compares accuracies"):
        prepare_one_of_many(configuration(tmp_path, block=REGRESSION), "a search")
