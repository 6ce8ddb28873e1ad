"""What holds for every export of a feedback tool: told apart, bounded, and never raising."""

from __future__ import annotations

import copy
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import JudgedAnswer, Pair
from dpo_assets.feedback.readers import Place, ReadOptions, RowFault, format_named, formats
from dpo_assets_tests.feedback.tool_exports import (
    COMPANIONS,
    TOOLS,
    read,
    rows_of,
)

# All of them


@pytest.mark.parametrize("name", TOOLS)
def test_a_row_of_an_export_fits_its_own_format_and_no_other(name: str) -> None:
    for row in rows_of(name):
        scores = {other: fit for other, format_ in formats().items() if (fit := format_.fits(row)) > 0}
        assert scores == {name: 1.0}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "a", "replies": []}},
    ],
)
def test_rows_of_other_formats_do_not_fit_a_tool(row: dict[str, Any]) -> None:
    assert [name for name in TOOLS if format_named(name).fits(row) > 0] == []


@pytest.mark.parametrize("name", sorted(COMPANIONS))
def test_a_companion_file_that_is_not_given_or_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="companion"):
        format_named(name).reader(ReadOptions())
    with pytest.raises(ConfigError, match="is not there"):
        format_named(name).reader(ReadOptions(companion=tmp_path / "none.jsonl"))


def test_rows_that_wait_for_the_end_of_the_file_do_not_wait_in_memory() -> None:
    question, answer, *_ = rows_of("librechat")
    reader = format_named("librechat").reader(ReadOptions())
    tracemalloc.start()
    try:
        for n in range(400):
            where = {"conversationId": f"k{n}", "text": f"{n} " * 5_000}
            for row in (question, answer):
                copy_ = row | where | {"messageId": f"{row['messageId']}-{n}", "parentMessageId": f"q1-{n}"}
                if row is question:
                    copy_["parentMessageId"] = None
                list(reader.read(copy_, Place("export.jsonl", n + 1)))
        held = sum(isinstance(item, JudgedAnswer) for _, item in reader.finish())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held == 400
    assert peak < 2 * 2**20  # Of 15 MB read.


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    leaves |= st.sampled_from(
        ["left", "rating", "submitted", "BOOLEAN", "user", "m1", '{"messages": [{}]}', "[[]]", 10**400]
    )
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    )


@st.composite
def damaged_exports(draw: st.DrawFn, name: str) -> list[Any]:
    """A few rows of the fixture, each with values replaced or removed at any depth."""
    rows = []
    for row in draw(st.lists(st.sampled_from(rows_of(name)), min_size=1, max_size=4)):
        row = copy.deepcopy(row)
        for _ in range(draw(st.integers(0, 3))):
            inner: Any = row
            while True:
                keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                if not keys:
                    break
                key = draw(st.sampled_from(keys))
                if isinstance(inner[key], dict | list) and inner[key] and draw(st.integers(0, 3)):
                    inner = inner[key]
                    continue
                if draw(st.booleans()):
                    inner[key] = draw(json_values())
                else:
                    del inner[key]
                break
        rows.append(row)
    return rows


def check_items(name: str, rows: list[Any], **fields: str) -> None:
    """Nothing is raised, no row is lost, and what comes out can be stored."""
    items = read(name, rows, **fields)
    assert {line for line, _ in items} == set(range(1, len(rows) + 1))
    for _, item in items:
        if isinstance(item, RowFault):
            assert item.reason != "reader_failed", item
            assert item.message
            continue
        answers = [item.chosen, item.rejected] if isinstance(item, Pair) else [item.answer]
        for message in [m for messages in (item.prompt, *answers) for m in messages]:
            message["content"].encode("utf-8")
            assert message["content"].strip()
        strength = item.margin if isinstance(item, Pair) else item.score
        assert strength is None or math.isfinite(strength)


HOSTILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", TOOLS)
@HOSTILE
@given(data=st.data())
def test_damaged_rows_never_raise_and_are_never_lost(name: str, data: st.DataObject) -> None:
    check_items(name, data.draw(damaged_exports(name)))


@pytest.mark.parametrize("name", TOOLS)
@HOSTILE
@given(rows=st.lists(st.dictionaries(st.text(max_size=8), json_values(), max_size=4), max_size=3))
def test_arbitrary_objects_never_raise_and_are_never_lost(name: str, rows: list[Any]) -> None:
    check_items(name, rows)
