"""What lies in the tables of batches, counted again from disk.

The counts beside a batch were made while its file was read. Here the tables themselves are counted, as those who read
on will find them, so that the two can be held against each other (`checks.ingest`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.feedback.batches import ANSWERS, PAIRS, QUARANTINE

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Held:
    """Rows in the tables of one file.

    Args:
        pairs, answers, rejected: rows of each table; a refusal of the whole file is none.
        lines: different rows of the file that these are made of.
        strangers: rows that name another file as their source.
    """

    pairs: int
    answers: int
    rejected: int
    lines: int
    strangers: int


@dataclass(frozen=True)
class HeldPaired:
    """Rows in the tables of what a pairing policy made of judged answers, and how many of them are answers it left."""

    pairs: int
    rejected: int
    left: int


def held(batches: Sequence[Path], source: str) -> Held:
    """What the batches of one file hold."""
    import polars as pl

    tables = {name: _columns(batches, name, ["source", "line"]) for name in (PAIRS, ANSWERS, QUARANTINE)}
    rows = pl.concat(tables.values())
    return Held(
        pairs=tables[PAIRS].height,
        answers=tables[ANSWERS].height,
        rejected=tables[QUARANTINE].filter(pl.col("line") > 0).height,
        lines=rows.filter(pl.col("line") > 0)["line"].n_unique(),
        strangers=rows.filter(pl.col("source") != source).height,
    )


def held_paired(batches: Sequence[Path], paired: Path) -> HeldPaired:
    """What the batch of paired answers holds. `batches`: those of all files."""
    place = ["source", "row", "line"]
    rejected = _columns([paired], QUARANTINE, place)
    answers = _columns(batches, ANSWERS, place).unique()
    return HeldPaired(
        pairs=_columns([paired], PAIRS, place).height,
        rejected=rejected.height,
        left=rejected.join(answers, on=place, how="semi").height,
    )


def _columns(batches: Sequence[Path], table: str, columns: Sequence[str]) -> pl.DataFrame:
    import polars as pl

    return pl.concat([pl.read_parquet(batch / table, columns=list(columns)).select(columns) for batch in batches])
