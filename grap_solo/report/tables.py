"""Tables as files and as text, and the statistics of a comparison's table."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind
from statsmodels.stats.multitest import multipletests

from grap_solo.records.files import SUMMARY_FILE
from grap_solo.records.runs import MEASURES
from grap_solo.records.weights import format_weight

MISSING = "-"
"""The cell of a table that has no value."""

BASELINE = "fixed"
"""The method that costs and p-values compare with."""


def table_of_runs(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Makes one row for each run: method, seed, the measures, seconds, ``reason``, which says why
    the run failed and is empty if it did not, and ``weight/<term>``.

    Args:
        results: each run's ``result.json``; of a failed run its method, seed and reason.
    """
    rows = []
    for result in results:
        plain = {key: value for key, value in result.items() if key != "weights"}
        weights = {f"weight/{term}": w for term, w in result.get("weights", {}).items()}
        rows.append({"reason": "", **plain, **weights})
    columns = ["method", "seed", *MEASURES, "seconds", "reason"]
    frame = pd.DataFrame(rows).reindex(columns=list(dict.fromkeys([*columns, *_weights(rows)])))
    for measure in MEASURES:  # A run may lack some: None.
        frame[measure] = pd.to_numeric(frame[measure])
    return frame


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for row in rows for key in row if key.startswith("weight/")]


def table_of_methods(
    runs: pd.DataFrame, methods: Sequence[str], costs: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """Makes one row for each method: runs, failed runs, mean and sample standard deviation of the
    metrics, training cost relative to ``fixed``, p-value, and mean weights.

    ``p_value`` compares the linear probe with that of ``fixed`` by Welch's two-sided t-test,
    corrected over all methods of the table by Holm (1979). It is NaN where either method has fewer
    than two runs, or where neither varies.

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
        for metric in MEASURES:
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
    """Computes the corrected p-value of each method: see :func:`table_of_methods`."""
    linear = {
        method: runs.loc[(runs["method"] == method) & (runs["reason"] == ""), "linear"]
        .dropna()
        .to_numpy()
        for method in {*methods, BASELINE}
    }
    base = linear[BASELINE]
    raw = np.full(len(methods), np.nan)
    for i, method in enumerate(methods):
        mine = linear[method]
        varies = len(mine) and len(base) and (np.ptp(mine) > 0 or np.ptp(base) > 0)
        if method != BASELINE and min(len(mine), len(base)) > 1 and varies:
            raw[i] = ttest_ind(mine, base, equal_var=False).pvalue
    tested = np.isfinite(raw)
    if tested.any():
        raw[tested] = multipletests(raw[tested], method="holm")[1]
    return [float(each) for each in raw]


def write_summary(directory: Path, runs: pd.DataFrame, methods: pd.DataFrame, notes: str) -> str:
    """Writes a comparison's ``runs.csv``, ``summary.csv`` and ``summary.md``.

    Args:
        directory: the comparison's folder.
        runs: see :func:`table_of_runs`.
        methods: see :func:`table_of_methods`.
        notes: the text below the table.

    Returns:
        The text of ``summary.md``.
    """
    runs.to_csv(directory / "runs.csv", index=False, float_format="%.6g")
    methods.to_csv(directory / SUMMARY_FILE, index=False, float_format="%.6g")
    weights = [column for column in methods if column.startswith("weight/")]
    header = ["method", "runs", *MEASURES.values(), "cost", "p"]
    header += [column.removeprefix("weight/") for column in weights]
    rows = [header]
    for _, row in methods.iterrows():
        count = f"{row['runs']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        cells = [row["method"], count]
        cells += [_mean_and_std(row, metric) for metric in MEASURES]
        cells += [format_number(row["cost"], ".2f"), format_number(row["p_value"], ".3f")]
        rows.append(cells + [_weight(row[column]) for column in weights])
    parts = [markdown(rows), notes]
    failed = runs[runs["reason"] != ""]
    if len(failed):
        lines = [["failed run", "reason"]]
        lines += [[f"{r['method']}, seed {r['seed']}", r["reason"]] for _, r in failed.iterrows()]
        parts.append(markdown(lines))
    return write_text(directory / "summary.md", *parts)


def write_csv(file: Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes rows of texts, the header first, as a CSV file."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)


def write_text(file: Path, *parts: str) -> str:
    """Writes tables and notes with an empty line between them; returns the file's text."""
    text = "\n\n".join(parts) + "\n"
    file.write_text(text, encoding="utf-8")
    return text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table that lines up in plain text, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    first, *rest = widths
    rule = "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)]) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def format_number(value: float | None, form: str, missing: str = MISSING) -> str:
    """Formats a number such as ``.2f`` says, or a missing one (None or NaN) as ``missing``."""
    return missing if pd.isna(value) else format(value, form)


def format_weights(
    weights: Mapping[str, float] | None, terms: Sequence[str], form: str
) -> list[str]:
    """Formats the weight of each term; all are missing when there are no weights."""
    values = [None if weights is None else weights[term] for term in terms]
    return [format_number(value, form) for value in values]


def _mean_and_std(row: pd.Series, metric: str) -> str:
    mean, std = (row[f"{metric}_{part}"] for part in ("mean", "std"))
    return format_number(mean, ".2f") + ("" if pd.isna(std) else f" ± {std:.2f}")


def _weight(value: float) -> str:
    return MISSING if pd.isna(value) else format_weight(value)
