"""When a run has collapsed, and which term's weight fell."""

import numpy as np
import pytest
from run_folders import EPOCHS, PER_EPOCH, steps, write_csv, write_run

from grap_solo.records.collapse import Validations, find_fall
from grap_solo.records.runs import read_run

NAN = np.nan
SOUND = [(50.0, 0.6), (48.0, 0.7), (45.0, 0.7)]
LOW = [(50.0, 0.6), (9.0, 0.6), (9.0, 0.6)]


@pytest.mark.parametrize(
    ("rankme", "spread", "expected"),
    [
        ([50, 40, 30], [0.6, 0.5, 0.5], None),
        ([50, 40, 30, 30], [0.6, 0.09, 0.09, 0.0], 2),
        ([1.9, 1.2, 1.1], [0.6, 0.5, 0.5], 1),
        ([3, 3, 3], [0.6, 0.5, 0.5], None),
        ([40, 60, 16, 14, 14], [0.6] * 5, 4),  # A quarter of 60, not of 40.
        ([40, 60, 14, 16, 14], [0.6] * 5, None),  # Not twice in a row.
        ([50, 13, 50, 1.5], [0.6, 0.6, 0.05, 0.6], 3),  # Twice in a row, for two reasons.
        ([5, 50, 50], [0.05, 0.5, 0.5], None),  # Before batch-norm has its statistics.
        ([1.0], [0.0], None),
        ([], [], None),
        ([50, NAN, NAN], [0.6, NAN, NAN], None),
        ([NAN, 50, 10, 10], [NAN, 0.6, 0.6, 0.6], 3),
        ([0.0, 0.0], [0.0, 0.0], 1),
    ],
)
def test_a_run_has_collapsed_at_the_second_low_validation(rankme, spread, expected):
    found = Validations(np.arange(len(rankme)), np.array(rankme, float), np.array(spread, float))
    assert found.collapsed_at() == expected


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ([1, 1, 2], [1, 1, 0], ("c", 0.5, 0.0)),
        ([25, 25, 1], [20, 25, 0.1], ("c", 1 / 51, 0.1 / 45.1)),  # The most of its own share.
        ([1, 1, 1], [5, 5, 5], None),
        ([1, 1, 1], [5, 5, 4.9], None),  # Not by a tenth.
        ([1, 0, 1], [1, 0, 0.5], ("c", 0.5, 1 / 3)),
        ([1, 1, 1], [1, 1, -0.5], ("c", 1 / 3, -0.2)),
        ([0, 0, 0], [0, 0, 0], None),
        ([1, 1, 1], [NAN, NAN, NAN], None),
    ],
)
def test_the_term_is_the_one_that_lost_most_of_its_share(first, last, expected):
    weights = np.array([first, first, last, last, [9, 9, 9]], float)
    found = find_fall(["a", "b", "c"], np.array([0, 0, 2, 2, 3]), weights, 2)
    if expected is None:
        assert found is None
    else:
        assert found.term == expected[0]
        assert (found.before, found.after) == pytest.approx(expected[1:])


def test_a_single_step_does_not_name_a_term():
    weights = np.array([[1, 1], [1, 1], [1, 0], [1, 1]], float)
    assert find_fall(["a", "b"], np.array([0, 1, 1, 1]), weights, 1) is None


@pytest.mark.parametrize(("validations", "expected"), [(None, False), (SOUND, False), (LOW, True)])
def test_a_run_folder_says_whether_its_run_collapsed(tmp_path, validations, expected):
    folder = tmp_path / "run"
    write_run(folder, {"keeps": 1.0, "falls": 1.0}, validations=validations)
    rows = [[*each, 1.0, 0.0 if each[1] else 1.0] for each in steps()]
    write_csv(folder / "weights.csv", ["step", "epoch", "keeps", "falls"], rows)
    run = read_run(folder)
    assert (run.validations is None) == (validations is None)
    assert (run.collapse is not None) == expected
    if expected:
        assert run.collapse.describe() == (
            "the representation collapsed within 3 epochs (RankMe 9.0, spread 0.60); the weight of "
            "falls fell most, from 50 % to 0 % of the sum"
        )


def test_labels_that_train_alone_are_no_collapse(tmp_path):
    write_run(tmp_path / "supervised", {"a": 0.0, "b": 0.0}, validations=LOW)
    assert read_run(tmp_path / "supervised").collapse is None
    write_run(tmp_path / "fixed", {"a": 1.0, "b": 1.0}, validations=LOW)
    described = read_run(tmp_path / "fixed").collapse.describe()
    assert described.endswith("it did so with the weights given")


def test_other_rows_and_one_cut_short_are_passed_over(tmp_path):
    write_run(tmp_path / "run", {"a": 1.0}, validations=SOUND)
    file = tmp_path / "run" / "metrics.csv"
    file.write_text(file.read_text() + f",{EPOCHS},{PER_EPOCH * EPOCHS}")
    found = read_run(tmp_path / "run").validations
    assert found.epochs.tolist() == [0, 1, 2] and found.rankme.tolist() == [50, 48, 45]
