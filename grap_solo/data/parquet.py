"""Images in Parquet files, read a row group at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from glob import glob
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

MOST_OPEN = 64
"""How many files each process keeps open."""

KEPT_BYTES = 2**27
"""How much of the encoded images each process keeps: all of CIFAR, or a part of a larger set."""

MEASURED_BYTES = 2**30
"""Up to what size a single file is read for the sizes of its images."""

PREFIXES = {True: ("train",), False: ("val", "test")}
"""How the files of the training and of the validation images start, in one folder of both."""


def find_parquet(path: str, key: str, train: bool) -> list[Path]:
    """The Parquet files that a path names, in order: one, those of a folder, or of a pattern.

    Of a folder in which files are named after their split, such as ``train-00000.parquet``, only
    those of the split count.

    Args:
        path: a file, a folder, or a pattern with ``*``.
        key: the key that gave it, for the errors.
        train: whether the training images are wanted, else the validation images.

    Raises:
        ConfigError: there are none.
    """
    if "*" in path and not os.path.exists(path):
        files = sorted(Path(each) for each in glob(path))
    elif os.path.isdir(path):
        inside = sorted(each for each in Path(path).glob("*.parquet") if each.is_file())
        inside = [each for each in inside if not each.name.startswith(".")]
        every = [name for names in PREFIXES.values() for name in names]
        named = [each for each in inside if each.name.startswith(tuple(every))]
        files = inside
        for name in PREFIXES[train] if named else ():
            files = [each for each in named if each.name.startswith(name)]
            if files:
                break
    else:
        files = [Path(path)] if os.path.isfile(path) else []
    if not files:
        raise ConfigError(
            f"{key}: no such file {path}: give a Parquet file, or a folder or a pattern of them"
        )
    return files


class Parquet(Images):
    """Parquet files with a column of images (a struct with encoded ``bytes``) and one of labels.

    Keeps the labels in memory, and the row groups that were read last, up to :data:`KEPT_BYTES` in
    each process. Decodes an image on access. See :func:`~grap_solo.data.columns.number_labels` for
    the labels.

    Args:
        files: the files, in order.
        image_key: the column of the images; None for ``img`` or ``image``.
        label_key: the column of the labels; None for ``label``.
        labelled: whether the images need labels; otherwise they have none.

    Raises:
        ConfigError: if one is not such a file, or a label is not a class.
    """

    _opened: dict[int, Any]
    _kept: dict[int, Any]

    def __init__(
        self,
        files: Sequence[Path],
        image_key: str | None = None,
        label_key: str | None = None,
        labelled: bool = True,
    ) -> None:
        import pyarrow
        import pyarrow.parquet

        self.files, self.image_key, groups, labels = list(files), "", [], []
        for number, path in enumerate(files):
            try:
                file = pyarrow.parquet.ParquetFile(path)
                schema, about = file.schema_arrow, file.metadata
                self.image_key = choose_column(
                    schema.names, image_key, "data.image_key", IMAGE_COLUMNS, str(path)
                )
                check_image_column(schema, self.image_key, str(path))
                if labelled:
                    name = choose_column(
                        schema.names, label_key, "data.label_key", (LABEL_COLUMN,), str(path)
                    )
                    table = pyarrow.parquet.read_table(path, columns=[name])
                    labels.append(_decoded(table[name]))
            except ConfigError:
                raise
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                line = (str(error).splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"{path}: not a Parquet file: {line}") from None
            for group in range(about.num_row_groups):
                rows = about.row_group(group)
                groups.append((number, group, rows.num_rows, rows.total_byte_size))
        table_of_groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.groups, self.sizes = table_of_groups[:, :2], table_of_groups[:, 3]
        self.starts = np.concatenate([[0], np.cumsum(table_of_groups[:, 2])])
        self._owner, self._opened, self._kept = 0, {}, {}
        if not labelled:
            self.targets = np.full(self.starts[-1], -1)
            return
        self.targets, self.class_names = number_labels(
            _join(labels, files[0].parent, "labels"), str(files[0]), self.describe
        )
        if self.class_names is not None:
            self.classes = len(self.class_names)

    def __getitem__(self, index: int) -> Sample:
        data = self._encoded(index).as_py()
        if data is None:
            raise ValueError("it is null")
        return open_rgb(io.BytesIO(data)), int(self.targets[index])

    def read_column(self, name: str, key: str) -> Any:
        import pyarrow.parquet

        parts = []
        for path in self.files:
            names = pyarrow.parquet.read_schema(path).names
            choose_column(names, name, key, (), str(path))
            parts.append(_decoded(pyarrow.parquet.read_table(path, columns=[name])[name]))
        return _join(parts, self.files[0].parent, f"values of '{name}'")

    def describe(self, index: int) -> str:
        group = self._group_of(index)
        number = self.groups[group, 0]
        first = self.starts[np.argmax(self.groups[:, 0] == number)]
        return f"{self.files[number]}, row {index - first} (the first is 0)"

    def stored_size(self, index: int) -> int:
        """The bytes of an image's encoding; for many files or a large one those of its row group,
        since a look at each image would read them all."""
        if len(self.files) > 1 or self.sizes.sum() > MEASURED_BYTES:
            return int(self.sizes[self._group_of(index)])
        data = self._encoded(index)
        return len(data.as_buffer()) if data.is_valid else 0

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _encoded(self, index: int) -> Any:
        """An image's encoded bytes, as Arrow's scalar."""
        group = self._group_of(index)
        return self._read(group)[int(index - self.starts[group])]

    def _read(self, group: int) -> Any:
        """The encoded images of a row group, from what is kept or from its file."""
        import pyarrow.compute
        import pyarrow.parquet

        if self._owner != os.getpid():
            # A process shares no open file with the one that it was forked from.
            self._owner, self._opened, self._kept = os.getpid(), {}, {}
        found = self._kept.pop(group, None)
        if found is None:
            number, inside = self.groups[group].tolist()
            if number not in self._opened:
                if len(self._opened) >= MOST_OPEN:
                    del self._opened[next(iter(self._opened))]
                self._opened[number] = pyarrow.parquet.ParquetFile(self.files[number])
            table = self._opened[number].read_row_group(
                inside, columns=[self.image_key], use_threads=False
            )
            found = pyarrow.compute.struct_field(table[self.image_key], "bytes")
            room = KEPT_BYTES - found.nbytes
            while self._kept and sum(each.nbytes for each in self._kept.values()) > room:
                del self._kept[next(iter(self._kept))]
        self._kept[group] = found  # The newest comes last.
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_kept": {}}


def _decoded(labels: Any) -> Any:
    """A column of labels without a dictionary: each file may have another one."""
    from pyarrow import types

    if types.is_dictionary(labels.type):
        return labels.cast(labels.type.value_type)
    return labels


def _join(parts: Sequence[Any], folder: Path, what: str) -> Any:
    """A column of several files as one.

    Args:
        parts: the column in each file.
        folder: where the files are, for the error.
        what: what the column holds, for the error.

    Raises:
        ConfigError: its types do not fit each other.
    """
    import pyarrow

    try:
        joined = pyarrow.concat_tables(
            [pyarrow.table({"column": each}) for each in parts], promote_options="permissive"
        )
    except pyarrow.ArrowException:
        kinds = ", ".join(sorted({str(each.type) for each in parts}))
        raise ConfigError(
            f"{folder}: the {what} of its files are of several types ({kinds}): store them alike"
        ) from None
    return joined["column"]
