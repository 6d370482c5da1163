"""The columns of tables of images: which of them hold images and labels, and labels as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from grap_solo.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS, LABEL_COLUMN = ("img", "image"), "label"
MOST_CLASSES = 1_000_000
"""Labels count classes from 0: one beyond this is an identifier, not a class."""


def choose_column(
    names: Sequence[str], given: str | None, key: str, usual: Sequence[str], where: str
) -> str:
    """The name of the column for images or for labels.

    Args:
        names: the columns that there are.
        given: the name that the configuration gives; None for a usual name.
        key: the configuration's key.
        usual: the usual names, the first one that is there counts.
        where: the file, for the errors.

    Raises:
        ConfigError: there is no such column.
    """
    for name in usual if given is None else [given]:
        if name in names:
            return name
    wanted = " or ".join(f"'{name}'" for name in (usual if given is None else [given]))
    labels = ", or data.no_labels=True" if key == "data.label_key" else ""
    raise ConfigError(
        f"{where}: no column {wanted} among {', '.join(map(str, names))}: set {key} to the one "
        f"that is meant{labels}"
    )


def check_image_column(schema: pyarrow.Schema, name: str, where: str) -> None:
    """Refuses a column that is no struct with encoded ``bytes``.

    Raises:
        ConfigError: such a column.
    """
    from pyarrow import types

    kind = schema.field(name).type
    found = f"it is of type {kind}"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = kind.field("bytes").type
        found = f"its 'bytes' are of type {inner}, not binary"
        tests = (
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
        )
        if any(test(inner) for test in tests):
            return
    raise ConfigError(
        f"{where}: its column '{name}' is no column of images (a struct with encoded 'bytes'): "
        f"{found}: store the images so, or set data.image_key to another column"
    )


def number_labels(
    labels: pyarrow.Array | pyarrow.ChunkedArray, where: str, describe: Callable[[int], str]
) -> tuple[np.ndarray, list[str] | None]:
    """Numbers the labels of a column; -1 for an image without a label.

    A label is a whole number of 0 or more, or a text; texts are numbered in their sorted order. An
    image whose label is null or -1 is unlabelled.

    Args:
        labels: the column, N rows.
        where: the file, for the errors.
        describe: names a row, for the errors.

    Returns:
        The numbers, shape (N,), and the classes' names; None where the labels are numbers.

    Raises:
        ConfigError: a label is not a class; the text names the first such row.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(labels, pyarrow.ChunkedArray):
        labels = labels.combine_chunks()
    if types.is_dictionary(labels.type):
        labels = labels.dictionary_decode()
    text = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(test(labels.type) for test in text):
        return _whole_labels(labels, where, describe), None
    texts = labels.to_pylist()
    names = sorted({text for text in texts if text is not None})
    number = {name: label for label, name in enumerate(names)}
    return np.array([number.get(text, -1) for text in texts], dtype=np.int64), names


def read_numbers(
    column: pyarrow.Array | pyarrow.ChunkedArray,
    where: str,
    describe: Callable[[int], str],
    only: tuple[float, ...] = (),
) -> np.ndarray:
    """The numbers of a column, float32 of shape (N,); NaN where one is null or NaN.

    Args:
        column: the column, N rows.
        where: the configuration's key, and the column, for the errors.
        describe: names a row, for the errors.
        only: the numbers that are allowed; empty for all.

    Raises:
        ConfigError: a value is no finite number, or another one than ``only``; the text names the
            first such row.
    """
    from pyarrow import ChunkedArray, float64, int8, types

    if isinstance(column, ChunkedArray):
        column = column.combine_chunks()
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_boolean(column.type):
        column = column.cast(int8())
    if types.is_null(column.type):
        return np.full(len(column), np.nan, np.float32)
    wanted = " or ".join(f"{each:g}" for each in only) or "a finite number"
    fix = f"give {wanted} in each row, or nothing where it is unknown"
    if not (types.is_integer(column.type) or types.is_floating(column.type)):
        texts = [str(each) for each in column.to_pylist() if each is not None]
        odd = next((each for each in texts if not _is_number(each)), texts[0] if texts else "")
        raise ConfigError(f"{where} holds no numbers, but values such as {odd!r}: {fix}")
    missing = column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    exact = column.cast(float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # Refused below.
        values = np.where(missing, np.nan, exact).astype(np.float32)
    wrong = ~missing & (~np.isin(values, only) if only else ~np.isfinite(values))
    if wrong.any():
        row = int(wrong.argmax())
        raise ConfigError(f"{where} has {column[row]} at {describe(row)}: {fix}")
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole_labels(labels: pyarrow.Array, where: str, describe: Callable[[int], str]) -> np.ndarray:
    """Labels as whole numbers (N,): see :func:`number_labels`."""
    from pyarrow import float64, int8, types

    if types.is_null(labels.type):
        return np.full(len(labels), -1)
    if types.is_boolean(labels.type):
        labels = labels.cast(int8())
    if not (types.is_integer(labels.type) or types.is_floating(labels.type)):
        raise ConfigError(
            f"{where}: its labels are of type {labels.type}: give whole numbers or texts"
        )
    missing = labels.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    values = labels.cast(float64(), safe=False).to_numpy(zero_copy_only=False)
    values = np.where(missing, -1, values)
    wrong = (values != np.floor(values)) | (values < -1) | (values >= MOST_CLASSES)
    if wrong.any():
        row = int(wrong.argmax())
        raise ConfigError(
            f"{describe(row)}: its label is {labels[row]}: give whole numbers "
            f"from 0 on, below {MOST_CLASSES:,}; -1 or null for an image without a label"
        )
    return values.astype(np.int64)
