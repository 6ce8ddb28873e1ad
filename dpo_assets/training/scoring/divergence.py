"""How far a policy is from its reference on what it says itself: KL(policy || reference), estimated from samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_assets.checks.evidence.clusters import clustered_ratio
from dpo_assets.checks.reports import Divergence
from dpo_assets.training.batches.packing import Group

LogRatios = list[tuple[float, int]]  # log pi - log pi_ref of an answer in nats, and its tokens.


def own_answers(prompts: Sequence[list[int]], answers: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Sampled answers to be scored, each with the token that ended it; one without a token has no score."""
    said = [[*a["ids"], a["end"]] if a["ended"] else a["ids"] for a in answers]
    return [Group(prompt, (ids,)) for prompt, ids in zip(prompts, said, strict=True) if ids]


def log_ratios(answers: Sequence[Group], policy: Sequence[float], reference: Sequence[float]) -> LogRatios:
    """Of the policy's own answers, whose summed log-probabilities by both are given in nats."""
    return [(p - r, len(g.completions[0])) for p, r, g in zip(policy, reference, answers, strict=True)]


def per_token(ratios: LogRatios) -> Divergence:
    """Nats per token: the sum of log-ratios over that of lengths, with its interval over answers; there must be one.

    The expectation is over the policy, so its own answers at temperature 1 estimate it. Fewer than four answers bound
    nothing.
    """
    found = clustered_ratio([ratio for ratio, _ in ratios], [tokens for _, tokens in ratios])
    return Divergence(per_token=found.value, low=found.low, high=found.high)
