"""The table of a comparison: every method's runs as mean and standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind
from statsmodels.stats.multitest import multipletests

from grap_solo.records.weights import format_weight

METRICS = {"online": "online probe", "linear": "linear probe", "knn": "k-NN", "rankme": "RankMe"}
BASE = "fixed"


def table_of_runs(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each run: method, seed, the metrics, ``weight/<term>``, seconds, and ``reason``,
    why it failed (empty if it did not).

    Args:
        results: the runs' ``result.json``, or for a failed one its method, seed and reason.
    """
    rows = []
    for result in results:
        plain = {key: value for key, value in result.items() if key != "weights"}
        weights = {f"weight/{term}": w for term, w in result.get("weights", {}).items()}
        rows.append({"reason": "", **plain, **weights})
    columns = ["method", "seed", *METRICS, "seconds", "reason"]
    frame = pd.DataFrame(rows).reindex(columns=list(dict.fromkeys([*columns, *_weights(rows)])))
    frame["online"] = pd.to_numeric(frame["online"])
    return frame


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for row in rows for key in row if key.startswith("weight/")]


def table_of_methods(
    runs: pd.DataFrame, methods: Sequence[str], costs: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """One row for each method: runs, failed runs, mean and standard deviation (of a sample) of
    the metrics, the cost of its training by that of ``fixed``, the significance, the mean weights.

    ``p_value`` is of Welch's t-test of the linear probe against ``fixed``, two-sided, corrected
    over all methods of the table by Holm (1979). It is NaN where either has fewer than two runs,
    or where neither varies.

    Args:
        runs: see :func:`table_of_runs`.
        methods: the rows, in order.
        costs: ``median``, ``min`` and ``max`` by method.
    """
    rows: list[dict[str, Any]] = []
    for method in methods:
        mine = runs[runs["method"] == method]
        done = mine[mine["reason"] == ""]
        row: dict[str, Any] = {"method": method, "runs": len(done), "failed": len(mine) - len(done)}
        for metric in METRICS:
            row[f"{metric}_mean"] = done[metric].mean()
            row[f"{metric}_std"] = done[metric].std()
        cost = costs.get(method, {})
        row["cost"] = cost.get("median", np.nan)
        row["cost_min"], row["cost_max"] = cost.get("min", np.nan), cost.get("max", np.nan)
        row["p_value"] = np.nan
        for column in runs.columns[runs.columns.str.startswith("weight/")]:
            row[column] = done[column].mean()
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p_value"] = p_values(runs, methods)
    return table


def p_values(runs: pd.DataFrame, methods: Sequence[str]) -> list[float]:
    """The corrected p-value of each method: see :func:`table_of_methods`."""
    linear = {
        method: runs.loc[(runs["method"] == method) & (runs["reason"] == ""), "linear"].to_numpy()
        for method in {*methods, BASE}
    }
    base = linear[BASE]
    raw = np.full(len(methods), np.nan)
    for i, method in enumerate(methods):
        mine = linear[method]
        varies = len(mine) and len(base) and (np.ptp(mine) > 0 or np.ptp(base) > 0)
        if method != BASE and min(len(mine), len(base)) > 1 and varies:
            raw[i] = ttest_ind(mine, base, equal_var=False).pvalue
    tested = np.isfinite(raw)
    if tested.any():
        raw[tested] = multipletests(raw[tested], method="holm")[1]
    return [float(each) for each in raw]


def write_summary(directory: Path, runs: pd.DataFrame, methods: pd.DataFrame, notes: str) -> str:
    """Writes ``runs.csv``, ``summary.csv`` and ``summary.md``; returns what the last one holds.

    Args:
        directory: where to.
        runs: see :func:`table_of_runs`.
        methods: see :func:`table_of_methods`.
        notes: what stands below the table.
    """
    runs.to_csv(directory / "runs.csv", index=False, float_format="%.6g")
    methods.to_csv(directory / "summary.csv", index=False, float_format="%.6g")
    weights = [column for column in methods if column.startswith("weight/")]
    header = ["method", "runs", *METRICS.values(), "cost", "p"]
    header += [column.removeprefix("weight/") for column in weights]
    rows = [header]
    for _, row in methods.iterrows():
        count = f"{row['runs']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        cells = [row["method"], count]
        cells += [_mean_and_std(row, metric) for metric in METRICS]
        cells += [_number(row["cost"], "{:.2f}"), _number(row["p_value"], "{:.3f}")]
        rows.append(cells + [_weight(row[column]) for column in weights])
    text = f"{markdown(rows)}\n\n{notes}\n"
    failed = runs[runs["reason"] != ""]
    if len(failed):
        lines = [["failed run", "reason"]]
        lines += [[f"{r['method']}, seed {r['seed']}", r["reason"]] for _, r in failed.iterrows()]
        text += f"\n{markdown(lines)}\n"
    (directory / "summary.md").write_text(text)
    return text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text: the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    first, *rest = widths
    rule = "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)]) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def _mean_and_std(row: pd.Series, metric: str) -> str:
    mean = _number(row[f"{metric}_mean"], "{:.2f}")
    std = _number(row[f"{metric}_std"], " ± {:.2f}")
    return mean if std == "-" else mean + std


def _weight(value: float) -> str:
    return "-" if pd.isna(value) else format_weight(value)


def _number(value: float, form: str) -> str:
    return "-" if pd.isna(value) else form.format(value)
