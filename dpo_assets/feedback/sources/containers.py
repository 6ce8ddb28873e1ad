"""What a file is, by its first bytes and its name: both must say the same, or the file is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import PurePath
from typing import Any, Literal

from dpo_assets.feedback.sources import FileRefused
from dpo_assets.feedback.sources.streams import GZIP, UNPACK, ZSTD

Kind = Literal["lines", "values", "csv", "parquet"]
PARQUET = b"PAR1"
HEAD = 1 << 16
_PACKED = {".gz": GZIP, ".gzip": GZIP, ".zst": ZSTD, ".zstd": ZSTD}
_LINES, _JSON, _CSV, _PARQUET = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".parquet", ".pq")
_ENDINGS = "`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`; the first five also with `.gz` or `.zst` behind"
# (offset, bytes) of what is told apart only to say what to do instead.
_STRANGERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive or a workbook of Excel: unpack it, or save it as CSV"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (257, b"ustar", "a tar archive: unpack it"),
    (0, b"BZh", "compressed with bzip2: unpack it, or compress it with gzip or zstd"),
    (0, b"\xfd7zXZ\x00", "compressed with xz: unpack it, or compress it with gzip or zstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (0, b"Rar!\x1a\x07", "a rar archive: unpack it"),
    (0, b"SQLite format 3\x00", "an SQLite database: name it under `sql`, with a table or query"),
    (0, b"ARROW1", "an Arrow file: save it as Parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream: save it as Parquet"),
    (0, b"Obj\x01", "an Avro file: save it as JSONL or Parquet"),
    (0, b"ORC", "an ORC file: save it as Parquet"),
    (0, b"\x89HDF", "an HDF5 file: save it as Parquet"),
    (0, b"%PDF", "a PDF"),
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS: fetch the file with git lfs pull",
    ),
)
_OPENS_JSON = re.compile(rb'\s*+(\{\s*+["}]|\[\s*+[{\]])')
_PAGE = re.compile(rb"\s*+<(!doctype|html|\?xml)", re.IGNORECASE)


def packed_as(name: str, head: bytes) -> bytes | None:
    """The magic of the compression that a file's name and its first bytes agree on; None for none.

    Raises:
        FileRefused: `wrong_magic` when they do not agree.
    """
    magic = _PACKED.get(PurePath(name).suffix.lower())
    if magic is not None and not head.startswith(magic):
        raise FileRefused(
            "wrong_magic", f"its name ends in `{PurePath(name).suffix}`, but its bytes are something else"
        )
    for known, ending in ((GZIP, ".gz"), (ZSTD, ".zst")):
        if magic is None and head.startswith(known):
            raise FileRefused("wrong_magic", f"it is compressed: let its name end in `{ending}` (`x.jsonl{ending}`)")
    return magic


def unpacked_name(name: str) -> str:
    """The name without the ending of a compression."""
    return name[: -len(PurePath(name).suffix)] if PurePath(name).suffix.lower() in _PACKED else name


def unpacker(name: str) -> str:
    """What unpacks a file of this name by hand; nothing for one that is not compressed."""
    return UNPACK.get(_PACKED.get(PurePath(name).suffix.lower(), b""), "")


def refuse_strangers(head: bytes) -> None:
    """Refuses what is no feedback file by its first bytes, with what to do instead.

    Raises:
        FileRefused: `wrong_magic`.
    """
    for offset, magic, what in _STRANGERS:
        if head[offset:].startswith(magic):
            raise FileRefused("wrong_magic", f"it is {what}")


def kind_of(name: str, stream: io.BufferedReader) -> Kind:
    """How the rows of a text file stand in it. `stream` is UTF-8 and is not read on.

    Raises:
        FileRefused: `wrong_magic` where name and content disagree, `unknown_container` where neither tells.
    """
    head, ending = stream.peek(HEAD), PurePath(name).suffix.lower()
    refuse_strangers(head)
    if _PAGE.match(head):
        raise FileRefused("wrong_magic", "it is a web page or XML: the download may have met a log-in")
    if ending in _CSV:
        if _OPENS_JSON.match(head):
            raise FileRefused("wrong_magic", "its name says CSV, but it holds JSON: let its name end in `.jsonl`")
        return "csv"
    if ending in _LINES or ending in _JSON:
        return _json_kind(head, ending in _JSON)
    if head.lstrip()[:1] in (b"{", b"["):
        return _json_kind(head, any_layout=True)
    raise FileRefused("unknown_container", f"neither its name nor its first byte tells what it is; known: {_ENDINGS}")


def named_parquet(name: str, head: bytes) -> bool:
    """Whether it is Parquet.

    Raises:
        FileRefused: `wrong_magic` where name and bytes disagree.
    """
    named, is_one = PurePath(name).suffix.lower() in _PARQUET, head.startswith(PARQUET)
    if named and not is_one:
        raise FileRefused("wrong_magic", "its name says Parquet, but its first bytes do not")
    if is_one and not named:
        raise FileRefused("wrong_magic", "it is a Parquet file: let its name end in `.parquet`")
    return named


def _json_kind(head: bytes, any_layout: bool) -> Kind:
    """`lines` where each line is a value by itself, `values` where they lie otherwise: an array, or over many lines.

    A file that is named for its lines is one unless its first value shows otherwise, so that damage in its first line
    stays damage of that line.
    """
    text = head.lstrip()
    line, _, others = text.partition(b"\n")
    try:
        value, end = json.JSONDecoder().raw_decode(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        # No value by itself: the first of several lines of one, or damaged, or longer than what was looked at.
        opens_array = re.match(rb"\[\s*+([{\]]|\Z)", text) is not None
        goes_on = others and re.fullmatch(rb"[{\[]\s*+|.*[,{\[]\s*+", line, re.DOTALL) is not None
        if opens_array or (goes_on and _goes_on(others)) or any_layout:
            return "values"
        return "lines"
    rest = line.decode("utf-8", "surrogateescape")[end:]
    if rest.strip():
        return "values"  # Several values on one line, or all on one with other line ends.
    if any_layout and not others.strip():
        return "values"  # All of the file, so that it may be an object around the rows.
    # A list of rows: there may be one on every line.
    if isinstance(value, list) and _holds_rows(value):
        return "values"
    return "lines"


def _holds_rows(value: list[Any]) -> bool:
    return any(isinstance(one, dict) or (isinstance(one, list) and _holds_rows(one)) for one in value)


def _goes_on(others: bytes) -> bool:
    """Whether the second line goes on with an object or array that the first one opened."""
    return re.match(rb'\s*+("[^"\\\n]*+(\\.[^"\\\n]*+)*+"\s*+:|[{\[}\]])', others) is not None
