"""Reads the exports of feedback tools that were written from their documentation, for the tests beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from dpo_assets.feedback.pair import JudgedAnswer, Message, Pair
from dpo_assets.feedback.readers import Item, Place, ReadOptions, RowFault, format_named

EXPORTS = Path(__file__).parent / "exports"
COMPANIONS = {"langfuse": "langfuse_observations.jsonl", "langsmith": "langsmith_runs.jsonl"}
TOOLS = ["open_webui", "label_studio", "argilla", "langfuse", "langsmith", "librechat"]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXPORTS / f"{name}.jsonl").read_text("utf-8").split("\n") if line]


def read(
    name: str, rows: list[Any], companion: Path | None = None, pairing: str = "best_worst", **fields: str
) -> list[tuple[int, Item]]:
    if companion is None and name in COMPANIONS:
        companion = EXPORTS / COMPANIONS[name]
    reader = format_named(name).reader(ReadOptions(pairing, fields=fields, companion=companion))
    items: list[tuple[Place, Item]] = []
    for line, row in enumerate(rows, 1):
        items += reader.read(row, Place("export.jsonl", line))
    items += reader.finish()
    assert all(place.source == "export.jsonl" for place, _ in items)
    return [(place.line, item) for place, item in items]


def read_export(name: str, **options: Any) -> dict[int, list[Item]]:
    found: dict[int, list[Item]] = {}
    for line, item in read(name, rows_of(name), **options):
        found.setdefault(line, []).append(item)
    return found


def only(items: list[Item]) -> Any:
    [item] = items
    return item


def the(name: str, row: Any, **options: Any) -> Any:
    """The one item of one row."""
    return only([item for _, item in read(name, [row], **options)])


def reason(item: Any) -> tuple[str, str]:
    assert isinstance(item, RowFault), item
    return item.reason, item.message


def sides(item: Any) -> tuple[list[Message], list[Message], list[Message]]:
    assert isinstance(item, Pair), item
    return item.prompt, item.chosen, item.rejected


def judged(item: Any) -> tuple[list[Message], list[Message], float]:
    assert isinstance(item, JudgedAnswer), item
    return item.prompt, item.answer, item.score


def changed(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `row` with one value replaced; `path` is dotted."""
    row = copy.deepcopy(row)
    *parents, last = path.split(".")
    inner: Any = row
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[int(last) if isinstance(inner, list) else last] = value
    return row
