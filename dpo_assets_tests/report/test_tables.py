"""Markdown tables: bounded in size, and whole whatever the texts in them hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dpo_assets.feedback.pair import Pair, Rejected
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.report.tables import CELL, MOST_ROWS, cell, counts_table, quarantine_table, sample_table, table
from dpo_assets_tests.samples import assistant, pair, user


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=400), st.text("ab|\\\n", max_size=400)))
def test_a_cell_is_one_line_of_bounded_length_with_every_bar_escaped(text: str) -> None:
    shown = cell(text)
    (bounded,) = MarkdownIt("commonmark").parseInline(shown)
    assert sum(len(part.content) for part in bounded.children or ()) <= CELL + shown.count("\u2060")
    assert "\n" not in shown
    assert "\r" not in shown
    # No backslash but an escaping one: parsers of tables count several before a bar in different ways.
    assert "|" not in shown.replace("\\|", "")
    assert "\\\\" not in shown


def test_a_short_text_is_shown_whole_and_a_long_one_with_a_mark_where_it_was_cut() -> None:
    assert cell("x" * CELL) == "x" * CELL
    assert cell("x" * (CELL + 1)) == "x" * (CELL - 1) + "…"
    assert cell("|" * (CELL + 1)) == "\\|" * (CELL - 1) + "…"
    assert cell(None) == "None"


def test_a_table_has_a_header_a_rule_and_a_line_a_row() -> None:
    assert table(["a", "b"], [[1, "x|y"], [2, "z"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |\n| 2 | z |"


def test_counts_stand_largest_first_and_then_by_name() -> None:
    lines = counts_table("reason", {"b": 1, "a": 1, "c": 9}).splitlines()
    assert lines == ["| reason | rows |", "|---|---|", "| c | 9 |", "| a | 1 |", "| b | 1 |"]
    assert counts_table("reason", {}) == "none"


def saved(folder: Path, pairs: list[Pair]) -> Path:
    pairs_frame(pairs).write_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_a_sample_shows_the_last_messages_of_the_first_pairs(tmp_path: Path) -> None:
    first = pair(0, prompt=[user("opening"), assistant("b"), user("last")])
    lines = sample_table(saved(tmp_path, [first, *(pair(n) for n in range(1, 20))])).splitlines()
    assert len(lines) == 2 + MOST_ROWS
    assert lines[2] == "| last | a good answer | a bad answer |"
    assert len(sample_table(saved(tmp_path, [])).splitlines()) == 2


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_a_sample_of_pairs_as_read_survives_one_without_messages(tmp_path: Path, part: str) -> None:
    lines = sample_table(saved(tmp_path, [pair(0, **{part: []}), pair(1)])).splitlines()
    assert len(lines) == 4


def test_quarantined_rows_are_shown_two_a_reason_and_in_bounds(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.parquet"
    rows = [Rejected(f"reason {n % 15:02}", "why", "f.jsonl", "", n, b"raw") for n in range(90)]
    quarantine_frame(rows).write_parquet(path)
    lines = quarantine_table(path).splitlines()
    assert len(lines) == 2 + 4 * MOST_ROWS
    assert lines[2:5] == [
        "| reason 00 | why | f.jsonl | 0 |",
        "| reason 00 | why | f.jsonl | 15 |",
        "| reason 01 | why | f.jsonl | 1 |",
    ]
    quarantine_frame([]).write_parquet(path)
    assert quarantine_table(path) == "none"
