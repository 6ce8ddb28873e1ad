"""JSON values that follow each other: found by their brackets, in any layout; damage costs its own value."""

from __future__ import annotations

import io
import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.sources import FileRefused
from dpo_assets.feedback.sources import json_values as module
from dpo_assets.feedback.sources.json_values import JsonValues


def cut(content: bytes, limit: int = 2**20, piece: int = module.PIECE) -> tuple[list[bytes], bool]:
    with patch.object(module, "PIECE", piece):
        values = JsonValues(io.BufferedReader(io.BytesIO(content)), limit)  # type: ignore[type-var]
        return list(values), values.unfinished


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(['"', "\\", "]}", "{[", "\n"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_objects = st.lists(st.dictionaries(_texts, _json, max_size=3), max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    rows=_objects,
    indent=st.sampled_from([None, 0, 1, 2, 4, "\t"]),
    escape=st.booleans(),
    between=st.sampled_from([None, "", " ", "\n", "\r\n", "\n\n"]),
    piece=st.sampled_from([1, 2, 7, 64, 65536]),
)
def test_values_come_out_as_they_went_in(rows: Any, indent: Any, escape: bool, between: str | None, piece: int) -> None:
    """As an array, or one after another; whatever the pieces are in which the text is read."""
    parts = [json.dumps(one, indent=indent, ensure_ascii=escape) for one in rows]
    text = json.dumps(rows, indent=indent, ensure_ascii=escape) if between is None else between.join(parts)
    values, unfinished = cut(text.encode(), piece=piece)
    assert [json.loads(value) for value in values] == rows
    assert not unfinished


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.lists(st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b" {", b"a", b",", b":", b" "])).map(
        b"".join
    ),
    limit=st.sampled_from([5, 50, 2**20]),
    piece=st.sampled_from([1, 3, 65536]),
)
@example(content=b'{"a": "\n{"b": 1}', limit=50, piece=65536)
@example(content=b'"a\\', limit=5, piece=1)
def test_any_bytes_are_cut_without_losing_one_that_matters(content: bytes, limit: int, piece: int) -> None:
    """Every byte that is neither white space nor a comma nor the array's own bracket is in some value."""
    values, _ = cut(content, limit, piece)
    assert all(len(value) <= limit + 1 for value in values)
    if all(len(value) <= limit for value in values):
        kept = sum(len(value.translate(None, b" \t\r\n\x0b\x0c,")) for value in values)
        there = len(content.translate(None, b" \t\r\n\x0b\x0c,"))
        assert there - 2 <= kept <= there


@pytest.mark.parametrize("piece", [10, 65536])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # A quote is missing, then a brace, then a bracket: each costs its own value.
        (b'[\n  {"a": 1},\n  {"a": "x\n  },\n  {"a": 3}\n]', [b'{"a": 1}', b'{"a": "x\n  },', b'{"a": 3}']),
        (b'[\n  {"a": 1},\n  {"a": {"x": 1},\n  {"a": 3}\n]', [b'{"a": 1}', b'{"a": {"x": 1},', b'{"a": 3}']),
        (b'[\n  {"a": [1},\n  {"a": 3}\n]', [b'{"a": [1},', b'{"a": 3}']),
        (
            b'{\n  "a": [\n    {"b": 1\n  ]\n}\n{\n  "a": 2\n}\n',
            [b'{\n  "a": [\n    {"b": 1\n  ]\n}', b'{\n  "a": 2\n}'],
        ),
        (b'5 "x" nul}} ] {"a": 1} "unt', [b"5", b'"x"', b"nul", b"}}", b"]", b'{"a": 1}', b'"unt']),
        (b'[{"a": 1}] trailing', [b'{"a": 1}', b"trailing"]),
        (b'[{"a": 1}][{"b": 2}]', [b'{"a": 1}', b'[{"b": 2}]']),
        (b"[]", []),
        (b"", []),
    ],
)
def test_damage_costs_the_value_that_it_is_in(content: bytes, expected: list[bytes], piece: int) -> None:
    values, _ = cut(content, piece=piece)
    assert values == expected


@pytest.mark.parametrize("content", [b'[{"a": 1}', b'[{"a": 1},', b'[{"a": 1}, {"b": "x', b'{"a": ', b"["])
def test_a_text_that_ends_inside_a_value_or_an_array_is_unfinished(content: bytes) -> None:
    assert cut(content)[1]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_value_over_the_limit_is_cut_and_the_next_ones_are_found(indent: int | None) -> None:
    rows = [{"a": 1}, {"a": "x" * 300_000, "b": [{"c": '"]}'}] * 100}, {"a": 3}]
    values, unfinished = cut(json.dumps(rows, indent=indent).encode(), limit=1_000)
    assert [json.loads(values[0]), json.loads(values[2])] == [rows[0], rows[2]]
    assert (len(values), len(values[1]), unfinished) == (3, 1_001, False)


def test_brackets_that_never_match_are_given_up_before_they_take_for_ever() -> None:
    with pytest.raises(FileRefused, match="brackets do not match") as refused:
        cut(b"{\n" * 30_000)
    assert refused.value.reason == "damaged_file"
