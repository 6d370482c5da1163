"""weights.csv is read back, and its median is taken, written and read."""

import numpy as np
import pytest
import yaml
from run_folders import write_csv

from grap_solo.errors import ConfigError
from grap_solo.records.weights import (
    format_weight,
    median_weights,
    pooled_weights,
    read_median,
    read_weights,
    write_median,
)


def write_weights(path, epochs, weights, terms=("a", "b")):
    """Writes a ``weights.csv`` as the recorder does."""
    cells = [[f"{each:.9g}" for each in row] for row in weights]
    rows = [[i + 1, epoch, *row] for i, (epoch, row) in enumerate(zip(epochs, cells))]
    write_csv(path, ["step", "epoch", *terms], rows)


def test_every_number_is_read_as_python_reads_it(tmp_path):
    """Also very small and very large ones, and those that are not finite."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(2000, 2)) * 10.0 ** generator.integers(-12, 13, (2000, 2))
    weights[3] = np.nan, np.inf
    weights[4] = -np.inf, 0
    write_weights(tmp_path / "weights.csv", [0] * 2000, weights)
    terms, steps, found = read_weights(tmp_path / "weights.csv")
    expected = [[float(f"{each:.9g}") for each in row] for row in weights]
    np.testing.assert_array_equal(found, expected)
    assert terms == ["a", "b"] and steps.dtype.kind == "i"
    assert steps[:, 0].tolist() == list(range(1, 2001)) and not steps[:, 1].any()


def test_a_term_may_have_a_comma_in_its_name(tmp_path):
    write_weights(tmp_path / "weights.csv", [0], [[1, 2]], ["a,b", "c"])
    assert read_weights(tmp_path / "weights.csv")[0] == ["a,b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged: it is empty"),
        (b"a,b\n1,2\n", "expected 'step,epoch' as its first columns"),
        (b"step,epoch\n1,0\n", "expected columns 'step,epoch,TERM...'"),
        (b"step,epoch,a\n", "no step is recorded in it"),
        (b"step,epoch,a,b\n1,0,1,2\n2,0,1\n", "row 3 has 3 values for 4 columns"),
        (b"step,epoch,a,b\n1,0,1,2\n2,0,1,2,3\n", "row 3 has 5 values for 4 columns"),
        (b"step,epoch,a,b\n1,0,1,2,3\n2,0,1\n", "row 2 has 5 values for 4 columns"),
        (b"step,epoch,a,b\n1,0,1\n2,0,1,2,3\n", "row 2 has 3 values for 4 columns"),
        (b"step,epoch,a\n1,0,1\n\n2,0,1\n", "row 3 has 0 values for 3 columns"),
        (b"step,epoch,a\n1,0,x\n", "row 2: a is 'x', not numeric"),
        (b"step,epoch,a\n1,0,\n", "row 2: a is '', not numeric"),
        (b"step,epoch,a\n1,0,1\n2,,1\n", "row 3: epoch is '', not a whole number"),
        (b"step,epoch,a\n1,inf,1\n", "row 2: epoch is 'inf', not a whole number"),
        (b"step,epoch,a\n1.5,0,1\n", "row 2: step is '1.5', not a whole number"),
        (b"\xff\xfe\x00step", "damaged: not a CSV file"),
        (b"step,epoch,a\n1,0,\xff\n", "damaged: not a CSV file"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_place(tmp_path, content, message):
    path = tmp_path / "weights.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_weights(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_file_is_named():
    with pytest.raises(ConfigError, match="nowhere/weights.csv: no such file"):
        read_weights("nowhere/weights.csv")


def test_the_median_leaves_the_warmup_out_unless_nothing_is_left(tmp_path):
    path = tmp_path / "weights.csv"
    write_weights(path, [0, 0, 1, 1, 1], [[9, 9], [9, 9], [1, 0.1], [3, 0.3], [2, 0.2]])
    assert median_weights(path, 1) == {"a": 2, "b": 0.2}
    assert median_weights(path) == {"a": 3, "b": 0.3}
    assert median_weights(path, 7) == {"a": 3, "b": 0.3}


def test_steps_are_pooled_over_runs_epochs_or_the_last_ones(tmp_path):
    first, second = tmp_path / "1.csv", tmp_path / "2.csv"
    write_weights(first, [0, 0, 1], [[1, 1], [2, 2], [3, 3]])
    write_weights(second, [0, 1, 1], [[10, 10], [20, 20], [30, 1 / 3]])
    both = [first, second]
    assert pooled_weights(both, [0, 0])["a"] == 6.5
    assert pooled_weights(both, [1, 0])["a"] == 15  # Of 3, 10, 20, 30.
    assert pooled_weights(both, [0, 0], epochs=(1, 1))["a"] == 20
    assert pooled_weights(both, [0, 0], last=1) == {"a": 16.5, "b": 1.66667}
    with pytest.raises(ConfigError, match="no step in the epochs 7 to 9"):
        pooled_weights(both, [0, 0], epochs=(7, 9))
    with pytest.raises(ConfigError, match="two choices: give one"):
        pooled_weights(both, [0, 0], epochs=(0, 1), last=2)
    write_weights(second, [0], [[1, 1]], ["a", "c"])
    with pytest.raises(ConfigError, match="2.csv: its terms are a, c, the first run's a, b"):
        pooled_weights(both, [0, 0])


def test_the_median_is_written_as_a_block_and_read_back(tmp_path):
    write_weights(tmp_path / "weights.csv", [0, 0], [[1, 2], [3, 4]])
    write_median(tmp_path / "weights.csv", 0)
    path = tmp_path / "median_weights.yaml"
    block = {"name": "fixed", "weights": {"a": 2.0, "b": 3.0}}
    assert yaml.safe_load(path.read_text()) == {"weighting": block}
    assert read_median(path) == block["weights"] and "Not as it stands" not in path.read_text()
    write_weights(tmp_path / "weights.csv", [0], [[-1, 2]])
    write_median(tmp_path / "weights.csv", 0)
    assert "Not as it stands" in path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("weighting: [", "expected a block 'weighting: weights:'"),
        ("weights: {a: 1}", "expected a block 'weighting: weights:'"),
        ("weighting: {weights: [1, 2]}", "expected a weight for each term"),
    ],
)
def test_a_damaged_median_is_one_line(tmp_path, content, message):
    path = tmp_path / "median_weights.yaml"
    with pytest.raises(ConfigError, match="no such file: give the folder of a run"):
        read_median(path)
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"median_weights.yaml: {message}"):
        read_median(path)


def test_small_weights_keep_two_digits():
    values = (2.5, 0.0123, 0.01, 0.00123, 0, -0.004567, -2)
    texts = ["2.50", "0.01", "0.01", "0.0012", "0.00", "-0.0046", "-2.00"]
    assert [format_weight(value) for value in values] == texts
