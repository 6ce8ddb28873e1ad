"""Exports as their documentation describes them (exports/FORMAT.jsonl), and what a reader makes of a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_assets.feedback.pair import JudgedAnswer, Pair
from dpo_assets.feedback.readers import Item, Place, ReadOptions, RowFault, format_named

EXPORTS = Path(__file__).parent / "exports"
PLACE = Place("export.jsonl", 7)
# The second file of formats that join two.
COMPANIONS = {"langfuse": EXPORTS / "langfuse_observations.jsonl", "langsmith": EXPORTS / "langsmith_runs.jsonl"}


def rows_of(format: str) -> list[dict[str, Any]]:
    """The rows of a format's export."""
    return [json.loads(line) for line in (EXPORTS / f"{format}.jsonl").read_text("utf-8").splitlines()]


def items_of(format: str, row: Any, options: ReadOptions | None = None) -> list[Item]:
    """What one row, alone in a file, leads to."""
    joined = replace(options or ReadOptions(), companion=COMPANIONS.get(format))
    reader = format_named(format).reader(joined)
    return [item for _, item in [*reader.read(row, PLACE), *reader.finish()]]


def read_export(format: str) -> list[list[Item]]:
    """Row by row, what the format's export leads to."""
    return [items_of(format, row) for row in rows_of(format)]


def one(items: list[Item]) -> Item:
    [item] = items
    return item


def the_pair(items: list[Item]) -> Pair:
    item = one(items)
    assert isinstance(item, Pair), item
    return item


def the_answer(items: list[Item]) -> JudgedAnswer:
    item = one(items)
    assert isinstance(item, JudgedAnswer), item
    return item


def the_fault(items: list[Item]) -> RowFault:
    item = one(items)
    assert isinstance(item, RowFault), item
    return item


def talk(pair: Pair) -> tuple[str, str, str]:
    """The three parts as lines of `r: text`, with s, u and a for the roles: short enough to be spelled out."""
    parts = (pair.prompt, pair.chosen, pair.rejected)
    prompt, chosen, rejected = ("\n".join(f"{m['role'][0]}: {m['content']}" for m in part) for part in parts)
    return prompt, chosen, rejected


def said(answer: JudgedAnswer) -> tuple[str, str, float]:
    """The prompt and the answer of a judged answer in the same way, and its score."""
    prompt, text = (
        "\n".join(f"{m['role'][0]}: {m['content']}" for m in part) for part in (answer.prompt, answer.answer)
    )
    return prompt, text, answer.score
