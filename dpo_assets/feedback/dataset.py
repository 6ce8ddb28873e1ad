"""How a dataset lies on disk, and how a split of it is read.

A dataset is a choice among the rows of fitted batches (`fitted`), which lie beside it and are shared by all datasets of
a pipeline: a refresh writes which rows it chose, and no row again.

| file | holds |
|---|---|
| `rows.parquet` | what the dataset is: a row a pair, in the order of ids: id, digest of content, side, and more flags |
| `stored/places.parquet` | the same rows: which batch, and which row of it |
| `stored/parts.json` | the batches, with the sha256 of the table of each |

What lies under `stored/` says how rows lie in files. The digest of the dataset leaves it out, so that it does not
depend on how feedback was cut into batches.

A folder may also hold a split as one table, `train.parquet` or `eval.parquet`: so a stage can be run by hand.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_assets.artifact import STORED, Artifact, write_json
from dpo_assets.errors import CorruptArtifact
from dpo_assets.feedback.batches import PAIR_ID, PAIRS, PARQUET
from dpo_assets.feedback.facts import CONTENT
from dpo_assets.feedback.pool import PART, StoredBatch
from dpo_assets.hashing import file_sha256, is_file_of

if TYPE_CHECKING:
    import polars as pl

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
ROWS = "rows.parquet"
PLACES, PARTS = f"{STORED}places.parquet", f"{STORED}parts.json"


@dataclass(frozen=True)
class Part:
    """A fitted batch of a dataset."""

    kind: str
    fingerprint: str
    digest: str
    sha256: str  # Of its pairs.

    @classmethod
    def of(cls, fitted: Artifact) -> Part:
        return cls(fitted.manifest.kind, fitted.fingerprint, fitted.digest, fitted.manifest.files[PAIRS].sha256)

    def folder(self, dataset: Path) -> Path:
        """Where it lies for a dataset of the same store."""
        return dataset.parent.parent / self.kind / self.fingerprint


def write_rows(folder: Path, rows: pl.DataFrame, parts: Iterable[Part]) -> None:
    """Writes the files of a dataset.

    Args:
        rows: in the order of ids: PAIR_ID, `facts.CONTENT`, `held_out`, `note` and the row's place, `b` and `n`.
    """
    (folder / STORED).mkdir()
    _write(rows.select(*PAIR_ID, *CONTENT, "held_out", "note"), folder / ROWS)
    _write(rows.select("b", "n"), folder / PLACES)
    write_json(folder / PARTS, [vars(part) for part in parts])


def _write(table: pl.DataFrame, path: Path) -> None:
    import polars as pl
    import pyarrow.parquet as pq

    settings = {**PARQUET, "use_dictionary": False}
    pq.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), path, **settings)


def parts_of(dataset: Path) -> list[Part]:
    """The fitted batches that a dataset chose from; none of a folder with whole tables."""
    path = dataset / PARTS
    return [Part(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def is_whole(dataset: Path) -> bool:
    """Whether every batch that a dataset chose from is there and holds what it held then: its pairs can be read.

    A dataset outlives its batches: one that is damaged is made again where the recipe still asks for it, and with other
    bytes where another version of a library writes the table.
    """
    try:
        for part in parts_of(dataset):
            _verified(dataset, part)
    except CorruptArtifact:
        return False
    return True


def has_split(dataset: Path, split: Split) -> bool:
    """Whether a folder holds a split, of however many pairs."""
    return (dataset / ROWS).is_file() or _whole(dataset, split).is_file()


def split_rows(dataset: Path, split: Split) -> int:
    """Pairs of a split; 0 where the folder has none."""
    import polars as pl
    import pyarrow.parquet as pq

    if _whole(dataset, split).is_file():
        return int(pq.read_metadata(_whole(dataset, split)).num_rows)
    if not (dataset / ROWS).is_file():
        return 0
    held_out = pl.read_parquet(dataset / ROWS, columns=["held_out"])["held_out"]
    return int((held_out == (split == "eval")).sum())


def split_columns(dataset: Path, split: Split) -> list[str]:
    """The columns of a split."""
    import pyarrow.parquet as pq

    path = _whole(dataset, split)
    if not path.is_file():
        path = _verified(dataset, parts_of(dataset)[0]) / PAIRS
    return list(pq.read_schema(path).names)


def read_split(
    dataset: Path, split: Split, columns: Sequence[str] | None = None, first: int | None = None
) -> pl.DataFrame:
    """The pairs of a split, in the order of their ids.

    Args:
        columns: of PAIR_COLUMNS and TOKEN_COLUMNS; None: all.
        first: only so many pairs.

    Raises:
        CorruptArtifact: a batch that the dataset chose from is gone or holds something else.
    """
    import polars as pl

    return pl.concat(split_parts(dataset, split, columns, first))


def split_parts(
    dataset: Path, split: Split, columns: Sequence[str] | None = None, first: int | None = None, size: int = PART
) -> Iterator[pl.DataFrame]:
    """What `read_split` reads, `size` pairs at a time, and a table without rows before them.

    Batches are in the order of ids too, so each is read once from its beginning to its end.
    """
    import polars as pl

    if _whole(dataset, split).is_file():
        wanted, table = list(columns) if columns else None, _whole(dataset, split)
        yield pl.read_parquet(table, columns=wanted, n_rows=0)
        for start in range(0, min(split_rows(dataset, split), first if first is not None else sys.maxsize), size):
            rows = pl.scan_parquet(table).slice(start, size if first is None else min(size, first - start))
            yield (rows.select(wanted) if wanted else rows).collect()
        return
    parts = parts_of(dataset)
    rows = pl.read_parquet(dataset / ROWS, columns=["held_out", "note"])
    places = pl.read_parquet(dataset / PLACES).hstack(rows).filter(pl.col("held_out") == (split == "eval"))
    places = places.drop("held_out").with_row_index("at").slice(0, first)
    batches = {b: StoredBatch(_verified(dataset, parts[b])) for b in places["b"].unique().sort()}
    yield StoredBatch(_verified(dataset, parts[0])).take([], columns)
    for start in range(0, places.height, size):
        wanted = places.slice(start, size)
        taken = [_taken(batches[b], rows, columns) for (b,), rows in wanted.partition_by("b", as_dict=True).items()]
        yield pl.concat(taken).sort("at").drop("at")


@contextmanager
def split_file(dataset: Path, split: Split, columns: Sequence[str], scratch: Path) -> Iterator[Path]:
    """A table of a split for who reads files: in `scratch` for as long as the context lasts, if it is not there."""
    if _whole(dataset, split).is_file():
        yield _whole(dataset, split)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        table = _whole(Path(folder), split)
        write_split(Path(folder), split, split_parts(dataset, split, columns))
        yield table


def write_split(folder: Path, split: Split, parts: Iterable[pl.DataFrame]) -> None:
    """Writes a split as one table.

    Args:
        parts: at least one, which may be without rows.
    """
    import polars as pl
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        writer: Any = None
        for part in parts:
            rows = part.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or stack.enter_context(pq.ParquetWriter(_whole(folder, split), rows.schema))
            if rows.num_rows:  # A group without rows makes `datasets` read no rows at a time.
                writer.write_table(rows)


def split_digest(dataset: Path, split: Split) -> str:
    """sha256 of what says which pairs a split has."""
    return file_sha256(_whole(dataset, split) if _whole(dataset, split).is_file() else dataset / ROWS)


def _taken(batch: StoredBatch, places: pl.DataFrame, columns: Sequence[str] | None) -> pl.DataFrame:
    """The pairs of some places of one batch, with their place `at` in the order of ids."""
    import polars as pl

    ordered = places.sort("n")
    pairs = batch.take(ordered["n"].to_list(), columns)
    if "flags" in pairs.columns and ordered["note"].null_count() < ordered.height:
        flags = pl.concat_list(pl.col("flags").replace("", None), "note").list.drop_nulls().list.join(",")
        pairs = pairs.with_columns(ordered["note"]).with_columns(flags.alias("flags")).drop("note")
    return pairs.with_columns(ordered["at"])


def _verified(dataset: Path, part: Part) -> Path:
    folder = part.folder(dataset)
    if not (folder / PAIRS).is_file():
        raise CorruptArtifact(f"{folder / PAIRS}: {dataset} chose pairs of it, and it is gone; materialise dpo_dataset")
    if not is_file_of(folder / PAIRS, part.sha256):
        raise CorruptArtifact(f"{folder / PAIRS}: differs from what {dataset} chose pairs of; materialise dpo_dataset")
    return folder


def _whole(dataset: Path, split: Split) -> Path:
    return dataset / f"{split}.parquet"


def sides_of(dataset: Path) -> dict[str, Any]:
    """Counts of what `rows.parquet` holds, as it lies on disk: pairs, those of each side, and ids that stand twice."""
    import polars as pl

    rows = pl.read_parquet(dataset / ROWS)
    held_out = int(rows["held_out"].sum())
    return {
        "accepted": rows.height,
        "train_pairs": rows.height - held_out,
        "eval_pairs": held_out,
        "twice": rows.height - rows.select(PAIR_ID).unique().height,
    }
