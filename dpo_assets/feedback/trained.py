"""Which groups of pairs a model was trained on: they cannot become held-out ones, and no score may rest on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.feedback.dataset import read_split, split_parts, write_split
from dpo_assets.feedback.splits import in_eval_split

if TYPE_CHECKING:
    import polars as pl

TRAINED_GROUPS = "trained_groups.parquet"  # Kept with a model: one column, each group once, 32 bytes a group.
TRAIN_SPLIT = "train.parquet"  # Of datasets from before models kept their groups.


def write_trained_groups(dataset: Path, model: Path) -> None:
    """Keeps with a model the groups of the train split that it was trained on."""
    groups = read_split(dataset, "train", ["group_id"])
    groups.unique().sort("group_id").write_parquet(model / TRAINED_GROUPS)


def training_pairs(dataset: Path) -> pl.Series:
    """Ids of the pairs in the train split of a dataset."""
    return read_split(dataset, "train", ["pair_id"])["pair_id"]


def write_training_set(dataset: Path, pairs: pl.Series, folder: Path) -> None:
    """The pairs of these ids in the train split of a dataset as a train split of their own, part by part."""
    import polars as pl

    wanted = pl.DataFrame({"pair_id": pairs})
    parts = split_parts(dataset, "train")
    # In their order, which decides what is trained on when.
    write_split(folder, "train", (part.join(wanted, "pair_id", "semi", maintain_order="left") for part in parts))


def trained_groups(table: Path) -> pl.Series:
    """The groups that stand in the column `group_id` of a Parquet file, each once."""
    import polars as pl

    return pl.read_parquet(table, columns=["group_id"])["group_id"].unique()


def bound_to_train(trained: Iterable[str], fraction: float, seed: int) -> frozenset[str]:
    """Of the groups that a model was trained on, those that this split would hold out.

    None for as long as neither fraction nor seed changes: what a split puts in train it does not hold out.
    """
    return frozenset(group for group in trained if in_eval_split(group, fraction, seed))


def seen_pairs(scored: Path, dataset: Path, trained: Iterable[Path]) -> int:
    """Pairs of a table of scores that their model may have seen, by the record of what it was trained on.

    Args:
        scored: table with a row and a `pair_id` for each pair that was scored.
        dataset: tells the group of each held-out pair; one that is missing there counts as seen.
        trained: the tables of trained groups.
    """
    import polars as pl

    groups = read_split(dataset, "eval", ["pair_id", "group_id"])
    pairs = pl.read_parquet(scored, columns=["pair_id"]).join(groups, on="pair_id", how="left")
    seen = [trained_groups(table) for table in trained]
    known = pl.concat(seen) if seen else pl.Series(dtype=pl.String)
    return int(pairs.filter(pl.col("group_id").is_null() | pl.col("group_id").is_in(known.to_list())).height)


def groups_digest(groups: Iterable[str]) -> str:
    """sha256 of a set of groups."""
    return hashlib.sha256("\n".join(sorted(groups)).encode()).hexdigest()
