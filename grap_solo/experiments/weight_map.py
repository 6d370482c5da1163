"""Maps accuracy over the weights of two terms, and draws the way of a learning rule across it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from grap_solo.errors import ConfigError, unknown_name
from grap_solo.experiments.cells import (
    check_cell,
    check_launcher,
    result_of,
    run_all,
    say_what_differs,
)
from grap_solo.experiments.grid import Cell, plan
from grap_solo.experiments.tasks import Launcher
from grap_solo.records.files import WEIGHTS_FILE, make_folder, only_one, whole_file
from grap_solo.records.runs import MEASURES
from grap_solo.records.weights import read_weights
from grap_solo.report.maps import MapPoint, plot_weight_map
from grap_solo.report.tables import BASELINE, format_number, table_of_runs
from grap_solo.training.config import prepare, terms_of

MAP_FILES = ("map.csv", "map.md", "map.png")


def map_weights(
    cfg: DictConfig,
    terms: tuple[str, str],
    values: Sequence[float],
    seeds: Sequence[int] | None = None,
    launcher: Launcher | None = None,
) -> Path:
    """Trains a method with every pair of weights of two terms, and draws the accuracies as a map.

    Weights are relative to that of the first term that is not varied, the unit term; further terms
    keep the ratio of their reference weights to it. The map also shows the reference weights, and
    the effective weights of the configuration's own rule, epoch by epoch, with the accuracy of its
    one run. Writes ``map.csv``, ``map.md`` and ``map.png`` to ``checkpoint.dir`` / ``name``.
    Called again, it resumes as :func:`~grap_solo.experiments.compare.compare` does.

    Args:
        cfg: a composed configuration that all runs share; its ``weighting`` is the rule.
        terms: the two terms, of the x-axis and the y-axis.
        values: the weights that each of the two takes, above 0.
        seeds: the seeds of every run; None takes the configuration's.
        launcher: as for ``compare``.

    Raises:
        ConfigError: an unknown term, a method of two terms, values that are no positive numbers, or
            what :func:`~grap_solo.experiments.compare.compare` refuses.
    """
    ready = prepare(cfg)
    reference, seeds = terms_of(ready), seeds or [ready.seed]
    unit = _unit_term(reference, terms)
    steps = sorted({float(each) for each in values})
    if len(steps) < 2 or steps[0] <= 0 or not np.isfinite(steps).all():
        raise ConfigError(f"values: expected two or more numbers above 0, got {list(values)}")
    pairs = {_cell_name(terms, pair): pair for pair in itertools.product(steps, steps)}
    if len(pairs) < len(steps) ** 2:
        raise ConfigError(f"values: two of {steps} are the same to 6 digits: leave one of them out")
    definitions: dict[str, Any] = {}
    for name, pair in pairs.items():
        weights = _pair_weights(reference, unit, terms, pair)
        definitions[name] = {"weighting": {"name": "fixed", "weights": weights}}
    rule = str(OmegaConf.select(cfg, "weighting.name", default=BASELINE))
    methods = list(dict.fromkeys([BASELINE, rule]))
    if rule != BASELINE:
        definitions[rule] = {"weighting": OmegaConf.to_container(cfg.weighting, resolve=True)}
    launcher = launcher or Launcher()
    cells = plan(cfg, [*methods, *pairs], seeds, definitions)
    check_launcher(cells, launcher)
    directory = cells[0].directory.parent
    make_folder(directory, "checkpoint.dir")
    with only_one(directory):
        say_what_differs([(cell, check_cell(cell)) for cell in cells])
        reasons = run_all(cells, directory, launcher)
        runs = table_of_runs([result_of(cell, reasons) for cell in cells])
        table = _table_of_pairs(runs, pairs, terms)
        with whole_file(directory / MAP_FILES[0]) as file:
            table.to_csv(file, index=False, float_format="%.6g")
        start = _ratios(reference, unit, terms)
        points = [MapPoint("reference weights", [start], _accuracies(runs, BASELINE))]
        if rule != BASELINE:
            path = _rule_path([cell for cell in cells if cell.method == rule], unit, terms)
            points.append(MapPoint(rule, path, _accuracies(runs, rule)))
        text = _map_text(runs, pairs, terms, unit, points, len(set(seeds)))
        with whole_file(directory / MAP_FILES[1]) as file:
            file.write(text)
        failed = int((runs["reason"] != "").sum())
        if failed < len(runs):
            plot_weight_map(table, terms, unit, points, directory / MAP_FILES[2])
        print(f"\n{text}\nfiles: {directory}/{', '.join(MAP_FILES)}")
    return directory


def _unit_term(reference: Mapping[str, float], terms: Sequence[str]) -> str:
    """The first term that is not varied and has a reference weight.

    Raises:
        ConfigError: an unknown or repeated term, or no term is left to be the unit.
    """
    for term in terms:
        if term not in reference:
            raise unknown_name("terms", term, reference)
    if len(set(terms)) != 2:
        raise ConfigError(f"terms: expected two different terms of {', '.join(reference)}")
    others = [term for term in reference if term not in terms and reference[term] > 0]
    if not others:
        raise ConfigError(
            "terms: a map needs a third term whose weight stays: of two terms only the ratio "
            "counts, which compare with 'definitions' can vary"
        )
    return others[0]


def _cell_name(terms: Sequence[str], pair: Sequence[float]) -> str:
    return "-".join(f"{term}_{value:g}" for term, value in zip(terms, pair, strict=True))


def _pair_weights(
    reference: Mapping[str, float], unit: str, terms: Sequence[str], pair: Sequence[float]
) -> dict[str, float]:
    """The weights of all terms for a pair of the two that vary."""
    scaled = {term: weight / reference[unit] for term, weight in reference.items()}
    return {**scaled, **dict(zip(terms, pair, strict=True))}


def _ratios(weights: Mapping[str, float], unit: str, terms: Sequence[str]) -> tuple[float, float]:
    x, y = (weights[term] / weights[unit] for term in terms)
    return x, y


def _rule_path(cells: Sequence[Cell], unit: str, terms: Sequence[str]) -> list[tuple[float, float]]:
    """The effective weights of the first seed's run, relative to the unit term: the median of every
    epoch's steps. Epochs in which one of them is 0 have no place on a logarithmic axis."""
    for cell in cells:
        file = cell.directory / WEIGHTS_FILE
        if not file.exists():
            continue
        names, steps, weights = read_weights(file)
        columns = [names.index(each) for each in (*terms, unit)]
        x, y, scale = weights[:, columns].T
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.stack([x / scale, y / scale], axis=1)
        epochs = [steps[:, 1] == epoch for epoch in np.unique(steps[:, 1])]
        medians = np.array([ratios[:1][0], *(np.median(ratios[each], axis=0) for each in epochs)])
        usable = np.isfinite(medians).all(axis=1) & (medians > 0).all(axis=1)
        return [(float(a), float(b)) for a, b in medians[usable]]
    return []


def _table_of_pairs(
    runs: pd.DataFrame, pairs: Mapping[str, Sequence[float]], terms: Sequence[str]
) -> pd.DataFrame:
    """One row for each run of the map: the two weights, the seed, the measures, and the reason of a
    failure."""
    mine = runs[runs["method"].isin(pairs)].copy()
    for index, term in enumerate(terms):
        mine[term] = [pairs[name][index] for name in mine["method"]]
    return mine[[*terms, "seed", *MEASURES, "reason"]]


def _accuracies(runs: pd.DataFrame, method: str) -> dict[str, float]:
    """A method's mean accuracies over the seeds, in percent."""
    return {key: float(runs.loc[runs["method"] == method, key].mean()) for key in ("linear", "knn")}


def _map_text(
    runs: pd.DataFrame,
    pairs: Mapping[str, Sequence[float]],
    terms: Sequence[str],
    unit: str,
    points: Sequence[MapPoint],
    seeds: int,
) -> str:
    """The content of ``map.md``: the best and the worst pair, the other points, and the cost."""
    rows = [("weights", *terms, "linear probe", "k-NN")]
    means = runs[runs["method"].isin(pairs)].groupby("method")[["linear", "knn"]].mean()
    means = means.dropna().sort_values("linear", ascending=False)
    if len(means):
        for name, which in (("best of the map", 0), ("median of the map", len(means) // 2),
                            ("worst of the map", len(means) - 1)):  # fmt: skip
            pair = pairs[str(means.index[which])]
            found = [f"{each:.2f}" for each in means.iloc[which]]
            rows.append((name, *(f"{each:g}" for each in pair), *found))
    for point in points:
        ends = ["-", "-"] if not point.path else [f"{each:.3g}" for each in point.path[-1]]
        named = point.name if len(point.path) < 2 else f"{point.name}, at its end"
        rows.append(
            (named, *ends, *(format_number(each, ".2f") for each in point.accuracies.values()))
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'---|' * len(rows[0])}")
    failed = int((runs["reason"] != "").sum())
    note = (
        f"Weights relative to that of {unit}; top-1 in percent, mean over {seeds} seed"
        f"{'s' if seeds > 1 else ''}. The map took {len(pairs)} runs for each seed, any other row "
        "one."
    )
    if failed:
        note += f" {failed} of {len(runs)} runs failed: see map.csv and logs/."
    return "\n".join([*lines, "", note]) + "\n"
