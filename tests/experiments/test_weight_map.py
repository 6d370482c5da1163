"""The map of accuracy over two weights: its runs, its files, and what it refuses."""

import csv

import numpy as np
import pandas as pd
import pytest
from helpers import digits
from matplotlib import image
from omegaconf import OmegaConf

from grap_solo import ConfigError
from grap_solo.cli import main
from grap_solo.experiments.weight_map import map_weights
from grap_solo.records.weights import read_weights
from grap_solo.report.maps import MapPoint, _edges, plot_weight_map

FEW = ["++data.fraction=0.1", "optimizer.batch_size=32", "+enable_progress_bar=false",
       "scheduler.warmup_epochs=0"]  # fmt: skip
TERMS = ("variance", "covariance")


def configuration(directory, *overrides, file="grap_vicreg"):
    return digits(directory, *FEW, "name=map", *overrides, file=file)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A map of two by two weights."""
    return map_weights(configuration(tmp_path_factory.mktemp("runs")), TERMS, [5, 1], [1])


def weights_of(done, name):
    cfg = OmegaConf.load(done / f"{name}-seed1" / "config.yaml")
    return OmegaConf.to_container(cfg.weighting)


@pytest.mark.slow
def test_every_pair_is_trained_beside_the_reference_and_the_rule(done):
    pairs = {(1.0, 1.0), (1.0, 5.0), (5.0, 1.0), (5.0, 5.0)}
    for variance, covariance in pairs:
        weighting = weights_of(done, f"variance_{variance:g}-covariance_{covariance:g}")
        expected = {"invariance": 1.0, "variance": variance, "covariance": covariance}
        assert weighting == {"name": "fixed", "weights": expected}
    assert weights_of(done, "grap")["name"] == "grap"
    assert weights_of(done, "fixed") == {"name": "fixed"}
    rows = list(csv.DictReader((done / "map.csv").open()))
    assert {(float(row["variance"]), float(row["covariance"])) for row in rows} == pairs
    assert all(float(row["linear"]) > 30 and row["reason"] == "" for row in rows)


@pytest.mark.slow
def test_the_text_names_the_best_pair_the_other_rows_and_the_cost(done):
    text = (done / "map.md").read_text()
    rows = pd.read_csv(done / "map.csv").sort_values("linear", ascending=False)
    best = rows.iloc[0]
    cells = f"{best.variance:g} | {best.covariance:g} | {best.linear:.2f} | {best.knn:.2f}"
    assert f"| best of the map | {cells} |" in text
    assert "| reference weights | 1 | 0.04 |" in text
    terms, steps, weights = read_weights(done / "grap-seed1" / "weights.csv")
    assert terms == ["invariance", *TERMS]
    last = np.median(weights[steps[:, 1] == 1, 1:] / weights[steps[:, 1] == 1, :1], axis=0)
    assert f"| grap, at its end | {last[0]:.3g} | {last[1]:.3g} |" in text
    assert "The map took 4 runs for each seed" in text
    assert image.imread(done / "map.png").shape[2] == 4


@pytest.mark.slow
def test_started_again_it_trains_nothing(done):
    before = {file: file.stat().st_mtime_ns for file in done.glob("*-seed1/*")}
    map_weights(configuration(done.parent), TERMS, [1, 5], [1])
    assert {file: file.stat().st_mtime_ns for file in done.glob("*-seed1/*")} == before


@pytest.mark.parametrize(
    ("terms", "values", "file", "text"),
    [
        (("variance", "covarianc"), [1, 5], "grap_vicreg", "did you mean 'covariance'"),
        (("variance", "variance"), [1, 5], "grap_vicreg", "two different terms"),
        (TERMS, [1, 1], "grap_vicreg", "two or more numbers above 0"),
        (TERMS, [0, 1], "grap_vicreg", "two or more numbers above 0"),
        (TERMS, [1, float("inf")], "grap_vicreg", "two or more numbers above 0"),
        (("on_diagonal", "off_diagonal"), [1, 5], "grap_barlow_twins", "third term"),
    ],
)
def test_a_map_that_cannot_be_made_is_refused(terms, values, file, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        map_weights(configuration(tmp_path, file=file), terms, values, [1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["seed=null", "~seed"])
def test_without_a_seed_the_default_is_taken(key, tmp_path):
    """So that it is the devices that are refused, after the seeds."""
    with pytest.raises(ConfigError, match="devices: a comparison trains"):
        map_weights(configuration(tmp_path, key, "devices=2"), TERMS, [1, 5])


def test_values_whose_runs_would_have_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="values: two of .* are the same to 6 digits"):
        map_weights(configuration(tmp_path), TERMS, [1, 1.00000001])


def test_the_command_line_names_what_is_missing(capsys):
    assert main(["map", "--config-path", "configs/digits", "--config-name", "grap"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_cells_lie_around_their_weights():
    edges = _edges(np.array([0.04, 0.2, 1.0]))
    assert np.allclose(edges[1:3] ** 2, [0.04 * 0.2, 0.2 * 1.0])  # Geometric means.
    assert np.allclose(edges[1] / edges[0], edges[2] / edges[1])


def test_a_picture_is_drawn_with_failed_runs_and_a_path_beyond_its_edge(tmp_path):
    rows = [{"a": a, "b": b, "linear": 80 + a + b, "knn": 70.0} for a in (1, 5) for b in (1, 5)]
    rows[0]["linear"] = rows[0]["knn"] = np.nan
    accuracies = {"linear": 90.0, "knn": 80.0}
    points = [
        MapPoint("reference weights", [(1, 0.001)], accuracies),
        MapPoint("grap", [(1, 1), (30, 2), (4, 400)], accuracies),
        MapPoint("no record", [], accuracies),
    ]
    empty = tmp_path / "empty.png"
    plot_weight_map(pd.DataFrame(rows), ("a", "b"), "c", points[2:], empty)
    drawn = tmp_path / "map.png"
    plot_weight_map(pd.DataFrame(rows), ("a", "b"), "c", points, drawn)
    assert not np.array_equal(image.imread(drawn), image.imread(empty))
