"""What judges, reward models, benchmarks and lm-evaluation-harness said of the release."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from dpo_assets.artifact import Number
from dpo_assets.checks.evidence.measured import Comparison, MeanScore
from dpo_assets.checks.reports.base import Report
from dpo_assets.checks.reports.evaluation import Perplexity
from dpo_assets.checks.statistics import Proportion


class JudgedAnswers(Report):
    """What a judge said of the answers of policy and SFT, and of pairs that people had judged.

    Shares are of comparisons with a verdict, a tie counted half, and those of the policy's answers.
    """

    judge: str
    confidence: Number
    wins: int
    ties: int
    losses: int
    nulls: int = Field(description="Comparisons without a verdict.")
    flipped: int = Field(description="Of those and of people's pairs, verdicts that went with the order.")
    share: Proportion
    share_at_equal_length: Number
    interval_at_equal_length: tuple[Number, Number] | None = Field(
        default=None, description="Its ends; None: of an earlier version."
    )
    human_pairs: int
    human_nulls: int
    agreement: Proportion = Field(description="Share of people's pairs in which it preferred what they did.")
    corrected: Proportion = Field(description="The share that people would have preferred, by its agreement with them.")

    @property
    def asked(self) -> int:
        return self.wins + self.ties + self.losses + self.nulls + self.human_pairs


class RewardModelScores(Report):
    """What a reward model said of the answers of policy and SFT, and of pairs that people had ranked.

    Shares are of prompts with rewards, a tie counted half, and those of the policy's answers.
    """

    model: str
    confidence: Number
    wins: int
    ties: int
    losses: int
    left_out: dict[str, int] = Field(description="Prompts without a reward, by the reason.")
    share: Proportion
    share_at_equal_length: Number
    interval_at_equal_length: tuple[Number, Number] | None = Field(
        default=None, description="Its ends; None: of an earlier version."
    )
    difference: MeanScore = Field(description="Mean reward of the policy's answer less that of SFT's, by prompt.")
    human_pairs: int
    human_left_out: dict[str, int] = Field(description="Pairs of people without a reward, by the reason.")
    agreement: Proportion = Field(description="Share of people's pairs in which what they chose has the higher reward.")
    corrected: Proportion = Field(description="The share that people would have preferred, by its agreement with them.")


class SubsetScore(Report):
    """One subset of a benchmark."""

    name: str
    score: MeanScore


class BenchmarkScore(Report):
    """What the policy's implicit rewards against SFT make of one benchmark, as the benchmark itself counts."""

    name: str
    format: Literal["rewardbench", "rewardbench2"]
    rows: int = Field(description="Rows of the file, those that were left out included.")
    left_out: dict[str, int] = Field(description="Rows that were not scored, by the reason.")
    overall: MeanScore = Field(
        description="Mean of RewardBench's four sections where all are there, of RewardBench 2's subsets, or `by_row`."
    )
    by_row: MeanScore = Field(description="Share of rows that are right; of RewardBench 2 without Ties.")
    sections: dict[str, MeanScore] = Field(description="RewardBench's own, of the subsets that are there.")
    subsets: tuple[SubsetScore, ...]
    undecided: int = Field(description="Rows whose best right and best wrong answer have the very same reward.")


class BenchmarkScores(Report):
    """All benchmarks of a pipeline, scored by one engine."""

    confidence: Number
    scored: str = Field(description="What was scored as the release.")
    kernels: str
    kernels_note: str = ""
    benchmarks: tuple[BenchmarkScore, ...]


class TaskScore(Report):
    """One metric of one task, of SFT and policy on the same documents.

    `comparison` is of metrics that are right or wrong by document, `difference` of all that give a document a number:
    policy less SFT, whatever direction is better. `perplexity` is of metrics that are made of log-likelihoods. A metric
    that is made of all documents at once has none of them.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None = Field(description="As the task says it; None: it does not.")
    documents: int
    sft: Number = Field(description="As lm-eval aggregates it.")
    policy: Number
    comparison: Comparison | None
    difference: MeanScore | None
    perplexity: Perplexity | None = None
    asked: str = Field(
        default="", description="SHA-256 of documents, prompts and targets; empty: a group, or an earlier version."
    )

    @property
    def p_worse(self) -> float | None:
        """One-sided p that the policy is worse; None where documents do not tell, or the task no direction."""
        if self.perplexity is not None:
            return self.perplexity.p_above
        if self.higher_is_better is None:
            return None
        if self.comparison is not None:
            return self.comparison.p_worse if self.higher_is_better else self.comparison.p_better
        if self.difference is None:
            return None
        return self.difference.p_below if self.higher_is_better else self.difference.p_above

    @property
    def is_number(self) -> bool:
        """Whether both sides and what was paired of them are finite."""
        paired = [self.difference.value] if self.difference else []
        paired += [self.comparison.difference] if self.comparison else []
        paired += [self.perplexity.ratio] if self.perplexity else []
        return all(map(math.isfinite, (self.sft, self.policy, *paired)))

    @property
    def name(self) -> str:
        """Task, metric and filter."""
        return f"{self.task} {self.metric}" + ("" if self.filter == "none" else f" {self.filter}")

    @property
    def shown(self) -> str:
        """The paired difference with its interval; of perplexities their ratio."""
        if self.perplexity is not None:
            return str(self.perplexity)
        measured = self.comparison or self.difference
        return str(measured) if measured else f"{self.policy - self.sft:+.3f}, no interval"


class HarnessScores(Report):
    """What lm-evaluation-harness says of SFT and policy."""

    version: str = Field(description="Of lm-eval.")
    confidence: Number
    scored: str = Field(description="What was scored as the release.")
    tasks: tuple[TaskScore, ...]
