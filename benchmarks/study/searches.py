"""Computes from the runs of a map which weights a search would keep.

    python benchmarks/study/searches.py docs/results/study/map-cifar10/map.csv

A search of N runs tries N pairs of weights of the map, and keeps the one with the best online
probe. The table has the mean over many searches of what is kept, and how often its linear probe is
at least as good as a given accuracy (``--beats``). ``random`` draws N different pairs: its means
are over all draws, and exact. ``TPE`` is Optuna's sampler with its defaults, which are those of
``grap-solo search``; it chooses among the map's pairs, over :data:`SEARCHES` seeds.
"""

from __future__ import annotations

import argparse
from math import comb
from pathlib import Path

import numpy as np
import optuna
import pandas as pd

from grap_solo.cli import exit_on_refusal
from grap_solo.errors import ConfigError
from grap_solo.records.runs import MEASURES

RUNS = (1, 4, 8, 16)
SEARCHES = 200


def chances(count: int, drawn: int) -> np.ndarray:
    """The chance of each of ``count`` pairs, best first, to be the best of ``drawn`` of them."""
    ways = [comb(count - 1 - rank, drawn - 1) for rank in range(count)]
    return np.array(ways) / comb(count, drawn)


def kept_by_tpe(pairs: pd.DataFrame, runs: int, seed: int) -> list[int]:
    """The place of the best pair of the first 1, 2, ... ``runs`` trials of one search.

    Args:
        pairs: best online probe first; its index has the two weights.
        runs: the number of trials.
        seed: the sampler's.
    """
    levels = [sorted(set(pairs.index.get_level_values(each))) for each in (0, 1)]
    places = {pair: place for place, pair in enumerate(pairs.index)}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    best: list[int] = []
    for _ in range(runs):
        trial = study.ask()
        chosen = [
            each[trial.suggest_int(f"{k}", 0, len(each) - 1)] for k, each in enumerate(levels)
        ]
        place = places.get(tuple(chosen), len(pairs))  # A pair that failed is the worst.
        study.tell(trial, place)
        best.append(min([place, *best[-1:]]))
    return best


def search_table(runs: pd.DataFrame, beats: float) -> str:
    """A Markdown table of searches of :data:`RUNS` runs, and of all pairs.

    Args:
        runs: a map's runs; a pair's seeds are averaged.
        beats: a linear probe's top-1 in percent.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pairs = runs.groupby(list(runs.columns[:2]))[list(MEASURES)].mean().dropna()
    pairs = pairs.sort_values("online", ascending=False)
    sizes = [each for each in RUNS if each < len(pairs)]
    kept = np.array([kept_by_tpe(pairs, max(sizes), seed) for seed in range(SEARCHES)])
    rows = [("random", drawn, chances(len(pairs), drawn)) for drawn in (*sizes, len(pairs))]
    for drawn in sizes[1:]:
        counts = np.bincount(kept[:, drawn - 1], minlength=len(pairs))
        found = counts[: len(pairs)]  # Leaves out a search whose pairs have all failed.
        rows.append(("TPE", drawn, found / found.sum()))
    header = ("search", "runs", *MEASURES.values(), f"linear probe ≥ {beats:g}")
    lines = [header, ("---",) * len(header)]
    for name, drawn, chance in rows:
        means = [f"{chance @ pairs[measure].to_numpy():.2f}" for measure in MEASURES]
        share = 100 * chance @ (pairs["linear"] >= beats).to_numpy()
        lines.append((name, str(drawn), *means, f"{share:.0f} %"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("map", type=Path, help="a map's map.csv")
    parser.add_argument("--beats", type=float, default=100.0, help="an accuracy in percent")
    given = parser.parse_args()
    if not given.map.is_file():
        raise ConfigError(f"{given.map}: no such file: give a map's map.csv")
    print(search_table(pd.read_csv(given.map), given.beats))


if __name__ == "__main__":
    with exit_on_refusal():
        main()
