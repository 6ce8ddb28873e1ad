"""Rows of RewardBench and RewardBench 2 as questions: a conversation, answers that are right, and others.

Columns as in the Hub's `allenai/reward-bench` and `allenai/reward-bench-2`: `prompt`, `chosen`, `rejected`, `subset`
and `id`; in the second `chosen` and `rejected` are lists. Files are JSONL, JSON, CSV or Parquet, packed or not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.rules import pair_fault
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, rows_of
from dpo_assets.hashing import file_sha256

Format = Literal["rewardbench", "rewardbench2"]
TIES = "ties"  # The subset of RewardBench 2 that is scored by itself; its case differs from copy to copy.
_HALF = re.compile(r"(ref|tied):(\d+)")
WITHOUT_SUBSET = "all"


@dataclass(frozen=True)
class Question:
    """A row that can be asked.

    Attributes:
        number: its line, or its place among the rows; from 1.
        name: the row's `id`; its number where it has none.
    """

    number: int
    name: str
    subset: str
    prompt: Sequence[Message]
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The right ones first."""
        return (*self.right, *self.wrong)

    @property
    def answers_sha256(self) -> str:
        """Of the texts of all answers, and which of them are right."""
        return hashlib.sha256(json.dumps([self.right, self.wrong]).encode()).hexdigest()

    @property
    def is_tie(self) -> bool:
        """Whether it belongs to the subset Ties of RewardBench 2."""
        return self.subset.lower() == TIES


@dataclass(frozen=True)
class LeftOut:
    """A row that was not scored, and why: a code, and words."""

    number: int
    reason: str
    said: str


@dataclass(frozen=True)
class Questions:
    """A file, read: every row is in one of the two."""

    format: Format
    asked: tuple[Question, ...]
    left_out: tuple[LeftOut, ...]


def read_questions(path: Path, named: Literal["auto", "rewardbench", "rewardbench2"]) -> Questions:
    """Every row of a file. With `auto` the first row with a `chosen` tells the format.

    Raises:
        ConfigError: the file cannot be read, or has no row that can be asked.
    """
    format_: Format | None = None if named == "auto" else named
    asked: list[Question] = []
    left_out: list[LeftOut] = []
    ties: set[str] = set()
    try:
        for number, value in _rows(path):
            try:
                if isinstance(value, RowFault):
                    raise value
                format_ = format_ or format_of(value)
                question = _question(number, value, format_)
                if format_ == "rewardbench2" and question.is_tie:
                    if question.name in ties:
                        raise RowFault("duplicate_id", f"the id `{question.name}` of Ties stands in an earlier row too")
                    ties.add(question.name)
                asked.append(question)
            except RowFault as fault:
                left_out.append(LeftOut(number, fault.reason, fault.message))
    except FileRefused as refused:
        raise ConfigError(f"the benchmark {path} cannot be read: {refused.message}") from None
    if format_ is None or not asked:
        first = f": {left_out[0].said} (row {left_out[0].number})" if left_out else ""
        raise ConfigError(
            f"no row of the benchmark {path} can be asked{first}. Its columns must be RewardBench's (`prompt`, "
            "`chosen`, `rejected`, `subset`, `id`) or RewardBench 2's, where `chosen` and `rejected` are lists"
        )
    return Questions(format_, tuple(asked), tuple(left_out))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | RowFault]]:
    if not path.is_file():
        raise FileRefused("unreadable", "there is no such file")
    file = FeedbackFile(path, path.name, "rewardbench", file_sha256(path), path.stat().st_size)
    return ((row.number, row.value) for row in rows_of(file))


def format_of(row: Mapping[str, Any]) -> Format:
    """RewardBench 2 has several answers a side, as texts; a list of messages is one answer.

    Raises:
        RowFault: it has no `chosen`.
    """
    chosen = row.get("chosen")
    if isinstance(chosen, str) or _is_messages(chosen):
        return "rewardbench"
    if isinstance(chosen, list) and chosen and all(isinstance(one, str) for one in chosen):
        return "rewardbench2"
    raise RowFault("no_answer", "`chosen` is no text and no list of texts or messages")


def _question(number: int, row: Mapping[str, Any], format_: Format) -> Question:
    prompt = _prompt(row.get("prompt"))
    several = format_ == "rewardbench2"
    right, wrong = (_answers(name, row.get(name), prompt, several) for name in ("chosen", "rejected"))
    subset = row.get("subset")
    subset = subset if isinstance(subset, str) and subset.strip() else WITHOUT_SUBSET
    name = row.get("id")
    question = Question(number, str(number if name is None else name), subset, prompt, right, wrong)
    for good, bad in [(one, wrong[0]) for one in right] + [(right[0], one) for one in wrong]:
        pair = Pair(list(prompt), [_assistant(good)], [_assistant(bad)], "", "", number)
        if fault := pair_fault(pair):
            raise RowFault(*fault)
    if several:
        _refuse_unlike(question, row.get("num_correct"))
    return question


def _refuse_unlike(question: Question, correct: Any) -> None:
    """Rows that RewardBench 2's own scoring would read otherwise than they are written."""
    if isinstance(correct, int) and correct != len(question.right):
        raise RowFault("bad_row", f"num_correct is {correct}, and `chosen` has {len(question.right)} answers")
    if not question.is_tie:
        if len(question.right) > 1:
            raise RowFault("bad_row", "several right answers, which only the subset Ties may have")
        return
    half = tie_half(question.name)
    if half is None:
        raise RowFault("bad_row", f"the id `{question.name}` of a row of Ties is not `ref:<number>` or `tied:<number>`")
    if (half[0] == "tied") != (len(question.right) > 1):
        raise RowFault("bad_row", f"`{question.name}` has {len(question.right)} right answers")


def tie_half(name: str) -> tuple[str, int] | None:
    """(`ref` or `tied`, number of the prompt that the two share) of the id of a row of Ties."""
    found = _HALF.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if _is_messages(value):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise RowFault("no_prompt", "`prompt` is neither a text nor a list of messages")


def _answers(name: str, value: Any, prompt: list[Message], several: bool) -> tuple[str, ...]:
    if several:
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise RowFault("no_answer", f"`{name}` is no list of texts")
    if isinstance(value, str):
        return (value,)
    if _is_messages(value):
        messages = _prompt(value)
        own = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if [message["role"] for message in own] == ["assistant"]:
            return (own[0]["content"],)
    raise RowFault("no_answer", f"`{name}` is neither a text nor the prompt with one answer of the assistant")


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
