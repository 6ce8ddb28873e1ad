"""What rules across pairs, the split and the report need of a pair: a few numbers in place of its texts and tokens.

They are made once, when the pair is tokenized, and lie beside it. A million of them are some hundred MiB.
"""

from __future__ import annotations

import struct
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import PAIR_COLUMNS
from dpo_assets.feedback.quality import sizes
from dpo_assets.feedback.quality_conflicts import alike
from dpo_assets.feedback.quality_sources import models
from dpo_assets.feedback.splits import draw_of, together

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

CONTENT = ("content_a", "content_b")
SIDES = ("prompt", "chosen", "rejected")


@cache
def fact_schema() -> pl.Schema:
    """A row a pair.

    | column | is |
    |---|---|
    | `content_a`, `content_b` | digest of everything that the pair's row holds, token ids included |
    | `group_id`, `draw` | what the split keeps together, and what was drawn for it (`splits.draw_of`) |
    | `together` | number of the opening message: the same for pairs of one side |
    | `prompt_tokens`, `chosen_tokens`, `rejected_tokens`, `same_cut` | `quality.sizes` |
    | `alike_chosen`, `alike_rejected` | what the answers say (`quality_conflicts.alike`) |
    | `day` | when the preference was given, in UTC; null where nothing, or no date, was said |
    | `label_kind`, `user`, `margin`, `winner`, `loser` | who gave the preference and who won (`quality_sources`) |
    """
    import polars as pl

    return pl.Schema(
        {
            **dict.fromkeys(CONTENT, pl.UInt64()),
            "group_id": pl.String(),
            "draw": pl.UInt64(),
            "together": pl.UInt64(),
            **{f"{side}_tokens": pl.UInt32() for side in SIDES},
            "same_cut": pl.Boolean(),
            "alike_chosen": pl.UInt64(),
            "alike_rejected": pl.UInt64(),
            "day": pl.Date(),
            "label_kind": pl.String(),
            "user": pl.String(),
            "margin": pl.Float64(),
            "winner": pl.String(),
            "loser": pl.String(),
        }
    )


def facts_frame(pairs: pl.DataFrame, max_length: int, seed: int) -> pl.DataFrame:
    """The facts of a table of PAIR_COLUMNS and TOKEN_COLUMNS, row for row."""
    import polars as pl

    named = [models(meta) for meta in pairs["meta"]]
    opened = pairs.select(together()).to_series()
    contents = _contents(pairs)
    made: dict[str, Any] = {
        **{name: contents[:, n] for n, name in enumerate(CONTENT)},
        "group_id": pairs["group_id"],
        "draw": [draw_of(group, seed) for group in pairs["group_id"]],
        "together": [int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") for text in opened],
        **sizes(pairs, max_length).to_dict(),
        "alike_chosen": [alike(answer) for answer in pairs["chosen"].to_list()],
        "alike_rejected": [alike(answer) for answer in pairs["rejected"].to_list()],
        "day": pairs.select(day_of()).to_series(),
        **{name: pairs[name] for name in ("label_kind", "user", "margin")},
        "winner": [winner for winner, _ in named],
        "loser": [loser for _, loser in named],
    }
    return pl.DataFrame({name: pl.Series(name, made[name], dtype=kind) for name, kind in fact_schema().items()})


def day_of() -> pl.Expr:
    """The day, in UTC, of `created_at` as readers give it; null where it is no date."""
    import polars as pl

    return pl.col("created_at").str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)


def _contents(pairs: pl.DataFrame) -> NDArray[np.uint64]:
    """Digests of rows, as two numbers each: of their JSON, and of the token ids behind it."""
    import numpy as np

    if not pairs.height:
        return np.zeros((0, 2), dtype=np.uint64)
    written = pairs.select([column.name for column in PAIR_COLUMNS]).write_ndjson()
    lines = written.removesuffix("\n").split("\n")  # Not splitlines: texts may hold U+2028.
    columns = [_bytes_of(pairs[f"{side}_ids"]) for side in SIDES]
    made = bytearray()
    for line, *ids in zip(lines, *columns, strict=True):
        digest = blake2b(line.encode(), digest_size=16)
        digest.update(struct.pack("<3q", *map(len, ids)))
        for one in ids:
            digest.update(one)
        made += digest.digest()
    return np.frombuffer(bytes(made), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _bytes_of(ids: pl.Series) -> list[bytes]:
    flat = ids.list.explode(keep_nulls=False, empty_as_null=False).to_numpy().astype("<i4").tobytes()
    ends = [0, *(4 * ids.list.len().cast(int)).cum_sum()]
    return [flat[start:end] for start, end in pairwise(ends)]
