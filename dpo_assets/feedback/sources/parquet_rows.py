"""Parquet, batch by batch. What it says of its own size is checked first, for a few bytes can stand for gigabytes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused, Limits
from dpo_assets.feedback.sources.streams import RATIO_FROM

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_BYTES = 2**30  # Of one row group once decompressed, of which one column is held at a time.
BATCH_BYTES, BATCH_ROWS = 16 * 2**20, 1024  # About what is turned into rows at a time, and at most.


class ParquetRows:
    """Iterates over (number, row as JSON, row or fault). `handle` must be seekable."""

    def __init__(self, handle: BinaryIO, size: int, limits: Limits, flags: Counter[str]) -> None:
        self._handle, self._size, self._limits, self._flags = handle, size, limits, flags
        self._total = 0

    def __iter__(self) -> Iterator[tuple[int, bytes, Mapping[str, Any] | RowFault]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(self._handle, read_dictionary=self._check(pq.ParquetFile(self._handle)))
            of_a_row = max(1, self._total // max(1, file.metadata.num_rows))
            number, size = 0, max(1, min(BATCH_ROWS, BATCH_BYTES // of_a_row))
            for batch in file.iter_batches(batch_size=size, use_threads=False):
                for row in _rows_of_batch(batch):
                    number += 1
                    yield number, *self._checked(row)
        except FileRefused:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            message = f"not a sound Parquet file: {str(error).splitlines()[0][:200] if str(error) else 'too large'}"
            raise FileRefused("damaged_file", message) from None

    def _check(self, file: Any) -> list[str]:
        """Refuses a file that says it is too large; gives the text columns, to be read as dictionaries.

        As dictionaries, because a value that stands in a million rows is then held once.
        """
        import pyarrow as pa

        names = file.schema_arrow.names
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise FileRefused("bad_header", f"columns given twice: {', '.join(repr(name) for name in twice)}")
        for n in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(n)
            columns = sum(group.column(m).total_uncompressed_size for m in range(group.num_columns))
            size = max(group.total_byte_size, columns)
            self._total += size
            if size > ROW_GROUP_BYTES:
                message = f"row group {n} holds {size} bytes, more than {ROW_GROUP_BYTES}: write smaller row groups"
                raise FileRefused("row_group_too_large", message)
        total, ratio = self._total, self._limits.ratio
        if total > self._limits.file_bytes or (total > RATIO_FROM and total > ratio * self._size):
            message = f"{self._size} bytes that say they hold {total}, more than {ratio} to 1"
            raise FileRefused("decompression_bomb", message)
        schema = file.schema_arrow
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        return [field.name for field in schema if any(is_text(field.type) for is_text in texts)]

    def _checked(self, row: dict[str, Any]) -> tuple[bytes, Mapping[str, Any] | RowFault]:
        notes: set[str] = set()
        value = {name: _plain(cell, notes) for name, cell in row.items()}
        raw = json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "surrogateescape")
        if len(raw) > self._limits.row_bytes:
            return raw[: self._limits.row_bytes + 1], RowFault(
                "row_too_large", f"longer than {self._limits.row_bytes} bytes"
            )
        if "not_finite" in notes:
            return raw, RowFault("invalid_number", "a number is infinite")
        if "nan" in notes:
            self._flags["nan_read_as_nothing"] += 1
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return raw, RowFault("invalid_utf8", f"byte {error.start} of the row is not UTF-8")
        return raw, value


def _rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = [_cells(column) for column in batch.columns]
    for n in range(batch.num_rows):
        yield {name: column[n] for name, column in zip(names, columns, strict=True)}


def _cells(column: pa.Array) -> list[Any]:
    """The cells of a column; text that is not UTF-8 comes out with its bytes as surrogates."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        known = _cells(column.dictionary)
        return [None if index is None else known[index] for index in column.indices.to_pylist()]
    try:
        cells: list[Any] = column.to_pylist()
        return cells
    except UnicodeDecodeError:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            wide = pa.types.is_large_string(column.type)
            return list(column.cast(pa.large_binary() if wide else pa.binary()).to_pylist())
        return [_cell_or_fault(column[n]) for n in range(len(column))]


def _cell_or_fault(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b"\xff"  # Somewhere inside a nested value; shown as what it is, a text that is none.


def _plain(value: Any, notes: set[str]) -> Any:
    """A value as JSON has it. Texts, booleans, integers and nothing stay as they are: no type is guessed."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            notes.add("nan")  # What pandas writes for nothing in a column of numbers.
            return None
        if math.isinf(value):
            notes.add("not_finite")
            return repr(value)
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list | tuple):
        return [_plain(item, notes) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item, notes) for name, item in value.items()}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return _plain(float(value), notes)
    return repr(value)
