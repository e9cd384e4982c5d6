"""Records of tables: CSV and parquet. Structs of parquet are without the fields that are null."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.reading.content import decode, lines_of, shortened
from data.reading.record import Record, Refuse

_PARQUET_ROWS = 1024


def read_csv(path: Path, refuse: Refuse) -> Iterator[Record]:
    # the default, 131072 characters, is less than a long document; 2^31 - 1 fits any C long
    csv.field_size_limit(2**31 - 1)
    lines = (decode(line, path, number) for number, line in lines_of(path))
    rows = csv.reader(lines, strict=True)
    names: list[str] | None = None
    while True:
        location = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{location}: each row must be comma-separated values: got {error}; "
                "quote values that hold commas, quotes or line breaks, and double the quotes in "
                'them ("")'
            ) from error
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = _header(row, location)
        elif len(row) != len(names):
            refuse(
                ValueError(
                    f"{location}: each row must have {len(names)} values, as the header: got "
                    f"{len(row)}; quote values that hold commas, quotes or line breaks"
                )
            )
        else:
            yield Record(location, dict(zip(names, row, strict=True)))


def _header(row: list[str], location: str) -> list[str]:
    names = [name.strip() for name in row]
    # pandas writes its index without a name, and under this name in parquet
    if names[0] == "" and len(names) > 1:
        names[0] = "__index_level_0__"
    if "" in names or len(set(names)) != len(names):
        raise ValueError(
            f"{location}: the first row must name each column once: got "
            f"{', '.join(map(repr, names))}; write a header with different names"
        )
    return names


def read_parquet(path: Path, refuse: Refuse) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet must be read with pyarrow, which is not installed; "
            "pip install -e '.[parquet]'"
        ) from None
    index = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise ValueError(
                    f"each column must have a name of its own: got {', '.join(names[:8])}"
                )
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    # a column that is null is there all the same, as it is in JSON
                    values = {name: _without_nulls(value) for name, value in fields.items()}
                    yield Record(f"{path}[{index}]", values)
                    index += 1
    # damaged pages are an OSError, text may not be UTF-8, dates may overflow Python's
    except (ValueError, OSError, OverflowError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path}[{index}]: the file must be parquet that pyarrow {pyarrow.__version__} reads: "
            f"got {shortened(str(error), 200)}; download or write it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """The value without the fields that are null, at any depth.

    A struct of parquet has the fields of every row's struct, and null stands for those that a row
    has not. An element of a list that is null was null before.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
