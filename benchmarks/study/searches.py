"""What a random search of the weights finds, computed from the runs of a map.

    python benchmarks/study/searches.py docs/results/study/map-cifar10/map.csv

A search of N runs draws N different pairs of weights from the map, and keeps the one with the best
online probe. The table has the mean over all such draws of what is kept, and how often it is at
least as good as a given accuracy (``--beats``).
"""

from __future__ import annotations

import argparse
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd

from grap_solo.records.runs import MEASURES

RUNS = (1, 4, 8, 16)


def chances(count: int, drawn: int) -> np.ndarray:
    """The chance of each of ``count`` pairs, best first, to be the best of ``drawn`` of them."""
    ways = [comb(count - 1 - rank, drawn - 1) for rank in range(count)]
    return np.array(ways) / comb(count, drawn)


def search_table(runs: pd.DataFrame, beats: float) -> str:
    """A Markdown table of searches of :data:`RUNS` runs, and of all pairs.

    Args:
        runs: a map's runs; a pair's seeds are averaged.
        beats: a linear probe's top-1 in percent.
    """
    terms = list(runs.columns[:2])
    pairs = runs.groupby(terms)[list(MEASURES)].mean().dropna()
    pairs = pairs.sort_values("online", ascending=False)
    header = ("runs", *MEASURES.values(), f"linear probe ≥ {beats:g}")
    lines = [header, ("---",) * len(header)]
    for drawn in (*(each for each in RUNS if each < len(pairs)), len(pairs)):
        chance = chances(len(pairs), drawn)
        means = [f"{chance @ pairs[measure].to_numpy():.2f}" for measure in MEASURES]
        share = 100 * chance @ (pairs["linear"] >= beats).to_numpy()
        lines.append((str(drawn), *means, f"{share:.0f} %"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("map", type=Path, help="a map's map.csv")
    parser.add_argument("--beats", type=float, default=100.0, help="an accuracy in percent")
    given = parser.parse_args()
    print(search_table(pd.read_csv(given.map), given.beats))


if __name__ == "__main__":
    main()
