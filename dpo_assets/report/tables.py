"""Markdown tables of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.untrusted import in_cell

if TYPE_CHECKING:
    import polars as pl

MOST_ROWS, CELL = 5, 160


def cell(value: Any) -> str:
    """A value as one short table cell. Nothing in it is live, whatever text it is (`untrusted.in_cell`)."""
    text = str(value)
    return in_cell(text if len(text) <= CELL else text[: CELL - 1] + "…")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(cell, header)) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def counts_table(name: str, counts: Mapping[str, int]) -> str:
    """Counts, largest first."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return table([name, "rows"], rows) if rows else "none"


SHOWN = ("prompt", "chosen", "rejected")


def sample_table(path: Path) -> str:
    """The first pairs of a table in a file, see `sample_of`."""
    import polars as pl

    return sample_of(pl.read_parquet(path, columns=list(SHOWN), n_rows=MOST_ROWS))


def sample_of(pairs: pl.DataFrame) -> str:
    """The first pairs of a table: last user message and both answers."""
    # Pairs as read may still hold an empty conversation; screening comes later.
    rows = [
        [row[name][-1]["content"] if row[name] else "" for name in SHOWN]
        for row in pairs.head(MOST_ROWS).iter_rows(named=True)
    ]
    return table(["prompt (last message)", "chosen", "rejected"], rows)


def quarantine_table(path: Path) -> str:
    """A few rejected rows of every reason."""
    import polars as pl

    columns = ["reason", "message", "source", "line"]
    rows = pl.read_parquet(path, columns=columns).group_by("reason", maintain_order=True).head(2)
    return table(columns, rows.select(columns).rows()[: 4 * MOST_ROWS]) if rows.height else "none"
