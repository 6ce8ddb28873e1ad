"""JSON values that follow each other: found by their brackets, in any layout; damage costs its own value."""

from __future__ import annotations

import io
import json
import re
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_assets.feedback.lines import parse_line
from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused
from dpo_assets.feedback.sources import json_values as module
from dpo_assets.feedback.sources.json_values import JsonValues
from dpo_assets.feedback.sources.wrappers import NAMES


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
    """Every byte that is neither white space nor a comma nor a bracket of an array is in some value."""
    values, _ = cut(content, limit, piece)
    assert all(len(value) <= limit + 1 for value in values)
    if all(len(value) <= limit for value in values):
        between = b" \t\r\n\x0b\x0c,[]"
        assert b"".join(values).translate(None, between) == content.translate(None, between)


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
        (b'[{"a": 1}}, {"a": 2}}]', [b'{"a": 1}', b"}", b'{"a": 2}', b"}"]),
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
    content = b"[" + b'{"a": [1}, ' * 1_001
    assert len(cut(content)[0]) == 1_001
    with (
        patch.object(module, "READ_AGAIN", 1_000),
        patch.object(module, "READ_AGAIN_OF_ALL", 0),
        pytest.raises(FileRefused, match="brackets do not match") as refused,
    ):
        cut(content)
    assert refused.value.reason == "damaged_file"


# Damage among sound rows

_TEXTS_OF_ROWS = (
    "yes",
    "a {b} [c]",
    'he said "no"',
    "a, b",
    "one\ntwo",
    '{"prompt": 1}, {"prompt": 2}',
    "\\",
    "}",
    "é",
)
_LAYOUTS = ("one line", "a line each", "pretty", "no array", "no array, one line")


def _row(n: int, text: str, nested: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{n}"}]
    return {"prompt": f"q{n}", "chosen": messages if nested else text, "rejected": "no"}


def _laid_out(rows: list[str], layout: str) -> bytes:
    if layout == "pretty":
        return ("[\n  " + ",\n  ".join(rows) + "\n]\n").encode()
    between, ends = {
        "one line": (", ", "[]"), "a line each": (",\n", "[]"), "no array": ("\n", ("", "")),
        "no array, one line": ("", ("", "")),
    }[layout]  # fmt: skip
    return (ends[0] + between.join(rows) + ends[1]).encode()


def _damage(row: str, how: str) -> str:
    """A sound row's text with one fault."""
    if how == "no closing brace":
        return row.rstrip()[:-1]
    if how == "no closing quote":
        at = row.rindex('"')
        return row[:at] + row[at + 1 :]
    if how == "no opening quote":
        at = row.index('"no"')
        return row[:at] + row[at + 1 :]
    if how == "cut in the middle":
        return row[: row.index("rejected")]
    if how == "line break in a string":
        return row.replace('"no"', '"n\no"')
    if how == "one brace too many":
        return row + "}"
    if how == "too deep":
        return row.replace('"no"', "[" * 11_000 + "]" * 11_000)
    if how == "a key without a value":
        return row.replace('"rejected": ', '"rejected"')
    if how == "a bracket that was not opened":
        return row.replace('"no"', '"no"]')
    assert how == "no comma"
    return row.replace(", ", " ").replace(",\n", "\n")


_FAULTS = (
    "no closing brace", "no closing quote", "no opening quote", "cut in the middle", "line break in a string",
    "one brace too many", "too deep", "a key without a value", "a bracket that was not opened", "no comma",
)  # fmt: skip


def _sound(values: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for value in values:
        with suppress(RowFault):
            found.append(dict(parse_line(value)))
    return found


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.sampled_from(_TEXTS_OF_ROWS), min_size=4, max_size=9),
    nested=st.booleans(),
    layout=st.sampled_from(_LAYOUTS),
    fault=st.sampled_from(_FAULTS),
    where=st.integers(0, 8),
    piece=st.sampled_from([7, 65536]),
)
def test_a_damaged_row_costs_itself_and_its_neighbours_are_read(
    texts: list[str], nested: bool, layout: str, fault: str, where: int, piece: int
) -> None:
    where %= len(texts)
    rows = [_row(n, text, nested) for n, text in enumerate(texts)]
    written = [json.dumps(row, indent=2 if layout == "pretty" else None, ensure_ascii=False) for row in rows]
    written[where] = _damage(written[where], fault)
    values, _ = cut(_laid_out(written, layout), piece=piece)
    found = _sound(values)
    neighbours = rows[:where] + rows[where + 1 :]
    # A brace too many leaves its row sound, and is a value of its own.
    assert found == (rows if fault == "one brace too many" else neighbours)
    assert len(values) > len(neighbours)


@settings(max_examples=400, deadline=None)
@given(
    texts=st.lists(st.sampled_from(_TEXTS_OF_ROWS), min_size=3, max_size=6),
    nested=st.booleans(),
    layout=st.sampled_from(_LAYOUTS),
    where=st.integers(0, 5),
    at=st.integers(0, 200),
    gone=st.integers(0, 40),
    come=st.sampled_from(["", *'{}[]",:\\ \na1']),
)
def test_no_edit_of_one_row_costs_another_one_or_makes_a_row(
    texts: list[str], nested: bool, layout: str, where: int, at: int, gone: int, come: str
) -> None:
    """Any run of characters taken out, one put in: what is a row then is one that was there, or the edited one."""
    where %= len(texts)
    rows = [_row(n, text, nested) for n, text in enumerate(texts)]
    written = [json.dumps(row, indent=2 if layout == "pretty" else None, ensure_ascii=False) for row in rows]
    at %= len(written[where])
    written[where] = edited = written[where][:at] + come + written[where][at + gone :]
    whole = [row for row in _sound(cut(_laid_out(written, layout))[0]) if row.keys() >= rows[0].keys()]
    own = [*_sound([edited.encode()]), rows[where]]  # Which a bracket before or behind it leaves as it was.
    assert [row for row in whole if row not in own] == [row for n, row in enumerate(rows) if n != where]


@pytest.mark.parametrize("fault", _FAULTS)
@pytest.mark.parametrize("where", [0, 1, 500, 998, 999])
def test_a_damaged_row_of_a_long_line_costs_no_row_behind_it(fault: str, where: int) -> None:
    rows = [_row(n, f"answer {n}", False) for n in range(1_000)]
    written = [json.dumps(row) for row in rows]
    written[where] = _damage(written[where], fault)
    values, _ = cut(_laid_out(written, "one line"))
    kept = 1_000 if fault == "one brace too many" else 999
    assert len(_sound(values)) == kept
    assert kept < len(values) < 1_005


def test_damage_in_many_rows_costs_those_rows() -> None:
    rows = [_row(n, "a {b}", n % 2 == 0) for n in range(600)]
    written = [json.dumps(row) for row in rows]
    damaged = {n: _FAULTS[n // 5 % len(_FAULTS)] for n in range(2, 600, 5)}
    for n, fault in damaged.items():
        written[n] = _damage(written[n], fault)
    values, _ = cut(_laid_out(written, "one line"))
    whole = [row for n, row in enumerate(rows) if damaged.get(n, "one brace too many") == "one brace too many"]
    assert _sound(values) == whole


def test_a_row_whose_keys_stand_in_another_order_is_found_behind_a_damaged_one() -> None:
    turned = '{"rejected": "no", "chosen": "yes", "prompt": "q"}'
    content = f'[{json.dumps(_row(1, "a", False))}, {{"prompt": "q, "chosen": "b"}}, {turned}, {turned}]'
    assert [row["rejected"] for row in _sound(cut(content.encode())[0])] == ["no"] * 3


def test_objects_inside_a_damaged_row_are_no_rows() -> None:
    """The nodes of a tree begin as the tree does, and have the same keys."""
    tree = {"id": 1, "text": "root", "replies": [{"id": 2, "text": "one", "replies": []}]}
    cut_off = json.dumps(tree)[:-3]
    values, unfinished = cut(f"[{json.dumps(tree)}, {cut_off}".encode())
    assert (values[1:], unfinished) == ([cut_off.encode()], True)


@pytest.mark.parametrize(
    "content",
    [
        b'[{"a": 1}, {"a": 2}][{"a": 3}]',
        b'[{"a": 1}, {"a": 2}]\n[{"a": 3}]\n',
        b'[\n{"a": 1},\n{"a": 2}\n]\n[\n{"a": 3}\n]\n',
        b'[[{"a": 1}], [], [{"a": 2}, {"a": 3}]]',
        b'{"data": [{"a": 1}, {"a": 2}, {"a": 3}]}',
        b'{\n  "total": 3,\n  "rows": [\n    {"a": 1}, {"a": 2}, {"a": 3}],\n  "next": null\n}',
        b'{"data": [{"a": 1}, {"a": 2}, {"a": 3}], "page": {"n": 1, "of": {"all": 2}}, "errors": []}',
        b'{"meta": {"v": 1}, "data": [{"a": 1}, {"a": 2}, {"a": 3}]}\n\n',
        b'{"train": [ ], "data": [{"a": 1}, {"a": 2}, {"a": 3}]}',
        b'{"a": 1}\n\xef\xbb\xbf{"a": 2}{"a": 3}',
        b'[{"a": 1}]\xef\xbb\xbf[{"a": 2}, {"a": 3}]',
    ],
)
@pytest.mark.parametrize("piece", [1, 65536])
def test_rows_are_read_wherever_arrays_and_wrappers_hold_them(content: bytes, piece: int) -> None:
    values, unfinished = cut(content.replace(b"[],", b""), piece=piece)
    assert [json.loads(value) for value in values] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert not unfinished


@pytest.mark.parametrize(
    "content",
    [
        b'{"train": [{"a": 1}, {"a": 2}], "test": [{"a": 3}]}',
        b'{"features": [{"a": 1}], "rows": [{"a": 2}, {"a": 3}]}',
        b'{"data": [{"a": 1}], "data": [{"a": 2}]}',
    ],
)
@pytest.mark.parametrize("limit", [2**20, 30])
def test_two_lists_that_may_be_the_rows_refuse_the_file_with_the_command_for_each(content: bytes, limit: int) -> None:
    """Also where the object is longer than a row may be, so that the second list is seen when the first was read."""
    with pytest.raises(FileRefused) as refused:
        cut(content, limit)
    names = re.findall(rb'"(\w+)": \[', content)
    assert refused.value.reason == "ambiguous_rows"
    assert all(f"`{name.decode()}`" in refused.value.message for name in names)
    assert all(f"jq -c '.{name.decode()}[]' FILE > {name.decode()}.jsonl" in refused.value.message for name in names)


@pytest.mark.parametrize(
    "rest",
    [b', "chosen": "x"}', b', "test": [{"a": 9}]}', b', "tags": ["a"]}', b', "chosen": "x', b"}\n{}", b'}{"data": []}'],
)
def test_a_wrapper_that_turns_out_to_be_none_voids_its_rows(rest: bytes) -> None:
    rows = b", ".join(b'{"a": %d}' % n for n in range(20))
    with pytest.raises(FileRefused, match="take the rows out"):
        cut(b'{"data": [' + rows + b"]" + rest, limit=50)


def test_a_wrapper_that_was_cut_keeps_its_rows() -> None:
    for end in (b"", b"]", b'], "pa', b'], "page": {"n"'):
        values, unfinished = cut(b'{"data": [{"a": 1}, {"a": 2}' + end)
        assert values[:2] == [b'{"a": 1}', b'{"a": 2}']
        assert unfinished


@pytest.mark.parametrize(
    "row",
    [
        {"id": "x", "messages": [{"role": "user"}], "data": [{"a": 1}]},
        {"id": 2, "prompt": "d e", "examples": [{"prompt": "e1", "chosen": "good", "rejected": "bad"}], "chosen": "x"},
        {"examples": [{"prompt": "e1", "chosen": "good", "rejected": "bad"}], "prompt": "d e"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "a"}], "feedback": [{"stars": 5}]},
        {"results": [{"a": 1}], "meta": {"by": {"name": "somebody"}}},
        {"results": [{"a": 1}], "tags": [1]},
    ],
)
def test_a_row_with_a_column_of_objects_is_no_wrapper(row: dict[str, Any]) -> None:
    """Also where it is the only value of its file."""
    written = json.dumps(row).encode()
    assert cut(written)[0] == [written]


_cells = _texts | st.integers() | st.lists(st.dictionaries(_texts, _texts, min_size=1, max_size=2), max_size=2)
_wide_rows = st.dictionaries(st.sampled_from([*sorted(NAMES), "prompt", "chosen", "messages"]), _cells, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(_wide_rows, min_size=1, max_size=4),
    between=st.sampled_from([None, "\n", " "]),
    indent=st.sampled_from([None, 1]),
    limit=st.sampled_from([20, 2**20]),
    piece=st.sampled_from([1, 7, 65536]),
)
def test_rows_with_list_columns_come_out_whole_or_refuse_the_file(
    rows: list[Any], between: str | None, indent: int | None, limit: int, piece: int
) -> None:
    parts = [json.dumps(row, indent=indent) for row in rows]
    text = json.dumps(rows, indent=indent) if between is None else between.join(parts)
    try:
        values, _ = cut(text.encode(), limit, piece)
    except FileRefused:
        return
    heads = [value[: limit + 1] for value in values]
    wraps = between is not None and len(rows) == 1 and heads != [text.encode()[: limit + 1]]
    if wraps:  # One object that holds nothing but numbers beside its only list of objects.
        [row] = rows
        assert not any(isinstance(cell, str) for cell in row.values())
        [inside] = [cell for cell in row.values() if isinstance(cell, list) and cell] or [[]]
        assert len(values) == len(inside)
    else:
        assert len(values) == len(rows)
        assert all(len(value) > limit or json.loads(value) == row for value, row in zip(values, rows, strict=True))


def test_what_a_bracket_too_early_leaves_of_a_row_is_no_row() -> None:
    """Before its last key, which may be the one that says how much better an answer is."""
    rows = [_row(n, "yes", False) | {"margin": n} for n in range(3)]
    written = [json.dumps(row) for row in rows]
    written[1] = written[1].replace(', "margin"', '}, "margin"')
    values, _ = cut(_laid_out(written, "one line"))
    assert _sound(values) == [rows[0], rows[2]]
    assert len(values) == 3


@pytest.mark.parametrize("scalar", ["null", "1.5", '"note"', "true"])
def test_a_scalar_between_rows_costs_no_row_with_fewer_keys(scalar: str) -> None:
    values, _ = cut(f'[{{"a": 1, "id": 1}}, {{"a": 2}}, {scalar}, {{"a": 3}}]'.encode())
    assert values == [b'{"a": 1, "id": 1}', b'{"a": 2}', scalar.encode(), b'{"a": 3}']


def test_a_row_that_lost_its_opening_brace_is_one_row() -> None:
    written = [json.dumps(_row(n, "a, b", False)) for n in range(4)]
    written[2] = written[2][1:]
    values, _ = cut(_laid_out(written, "one line"))
    assert len(values) == 4
    assert _sound(values) == [_row(n, "a, b", False) for n in (0, 1, 3)]


def test_a_row_behind_a_stray_quote_is_read() -> None:
    values, _ = cut(b'[{"a": 1}, "x, {"a": 2}, {"a": 3}]')
    assert values == [b'{"a": 1}', b'"x,', b'{"a": 2}', b'{"a": 3}']


def test_damage_is_seen_long_before_a_value_is_too_long() -> None:
    written = [json.dumps(_row(n, "yes", False)) for n in range(20_000)]
    written[3] = _damage(written[3], "cut in the middle")
    content = _laid_out(written, "one line")
    assert len(content) > 2**20
    with patch.object(module, "READ_AGAIN", 3 * module.PIECE), patch.object(module, "READ_AGAIN_OF_ALL", 0):
        assert len(_sound(cut(content)[0])) == 19_999
