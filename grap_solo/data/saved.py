"""Datasets that Hugging Face's ``datasets`` has saved to disk, and lists of files with labels."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from grap_solo.data.columns import (
    IMAGE_COLUMNS,
    LABEL_COLUMN,
    check_image_column,
    choose_column,
    number_labels,
)
from grap_solo.data.images import Images, Sample, open_rgb
from grap_solo.errors import ConfigError

STATE, SPLITS_FILE = "state.json", "dataset_dict.json"
"""The files by which a saved dataset is known, and one with several splits."""

SPLITS = {True: ("train",), False: ("validation", "val", "test")}


def is_saved(path: str) -> bool:
    """Whether a folder holds a dataset that ``save_to_disk`` has written."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (STATE, SPLITS_FILE))


class SavedDataset(Images):
    """A dataset as ``save_to_disk`` of Hugging Face's ``datasets`` writes it, memory-mapped.

    Reads its Arrow files without that package. See
    :func:`~grap_solo.data.columns.number_labels` for the labels.

    Args:
        path: its folder; of several splits, that of the training or validation images is taken.
        key: the key that gave it, for the errors.
        train: whether the training images are wanted, else the validation images.
        image_key: the column of the images; None for ``img`` or ``image``.
        label_key: the column of the labels; None for ``label``.
        labelled: whether the images need labels; otherwise they have none.

    Raises:
        ConfigError: if it is not such a folder, or a label is not a class.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        train: bool,
        image_key: str | None = None,
        label_key: str | None = None,
        labelled: bool = True,
    ) -> None:
        import pyarrow

        if not is_saved(str(path)):
            raise ConfigError(
                f"{key}: {path} is no saved dataset (it has no {STATE}): write one with "
                "save_to_disk, or set data.format"
            )
        try:
            self.path = self._find_split(path, key, train)
            state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            self.files = [self.path / each["filename"] for each in state["_data_files"]]
            table = self._map()
        except ConfigError:
            raise
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{key}: {path}: a saved dataset that cannot be read ({line}): save it again"
            ) from None
        where = str(self.path)
        name = choose_column(table.column_names, image_key, "data.image_key", IMAGE_COLUMNS, where)
        check_image_column(table.schema, name, where)
        self.image_key, self._images = name, table[name]
        self.targets = np.full(len(table), -1)
        if labelled:
            name = choose_column(
                table.column_names, label_key, "data.label_key", (LABEL_COLUMN,), where
            )
            self.targets, self.class_names = number_labels(table[name], where, self.describe)
            self.classes = None if self.class_names is None else len(self.class_names)

    @staticmethod
    def _find_split(path: Path, key: str, train: bool) -> Path:
        """The folder of the split that is wanted."""
        if not (path / SPLITS_FILE).is_file():
            return path
        splits = json.loads((path / SPLITS_FILE).read_text(encoding="utf-8"))["splits"]
        for name in SPLITS[train]:
            if name in splits:
                return path / name
        raise ConfigError(
            f"{key}: {path} has the splits {', '.join(splits)}, and none of "
            f"{', '.join(SPLITS[train])}: give the folder of one split"
        )

    def _map(self) -> Any:
        """The table, whose columns stay on the disk until they are looked at."""
        import pyarrow

        parts = [
            pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in self.files
        ]
        return pyarrow.concat_tables(parts)

    def __getitem__(self, index: int) -> Sample:
        found = self._row(index)
        data = found["bytes"].as_py() if found.is_valid else None
        if data is not None:
            return open_rgb(io.BytesIO(data)), int(self.targets[index])
        file = found["path"].as_py() if found.is_valid and "path" in found else None
        if file is None:
            raise ValueError("it is null")
        return open_rgb(file), int(self.targets[index])

    def read_column(self, name: str, key: str) -> Any:
        table = self._map()
        return table[choose_column(table.column_names, name, key, (), str(self.path))]

    def describe(self, index: int) -> str:
        return f"{self.path}, row {index} (the first is 0)"

    def stored_size(self, index: int) -> int:
        found = self._row(index)
        data = found["bytes"] if found.is_valid else None
        return len(data.as_buffer()) if data is not None and data.is_valid else 0

    def _row(self, index: int) -> Any:
        if self._images is None:
            self._images = self._map()[self.image_key]
        return self._images[int(index)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # Another process maps the files itself.


class ListedFiles(Images):
    """The image files that a CSV file lists in a column ``file``, with labels in ``label``.

    Paths count from the CSV file's folder. A label is a whole number or a text; an image whose
    label is empty or -1 is unlabelled.

    Args:
        path: the CSV file.
        image_key: the column of the files; None for ``file``.
        label_key: the column of the labels; None for ``label``.
        labelled: whether the images need labels; otherwise they have none.

    Raises:
        ConfigError: if it is not such a file, an image is not there, or a label is not a class.
    """

    def __init__(
        self,
        path: Path,
        image_key: str | None = None,
        label_key: str | None = None,
        labelled: bool = True,
    ) -> None:
        import pyarrow

        self.path = path
        names, rows = self._read()
        column = names.index(
            choose_column(names, image_key, "data.image_key", ("file",), str(path))
        )
        self.files = [os.path.join(path.parent, row[column].strip()) for row in rows]
        missing = next((file for file in self.files if not os.path.isfile(file)), None)
        if missing is not None:
            raise ConfigError(f"{path}: no such file {missing}: correct or remove its row")
        self.targets = np.full(len(rows), -1)
        if labelled:
            name = choose_column(names, label_key, "data.label_key", (LABEL_COLUMN,), str(path))
            texts = [row[names.index(name)].strip() or None for row in rows]
            numbers = _whole_numbers(texts)
            labels = pyarrow.array(texts) if numbers is None else pyarrow.array(numbers)
            self.targets, self.class_names = number_labels(labels, str(path), self._name_row)
            self.classes = None if self.class_names is None else len(self.class_names)

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """The names of the columns, and the rows."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                names, *rows = [row for row in csv.reader(file) if row] or [[]]
        except (OSError, UnicodeError, csv.Error) as error:
            raise ConfigError(f"{self.path}: not a CSV file that can be read ({error})") from None
        names = [name.strip() for name in names]
        short = next((row for row in rows if len(row) != len(names)), None)
        if short is not None:
            raise ConfigError(
                f"{self.path}: the row {','.join(short)} has {len(short)} columns, not "
                f"{len(names)}: write texts with commas in quotes"
            )
        return names, rows

    def __getitem__(self, index: int) -> Sample:
        return open_rgb(self.files[index]), int(self.targets[index])

    def read_column(self, name: str, key: str) -> Any:
        """The values of a column: numbers if all of them are, else texts; null where it is empty.

        See :meth:`~grap_solo.data.images.Images.read_column`."""
        import pyarrow

        names, rows = self._read()
        column = names.index(choose_column(names, name, key, (), str(self.path)))
        texts = [row[column].strip() or None for row in rows]
        try:
            return pyarrow.array(
                [None if text is None else float(text) for text in texts], pyarrow.float64()
            )
        except ValueError:
            return pyarrow.array(texts, pyarrow.string())

    def describe(self, index: int) -> str:
        return self.files[index]

    def file_of(self, index: int) -> str:
        return self.files[index]

    def _name_row(self, index: int) -> str:
        return f"{self.path}, {self.files[index]}"


def _whole_numbers(texts: list[str | None]) -> list[float | None] | None:
    """Texts as whole numbers; None if one of them is no number."""
    try:
        return [None if text is None else float(int(text)) for text in texts]
    except (ValueError, OverflowError):
        return None
