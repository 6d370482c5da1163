"""The table that a run appends to survives a kill and a resumption."""

import torch

from grap_solo.records.trajectory import _Table
from grap_solo.records.weights import read_weights


def append(table, steps):
    table.waiting += [(step, step // 4, torch.tensor([step, step / 3])) for step in steps]
    table.flush()


def test_rows_reach_the_file_with_nine_digits_when_they_are_flushed(tmp_path):
    path = tmp_path / "weights.csv"
    table = _Table(path, ["a", "b"], kept=0)
    table.waiting.append((1, 0, torch.tensor([1, 1 / 3], dtype=torch.float64)))
    assert path.read_bytes() == b"step,epoch,a,b\r\n"
    table.flush()
    table.flush()
    assert path.read_bytes() == b"step,epoch,a,b\r\n1,0,1,0.333333333\r\n"


def test_the_last_column_may_hold_texts(tmp_path):
    table = _Table(tmp_path / "diagnostics.csv", ["a", "skipped"], kept=0)
    table.waiting += [(1, 0, torch.tensor([0.5, 0.0])), (2, 0, torch.tensor([torch.nan, 1.0]))]
    table.flush(last=["", "held"])
    assert table.path.read_text().split() == ["step,epoch,a,skipped", "1,0,0.5,", "2,0,nan,held"]


def test_a_resumed_table_drops_later_rows_and_one_cut_short(tmp_path):
    path = tmp_path / "weights.csv"
    append(_Table(path, ["a", "b"], kept=0), range(1, 9))
    with path.open("a") as file:
        file.write("9,2,9")  # Killed while it was written.
    append(_Table(path, ["a", "b"], kept=5), [6, 7])
    terms, steps, weights = read_weights(path)
    assert terms == ["a", "b"] and steps[:, 0].tolist() == weights[:, 0].tolist()
    assert steps[:, 0].tolist() == list(range(1, 8))


def test_a_run_from_its_start_writes_over_the_rows_of_another(tmp_path):
    path = tmp_path / "weights.csv"
    append(_Table(path, ["a", "b"], kept=0), range(1, 9))
    append(_Table(path, ["a", "b"], kept=0), [1])
    assert read_weights(path)[1].tolist() == [[1, 0]]
