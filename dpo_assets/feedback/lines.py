"""Strict JSONL: bytes, then one line at a time, then JSON. A damaged line costs that line and nothing else.

No pandas: it turns the answer "5" into a number and "NA" into nothing. No `splitlines`: it cuts inside answers that
hold U+2028.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dpo_assets.feedback.readers.base import RowFault

MAX_LINE_BYTES = 4 * 1024 * 1024


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without the line end) of every non-blank line, in bounded memory.

    A line over MAX_LINE_BYTES comes out cut to one byte more than the limit; `parse_line` refuses it.
    """
    with path.open("rb") as handle:
        number = 0
        if handle.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            handle.seek(0)
        while line := handle.readline(MAX_LINE_BYTES + len(b"\r\n")):
            number += 1
            whole, more = line, False
            while line and not line.endswith(b"\n"):
                line = handle.readline(MAX_LINE_BYTES)
                more = more or bool(line)
            content = whole.rstrip(b"\r\n")
            if more or len(content) > MAX_LINE_BYTES:
                # Blank or not as far as it was read: what followed is unknown, so it is a row, and too large a one.
                yield number, whole[: MAX_LINE_BYTES + 1]
            elif content.strip():
                yield number, content


def parse_line(line: bytes) -> Mapping[str, Any]:
    """The JSON object on a line.

    Raises:
        RowFault: `row_too_large`, `invalid_utf8`, `invalid_json`, `duplicate_key`, `too_deep` or `not_an_object`.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RowFault("row_too_large", f"longer than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault("invalid_utf8", f"byte {error.start} is not UTF-8") from None
    value = parse_text(text)
    if not isinstance(value, dict):
        raise RowFault("not_an_object", f"the line is a JSON {type(value).__name__}, expected an object")
    return value


def parse_text(text: str) -> Any:
    """The JSON value that a text is.

    Raises:
        RowFault: `invalid_utf8`, `invalid_json`, `duplicate_key` or `too_deep`.
    """
    try:
        value = _DECODER.decode(text)
        if "\\" in text and _SURROGATE.search(text) is not None:
            # A lone surrogate passes json and would break Parquet later.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault("invalid_utf8", "a lone surrogate escape (\\ud800-\\udfff) is not text") from None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        hint = "; the line ends early, as if the file had been cut" if cut else ""
        raise RowFault("invalid_json", f"column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise RowFault("too_deep", "nested too deeply") from None
    except ValueError:
        # Python refuses to read integers of more than 4,300 digits.
        raise RowFault("invalid_json", "a number is too long to be one") from None
    return value


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        twice = sorted(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        raise RowFault("duplicate_key", f"key given twice: {', '.join(twice)}")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowFault("invalid_json", f"{text} is beyond the range of numbers")
    return value


def _no_constants(name: str) -> NoReturn:
    raise RowFault("invalid_json", f"{name} is not JSON")


# One decoder for all rows: `json.loads` with arguments makes one for each. It knows the white space that `loads` does.
_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_finite)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
