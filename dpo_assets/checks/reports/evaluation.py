"""Held-out scores of policy, SFT and champion."""

from __future__ import annotations

from pydantic import Field

from dpo_assets.artifact import Number
from dpo_assets.checks.evidence.measured import Comparison, MeanScore
from dpo_assets.checks.evidence.slices import SliceScore
from dpo_assets.checks.reports.base import NotMeasured, Report
from dpo_assets.checks.reports.training import AnswerHealth, Divergence
from dpo_assets.checks.statistics import Proportion


class Perplexity(Report):
    """Perplexity per token of the same texts by SFT and policy, and the policy's over that of SFT.

    Ends of its interval are None where too few texts bound nothing. `p_above` is the one-sided p of a ratio above one.
    """

    texts: int
    tokens: int
    sft: Number
    policy: Number
    ratio: Number
    low: float | None
    high: float | None
    p_above: float | None = None

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"x{self.ratio:.4g}{ends} ({self.texts} texts)"


class GreedyAnswers(Report):
    """Health of the models' greedy answers to the same held-out prompts."""

    sft: AnswerHealth
    policy: AnswerHealth
    champion: AnswerHealth | None = None


class InstructionsFollowed(Report):
    """Shares of the package's own instructions (`checks.instructions`) that greedy answers followed, and what differs.

    `by_instruction` holds of each its name and whether SFT, policy and champion followed it. No champion: None.
    """

    sft: Proportion
    policy: Proportion
    champion: Proportion | None = None
    against_sft: Comparison = Field(description="Policy less SFT, paired by instruction.")
    against_champion: Comparison | None = None
    by_instruction: tuple[tuple[str, bool, bool, bool | None], ...]


class ChampionScores(Report):
    """The champion on the same held-out pairs, its implicit reward measured against its own start."""

    implicit_reward_accuracy: Proportion
    logp_accuracy: Proportion
    reward_against: Comparison = Field(description="Implicit-reward accuracy, policy less champion, on the same pairs.")
    logp_against: Comparison = Field(description="Accuracy by log-probability per token, policy less champion.")
    reward_accuracy_per_token: Proportion | None = Field(default=None, description="None: of an earlier version.")
    margin: MeanScore | None = Field(default=None, description="Mean margin in nats; None: of an earlier version.")
    kl: Divergence | NotMeasured | None = Field(default=None, description="KL(champion || its start), as the policy's.")
    neutral: Perplexity | NotMeasured | None = Field(default=None, description="Of neutral texts, by its start and it.")
    chosen: Perplexity | None = Field(default=None, description="Of chosen answers, by its start (`sft`) and by it.")
    left_out: dict[str, int] = Field(
        default={}, description="Held-out pairs that it could not be asked, by reason: neither side is scored on them."
    )


# How a share of held-out pairs is called wherever it is shown, by the field of EvaluationReport that holds it.
SHARES = {
    "implicit_reward_accuracy": "policy, implicit reward against SFT",
    "reward_accuracy_per_token": "policy, implicit reward against SFT, per token",
    "logp_accuracy_policy": "policy, log-probability per token",
    "logp_accuracy_sft": "SFT, log-probability per token",
    "pick_the_longer": "baseline: pick the longer answer",
}


class EvaluationReport(Report):
    """Held-out scores of the policy and of the SFT model that it started from, clustered by conversation.

    A comparison that is None is of an earlier version, whose intervals took the pairs of a prompt for independent.
    """

    pairs: int
    prompts: int
    implicit_reward_accuracy: Proportion
    reward_accuracy_per_token: Proportion | None = Field(default=None, description="None: of an earlier version.")
    logp_accuracy_sft: Proportion
    logp_accuracy_policy: Proportion
    pick_the_longer: Proportion
    reward_against_chance: Comparison | None = Field(
        default=None, description="The policy's implicit-reward accuracy less one half."
    )
    logp_against_sft: Comparison | None = Field(
        default=None, description="Accuracy by log-probability per token, policy less SFT, on the same pairs."
    )
    margin: MeanScore | None = Field(default=None, description="The mean margin in nats, with its interval.")
    slices: tuple[SliceScore, ...] = Field(
        default=(), description="By source, and by quartile of the feedback's margin; empty where there is one part."
    )
    margin_mean_nats: Number
    margin_median_nats: Number
    chosen_shift_nats_per_token: Number
    rejected_shift_nats_per_token: Number
    nll_ratio_chosen: Number = Field(description="NLL of chosen answers, policy over SFT.")
    confidence: Number
    kernels: str = Field(default="", description="The engine that scored both sides.")
    kernels_note: str = Field(default="", description="Why that is not what the plan said; empty where it is.")
    scored: str = Field(default="", description="What was scored as the release; empty: of an earlier version.")
    generation: GreedyAnswers
    champion: str | None = Field(default=None, description="Its name in the ledger; None: nothing was live.")
    champion_scores: ChampionScores | None = None
    kl: Divergence | NotMeasured | None = Field(
        default=None, description="KL(policy || SFT) on the policy's own answers; None: of an earlier version."
    )
    neutral: Perplexity | NotMeasured | None = Field(
        default=None, description="Of texts that no feedback is about; None: of an earlier version."
    )
    instructions: InstructionsFollowed | NotMeasured | None = Field(
        default=None, description="Of instructions about the form of an answer; None: of an earlier version."
    )
    chosen: Perplexity | None = Field(
        default=None, description="Of the chosen answers, with an interval over conversations."
    )

    @property
    def shares(self) -> tuple[tuple[str, Proportion], ...]:
        """Each share of held-out pairs with its name, in the order in which they are shown."""
        each = ((label, getattr(self, name)) for name, label in SHARES.items())
        return tuple((label, share) for label, share in each if share is not None)
