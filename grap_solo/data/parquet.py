"""Images in Parquet files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grap_solo.data.images import Images, Sample, open_rgb
from grap_solo.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

MOST_CLASSES = 1_000_000
"""Labels count classes from 0: one beyond this is an identifier, not a class."""


class Parquet(Images):
    """A Parquet file with columns ``img`` (a struct with encoded ``bytes``) and ``label``.

    Keeps the encoded images in memory and decodes an image on access. A label is a whole number of
    0 or more, or a text; texts are numbered in their sorted order. An image whose label is null or
    -1 is unlabelled.

    Args:
        path: the file.

    Raises:
        ConfigError: if it is not such a file, or a label is not a class.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        self.path = path
        try:
            table = pyarrow.parquet.read_table(path, columns=["img", "label"])
            self.encoded = pyarrow.compute.struct_field(table["img"], "bytes")
            if not _is_bytes(self.encoded.type):
                raise TypeError(f"the images' 'bytes' are of type {self.encoded.type}, not binary")
            labels = table["label"].combine_chunks()
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{path}: not a Parquet file with columns 'img' (with 'bytes') and 'label': {line}"
            ) from None
        if pyarrow.types.is_dictionary(labels.type):
            labels = labels.dictionary_decode()
        if _is_text(labels.type):
            self._number_texts(labels)
        else:
            self.targets = _whole_labels(labels, path)

    def _number_texts(self, labels: pyarrow.Array) -> None:
        texts = labels.to_pylist()
        self.class_names = sorted({text for text in texts if text is not None})
        self.classes = len(self.class_names)
        number = {name: label for label, name in enumerate(self.class_names)}
        self.targets = np.array([number.get(text, -1) for text in texts], dtype=np.int64)

    def __getitem__(self, index: int) -> Sample:
        data = self.encoded[index].as_py()
        if data is None:
            raise ValueError("it is null")
        return open_rgb(io.BytesIO(data)), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"{self.path}, row {index} (the first is 0)"

    def stored_size(self, index: int) -> int:
        data = self.encoded[index]
        return len(data.as_buffer()) if data.is_valid else 0


def _is_bytes(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    tests = (
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)
    )


def _whole_labels(labels: pyarrow.Array, path: Path) -> np.ndarray:
    """Labels as whole numbers (N,); -1 for an unlabelled image.

    Raises:
        ConfigError: if a label is not a class; the text names the first such row.
    """
    from pyarrow import float64, int8, types

    if types.is_null(labels.type):
        return np.full(len(labels), -1)
    if types.is_boolean(labels.type):
        labels = labels.cast(int8())
    if not (types.is_integer(labels.type) or types.is_floating(labels.type)):
        raise ConfigError(
            f"{path}: its labels are of type {labels.type}: give whole numbers or texts"
        )
    missing = labels.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    values = labels.cast(float64(), safe=False).to_numpy(zero_copy_only=False)
    values = np.where(missing, -1, values)
    wrong = (values != np.floor(values)) | (values < -1) | (values >= MOST_CLASSES)
    if wrong.any():
        row = int(wrong.argmax())
        raise ConfigError(
            f"{path}, row {row} (the first is 0): its label is {labels[row]}: give whole numbers "
            f"from 0 on, below {MOST_CLASSES:,}; -1 or null for an image without a label"
        )
    return values.astype(np.int64)
