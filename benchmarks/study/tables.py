"""Writes the tables of the study's finished runs.

    python benchmarks/study/tables.py [--runs runs/study] [--out docs/results/study]

For each method and data set it writes ``<method>-<data>.csv``, a row for each run, and prints a
Markdown table: mean and sample standard deviation over the seeds, those that variants were chosen
on (below 10) and those that confirm (from 11 on) apart. What stage transfer changed has a file and
a table of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from study import TRANSFER

from grap_solo.cli import exit_on_refusal
from grap_solo.errors import ConfigError
from grap_solo.records.runs import MEASURES
from grap_solo.records.weights import format_weight


def read_runs(folder: Path) -> pd.DataFrame:
    """One row for each run: the study's method, its data set and what of it was changed, the stage,
    the variant, the seed, the measures, seconds, and the median effective weight of each term."""
    rows = []
    for file in sorted(folder.glob("*/*/result.json")):
        method, data, stage = file.parts[-3].split("-", 2)
        if stage in TRANSFER:
            data = f"{data}-{stage}"
        result = json.loads(file.read_text())
        weights = {f"weight/{term}": value for term, value in result.pop("weights").items()}
        variant = result.pop("method")
        rows.append(
            {"base": method, "data": data, "stage": stage, "variant": variant, **result, **weights}
        )
    return pd.DataFrame(rows)


def write_table(runs: pd.DataFrame) -> str:
    """A Markdown table of one method's runs on one data set."""
    weights = [name for name in runs if name.startswith("weight/") and runs[name].notna().any()]
    terms = [name.removeprefix("weight/") for name in weights]
    lines = [["variant", "seeds", *MEASURES.values(), *terms]]
    runs = runs.assign(confirms=runs["seed"] > 10).sort_values("confirms", kind="stable")
    for (_, variant), mine in runs.groupby(["confirms", "variant"], sort=False):
        seeds = ", ".join(str(seed) for seed in sorted(mine["seed"]))
        cells = []
        for measure in MEASURES:
            spread = f" ± {mine[measure].std():.2f}" if len(mine) > 1 else ""
            cells.append(f"{mine[measure].mean():.2f}{spread}")
        cells += [format_weight(mine[name].mean()) for name in weights]
        lines.append([str(variant), seeds, *cells])
    rule = "|".join(["---"] * len(lines[0]))
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], f"|{rule}|", *rows[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/study"))
    given = parser.parse_args()
    runs = read_runs(given.runs)
    if runs.empty:
        raise ConfigError(f"--runs: {given.runs} has no finished run of the study")
    given.out.mkdir(parents=True, exist_ok=True)
    order = runs.sort_values(["stage", "seed"], kind="stable").drop_duplicates(
        ["base", "data", "variant", "seed"]  # A stage may repeat another's runs.
    )
    for (base, data), mine in order.groupby(["base", "data"]):
        filled = mine.dropna(axis="columns", how="all")
        filled.to_csv(given.out / f"{base}-{data}.csv", index=False, float_format="%.6g")
        print(f"\n{base}, {data}\n\n{write_table(mine)}")


if __name__ == "__main__":
    with exit_on_refusal():
        main()
