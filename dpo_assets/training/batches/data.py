"""Prepared datasets in the worker: Parquet through `datasets`, and pairs as groups."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from dpo_assets.feedback.dataset import split_columns, split_file, split_rows
from dpo_assets.feedback.pair import TOOLS
from dpo_assets.locks import TEMPORARY, scratch_folder
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import ChatFormat

TOKEN_COLUMNS = ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"]


def load_split(
    folder: Path, split: Literal["train", "eval"], columns: list[str] | None = None, scratch: Path | None = None
) -> Dataset:
    """One split of a dpo_dataset artefact.

    `datasets` keeps a copy of what it reads. It goes into `scratch`, the stage's own folder, so that it goes with that
    also when the stage is killed; without one, into a folder that ends with this process.
    """
    if scratch is None:
        owned = ExitStack()
        scratch = owned.enter_context(scratch_folder(f"{TEMPORARY}datasets-"))
        atexit.register(owned.close)
    columns = columns or TOKEN_COLUMNS
    with split_file(folder, split, columns, scratch) as table:
        return Dataset.from_parquet(str(table), columns=columns, cache_dir=str(scratch / f"datasets-{split}"))


def load_conversations(folder: Path, scratch: Path | None = None) -> Dataset:
    """The training pairs as messages, for a trainer that renders them itself; with TRL's column `tools`, where any pair
    has tools (JSON, or None)."""
    columns = ["prompt", "chosen", "rejected"]
    if TOOLS not in split_columns(folder, "train"):
        return load_split(folder, "train", columns, scratch)
    rows = load_split(folder, "train", [*columns, TOOLS], scratch)
    tools = [value or None for value in rows[TOOLS]]
    rows = rows.remove_columns(TOOLS)
    return rows.add_column(TOOLS, tools) if any(tools) else rows


def load_asked(
    folder: Path, split: Literal["train", "eval"], scratch: Path | None = None, more: Sequence[str] = ()
) -> Dataset:
    """One split with its token ids, and what its prompts are rendered from."""
    tools = [TOOLS] if TOOLS in split_columns(folder, split) else []
    return load_split(folder, split, [*TOKEN_COLUMNS, "prompt", *tools, *more], scratch)


def first_asked(
    rows: Iterable[dict[str, Any]], chat: ChatFormat, count: int, longest: int, *, by: str = "prompt_ids"
) -> list[tuple[dict[str, Any], list[int]]]:
    """The first rows of up to `count` different prompts, each with the token ids that a model answers to.

    These are the whole prompt as the template opens it. `prompt_ids` may be shorter: they are what both conversations
    begin with, and a thinking template opens a turn otherwise than it renders a finished one.

    Args:
        rows: as `load_asked` gives them.
        longest: most tokens of a prompt.
        by: the column by which prompts differ.
    """
    seen: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for row in rows:
        if len(seen) == count:
            break
        # Rendering is slow, and cannot make a prompt shorter than what the conversations share.
        if str(row[by]) in seen or len(row["prompt_ids"]) > longest:
            continue
        ids = chat.prompt_ids(row["prompt"], json.loads(row[TOOLS]) if row.get(TOOLS) else None)
        if len(ids) <= longest:
            seen[str(row[by])] = (row, ids)
    return list(seen.values())


def longest_group(folder: Path, to_group: Callable[[dict[str, Any]], Group], scratch: Path | None = None) -> Group:
    """The group with the longest row of both splits: held-out pairs are scored too, by the engine that trains.

    Found by the lengths of prompts and answers, because converting a split to groups takes long.
    """
    splits: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    longest: list[Group] = []
    for split in splits:
        if not split_rows(folder, split):
            continue
        rows = load_split(folder, split, scratch=scratch)
        table = rows.with_format("arrow")[:]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompts, chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in names)
        # A group has the chosen answer, or both.
        places = {int(np.argmax(prompts + answers)) for answers in (chosen, np.maximum(chosen, rejected))}
        longest += [to_group(rows[place]) for place in places]
    return max(longest, key=lambda group: group.longest_row)


def dpo_group(row: dict[str, Any], max_length: int) -> Group:
    """Prompt with chosen and rejected, each cut to `max_length`."""
    return Group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])).truncated(max_length)


def sft_group(row: dict[str, Any], max_length: int) -> Group:
    """Prompt with the chosen answer."""
    return Group(row["prompt_ids"], (row["chosen_ids"],)).truncated(max_length)
