"""The one scorer: log-probabilities of completion tokens, for SFT, reference, DPO and evaluation alike.

Two forwards that round differently are the classic cause of a first loss off ln 2, so there is only this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.packing import Group, pack, under_budget
from dpo_assets.training.engines.head import TokenScores
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.structure import causal_lm


def score_tokens(model: Any, batch: PackedBatch, autocast: AbstractContextManager[Any] | None = None) -> TokenScores:
    """Scores the completion tokens of a packed batch that is on the model's device, by the engine of the model."""
    scores: TokenScores = engine_of(model).scores(causal_lm(model), batch, autocast)
    return scores


def sequence_logps(scores: TokenScores, batch: PackedBatch) -> Tensor:
    """Summed log-probability of each completion [R], in the order of `pack`, rounded once to what its tokens are in."""
    return exact_logps(scores, batch).to(scores.logps.dtype)


def exact_logps(scores: TokenScores, batch: PackedBatch) -> Tensor:
    """The same in fp64. In fp32 a sum of 500 nats is off by 3e-5, of which a margin has four: `TIE_NATS` is 1e-4."""
    logps = scores.logps.double()
    return logps.new_zeros(len(batch.scored.lengths)).index_add(0, batch.scored.owner, logps)


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
        batch = pack(run).to(causal_lm(model).device, non_blocking=True)
        with engine.as_the_policy():
            scores = score_tokens(model, batch, autocast)
            logps.append(exact_logps(scores, batch))
        hits.append(torch.zeros_like(batch.scored.lengths).index_add(0, batch.scored.owner, scores.top1.long()))
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
