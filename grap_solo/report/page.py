"""Writes a report on runs: pictures, and one page that shows them and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from grap_solo.errors import ConfigError
from grap_solo.records.files import PICTURE_FILE, SUMMARY_FILE, make_folder
from grap_solo.records.runs import MEASURES, counted, is_run
from grap_solo.records.weights import format_weight
from grap_solo.report.groups import Group, Summary, folder_names, read_recorded, to_float
from grap_solo.report.plots import term_colors
from grap_solo.report.sections import (
    DASH,
    Section,
    Table,
    accuracy_section,
    alignment_section,
    collapse_section,
    gramian_section,
    skipped_section,
    weights_section,
)

PAGE_FILE = "report.html"
TEMPLATE = "report.html.j2"


def _summary_section(summaries: Sequence[Summary]) -> Section:
    section = Section("summary", "Summary")
    titles = folder_names(each.folder for each in summaries)
    for each in summaries:
        section.tables += _tables(each, titles[each.folder] if len(summaries) > 1 else "")
    columns = {column for each in summaries for column in each.columns}
    said = {
        "linear_std": "accuracies (top-1 in percent) and RankMe are means ± standard deviations "
        "over the runs",
        "cost": "cost is the training time divided by that of fixed weights, from steps timed in "
        "turns (median, and minimum to maximum); it includes the run that a method starts from",
        "p_value": "p is the p-value of Welch's t-test of the linear probe against fixed weights, "
        "two-sided and corrected by Holm's method",
    }
    parts = [words for column, words in said.items() if column in columns]
    if not any(each.written for each in summaries):
        parts.append("a weight is the median over a run's steps, averaged over the runs")
    source = f"as in {SUMMARY_FILE}" if all(each.written for each in summaries) else "as recorded"
    section.caption = f"The methods, {'; '.join([source, *parts])}."
    return section


def _tables(summary: Summary, title: str) -> list[Table]:
    """Lays a summary out for reading: means with deviations, costs with ranges.

    The weights get a table of their own, since one table would be too wide.
    """
    joined = {
        f"{column.removesuffix('_mean')}_std" for column in summary.columns if "_mean" in column
    }
    shown = [each for each in summary.columns if each not in {"cost_min", "cost_max", *joined}]
    weights = [each for each in shown if each.startswith("weight/")]
    measures = [each for each in shown if each not in weights]
    parts = [(measures, title)]
    if weights:
        parts.append(([measures[0], *weights], f"{title}: weights" if title else "Weights"))
    return [
        Table(
            [_column_name(column) for column in columns],
            [[_cell(row, column) for column in columns] for row in summary.rows],
            caption,
        )
        for columns, caption in parts
    ]


def _column_name(column: str) -> str:
    key = column.removesuffix("_mean")
    if column.startswith("weight/"):
        return column.removeprefix("weight/")
    return "p" if column == "p_value" else MEASURES.get(key, key)


def _cell(row: Mapping[str, str], column: str) -> str:
    """Formats a cell: a number with two decimals, any other text unchanged."""
    text = row.get(column, "")
    value = to_float(text)
    if text in ("", "nan", "None"):
        return DASH
    measured = column.endswith("_mean") or column == "cost" or column.startswith("weight/")
    if np.isnan(value) or (text.isdigit() and not measured):
        return text
    if column == "p_value":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    spread = to_float(row.get(column.removesuffix("_mean") + "_std"))
    if column.endswith("_mean") and not np.isnan(spread):
        return f"{value:.2f} ± {spread:.2f}"
    if column.startswith("weight/"):
        return format_weight(value)
    low, high = to_float(row.get("cost_min")), to_float(row.get("cost_max"))
    if column == "cost" and high > low:
        return f"{value:.2f} ({low:.2f}{DASH}{high:.2f})"
    return f"{value:.2f}"


def report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Draws runs and writes ``report.html``, a self-contained page, beside the pictures.

    Args:
        folders: run folders, and folders of runs such as a comparison's.
        output: the folder to write to; made if it is absent.

    Returns:
        The files written.

    Raises:
        ConfigError: a folder without a run, a damaged file, or an output that cannot be written.
    """
    recorded = read_recorded(folders)
    groups, summaries = recorded.groups, recorded.summaries
    _make_output(output)
    colors = term_colors([term for group in groups for term in group.terms])
    sections = [
        weights_section(groups, colors, output),
        alignment_section(groups, colors, output),
        gramian_section(groups, output),
        collapse_section(groups, output),
        accuracy_section(summaries, output),
        skipped_section(groups),
        _summary_section(summaries),
    ]
    page = output / PAGE_FILE
    page.write_text(_render(folders, groups, sections, recorded.empty), encoding="utf-8")
    files = [*(each.picture for each in sections if each.picture is not None), page]
    print("files:", ", ".join(str(file) for file in files))
    return files


def _make_output(output: Path) -> None:
    if is_run(output):
        raise ConfigError(
            f"{output}: is a run folder, and its {PICTURE_FILE} would be overwritten: "
            "give another folder for the report"
        )
    make_folder(output, "--output")


def _render(
    folders: Sequence[Path],
    groups: Sequence[Group],
    sections: Sequence[Section],
    empty: Sequence[Path],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(embed=_embed, css_width=_css_width)
    count = sum(len(group.runs) for group in groups)
    return environment.get_template(TEMPLATE).render(
        lead=f"{counted(len(groups), 'method')}, {counted(count, 'run')}",
        folders=[str(folder) for folder in folders],
        overview=_overview(groups),
        sections=sections,
        runs=[str(run.folder) for group in groups for run in group.runs],
        empty=[str(path) for path in empty],
    )


def _overview(groups: Sequence[Group]) -> Table:
    """Builds the table of what was run: a row for each group."""
    rows = []
    for group in groups:
        dataset, epochs, terms = group.runs[0].setting()
        seeds = sorted({run.seed for run in group.runs if run.seed is not None})
        rows.append(
            [
                group.label,
                group.runs[0].rule or DASH,
                dataset or DASH,
                epochs.removesuffix(" epochs") or DASH,
                terms or DASH,
                str(len(group.runs)),
                ", ".join(map(str, seeds)) or DASH,
            ]
        )
    columns = ["method", "weighting", "data", "epochs", "terms", "runs", "seeds"]
    return Table(columns, rows)


def _embed(picture: Path) -> str:
    """Encodes a picture as a ``data:`` address for ``img``."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _css_width(picture: Path) -> int:
    """Returns half of a PNG's width, which its bytes 16 to 19 hold: pictures have double size."""
    return int.from_bytes(picture.read_bytes()[16:20], "big") // 2
