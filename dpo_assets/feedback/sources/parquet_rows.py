"""Parquet, batch by batch. What it says of its own size is checked first, for a few bytes can stand for gigabytes.

Column chunks are read page by page and not whole, so that memory follows the batch and not the row group.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from dpo_assets.feedback.cells import Binary, NotFinite
from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused, Limits
from dpo_assets.feedback.sources.streams import unpacked_too_large

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 2**30  # Of one column in one row group once decompressed: no page of it, the least that is read, is more.
BATCH_BYTES, BATCH_ROWS = 4 * 2**20, 1024  # About what is turned into rows at a time, and at most.
REPEATED_BYTES = 24 * 2**20  # Of a batch whose rows all hold the longest value that a column's dictionary may have.
SHOWN_BYTES = 4096  # Of a binary cell in the bytes of its row; of a longer one its size and digest are shown.
_PAGE_BUFFER = 2**20
_WIDEST_AS_PYTHON = 4  # A row whose values take this many times the limit is not turned into objects at all.
_UNPACK = "export it as JSONL"


class ParquetRows:
    """Iterates over (number, row as JSON, row or fault). `handle` must be seekable.

    A cell that JSON cannot say is a `cells.Binary` or a `cells.NotFinite` in the row.
    """

    def __init__(self, handle: BinaryIO, limits: Limits, flags: Counter[str]) -> None:
        self._handle, self._limits, self._flags = handle, limits, flags

    def __iter__(self) -> Iterator[tuple[int, bytes, Mapping[str, Any] | RowFault]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            file = pq.ParquetFile(self._handle, buffer_size=_PAGE_BUFFER, pre_buffer=False)
            for batch in file.iter_batches(batch_size=self._rows_at_once(file), use_threads=False):
                for row in self._rows(batch):
                    number += 1
                    yield number, *(self._too_large(row) if isinstance(row, int) else self._checked(row))
        except FileRefused:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            message = f"not a sound Parquet file: {str(error).splitlines()[0][:200] if str(error) else 'too large'}"
            raise FileRefused("damaged_file", message) from None

    def _rows_at_once(self, file: Any) -> int:
        """How many rows make a batch.

        Raises:
            FileRefused: the file says that it is too large.
        """
        names, metadata, limits = file.schema_arrow.names, file.metadata, self._limits
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise FileRefused("bad_header", f"columns given twice: {', '.join(repr(name) for name in twice)}")
        if metadata.num_rows > limits.unpacked_rows:
            raise unpacked_too_large(f"{metadata.num_rows} rows", "max_unpacked_rows", _UNPACK)
        total = longest = 0
        for n in range(metadata.num_row_groups):
            group = metadata.row_group(n)
            for chunk in (group.column(m) for m in range(group.num_columns)):
                size = chunk.total_uncompressed_size
                if size > CHUNK_BYTES:
                    message = (
                        f"column `{chunk.path_in_schema}` holds {size} bytes in row group {n}, more than "
                        f"{CHUNK_BYTES}: write smaller row groups"
                    )
                    raise FileRefused("row_group_too_large", message)
                total += size
                if chunk.has_dictionary_page:
                    longest = max(longest, self._dictionary_bytes(chunk))
        if total > limits.unpacked_bytes:
            raise unpacked_too_large(f"{total} bytes", "max_unpacked_gib", _UNPACK)
        of_a_row = max(1, total // max(1, metadata.num_rows))
        return int(max(1, min(BATCH_ROWS, BATCH_BYTES // of_a_row, REPEATED_BYTES // max(1, longest))))

    def _dictionary_bytes(self, chunk: Any) -> int:
        """Bytes of the dictionary of a column chunk, once decompressed: the longest value that many rows may share.

        They stand in its page header (parquet-format, README, Data Pages; Thrift's compact protocol): field 1 is the
        kind of page, field 2 this size.
        """
        self._handle.seek(chunk.dictionary_page_offset)
        head = self._handle.read(16)
        kind = _varint(head, 1) if head[:1] == _NEXT_I32 else None
        size = _varint(head, kind[1] + 1) if kind and head[kind[1] : kind[1] + 1] == _NEXT_I32 else None
        return size[0] >> 1 if size else int(chunk.total_uncompressed_size)  # Zigzag: twice the number.

    def _rows(self, batch: pa.RecordBatch) -> Iterator[dict[str, Any] | int]:
        """The rows of a batch; of one that would be too many objects its size in bytes."""
        if batch.nbytes <= _WIDEST_AS_PYTHON * self._limits.row_bytes:
            yield from _rows_of_batch(batch)
            return
        for n in range(batch.num_rows):
            one = batch.slice(n, 1)
            if one.nbytes > _WIDEST_AS_PYTHON * self._limits.row_bytes:
                yield one.nbytes
            else:
                yield from _rows_of_batch(one)

    def _too_large(self, size: int) -> tuple[bytes, RowFault]:
        return f"<{size} bytes>".encode(), self._longer()

    def _longer(self) -> RowFault:
        return RowFault("row_too_large", f"longer than {self._limits.row_bytes} bytes")

    def _checked(self, row: dict[str, Any]) -> tuple[bytes, Mapping[str, Any] | RowFault]:
        notes: set[str] = set()
        value = {name: _plain(cell, notes) for name, cell in row.items()}
        raw = json.dumps(value, ensure_ascii=False, default=_shown).encode("utf-8", "surrogateescape")
        if len(raw) > self._limits.row_bytes:
            return raw[: self._limits.row_bytes + 1], self._longer()
        if "nan" in notes:
            self._flags["nan_read_as_nothing"] += 1
        return raw, value


_NEXT_I32 = b"\x15"  # A field of 32 bits whose number is one more than that of the field before it.


def _varint(head: bytes, at: int) -> tuple[int, int] | None:
    """(number, where it ends) of seven bits a byte, least first; None where it does not end."""
    value = shift = 0
    for n, byte in enumerate(head[at : at + 5], at + 1):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, n
        shift += 7
    return None


def _rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = [_cells(column) for column in batch.columns]
    for n in range(batch.num_rows):
        yield {name: column[n] for name, column in zip(names, columns, strict=True)}


def _cells(column: pa.Array) -> list[Any]:
    """The cells of a column; text that is not UTF-8 comes out as its bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        known = _cells(column.dictionary)
        return [None if index is None else known[index] for index in column.indices.to_pylist()]
    try:
        cells: list[Any] = column.to_pylist()
        return cells
    except (ValueError, OverflowError):  # Text that is none, or a time that Python does not know.
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            wide = pa.types.is_large_string(column.type)
            return list(column.cast(pa.large_binary() if wide else pa.binary()).to_pylist())
        return [_cell(column[n]) for n in range(len(column))]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Binary(b"\xff")  # Somewhere inside a nested value; shown as what it is, a text that is none.
    except (ValueError, OverflowError):
        return f"{scalar.value} of {scalar.type}"  # A text, so that no reader takes it for a time.


def _plain(value: Any, notes: set[str]) -> Any:
    """A value as JSON has it, as far as it can. Texts, booleans, integers and nothing stay as they are: no type is
    guessed.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            notes.add("nan")  # What pandas writes for nothing in a column of numbers.
            return None
        return NotFinite(repr(value)) if math.isinf(value) else value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return Binary(value)
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
    return str(value)


def _shown(value: object) -> str:
    """A value that JSON does not know, in the bytes of its row."""
    if isinstance(value, Binary) and len(value) <= SHOWN_BYTES:
        return value.decode("utf-8", "surrogateescape")
    return str(value)
