"""Pairs, judged answers and rejected rows as tables.

Message lists are put together column by column from flat lists of texts: turning a million pairs into rows of nested
dictionaries, and those into a table, would take longer than everything else that is done to them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    QUARANTINE_COLUMNS,
    JudgedAnswer,
    Message,
    Pair,
    Rejected,
    answer_id,
    as_json,
    conversations_id,
    polars_schema,
    prompt_ids,
)

if TYPE_CHECKING:
    import polars as pl

CONVERSATIONS = ("prompt", "chosen", "rejected")


def pairs_frame(pairs: Sequence[Pair], ids: Sequence[str] | None = None) -> pl.DataFrame:
    """Pairs as a table of PAIR_COLUMNS. `ids` are their pair_ids, where they are known already."""
    import polars as pl

    schema = polars_schema(PAIR_COLUMNS)
    prompts = [prompt_ids(p.prompt, p.tools) for p in pairs]
    columns: dict[str, Any] = {
        "pair_id": [p.pair_id for p in pairs] if ids is None else ids,
        "prompt_id": [prompt for prompt, _ in prompts],
        "group_id": [group for _, group in prompts],
        "meta": [as_json(p.meta) for p in pairs],
        "flags": [",".join(p.flags) for p in pairs],
    }
    for name in CONVERSATIONS:
        columns[name] = messages_column([getattr(p, name) for p in pairs])
    for name in ("tools", "source", "row", "line", "label_kind", "margin", "created_at", "user", "row_hash"):
        columns[name] = [getattr(p, name) for p in pairs]
    return pl.DataFrame([_series(name, columns[name], kind) for name, kind in schema.items()])


def _series(name: str, values: Any, kind: Any) -> pl.Series:
    import polars as pl

    return values.alias(name) if isinstance(values, pl.Series) else pl.Series(name, values, dtype=kind)


def messages_column(conversations: Sequence[Sequence[Message]]) -> pl.Series:
    """Conversations as a column of lists of messages."""
    import numpy as np
    import polars as pl
    import pyarrow as pa

    lengths = np.fromiter((len(c) for c in conversations), dtype=np.int64, count=len(conversations))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    flat = [m for c in conversations for m in c]
    fields = [pa.array([m[key] for m in flat], type=pa.large_string()) for key in ("role", "content")]
    structs = pa.StructArray.from_arrays(fields, names=["role", "content"])
    series = pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), structs))
    assert isinstance(series, pl.Series)
    return series.cast(pl.List(pl.Struct({"role": pl.String, "content": pl.String})))


ANSWER_COLUMNS: tuple[str, ...] = (
    "prompt", "answer", "tools", "prompt_id", "answer_id", "score", "source", "row", "line", "label_kind", "meta",
    "created_at", "user", "flags", "raw",
)  # fmt: skip


@cache
def answer_schema() -> pl.Schema:
    """The Parquet types of judged answers."""
    import polars as pl

    messages = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    types: dict[str, pl.DataType] = {
        "prompt": messages, "answer": messages, "score": pl.Float64(), "line": pl.Int64(), "raw": pl.Binary(),
    }  # fmt: skip
    return pl.Schema({name: types.get(name, pl.String()) for name in ANSWER_COLUMNS})


def answers_frame(answers: Sequence[JudgedAnswer]) -> pl.DataFrame:
    """Judged answers as a table of ANSWER_COLUMNS."""
    import polars as pl

    made: dict[str, Callable[[JudgedAnswer], Any]] = {
        "prompt_id": lambda a: prompt_ids(a.prompt, a.tools)[0],
        "answer_id": lambda a: answer_id(a.answer),
        "meta": lambda a: as_json(a.meta),
        "flags": lambda a: ",".join(a.flags),
    }
    columns = []
    for name, kind in answer_schema().items():
        values = [made[name](a) if name in made else getattr(a, name) for a in answers]
        columns.append(_series(name, messages_column(values) if name in ("prompt", "answer") else values, kind))
    return pl.DataFrame(columns)


def quarantine_frame(rejected: Sequence[Rejected]) -> pl.DataFrame:
    """Rejected rows as a table of QUARANTINE_COLUMNS."""
    import polars as pl

    return pl.DataFrame([quarantined(r) for r in rejected], schema=polars_schema(QUARANTINE_COLUMNS))


def quarantined(row: Rejected) -> dict[str, Any]:
    """A row of the quarantine table."""
    return {
        "reason": row.reason,
        "message": row.message,
        "source": row.source,
        "row": row.row,
        "line": row.line,
        "raw": base64.b64encode(row.raw).decode("ascii"),
    }


def quarantine_record(record: dict[str, Any], reason: str, message: str) -> dict[str, Any]:
    """A quarantine row for a pair that was read well but cannot be used."""
    content = {k: record[k] for k in (*CONVERSATIONS, *(["tools"] if record["tools"] else []))}
    raw = json.dumps(content, ensure_ascii=False).encode()
    return {
        "reason": reason,
        "message": message,
        "source": record["source"],
        "row": record["row"],
        "line": record["line"],
        "raw": base64.b64encode(raw).decode("ascii"),
    }


def with_new_content(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the pair table whose conversations were changed, with the ids that they have now.

    The group stays that of the text as it was read: what a kept model was trained on is known by it, and another
    cleaning must not make held-out pairs of it.
    """
    changed = []
    for record in records:
        prompt, _ = prompt_ids(record["prompt"], record["tools"])
        pair = conversations_id(*(record[name] for name in CONVERSATIONS), tools=record["tools"])
        changed.append(record | {"pair_id": pair, "prompt_id": prompt})
    return changed
