"""Batches of pairs, judged answers and rejected rows as folders of tables, keyed by content.

A batch holds `pairs`, their `keys` (what duplicates and contradictions are found by, without reading a text), judged
`answers`, the `quarantine`, and the counts of what was read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.artifact import write_json
from dpo_assets.feedback.near import band_frame
from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    JudgedAnswer,
    Pair,
    Rejected,
    conversations_id,
    digest,
    pair_and_flipped_id,
    polars_schema,
)
from dpo_assets.feedback.pairing import Paired
from dpo_assets.feedback.rules import pair_fault
from dpo_assets.feedback.scan import with_flags
from dpo_assets.feedback.tables import answers_frame, pairs_frame, quarantine_frame
from dpo_assets.feedback.turns import SEEN_IN_PAIRS

if TYPE_CHECKING:
    import polars as pl

INDEX = "batches.json"  # Of `raw_preferences`: its files, and the batches that hold them.
PAIRS, KEYS, ANSWERS, QUARANTINE = "pairs.parquet", "keys.parquet", "answers.parquet", "quarantine.parquet"
COUNTS = "counts.json"
ROW_GROUP = 1024  # Rows of a batch; a part of the dataset reads the groups that hold its ids.
SPLIT_GROUP = 8192  # Rows of a split.


@dataclass
class Batch:
    """What one file, or one span of it, held."""

    pairs: list[Pair] = field(default_factory=list)
    answers: list[JudgedAnswer] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    rows: int = 0  # Rows seen. Each is the row of one pair, answer or rejected row at least.
    lines: int = 0  # Different numbers among them: several rows can stand in one line.
    shapes: Counter[str] = field(default_factory=Counter)  # Rows by the keys that they have.
    flags: Counter[str] = field(default_factory=Counter)  # What was seen or changed in the texts of rows.

    @property
    def rows_in(self) -> int:
        return len(self.pairs) + len(self.answers) + len(self.rejected)


PAIR_ID, FLIPPED_ID, PROMPT_ID = ("pair_a", "pair_b"), ("flipped_a", "flipped_b"), ("prompt_a", "prompt_b")


def keys_frame(pairs: pl.DataFrame, flipped: Sequence[str] | None = None) -> pl.DataFrame:
    """What cross-row rules need of pairs, without their texts; row for row.

    Ids are two whole numbers each, in whose order they sort as their digits do: a third of the memory of the text.

    Args:
        pairs: a table of PAIR_COLUMNS.
        flipped: the ids that the pairs would have with their answers exchanged, where they are known already.
    """
    import polars as pl

    if flipped is None:
        turned = zip(*(pairs[c].to_list() for c in ("prompt", "rejected", "chosen", "tools")), strict=True)
        flipped = [conversations_id(*one, tools=tools) for *one, tools in turned]
    ids = {
        **_halves(PAIR_ID, pairs["pair_id"].to_list()),
        **_halves(FLIPPED_ID, flipped),
        **_halves(PROMPT_ID, pairs["prompt_id"].to_list()),
    }
    own = pairs.select("source", "line", "row", "flags")
    return pl.concat([pl.DataFrame(ids), own, band_frame(pairs)], how="horizontal")


def _halves(names: tuple[str, str], ids: Sequence[str]) -> dict[str, pl.Series]:
    import numpy as np
    import polars as pl

    # An id that is none (the schema will say so) is hashed to one: it must not stop the others.
    sound = [one if _HEX.fullmatch(one) else digest(one.encode()) for one in ids]
    halves = np.frombuffer(bytes.fromhex("".join(sound)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return {name: pl.Series(halves[:, n]) for n, name in enumerate(names)}


_HEX = re.compile(r"[0-9a-f]{32}")


def write_batch(batch: Batch, folder: Path) -> dict[str, Any]:
    """The tables of a batch, and its counts, which are returned too."""
    ids = [pair_and_flipped_id(pair) for pair in batch.pairs]
    pairs = with_flags(pairs_frame(batch.pairs, [pair_id for pair_id, _ in ids]))
    write_pairs(pairs, folder, flipped=[flipped for _, flipped in ids])
    answers_frame(batch.answers).write_parquet(folder / ANSWERS, compression="zstd", compression_level=1)
    quarantine_frame(batch.rejected).write_parquet(folder / QUARANTINE, compression="zstd", compression_level=1)
    whole = sum(row.line == 0 for row in batch.rejected)  # A file that is refused as a whole is no row.
    counts = {
        "rows": batch.rows,
        "lines": batch.lines,
        "rows_in": batch.rows_in - whole,
        "pairs": len(batch.pairs),
        "answers": len(batch.answers),
        "rejected": len(batch.rejected) - whole,
        "shapes": dict(sorted(batch.shapes.items())),
        "flags": dict(sorted(batch.flags.items())),
    }
    write_json(folder / COUNTS, counts)
    return counts


def write_paired(paired: Paired, folder: Path) -> dict[str, Any]:
    """The batch of what a pairing policy made of judged answers, and its counts."""
    made = Batch(rejected=list(paired.rejected))
    for pair in paired.pairs:
        # Answers were sound one by one; whether two of them are a pair is seen only now.
        if fault := pair_fault(pair):
            made.rejected.append(Rejected(*fault, pair.source, pair.row, pair.line, b""))
        else:
            made.pairs.append(pair)
            made.flags.update(flag for flag in pair.flags if flag in SEEN_IN_PAIRS)  # Others were counted by answer.
    write_batch(made, folder)
    counts = {
        "pairs": len(made.pairs),
        "used": sum(count["used"] for count in paired.counts.values()),
        "left": len(paired.rejected),
        "rejected": len(made.rejected),  # With pairs that are none, such as one answer judged in two ways.
        "policies": paired.counts,
        "flags": dict(sorted(made.flags.items())),
        "answers": 0,
    }
    write_json(folder / COUNTS, counts)
    return counts


def write_pairs(pairs: pl.DataFrame, folder: Path, flipped: Sequence[str] | None = None) -> None:
    """`pairs` and their `keys`, in the order of ids."""
    import polars as pl

    keys = keys_frame(pairs, flipped)
    order = pairs.select(pl.arg_sort_by("pair_id", "source", "line", "row")).to_series()
    write_table(pairs[order], folder / PAIRS)
    write_table(keys[order], folder / KEYS)


def write_table(frame: pl.DataFrame, path: Path, row_group: int = ROW_GROUP) -> None:
    """One Parquet file in row groups of that many rows. Equal tables give equal bytes."""
    import polars as pl
    import pyarrow.parquet as pq

    pq.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), path, row_group_size=row_group, **PARQUET)


PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["source", "label_kind"]}


class PairWriter:
    """A Parquet file of pairs, written part by part. `rows` counts them."""

    def __init__(self, path: Path, schema: pl.Schema | None = None, row_group: int = SPLIT_GROUP) -> None:
        self.rows = 0
        self._row_group = row_group
        self._path, self._schema = path, schema if schema is not None else polars_schema(PAIR_COLUMNS)
        self._writer: Any = None

    def __enter__(self) -> PairWriter:
        return self

    def write(self, part: pl.DataFrame) -> None:
        import polars as pl
        import pyarrow.parquet as pq

        rows = part.select(list(self._schema)).cast(dict(self._schema)).to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, rows.schema, **PARQUET)
        self._writer.write_table(rows, row_group_size=self._row_group)
        self.rows += part.height

    def __exit__(self, *_: object) -> None:
        import polars as pl

        if self._writer is None:
            self.write(pl.DataFrame(schema=self._schema))
        self._writer.close()
