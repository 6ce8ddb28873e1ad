"""Held-out pairs as another base reads them: its own template and tokens, and the pairs that it cannot be asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dpo_assets.contract import TemplateSettings
from dpo_assets.feedback.pair import TOOLS, token_schema
from dpo_assets.feedback.splits import fit_to_model
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.evaluation.subjects import Reading, as_groups
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.stages.tokenize import PairTokenizer

CUT_FOR_ONE = "answer_cut_for_the_champion_alone"


@dataclass(frozen=True)
class Reread:
    """Pairs by their id in the tokens of another base, and how many it cannot be asked, by reason."""

    chat: ChatFormat
    groups: Mapping[str, Group]
    left_out: Mapping[str, int]
    longest: int  # Most tokens of a row.

    def reading(
        self,
        pair_ids: Sequence[str],
        asked: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        longest: int,
        sampled: Sequence[Mapping[str, Any]],
        instructions: Sequence[Mapping[str, Any]],
    ) -> Reading:
        """The same pairs, prompts of the same rows, and texts of at most `longest` tokens, in the same order."""
        return Reading(
            self.chat,
            [self.groups[pair] for pair in pair_ids],
            [self.prompt_ids(row) for row in asked],
            as_groups(texts, self.chat, min(longest, self.longest)),
            [self.prompt_ids(row) for row in sampled],
            [self.prompt_ids(row) for row in instructions],
        )

    def leaves_room(self, row: Mapping[str, Any], tokens: int) -> bool:
        """Whether the row's prompt leaves room for an answer of so many tokens."""
        return len(self.prompt_ids(row)) + tokens <= self.longest

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """The tokens that it answers to."""
        return self.chat.prompt_ids(row["prompt"], json.loads(row[TOOLS]) if row.get(TOOLS) else None)


def reread(pairs: pl.DataFrame, base: Path, template: TemplateSettings, max_length: int) -> Reread:
    """Pairs of a dataset as `base` reads them, by the rules that a dataset of its own would be made by.

    Left out is what its template refuses or loses text of, a prompt that fills its rows, answers that its rows make
    equal, and an answer that its rows cut and the challenger's do not: one side would be judged by half an answer.

    Args:
        max_length: most tokens of a row; its own context may be shorter.
    """
    chat, shape = load_chat_format(base, template), inspect_model(base).shape
    longest = min(max_length, shape.context)
    whole = _cut(pairs, max_length).not_()
    tokenizer = PairTokenizer(chat, shape.vocabulary)
    tokens = tokenizer.encoded(tokenizer.rendered(pairs))
    own = [name for name in token_schema() if name in pairs.columns and name != "pair_id"]
    bare = pairs.drop(own) if TOOLS in pairs.columns else pairs.drop(own).with_columns(pl.lit("").alias(TOOLS))
    fit, faults = fit_to_model(bare, tokens, longest)
    half = fit.filter(_cut(fit, longest) & fit["pair_id"].is_in(pairs.filter(whole)["pair_id"].implode()))
    left_out = Counter(str(fault["reason"]) for fault in faults) + Counter({CUT_FOR_ONE: half.height})
    rows = fit.join(half, on="pair_id", how="anti").select("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")
    groups = {
        pair: Group(prompt, (chosen, rejected)).truncated(longest)
        for pair, prompt, chosen, rejected in rows.iter_rows()
    }
    return Reread(chat, groups, {reason: n for reason, n in sorted(left_out.items()) if n}, longest)


def _cut(pairs: pl.DataFrame, longest: int) -> pl.Series:
    """Whether rows of `longest` tokens cut an answer of a pair."""
    sizes = [pairs[name].list.len().cast(pl.Int64) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return (sizes[0] + sizes[1] > longest) | (sizes[0] + sizes[2] > longest)
