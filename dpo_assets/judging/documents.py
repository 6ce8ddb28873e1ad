"""What two models scored on the documents of a task, compared document by document in the metric's own sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_assets.checks.evidence.clusters import clustered_mean
from dpo_assets.checks.evidence.measured import Comparison, MeanScore
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.neutral import perplexities
from dpo_assets.checks.reports import Perplexity

WINS = {0.0, 0.5, 1.0}  # What a document gives where it is right or wrong: such values are compared exactly.
SAME = 1e-6  # Relative: aggregates of one set of floats in another order.
LogLikelihood = tuple[float, float]  # In nats, and the words, bytes or tokens that it is of.
Scored = float | LogLikelihood


@dataclass(frozen=True)
class PairedScores:
    """None of them: the documents' values do not make up the metric, which then is of all documents at once."""

    comparison: Comparison | None = None
    difference: MeanScore | None = None
    perplexity: Perplexity | None = None


def scored(value: Any) -> Scored | None:
    """What a document gave a metric: a number, or a log-likelihood with its size; None: neither."""
    if isinstance(value, list | tuple):
        parts = [scored(part) for part in value]
        match parts:
            case [float(nats), float(size)]:
                return nats, size
        return None
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None


def paired_scores(
    sft: Sequence[Scored | None],
    policy: Sequence[Scored | None],
    documents: Sequence[object],
    aggregates: tuple[float, float],
    confidence: float,
) -> PairedScores:
    """How the policy's scores differ from SFT's, by document.

    A metric's name does not say what its documents' values are: those of `perplexity` are log-likelihoods, whose higher
    is better where the metric's lower is, and those of F1 are labels. So they are taken for what makes up the aggregate
    of both sides: their mean; or exp, or bits, of minus the sum of log-likelihoods over that of sizes.

    Args:
        documents: which each value belongs to; a document that is asked twice is no independent evidence.
        aggregates: the metric of SFT and of the policy.
    """
    there = [(s, p) for s, p in zip(sft, policy, strict=True) if s is not None and p is not None]
    if not there or len(there) < len(sft):
        return PairedScores()
    numbers = [(s, p) for s, p in there if isinstance(s, float) and isinstance(p, float)]
    if len(numbers) == len(there):
        before, after = (list(side) for side in zip(*numbers, strict=True))
        if all(_same(math.fsum(s) / len(s), one) for s, one in zip((before, after), aggregates, strict=True)):
            binary = {*before, *after} <= WINS
            return PairedScores(
                comparison=compare(after, before, documents, confidence) if binary else None,
                difference=clustered_mean([a - b for b, a in numbers], documents, confidence),
            )
        return _as_perplexity([((b, 1.0), (a, 1.0)) for b, a in numbers], documents, aggregates, confidence)
    pairs = [(s, p) for s, p in there if isinstance(s, tuple) and isinstance(p, tuple)]
    if len(pairs) < len(there):
        return PairedScores()
    return _as_perplexity(pairs, documents, aggregates, confidence)


def _as_perplexity(
    pairs: Sequence[tuple[LogLikelihood, LogLikelihood]],
    documents: Sequence[object],
    aggregates: tuple[float, float],
    confidence: float,
) -> PairedScores:
    sizes = [size for (_, size), _ in pairs]
    if sizes != [size for _, (_, size) in pairs] or not all(size >= 0 for size in sizes) or not sum(sizes):
        return PairedScores()
    before, after = [nats for (nats, _), _ in pairs], [nats for _, (nats, _) in pairs]
    for nats, one in zip((before, after), aggregates, strict=True):
        lost = -math.fsum(nats) / math.fsum(sizes)
        if not (_same(lost, math.log(one) if one > 0 else one) or _same(lost / math.log(2), one)):
            return PairedScores()
    return PairedScores(perplexity=perplexities(sizes, before, after, documents, confidence))


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME, abs_tol=SAME) or (math.isnan(one) and math.isnan(other))
