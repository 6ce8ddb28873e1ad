"""Batches as one set of pairs that is larger than memory: keys of all, texts of those that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpo_assets.feedback.batches import KEYS, PAIR_ID, PAIRS, keys_frame
from dpo_assets.feedback.pair import token_schema

if TYPE_CHECKING:
    import polars as pl

PART = 1 << 15  # Pairs that are held at once with their texts.


class PairBatch(Protocol):
    """A table of pairs whose rows are known by number."""

    def keys(self, columns: Sequence[str]) -> pl.DataFrame: ...

    def take(self, rows: Sequence[int], columns: Sequence[str] | None = None) -> pl.DataFrame:
        """These rows, given in ascending order; of them these columns, or all."""
        ...


class LoadedBatch:
    """A batch in memory."""

    def __init__(self, pairs: pl.DataFrame) -> None:
        self._pairs, self._keys = pairs, keys_frame(pairs)

    def keys(self, columns: Sequence[str]) -> pl.DataFrame:
        return self._keys.select(columns)

    def take(self, rows: Sequence[int], columns: Sequence[str] | None = None) -> pl.DataFrame:
        return (self._pairs.select(columns) if columns else self._pairs)[list(rows)]


class StoredBatch:
    """A batch on disk, of which only the row groups that are needed are read.

    The last one is kept: a batch is read from its beginning to its end, and one part of it ends where the next begins.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts: list[int] = []
        self._last: tuple[int, Sequence[str] | None, Any] = (-1, None, None)  # Row group, columns, table.

    def keys(self, columns: Sequence[str]) -> pl.DataFrame:
        import polars as pl

        return pl.read_parquet(self._folder / KEYS, columns=list(columns))

    def take(self, rows: Sequence[int], columns: Sequence[str] | None = None) -> pl.DataFrame:
        import numpy as np
        import polars as pl
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not rows:
            return pl.read_parquet(self._folder / PAIRS, n_rows=0, columns=list(columns) if columns else None)
        with pq.ParquetFile(self._folder / PAIRS) as file:
            if not self._starts:
                sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
                self._starts = [0, *np.cumsum(sizes).tolist()]
            wanted = np.asarray(rows, dtype=np.int64)
            group = np.searchsorted(self._starts, wanted, side="right") - 1
            groups, first = np.unique(group, return_index=True)
            bounds = [*first.tolist(), wanted.size]
            parts = []
            for n, number in enumerate(groups.tolist()):
                local = wanted[bounds[n] : bounds[n + 1]] - self._starts[number]
                if self._last[:2] != (number, columns):
                    self._last = (number, columns, file.read_row_group(number, columns=columns))
                # Taken by Arrow, which copies the rows: Polars would keep the whole group for one of them.
                parts.append(self._last[2].take(pa.array(local)))
        taken = pl.from_arrow(pa.concat_tables(parts))
        assert isinstance(taken, pl.DataFrame)
        return taken


class Pool:
    """All pairs of several batches. A pair is named by `b`, its batch, and `n`, its row there."""

    def __init__(self, batches: Sequence[PairBatch]) -> None:
        self.batches = list(batches)

    def keys(self, columns: Sequence[str]) -> pl.DataFrame:
        """These key columns of every pair, with `b` and `n`."""
        import polars as pl

        parts = [
            batch.keys(columns).with_row_index("n").with_columns(pl.lit(b, dtype=pl.UInt32).alias("b"))
            for b, batch in enumerate(self.batches)
        ]
        return pl.concat(parts)

    def of(self, names: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
        """These key columns of the pairs that `names` (with `b` and `n`) names, row for row."""
        import numpy as np

        keys = self.keys(columns)
        sizes = np.bincount(keys["b"].to_numpy(), minlength=len(self.batches))
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])[:-1]
        return keys.select(list(columns))[starts[names["b"].to_numpy()] + names["n"].to_numpy()]

    def take(self, names: pl.DataFrame, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The pairs that `names` (with `b` and `n`) names, with these two, by batch and row; of them these columns."""
        import polars as pl

        parts = []
        for (b,), rows in sorted(names.select("b", "n").partition_by("b", as_dict=True).items()):
            numbers = rows["n"].sort()
            part = self.batches[b].take(numbers.to_list(), columns)
            parts.append(part.with_columns(pl.lit(b, dtype=pl.UInt32).alias("b"), numbers.alias("n")))
        if not parts:
            return (
                self.batches[0]
                .take([], columns)
                .with_columns(b=pl.lit(0, dtype=pl.UInt32), n=pl.lit(0, dtype=pl.UInt32))
            )
        return pl.concat(parts)

    def parts(self, names: pl.DataFrame, size: int = PART) -> Iterator[pl.DataFrame]:
        """The pairs of `names` in the order of their ids, `size` at a time, with the other columns of `names`.

        `names` has the columns PAIR_ID too.
        """
        ordered = names.sort(*PAIR_ID, "b", "n")
        for start in range(0, ordered.height, size):
            wanted = ordered.slice(start, size).drop(PAIR_ID)
            part = self.take(wanted).join(wanted, on=["b", "n"], how="left", maintain_order="left")
            yield part.sort("pair_id", "b", "n")


def stored(folders: Iterable[Path]) -> Pool:
    """The pairs of batches on disk."""
    return Pool([StoredBatch(folder) for folder in folders])


def parts_with_tokens(
    pairs: Path, tokens: Path | None, start: int = 0, count: int | None = None
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Pairs of a file and their token ids, which another has in the same order, PART at a time; None: no pair.

    Args:
        start: the first pair.
        count: how many; None: all that follow.
    """
    import polars as pl

    if tokens is None:
        yield pl.read_parquet(pairs, n_rows=0), pl.DataFrame(schema=token_schema())
        return
    stop = pl.scan_parquet(pairs).select(pl.len()).collect().item() if count is None else start + count
    for at in range(start, stop, PART):
        one, ids = (pl.scan_parquet(path).slice(at, min(PART, stop - at)).collect() for path in (pairs, tokens))
        yield one, ids
