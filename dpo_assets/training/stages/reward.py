"""Stage `reward`: the scores of a reward model for the answers of SFT and policy, and for pairs that people ranked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.contract import REWARDED, RewardSpec
from dpo_assets.judging.comparing import Message
from dpo_assets.judging.pairs import AnswerPair, answers_of, human_pairs
from dpo_assets.judging.rewards import NOT_FINITE, REFUSED, TOO_LONG, Rewarded, summarise
from dpo_assets.training.models.chat_format import RENDERING_ERRORS, ChatFormat, load_chat_format
from dpo_assets.training.models.reward_model import load_reward_model
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.scoring.rewards import rewards

Row = tuple[int, ...]


def run(spec: RewardSpec, reporter: Reporter) -> None:
    """Writes `rewarded.json` (a row a prompt) and `report.json`.

    Raises:
        ConfigError: the folder holds no reward model.
    """
    started = time.perf_counter()
    chat = load_chat_format(spec.base_model, spec.template)
    model = load_reward_model(spec.base_model, spec.plan)
    longest = min(spec.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", spec.max_length))
    pairs = answers_of(json.loads(spec.answers.read_text(encoding="utf-8")))
    people = human_pairs(spec.people, spec.human_pairs)

    rows = [_rows(pair, chat, longest) for pair in (*pairs, *people)]
    every = list(dict.fromkeys(row for two in rows if isinstance(two, list) for row in two))  # Equal texts once.
    reporter.log(f"reward: {len(pairs)} prompts and {len(people)} pairs of people, {len(every)} texts to score")
    scores = dict(zip(every, rewards(model, every, spec.plan.token_budget), strict=True))

    rewarded = [_rewarded(pair, two, scores) for pair, two in zip((*pairs, *people), rows, strict=True)]
    answers, ranked = rewarded[: len(pairs)], rewarded[len(pairs) :]
    summarise(spec.name, answers, ranked, spec.confidence).write(spec.output_dir)
    write_json(spec.output_dir / REWARDED, [_told(pair, one) for pair, one in zip(pairs, answers, strict=True)])
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})


def _rows(pair: AnswerPair, chat: ChatFormat, longest: int) -> list[Row] | str:
    """Token ids of the conversation with each answer, or why there are none.

    As TRL's RewardTrainer makes them: by the reward model's own chat template, no token beside.
    """
    try:
        texts = chat.texts([_with(pair.conversation, a) for a in (pair.first, pair.second)], answer_follows=False)
    except RENDERING_ERRORS:
        return REFUSED
    rows = [tuple(ids) for ids in chat.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return TOO_LONG if any(len(row) > longest for row in rows) else rows


def _with(conversation: Sequence[Message], answer: str) -> list[Message]:
    return [*conversation, {"role": "assistant", "content": answer}]


def _rewarded(pair: AnswerPair, rows: list[Row] | str, scores: dict[Row, float]) -> Rewarded:
    if isinstance(rows, str):
        return Rewarded(None, pair.lengths, pair.opening, rows)
    first, second = (scores[row] for row in rows)
    if not (math.isfinite(first) and math.isfinite(second)):
        return Rewarded(None, pair.lengths, pair.opening, NOT_FINITE)
    return Rewarded((first, second), pair.lengths, pair.opening)


def _told(pair: AnswerPair, one: Rewarded) -> dict[str, Any]:
    return {
        "prompt": pair.asked,
        "policy": pair.first,
        "sft": pair.second,
        "rewards": one.rewards and list(one.rewards),
        "why_none": one.why_none,
        "outcome": one.outcome,
    }
