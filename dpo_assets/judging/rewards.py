"""Answers by the scores of a reward model, and how far these can be believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_assets.checks.evidence.clusters import clustered_mean, wins_of
from dpo_assets.checks.reports import RewardModelScores
from dpo_assets.judging.comparing import Outcome
from dpo_assets.judging.rates import at_equal_length, share_of
from dpo_assets.judging.shares import corrected

TOO_LONG, REFUSED, NOT_FINITE = "too_long", "template_refused", "not_finite"
OUTCOMES: dict[float, Outcome] = {1.0: "win", 0.5: "tie", 0.0: "loss"}


@dataclass(frozen=True)
class Rewarded:
    """Two answers to one prompt with their rewards.

    Attributes:
        rewards: of the first and of the second answer; None where one of them has none.
        why_none: the reason; empty where there are rewards.
        lengths: of the answers, in characters.
        conversation: which the prompt belongs to.
    """

    rewards: tuple[float, float] | None
    lengths: tuple[int, int]
    conversation: str
    why_none: str = ""

    @property
    def difference(self) -> float:
        """First less second; NaN where there are none."""
        return math.nan if self.rewards is None else self.rewards[0] - self.rewards[1]

    @property
    def outcome(self) -> Outcome:
        """A tie where the rewards differ by no more than rounding does."""
        return "null" if self.rewards is None else OUTCOMES[wins_of([self.difference])[0]]


def summarise(
    model: str, answers: Sequence[Rewarded], people: Sequence[Rewarded], confidence: float
) -> RewardModelScores:
    """What a reward model says of the policy's answers (first of each pair), and of what people chose (first too).

    Its intervals count conversations.
    """
    outcomes = [one.outcome for one in answers]
    share, agreement = (share_of(pairs, _conversations(pairs), confidence) for pairs in (answers, people))
    alike = at_equal_length(answers, [one.lengths for one in answers], _conversations(answers), confidence)
    scored = [one for one in answers if one.rewards]
    return RewardModelScores(
        model=model,
        confidence=confidence,
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("loss"),
        left_out=Counter(one.why_none for one in answers if one.why_none),
        share=share.proportion(confidence),
        share_at_equal_length=alike.value,
        interval_at_equal_length=(alike.low, alike.high),
        difference=clustered_mean([one.difference for one in scored], _conversations(scored), confidence),
        human_pairs=len(people),
        human_left_out=Counter(one.why_none for one in people if one.why_none),
        agreement=agreement.proportion(confidence),
        corrected=corrected(share, agreement, confidence),
    )


def _conversations(pairs: Sequence[Rewarded]) -> list[str]:
    return [one.conversation for one in pairs]
