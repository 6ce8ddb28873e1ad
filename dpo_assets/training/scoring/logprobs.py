"""The one scorer: log-probabilities of completion tokens, for SFT, reference, DPO and evaluation alike.

Two forwards that round differently are the classic cause of a first loss off ln 2, so there is only this one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.planning.memory import head_chunk
from dpo_assets.training.batches.packing import Group, PackedBatch, pack, under_budget
from dpo_assets.training.engines.base import causal_lm
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.loading import plain_attention
from dpo_assets.training.scoring.head import Head, ScoredHead

LONGEST_EAGER = 4096  # Eager attention keeps all scores of a row, heads x length squared.
PROBE_TOLERANCE = 1e-3  # Nats per token between packed and plain scoring in fp32; measured differences are below 1e-5.


@dataclass(frozen=True)
class TokenScores:
    """Per scored token [N]: log-probability (with gradient), and entropy, mean logit, greedy match (without)."""

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    top1: Tensor


def score_tokens(model: Any, batch: PackedBatch, autocast: AbstractContextManager[Any] | None = None) -> TokenScores:
    """Scores the completion tokens of a packed batch that is on the model's device, by the engine of the model."""
    picked = engine_of(model).hidden(batch, autocast)
    chunk = head_chunk(len(batch["ids"]), "cuda" if picked.is_cuda else "cpu")
    return TokenScores(*ScoredHead.apply(picked, Head.of(causal_lm(model)), batch["target"], chunk))


def sequence_logps(scores: TokenScores, batch: PackedBatch) -> Tensor:
    """Summed log-probability of each completion [R], in the order of `pack`."""
    rows = batch["shape"][0]
    return scores.logps.new_zeros(rows).index_add(0, batch["owner"], scores.logps)


def to_device(batch: PackedBatch, device: Any) -> PackedBatch:
    """The batch with its tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return [move(v) for v in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in batch.items()}


def score_groups(
    model: Any,
    groups: Sequence[Group],
    budget: int,
    autocast: AbstractContextManager[Any] | None = None,
) -> tuple[list[float], list[int]]:
    """(summed log-probability, token count) of every completion, group by group, completion by completion."""
    logps, _ = score_hits(model, groups, budget, autocast)
    return logps, [len(c) for g in groups for c in g.completions]


@torch.no_grad()
def score_hits(
    model: Any,
    groups: Sequence[Group],
    budget: int,
    autocast: AbstractContextManager[Any] | None = None,
) -> tuple[list[float], list[int]]:
    """(summed log-probability, tokens that greedy decoding would pick) of every completion, in `pack`'s order."""
    logps, hits = [], []
    engine = engine_of(model)
    engine.renew()
    for run in under_budget(groups, [g.tokens for g in groups], budget):
        batch = to_device(pack(run), causal_lm(model).device)
        with engine.as_the_policy():
            scores = score_tokens(model, batch, autocast)
            logps.append(sequence_logps(scores, batch).detach())
        hits.append(torch.zeros_like(batch["lengths"]).index_add(0, batch["owner"], scores.top1.long()))
    # Read once at the end: a read per forward would wait for the device each time.
    return (torch.cat(logps).tolist(), torch.cat(hits).tolist()) if logps else ([], [])


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while: an adapter's dropout would make two scores of one pair differ."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def assert_packing_is_exact(model: Any, group: Group, autocast: AbstractContextManager[Any] | None = None) -> None:
    """Scores one group packed and, row by row, through the model's own forward with eager attention.

    Give it the pair with the longest row: a window of attention shows only on rows that are longer than it. Scores that
    are not finite pass, because they say nothing about attention; the guards of training name them.

    Raises:
        ConfigError: when they differ, as they do for architectures whose attention is not plain causal attention.
    """
    lm = causal_lm(model)
    if not engine_of(model).has_eager:
        return  # It has no eager attention to compare with; its own table of shared prefixes was checked at loading.
    with evaluating(model):
        packed, lengths = score_groups(model, [group], budget=group.tokens, autocast=autocast)
        with plain_attention(model, "eager" if group.longest_row <= LONGEST_EAGER else "sdpa"):
            plain = [_row_logp(lm, group.prompt, completion, autocast) for completion in group.completions]
    tolerance = PROBE_TOLERANCE if lm.dtype == torch.float32 else 0.1
    for ours, theirs, length in zip(packed, plain, lengths, strict=True):
        if math.isfinite(theirs) and not abs(ours - theirs) <= tolerance * length:
            raise ConfigError(
                f"{type(lm).__name__} scores {theirs:.4f} nats row by row and {ours:.4f} packed: its attention is not "
                "plain causal attention, so packed batches cannot be scored with it. Use a base of another "
                "architecture; the Llama, Mistral and Qwen2 families are tested."
            )


def _row_logp(
    lm: Any, prompt: Sequence[int], completion: Sequence[int], autocast: AbstractContextManager[Any] | None
) -> float:
    row = torch.tensor([[*prompt, *completion]], device=lm.device)
    kept = len(completion) + 1
    # Logits of the prompt would only cost memory; the few models that do not know the argument compute them.
    few = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    with autocast or nullcontext():
        logits = lm(input_ids=row, use_cache=False, **few).logits[0, -kept:-1].float()
    wanted = row[0, len(prompt) :]
    return float(logits.log_softmax(-1).gather(-1, wanted[:, None]).sum())
