"""What is judged: two answers to one conversation, those of SFT and policy or those that people ranked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_assets.feedback.dataset import read_split
from dpo_assets.feedback.pair import LabelKind, prompt_ids
from dpo_assets.judging.comparing import Message

BY_A_MODEL: LabelKind = "judge_rating"


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one conversation."""

    conversation: Sequence[Message]
    first: str
    second: str

    @property
    def lengths(self) -> tuple[int, int]:
        """Of the two answers, in characters."""
        return len(self.first), len(self.second)

    @property
    def opening(self) -> str:
        """What the conversation is known by: the `group_id` of its pairs."""
        return prompt_ids([{"role": m["role"], "content": m["content"]} for m in self.conversation])[1]

    @property
    def asked(self) -> str:
        """The last message of the conversation."""
        return self.conversation[-1]["content"]


def answers_of(rows: Iterable[Mapping[str, Any]]) -> list[AnswerPair]:
    """The policy's answer, then that of SFT, of what `eval_scores` keeps: `prompt`, `policy` and `sft`."""
    return [AnswerPair([_plain(message) for message in row["prompt"]], row["policy"], row["sft"]) for row in rows]


def human_pairs(dataset: Path, most: int) -> list[AnswerPair]:
    """Held-out pairs, chosen answer first: those that people ranked, in the order of their ids, which is none.

    Not those that another model rated: to agree with that one says nothing of people. One of each prompt: pairs of one
    prompt agree, and the interval of a judge's agreement takes them for independent.
    """
    import polars as pl

    columns = ["pair_id", "prompt_id", "prompt", "chosen", "rejected", "label_kind"]
    pairs = read_split(dataset, "eval", columns).filter(pl.col("label_kind") != BY_A_MODEL).sort("pair_id")
    rows = pairs.unique("prompt_id", keep="first", maintain_order=True).head(most).iter_rows(named=True)
    return [
        AnswerPair([_plain(m) for m in row["prompt"]], row["chosen"][-1]["content"], row["rejected"][-1]["content"])
        for row in rows
    ]


def _plain(message: Mapping[str, Any]) -> Message:
    return {"role": str(message["role"]), "content": str(message["content"])}
