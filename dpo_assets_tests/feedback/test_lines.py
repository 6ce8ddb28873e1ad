"""Strict JSONL: which lines are rows, which rows are objects, and what is said about the others."""

from __future__ import annotations

import codecs
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_assets.feedback import lines as module
from dpo_assets.feedback.lines import MAX_LINE_BYTES, parse_line, read_lines
from dpo_assets.feedback.readers import RowFault


def numbered(content: bytes) -> list[tuple[int, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "feedback.jsonl"
        path.write_bytes(content)
        return list(read_lines(path))


def fault(line: bytes) -> RowFault:
    with pytest.raises(RowFault) as refused:
        parse_line(line)
    return refused.value


# Lines


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=6), st.sampled_from([b"", b"\r", b" \t", b"{}\r", b"\xe2\x80\xa8"]))))
@example([codecs.BOM_UTF8 + b"{}", codecs.BOM_UTF8 + b"{}"])
@example([codecs.BOM_UTF8])
def test_rows_are_what_stands_between_line_feeds_and_is_not_blank(parts: list[bytes]) -> None:
    content = b"\n".join(parts)
    raw = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    expected = [(n, line.rstrip(b"\r")) for n, line in enumerate(raw, 1) if line.strip()]
    assert numbered(content) == expected


def test_windows_line_ends_blank_lines_and_a_missing_last_line_end_change_no_row() -> None:
    assert numbered(b'{"a":1}\r\n\r\n  \n{"a":2}') == [(1, b'{"a":1}'), (4, b'{"a":2}')]


def test_a_byte_order_mark_is_dropped_at_the_start_of_the_file_only() -> None:
    rows = numbered(codecs.BOM_UTF8 + b'{"a":1}\n' + codecs.BOM_UTF8 + b'{"a":2}\n')
    assert parse_line(rows[0][1]) == {"a": 1}
    assert fault(rows[1][1]).reason == "invalid_json"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001e"])
def test_a_unicode_line_separator_inside_an_answer_does_not_cut_the_row(separator: str) -> None:
    text = f"one{separator}two"
    raw = json.dumps({"chosen": text}, ensure_ascii=False).encode()
    [(_, line)] = numbered(raw + b"\n")
    assert parse_line(line) == {"chosen": text}


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A line limit small enough to cross."""
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 64)
    return 64


@pytest.mark.parametrize("over", [1, 2, 63, 64, 65, 200])
def test_a_line_over_the_limit_is_one_row_cut_short_and_the_next_keeps_its_number(limit: int, over: int) -> None:
    rows = numbered(b"{}\n" + b"x" * (limit + over) + b"\n" + b'{"a":1}\n')
    assert [number for number, _ in rows] == [1, 2, 3]
    assert len(rows[1][1]) == limit + 1
    assert fault(rows[1][1]).reason == "row_too_large"
    assert parse_line(rows[2][1]) == {"a": 1}


def test_a_last_line_over_the_limit_without_a_line_end_is_one_row(limit: int) -> None:
    assert [(n, len(line)) for n, line in numbered(b"x" * (3 * limit))] == [(1, limit + 1)]


def test_a_line_just_below_the_limit_is_whole(limit: int) -> None:
    assert numbered(b"x" * (limit - 1) + b"\n" + b"y" * limit) == [(1, b"x" * (limit - 1)), (2, b"y" * limit)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("x \r", max_size=14).map(str.encode), max_size=5))
@example([b" " * 12 + b"x", b"x"])
@example([b"x" + b"\r" * 12 + b"x", b"x"])
def test_every_line_is_a_row_of_its_number_on_whatever_side_of_the_limit(parts: list[bytes]) -> None:
    with patch.object(module, "MAX_LINE_BYTES", 8):
        found = dict(numbered(b"\n".join(parts)))
    rows = {number: part.rstrip(b"\r") for number, part in enumerate(parts, 1) if part.strip()}
    # A line of nothing but white space over the limit may count as a row or not.
    assert {n for n in found if parts[n - 1].strip()} == set(rows)
    for number, row in rows.items():
        refused = len(found[number]) == 9
        if len(row) > 8:
            assert refused
        else:
            # Line ends that alone cross the limit may be refused, but nothing may be cut off unseen.
            assert found[number] == row or (refused and len(parts[number - 1]) > 9)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_of_exactly_the_limit_is_no_longer_than_the_limit(limit: int, end: bytes) -> None:
    line = b'{"a":"' + b"x" * (limit - 8) + b'"}'
    assert len(line) == limit
    assert [parse_line(row) for _, row in numbered(line + end)] == [{"a": "x" * (limit - 8)}]


def test_a_first_line_over_the_limit_is_one_row_behind_a_byte_order_mark_too(limit: int) -> None:
    rows = numbered(codecs.BOM_UTF8 + b"x" * (limit + 10) + b"\n{}\n")
    assert [number for number, _ in rows] == [1, 2]
    assert fault(rows[0][1]).reason == "row_too_large"


def test_the_limit_leaves_room_for_a_megabyte_of_text() -> None:
    assert MAX_LINE_BYTES >= 2**20
    assert len(parse_line(json.dumps({"chosen": "x" * 2**20}).encode())["chosen"]) == 2**20
    assert fault(b"x" * (MAX_LINE_BYTES + 1)).message == "longer than 4 MiB"


# Objects

_json = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**64), 2**64),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), _json), escape=st.booleans())
def test_every_json_object_reads_back_equal(value: dict[str, Any], escape: bool) -> None:
    assert parse_line(json.dumps(value, ensure_ascii=escape).encode()) == value


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(), st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_an_object_or_a_row_fault(line: bytes) -> None:
    result: Any
    try:
        result = parse_line(line)
    except RowFault as refused:
        result = {"reason": refused.reason, "message": refused.message}
        assert all(result.values())
    assert isinstance(result, dict)


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"chosen": "Sure, he', "invalid_json", "Unterminated string"),
        (b'{"chosen": ', "invalid_json", "as if the file had been cut"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate_key", "key given twice: a"),
        (b'{"x": {"b": 1, "a": 2, "a": 2, "b": 2}}', "duplicate_key", "key given twice: a, b"),
        (b'{"margin": NaN}', "invalid_json", "NaN is not JSON"),
        (b'{"margin": Infinity}', "invalid_json", "Infinity is not JSON"),
        (b'{"margin": -Infinity}', "invalid_json", "-Infinity is not JSON"),
        (b'{"chosen": "\\ud83d"}', "invalid_utf8", "lone surrogate"),
        (b'{"\\ude00": "x"}', "invalid_utf8", "lone surrogate"),
        (b'{"chosen": "caf\xe9"}', "invalid_utf8", "byte 15 is not UTF-8"),
        ('{"chosen": "x"}'.encode("utf-16"), "invalid_utf8", "byte 0 is not UTF-8"),
        (b'{"chosen": "\xed\xa0\x80"}', "invalid_utf8", "is not UTF-8"),
        (b'"text"', "not_an_object", "JSON str"),
        (b"5", "not_an_object", "JSON int"),
        (b"5.5", "not_an_object", "JSON float"),
        (b"null", "not_an_object", "JSON NoneType"),
        (b"true", "not_an_object", "JSON bool"),
        (b'[{"chosen": "x"}]', "not_an_object", "JSON list"),
        (b'{"a": 1} {"b": 2}', "invalid_json", "Extra data"),
        (b"{'a': 1}", "invalid_json", "column 2"),
        (b'{"a": "tab\tinside"}', "invalid_json", "Invalid control character"),
        (b"[" * 100_000, "too_deep", "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "too_deep", "nested too deeply"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_reason(line: bytes, reason: str, message: str) -> None:
    refused = fault(line)
    assert refused.reason == reason
    assert message in refused.message


LINE = b'{"chosen": "Sure", "x": [{"rejected": "No"}]}'


@pytest.mark.parametrize("cut", range(1, len(LINE)))
def test_a_line_that_was_cut_is_called_cut_wherever_it_was(cut: int) -> None:
    assert "as if the file had been cut" in fault(LINE[:cut]).message


def test_only_the_keys_that_are_given_twice_are_named() -> None:
    assert fault(b'{"a": 1, "b": 2, "a": 3, "c": 4, "b": 5}').message == "key given twice: a, b"


def test_a_fault_in_the_middle_of_a_line_is_not_called_a_cut() -> None:
    assert "cut" not in fault(b'{"a": 1,, "b": 2}').message


def test_a_pair_of_surrogate_escapes_is_one_character() -> None:
    assert parse_line(b'{"chosen": "\\ud83d\\ude00"}') == {"chosen": "\U0001f600"}


def test_the_text_5_stays_text_and_na_stays_na() -> None:
    assert parse_line(b'{"chosen": "5", "rejected": "NA", "id": "007"}') == {
        "chosen": "5",
        "rejected": "NA",
        "id": "007",
    }


def test_an_integer_of_five_thousand_digits_is_refused_as_a_row() -> None:
    assert fault(b'{"id": ' + b"1" * 5_000 + b"}").reason == "invalid_json"


class CountingKey(str):
    """A key that counts how often it is compared with another."""

    compared: ClassVar[Counter[str]] = Counter()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        self.compared["=="] += 1
        return str.__eq__(self, other)


def test_the_search_for_a_repeated_key_takes_time_in_proportion_to_the_keys() -> None:
    CountingKey.compared.clear()
    keys = [CountingKey(f"k{n}") for n in range(300)]
    with pytest.raises(RowFault, match="duplicate_key"):
        module._no_duplicates([(key, 0) for key in [*keys, CountingKey("k0")]])
    assert CountingKey.compared["=="] < 10 * len(keys)


def test_a_number_beyond_the_range_of_numbers_is_refused_before_it_becomes_infinity() -> None:
    assert fault(b'{"score": 1e999}').message == "1e999 is beyond the range of numbers"
