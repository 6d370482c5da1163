"""The study in benchmarks/study: its variants are runs that can start, its figures are right."""

import importlib.util
import itertools
import json
import runpy

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from grap_solo.compose import compose
from grap_solo.experiments.grid import plan
from grap_solo.training.config import prepare

FOLDER = ROOT / "benchmarks" / "study"


def load(name):
    file = FOLDER / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"study_{name}", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_run_of_every_stage_can_start(tmp_path):
    study = load("study")
    for (data, method), file in study.FILES.items():
        cfg = compose(file, [f"checkpoint.dir={tmp_path}", f"name={method}-{data}"])
        methods = {each for names, _ in study.STAGES.values() for each in names}
        definitions = {each: study.VARIANTS[each] for each in methods & set(study.VARIANTS)}
        for cell in plan(cfg, sorted(methods), [1], definitions):
            prepare(cell.cfg)


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("study/study", "vicreg digits confirm optimiser.lr=1", "optimiser"),
        ("study/tables", "--runs nowhere", "--runs: nowhere has no finished run"),
        ("study/searches", "nowhere.csv", "nowhere.csv: no such file"),
        ("estimate", "nowhere.yaml --images 9 --rate 9", "nowhere.yaml"),
        ("heads", "--method nothing", "no packaged configuration"),
        ("profile_step", "fixed --method nothing", "no packaged configuration"),
        ("soak", "soaked optimiser.lr=1", "optimiser"),
        ("loader", "--cifar10 nowhere", "nowhere"),
    ],
)
def test_a_benchmark_refuses_bad_input_in_one_line(
    script, line, message, tmp_path, monkeypatch, capsys
):
    file = ROOT / "benchmarks" / f"{script}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.setattr("sys.argv", [str(file), *line.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_transfer_changes_can_start_and_is_a_table_of_its_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    study, tables = load("study"), load("tables")
    for method in ("vicreg", "barlow_twins"):
        for overrides in study.TRANSFER.values():
            cfg = compose(study.FILES["digits", method], [f"checkpoint.dir={tmp_path}", *overrides])
            prepare(cfg)
    for stage in ("confirm", *study.TRANSFER):
        run = tmp_path / f"vicreg-digits-{stage}" / "equal"
        run.mkdir(parents=True)
        result = {"method": "equal", "seed": 11, "weights": {"variance": 1.0}}
        (run / "result.json").write_text(json.dumps(result))
    runs = tables.read_runs(tmp_path)
    assert set(runs["data"]) == {"digits", *(f"digits-{stage}" for stage in study.TRANSFER)}


def test_a_variant_means_the_same_whatever_the_rules_defaults_are():
    """Each names the keys in which the study's variants differ."""
    for name, variant in load("study").VARIANTS.items():
        block = variant["weighting"]
        keys = {"parametrization", "start", "heads"}
        assert "recipe" in block or (keys <= set(block) and {"lr", "lr_per_run"} & set(block)), name


@pytest.mark.parametrize("drawn", [1, 2, 4, 5])
def test_what_a_random_search_keeps_is_the_mean_over_all_draws(drawn):
    searches = load("searches")
    accuracies = np.array([9.0, 7.0, 4.0, 2.0, 1.0])
    draws = [max(each) for each in itertools.combinations(accuracies, drawn)]
    assert searches.chances(5, drawn) @ accuracies == pytest.approx(np.mean(draws))


def map_runs(rows):
    columns = ["a", "b", "seed", "online", "linear"]
    return pd.DataFrame(rows, columns=columns).assign(knn=1.0, rankme=2.0, reason="")


def test_the_table_of_searches_keeps_the_best_online_probe_and_reports_the_rest():
    runs = map_runs([(1, 1, 1, 50, 70), (1, 1, 2, 60, 72), (5, 1, 1, 40, 90), (5, 1, 2, 44, 92)])
    *_, one, both = load("searches").search_table(runs, 80).splitlines()
    assert one == "| random | 1 | 48.50 | 81.00 | 1.00 | 2.00 | 50 % |"
    assert both == "| random | 2 | 55.00 | 71.00 | 1.00 | 2.00 | 0 % |"


def test_a_search_by_tpe_climbs_the_online_probe():
    searches = load("searches")
    rows = [(a, b, 1, 50 - (a - 2) ** 2 - (b - 4) ** 2, a) for a in range(6) for b in range(6)]
    pairs = map_runs(rows).groupby(["a", "b"])[["online", "linear"]].mean()
    pairs = pairs.sort_values("online", ascending=False)
    found = np.array([searches.kept_by_tpe(pairs, 30, seed) for seed in range(20)])
    assert (np.diff(found, axis=1) <= 0).all()
    drawn = searches.chances(36, 1) @ np.arange(36)  # The mean of one pair: 17.5.
    assert found[:, 0].mean() > drawn / 2 and found[:, -1].mean() < 1.5
    again = searches.kept_by_tpe(pairs, 30, 3)
    assert again == found[3].tolist()
