"""Answers of a model, and whether they are well: for the guard while it trains, and for the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import torch
from transformers import GenerationConfig

from dpo_assets.feedback.quality_tokens import TEMPLATE_MARKS
from dpo_assets.planning.scoring import GENERATION_BATCH as GENERATION_BATCH
from dpo_assets.training.engines.attention import plain_attention
from dpo_assets.training.engines.rotary import RotaryTables, fresh_tables
from dpo_assets.training.models.chat_format import ChatFormat
from dpo_assets.training.models.structure import causal_lm

REPEATED_NGRAM, REPEATS = 4, 3  # An answer that says one 4-gram of tokens three times or more repeats itself.


Answers = list[dict[str, Any]]


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    chat: ChatFormat,
    max_new_tokens: int,
    *,
    seed: int | None = None,
    keep: Callable[[list[list[int]], Callable[[], Answers]], Answers] = lambda batch, answer: answer(),
) -> Answers:
    """Answers: `ids` without the token that ended them, `text`, whether the answer `ended` by itself, and at which id
    (`end`, None if it did not), and whether it is `marked`: holds a special token, or a turn mark of any template.

    Greedy; with a `seed` sampled at temperature 1 from the whole distribution, and the state of torch's generators is
    put back afterwards: a run that is watched must train as one that is not. Each batch begins from a seed of its own,
    so that its answers do not depend on whether those before it were drawn now.

    Args:
        keep: gets each batch of prompts and what answers it, and may know the answers.
    """
    answers: Answers = []
    pad = chat.tokenizer.pad_token_id
    # Top-k is on by default where answers are sampled.
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if seed is not None else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=seed is not None,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(chat.ends),
        pad_token_id=pad,
        **sampling,
    )
    together = answered_together(prompts, max_new_tokens, RotaryTables.of(causal_lm(model)))
    with plain_attention(model), own_generation(model, config), torch.random.fork_rng(enabled=seed is not None):
        for number, batch in enumerate(together):
            answers += keep(batch, partial(_answers, model, batch, chat, pad, None if seed is None else seed + number))
    return answers


def _answers(model: Any, batch: list[list[int]], chat: ChatFormat, pad: int, seed: int | None) -> Answers:
    """By the generation config that the model has for now."""
    if seed is not None:
        torch.manual_seed(seed)
    width = max(len(ids) for ids in batch)
    fresh_tables(causal_lm(model))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask)
    return [_answer(row, chat) for row in out[:, width:].tolist()]


def answered_together(prompts: list[list[int]], longest: int, tables: RotaryTables) -> Iterator[list[list[int]]]:
    """Prompts that are answered together, in their order.

    A row whose rotary tables change on the way to an answer of `longest` tokens would change those of the others with
    it, so it is answered alone.
    """
    batch: list[list[int]] = []
    for prompt in prompts:
        if tables.change_before(len(prompt) + longest):
            if batch:
                yield batch
            batch = []
            yield [prompt]
            continue
        batch.append(prompt)
        if len(batch) == GENERATION_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _answer(row: list[int], chat: ChatFormat) -> dict[str, Any]:
    length = next((n for n, token in enumerate(row) if token in chat.ends), None)
    kept = row if length is None else row[:length]
    text = chat.tokenizer.decode(kept, skip_special_tokens=True)
    marked = not chat.special_ids.isdisjoint(kept) or any(mark in text for mark in TEMPLATE_MARKS)
    end = None if length is None else row[length]
    return {"ids": kept, "text": text, "ended": length is not None, "end": end, "marked": marked}


@contextmanager
def own_generation(model: Any, config: GenerationConfig) -> Iterator[None]:
    """A generation config in place of the model's own for a while.

    `generate` fills what its arguments leave open from the model's config: a `no_repeat_ngram_size` there would keep a
    policy that repeats itself from showing it.
    """
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


def generation_health(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What `AnswerHealth` holds, of answers as `generate` gives them."""
    if not answers:
        return {"answers": 0}
    tokens = [token for a in answers for token in a["ids"]]
    bigrams = [tuple(pair) for a in answers for pair in zip(a["ids"], a["ids"][1:], strict=False)]
    return {
        "answers": len(answers),
        "repetition": fmean(repeats_itself(a["ids"]) for a in answers),
        "no_eos": fmean(not a["ended"] for a in answers),
        "empty": fmean(not a["ids"] for a in answers),
        "distinct_1": len(set(tokens)) / max(1, len(tokens)),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
        "longest_repeat": fmean(longest_repeat(a["ids"]) / max(1, len(a["ids"])) for a in answers),
        "marks": fmean(a["marked"] for a in answers),
        "mean_tokens": fmean(len(a["ids"]) for a in answers),
    }


def repeats_itself(ids: Sequence[int]) -> bool:
    """Whether any 4-gram of tokens stands three times or more."""
    grams = [tuple(ids[n : n + REPEATED_NGRAM]) for n in range(len(ids) - REPEATED_NGRAM + 1)]
    return any(grams.count(gram) >= REPEATS for gram in set(grams))


def longest_repeat(ids: Sequence[int]) -> int:
    """Tokens of the longest n-gram that stands twice; the two may overlap."""
    low, high = 0, max(0, len(ids) - 1)
    while low < high:  # Where an n-gram stands twice, so do its parts.
        n = (low + high + 1) // 2
        grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        low, high = (n, high) if len(set(grams)) < len(grams) else (low, n - 1)
    return low
