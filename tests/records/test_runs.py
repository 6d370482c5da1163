"""A run folder is read back, and damage in it is one line."""

import dataclasses
import json

import numpy as np
import pytest
from run_folders import EPOCHS, FOUR, PER_EPOCH, write_run

from grap_solo.errors import ConfigError
from grap_solo.records.runs import find_runs, read_run

WEIGHTS = "step,epoch,a,b\n1,0,1,2\n2,0,1,2\n"
VALIDATIONS = "epoch,val_rankme,val_spread\n1,9,0.5\n"


def test_everything_in_a_run_folder_is_read(tmp_path):
    weights = dict(zip(FOUR, (0.5, 0.5, 2.5, 2.0)))
    folder = tmp_path / "grap-seed3"
    write_run(folder, weights, seed=3, cosine=0.25, method="own", linear=90.0)
    (folder / "terms.yaml").write_text(
        json.dumps({"weighting": "gradnorm", "reference_weights": dict.fromkeys(FOUR, 1.5)})
    )
    run = read_run(folder)
    assert (run.folder, run.method, run.seed, run.rule) == (folder, "own", 3, "gradnorm")
    assert run.terms == FOUR and run.reference == dict.fromkeys(FOUR, 1.5)
    assert run.config["max_epochs"] == EPOCHS and run.result["linear"] == 90.0
    steps = EPOCHS * PER_EPOCH
    np.testing.assert_array_equal(run.epochs, np.repeat(range(EPOCHS), PER_EPOCH))
    np.testing.assert_array_equal(run.weights, np.tile(list(weights.values()), (steps, 1)))
    skipped = steps - PER_EPOCH
    assert run.diagnostics.skipped == ["unlabelled" if i == skipped else "" for i in range(steps)]
    expected = [np.nan if i == skipped else 0.25 for i in range(steps)]
    assert len(run.diagnostics.columns) == 1 + 4 + 4 + 6
    for values in run.diagnostics.columns.values():
        np.testing.assert_array_equal(values, expected)
    assert run.setting() == ("digits", f"{EPOCHS} epochs", ", ".join(FOUR))


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (None, "")]
)
def test_one_epoch_is_one_epoch(count, said, tmp_path):
    write_run(tmp_path / "run", dict.fromkeys(FOUR, 1.0))
    config = {} if count is None else {"max_epochs": count}
    run = dataclasses.replace(read_run(tmp_path / "run"), config=config)
    assert run.setting()[1] == said


def test_a_run_is_read_from_whatever_files_it_has(tmp_path):
    folder = tmp_path / "grap-seed7"
    folder.mkdir()
    run = read_run(folder)
    assert (run.method, run.seed, run.rule, run.terms) == ("grap", 7, "", ())
    assert run.weights.shape == (0, 0) and run.diagnostics is None and run.result == {}
    (folder / "weights.csv").write_text("step,epoch,a\n")
    (folder / "diagnostics.csv").write_text("step,epoch,alignment,skipped\n")
    assert read_run(folder).terms == () and read_run(folder).diagnostics is None
    (folder / "config.yaml").write_text("weighting: {name: dwa}\nseed: 1\n")
    assert (read_run(folder).rule, read_run(folder).seed) == ("dwa", 1)


def test_an_empty_cell_of_the_diagnostics_is_nan(tmp_path):
    (tmp_path / "diagnostics.csv").write_text("step,epoch,alignment\n1,0,\n2,0,0.5\n")
    diagnostics = read_run(tmp_path).diagnostics
    np.testing.assert_array_equal(diagnostics.columns["alignment"], [np.nan, 0.5])
    assert diagnostics.skipped == ["", ""]


def test_a_cause_with_a_comma_is_read(tmp_path):
    text = 'step,epoch,alignment,skipped\n1,0,0.5,"held, unlabelled"\n'
    (tmp_path / "diagnostics.csv").write_text(text)
    assert read_run(tmp_path).diagnostics.skipped == ["held, unlabelled"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.csv", WEIGHTS + "3,0,1\n", "row 4 has 3 values for 4 columns"),
        ("weights.csv", WEIGHTS + "3,0,1,x\n", "row 4: b is 'x', not numeric"),
        ("weights.csv", "a,b\n1,2\n", "expected 'step,epoch' as its first columns"),
        ("weights.csv", "", "it is empty"),
        ("weights.csv", "step,epoch,a\n1,1,1\n2,0,1\n", "its epochs do not ascend"),
        ("weights.csv", "step,epoch,a\n1,-1,1\n", "its epochs do not ascend"),
        ("diagnostics.csv", "step,epoch,alignment,skipped\n1,0\n", "row 2 has 2 values"),
        ("diagnostics.csv", "step,epoch,a,skipped\n1,0,1\n2,0,1,x,y\n", "row 2 has 3 values"),
        ("diagnostics.csv", "step,epoch,a,skipped\n1,0,1,x,y\n2,0,1\n", "row 2 has 5 values"),
        ("diagnostics.csv", "step,epoch,alignment,skipped\n1,0,high,\n", "not numeric"),
        ("diagnostics.csv", "alignment\n1\n", "expected 'step,epoch'"),
        ("diagnostics.csv", "step,epoch,a\n1,1,1\n2,0,1\n", "its epochs do not ascend"),
        ("metrics.csv", VALIDATIONS + "1,x,0.5\n", "val_rankme is 'x', not a number"),
        ("metrics.csv", VALIDATIONS + "1.5,9,0.5\n", "epoch is '1.5', not a number"),
        ("metrics.csv", VALIDATIONS + "0,9,0.5\n", "its epochs do not ascend"),
        ("config.yaml", "a: [", "expected keys and values"),
        ("terms.yaml", "- a", "expected keys and values"),
        ("terms.yaml", "reference_weights: {a: x}", "holds no weight for each term"),
        ("result.json", "[1]", "expected keys and values"),
        ("result.json", "{", "expected keys and values"),
        ("result.json", '{"linear": "97"}', "'linear' is '97', not a number"),
        ("result.json", '{"knn": true}', "'knn' is True, not a number"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / "weights.csv").write_text(WEIGHTS)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        read_run(tmp_path)
    line = str(error.value)
    assert message in line and str(tmp_path / name) in line and "\n" not in line


def test_runs_are_found_in_order_and_those_without_a_step_apart(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name, {"x": 1.0})
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.yaml").write_text("name: started\n")
    (tmp_path / "logs").mkdir()
    assert find_runs(tmp_path) == ([tmp_path / "a", tmp_path / "b"], [tmp_path / "started"])
    assert find_runs(tmp_path / "a") == ([tmp_path / "a"], [])
    with pytest.raises(ConfigError, match="nowhere: no such folder: give a run folder"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="logs: no run in it: give a folder with a weights.csv"):
        find_runs(tmp_path / "logs")
