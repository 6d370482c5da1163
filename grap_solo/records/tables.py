"""CSV files of a run folder, read back: a damaged file is one line that names the row."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from grap_solo.errors import ConfigError


class StepTable(NamedTuple):
    """A table with a row for each optimiser step.

    Attributes:
        names: the names of the columns of numbers, without ``step`` and ``epoch``.
        steps: the step and the epoch of each row, (N, 2).
        numbers: (N, len(names)).
        texts: the cells of the column of texts, (N,); empty texts without such a column.
    """

    names: list[str]
    steps: np.ndarray
    numbers: np.ndarray
    texts: list[str]


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Reads a small CSV file: its header and its rows, all as texts.

    Raises:
        ConfigError: not a CSV file, an empty one, or a row that is longer or shorter than the
            header.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path}: damaged: not a CSV file: remove it or run again") from None
    if not header:
        raise ConfigError(f"{path}: damaged: it is empty: remove it or run again")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ConfigError(
                f"{path}: damaged: row {number} has {len(row)} values for {len(header)} columns: "
                "remove that row"
            )
    return header, rows


def read_steps(path: Path, text: str = "", allow_empty: bool = False) -> StepTable:
    """Reads a CSV file that starts with the columns ``step,epoch``.

    pandas reads a healthy file in one fast pass. Otherwise the file is read again, row by row, to
    say where it is damaged.

    Args:
        path: the file.
        text: the name of the column that holds texts, if there may be one.
        allow_empty: read an empty cell as NaN instead of raising.

    Raises:
        ConfigError: not such a file, an incomplete row, or a cell that is not a number.
    """
    first, _, body = path.read_bytes().partition(b"\n")
    header = _read_header(path, first)
    places = [place for place, name in enumerate(header) if name != text]
    missing = ["nan", "NaN", *([""] if allow_empty else [])]
    try:
        frame = _parse(body, len(header), places, missing)
    except (ValueError, pd.errors.ParserWarning):
        frame = pd.DataFrame(_check_rows(path, places, missing), columns=range(len(header)))
    table = frame[places].to_numpy(dtype=float)
    texts = frame[header.index(text)].str.strip().tolist() if text in header else [""] * len(frame)
    names = [header[place] for place in places[2:]]
    return StepTable(names, table[:, :2].astype(int), table[:, 2:], texts)


def _read_header(path: Path, line: bytes) -> list[str]:
    try:
        header = next(csv.reader([line.decode("utf-8")]), [])
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path}: damaged: not a CSV file: remove it or run again") from None
    if not header:
        raise ConfigError(f"{path}: damaged: it is empty: remove it or run again")
    if header[:2] != ["step", "epoch"]:
        raise ConfigError(
            f"{path}: damaged: expected 'step,epoch' as its first columns: remove it or run again"
        )
    return header


def _parse(body: bytes, columns: int, numbers: list[int], missing: list[str]) -> pd.DataFrame:
    """Reads the rows below the header; the columns are named by their places.

    Raises:
        ValueError: an incomplete row, a cell that is not a number, or rows too unusual to tell.
        ParserWarning: a row that is too long.
    """
    # pandas fills a short row up without a word: count the separators.
    if body.count(b",") != (columns - 1) * (body.count(b"\n") + (not body.endswith(b"\n"))):
        raise ValueError
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(
            io.BytesIO(body),
            header=None,
            names=range(columns),
            index_col=False,
            dtype={place: float if place in numbers else str for place in range(columns)},
            keep_default_na=False,
            na_values={place: missing for place in numbers},
            skip_blank_lines=False,
            engine="c",
        )
    if not (frame[numbers[:2]] % 1 == 0).all(axis=None):  # Whole and finite.
        raise ValueError
    return frame


def _check_rows(path: Path, numbers: list[int], missing: list[str]) -> list[list[Any]]:
    """Reads the rows one by one, numbers as such.

    Raises:
        ConfigError: see :func:`read_steps`; it names the first damaged row.
    """
    header, rows = read_table(path)
    checked: list[list[Any]] = [list(row) for row in rows]
    for row_number, row in enumerate(checked, start=2):
        for place in numbers:
            cell = row[place]
            try:
                row[place] = float("nan" if cell in missing else cell)
                whole = place > 1 or row[place].is_integer()
            except ValueError:
                whole = False
            if not whole:
                kind = "numeric" if place > 1 else "a whole number"
                raise ConfigError(
                    f"{path}: damaged: row {row_number}: {header[place]} is {cell!r}, not {kind}: "
                    "remove that row"
                )
    return checked


def check_ascending(path: Path, epochs: np.ndarray) -> np.ndarray:
    """Returns the epochs of a file's rows, (N,).

    Raises:
        ConfigError: they do not ascend from 0 or more.
    """
    if epochs[0] < 0 or (np.diff(epochs) < 0).any():
        raise ConfigError(
            f"{path}: damaged: its epochs do not ascend: remove the rows out of order"
        )
    return epochs
