"""Prepared datasets in the worker: Parquet through `datasets`, and pairs as groups."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from datasets import Dataset

from dpo_assets.feedback.pair import TOOLS
from dpo_assets.training.packing import Group

TOKEN_COLUMNS = ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"]


def load_split(
    folder: Path, split: Literal["train", "eval"], columns: list[str] | None = None, scratch: Path | None = None
) -> Dataset:
    """One split of a dpo_dataset artefact.

    `datasets` keeps a copy of what it reads. It goes into `scratch`, the stage's own folder, so that it goes with that
    also when the stage is killed; without one, into a folder that ends with this process.
    """
    if scratch is None:
        scratch = Path(tempfile.mkdtemp(prefix="dpo-assets-datasets-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    columns = columns or TOKEN_COLUMNS
    cache = scratch / f"datasets-{split}"
    return Dataset.from_parquet(str(folder / f"{split}.parquet"), columns=columns, cache_dir=str(cache))


def load_conversations(folder: Path, scratch: Path | None = None) -> Dataset:
    """The training pairs as messages, for a trainer that renders them itself; with TRL's column `tools`, where any pair
    has tools (JSON, or None)."""
    columns = ["prompt", "chosen", "rejected"]
    if TOOLS not in pq.read_schema(folder / "train.parquet").names:
        return load_split(folder, "train", columns, scratch)
    rows = load_split(folder, "train", [*columns, TOOLS], scratch)
    tools = [value or None for value in rows[TOOLS]]
    rows = rows.remove_columns(TOOLS)
    return rows.add_column(TOOLS, tools) if any(tools) else rows


def dpo_group(row: dict[str, Any], max_length: int) -> Group:
    """Prompt with chosen and rejected, each cut to `max_length`."""
    return Group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])).truncated(max_length)


def sft_group(row: dict[str, Any], max_length: int) -> Group:
    """Prompt with the chosen answer."""
    return Group(row["prompt_ids"], (row["chosen_ids"],)).truncated(max_length)
