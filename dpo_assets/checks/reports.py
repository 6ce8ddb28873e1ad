"""What the worker measured, as the checks judge it. A stage writes one of these; its asset reads it back.

A part that could not be measured says why (`NotMeasured`). A part that is None is of an earlier version.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field

from dpo_assets.artifact import Artifact, Number, read_kept, write_json
from dpo_assets.checks.evidence.measured import Comparison, MeanScore
from dpo_assets.checks.evidence.slices import SliceScore
from dpo_assets.checks.statistics import Proportion
from dpo_assets.planning.targets import LoraCoverage

FILE = "report.json"


class Report(BaseModel):
    """A report of the worker. Keys of another version are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    def write(self, folder: Path) -> None:
        """Into the artefact that is being made."""
        write_json(folder / FILE, self.model_dump(mode="json"))

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The report of a sealed artefact.

        Raises:
            ConfigError: it is one of an earlier version, which said less.
        """
        return read_kept(artifact, FILE, cls)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, one a logged step. What was no finite number reads as NaN."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


class NotMeasured(Report):
    """A part that could not be measured here, with the reason."""

    not_measured: str


class HeldOutPairs(Report):
    """Implicit rewards of held-out pairs. `margin_nats` is the mean of chosen minus rejected log-ratio.

    `margins` holds it of each pair, by `pair_id`; it is empty in a report of an earlier version.
    """

    pairs: int
    accuracy: Proportion
    margin_nats: Number
    margins: dict[str, Number] = {}
    nll_ratio: Number
    chosen_nats_per_token: Number
    rejected_nats_per_token: Number


class Divergence(Report):
    """KL(policy || reference) in nats per token, with its interval where more than one answer was sampled."""

    per_token: Number
    low: float | None = None
    high: float | None = None


class AnswerHealth(Report):
    """Shares of answers that repeat themselves, never end, are empty or hold template marks; distinct tokens and
    bigrams; mean length in tokens.

    `longest_repeat` is the mean share that the longest n-gram which stands twice takes of its answer. With no answers
    there are no shares, and they are 0.
    """

    answers: int
    repetition: Number = 0.0
    no_eos: Number = 0.0
    empty: Number = 0.0
    distinct_1: Number = 0.0
    distinct_2: Number = 0.0
    longest_repeat: Number = 0.0
    marks: Number = 0.0
    mean_tokens: Number = 0.0


class SampledAnswers(Report):
    """Both sides' answers to the same prompts with the same seed; `longer` and `shorter` count the policy's."""

    prompts: int
    most_tokens: int
    reference: AnswerHealth
    policy: AnswerHealth
    longer: int
    shorter: int
    kl: Divergence | NotMeasured
    examples: tuple[tuple[str, str, str], ...] = ()


class Capability(Report):
    """Tasks, or next tokens, that each side meets: shares, and how many only one of them met."""

    kind: Literal["tasks", "token_accuracy"]
    tasks: int
    reference: Number
    policy: Number
    lost: int
    gained: int


class AdapterNorm(Report):
    """The largest change of a layer's weights over their norm, and where it stands."""

    largest: Number
    layer: str
    layers: int


class Stop(Report):
    """The first trigger of a run (`checks.collapse.Trigger`), and what became of it."""

    rule: str
    metric: str
    step: int
    value: Number
    limit: Number
    band: str
    source: str
    fix: str
    kept_step: int
    steps_saved: int
    of_steps: int


class Aftermath(Report):
    """What an adapter did, against where it started. None: of an earlier version."""

    held_out: HeldOutPairs | NotMeasured | None = None
    answers: SampledAnswers | NotMeasured | None = None
    capability: Capability | NotMeasured | None = None
    adapter_norm: AdapterNorm | NotMeasured | None = None


class DpoReport(Aftermath):
    """What stage `dpo` saw. The `last` values are means of the last logs; losses are in nats."""

    steps: int
    first_loss: Number
    expected_first_loss: float | None = Field(description="The loss at zero margin; None where it is not known.")
    first_loss_tokens: Number = Field(default=0.0, description="Mean answer tokens of a pair of step 1, in 16 bit.")
    last_loss: Number
    last_margin: Number
    last_accuracy: Number
    nll_ratio: Number = Field(description="NLL of chosen training answers, policy over reference.")
    finite: bool
    lora_coverage: LoraCoverage | None = Field(default=None, description="As measured on the trained model.")
    lora_planned: LoraCoverage = LoraCoverage()
    trainer: str
    kernels: str = Field(description="What computed its scores.")
    kernels_note: str = Field(default="", description="Why that is not what the plan said; empty where it is.")
    stopped: Stop | None = Field(default=None, description="The trigger that ended the run.")
    trigger: Stop | None = Field(default=None, description="The first trigger, whether it ended the run or not.")

    @property
    def guarded(self) -> bool:
        """Whether the run was watched, or at least says that it was not: reports of earlier versions are silent."""
        return "stopped" in self.model_fields_set


class AdoptedBase(Report):
    """Of an SFT checkpoint that is the base as it is."""

    adopted: Literal[True]  # No default: a report that lacks everything else too is no adopted base.


class SftReport(Report):
    """What stage `sft` saw. Losses are nats per token of held-out chosen answers."""

    steps: int
    held_out_nll_before: Number
    held_out_nll_after: Number
    finite: bool
    kernels: str = Field(default="", description="What computed its scores; empty: of an earlier version.")
    kernels_note: str = Field(default="", description="Why that is not what the plan said; empty where it is.")
    adapted_share: float | None = Field(default=None, description="Of the weights; None: of an earlier version.")
    lora_coverage: LoraCoverage | None = None
    ends_with_eos: Number = Field(description="Share of untruncated answers that end their turn.")


class SftOutcome(RootModel[SftReport | AdoptedBase]):
    """Either of them, as the file says."""


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
        if self.comparison is not None:
            return self.comparison.p_better if self.higher_is_better is False else self.comparison.p_worse
        if self.difference is None or self.higher_is_better is None:
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


def read_sft(artifact: Artifact) -> SftReport | AdoptedBase:
    """The report of an `sft_checkpoint`.

    Raises:
        ConfigError: it is neither; one of an earlier version, or cut.
    """
    return read_kept(artifact, FILE, SftOutcome).root


class Carried(Report):
    """What became of the base's tensors in the release, file against file."""

    tensors: int = Field(description="Tensors in the base's files.")
    adapted: int = Field(description="Of these, changed by the merge.")
    beside: int = Field(default=0, description="Of these, no part of the language model: towers, projectors, heads.")
    lost: tuple[str, ...] = Field(default=(), description="Not in the release, or in another shape or format.")
    altered: tuple[str, ...] = Field(default=(), description="Without an adapter, and yet other bytes.")
    added: tuple[str, ...] = Field(default=(), description="In the release, and not in the base.")
    by_name_alone: bool = Field(default=False, description="PEFT wrote another layout: no value was compared.")

    @property
    def whole(self) -> bool:
        return not (self.lost or self.altered or self.added)


class MergeReport(Report):
    """What stage `merge` measured. Differences are nats per token between adapter and merged model."""

    mean_difference_per_token: Number
    max_difference_per_token: Number
    probe_pairs: int
    parameters: int = Field(description="Values that were looked at, of the release as it loads.")
    not_finite: tuple[str, ...] = Field(default=(), description="The weights that are not all numbers, by name.")
    method: Literal["streamed", "peft"]
    carried: Carried | None = Field(default=None, description="None: not compared, by an earlier version.")
    proven_in: str = Field(default="", description="What both were computed in, and where.")
    kernels: str = Field(default="", description="The engine that scored both.")
    kernels_note: str = Field(default="", description="Why that is not what the plan said; empty where it is.")

    @computed_field(description="Whether all of them are numbers.")  # type: ignore[prop-decorator]
    @property
    def finite(self) -> bool:
        return not self.not_finite


class GreedyAnswers(Report):
    """Health of the models' greedy answers to the same held-out prompts."""

    sft: AnswerHealth
    policy: AnswerHealth
    champion: AnswerHealth | None = None


class ChampionScores(Report):
    """The champion on the same held-out pairs, its implicit reward measured against its own start."""

    implicit_reward_accuracy: Proportion
    logp_accuracy: Proportion
    reward_against: Comparison = Field(description="Implicit-reward accuracy, policy less champion, on the same pairs.")
    logp_against: Comparison = Field(description="Accuracy by log-probability per token, policy less champion.")
    neutral_ratio: float | None = Field(default=None, description="Of neutral perplexities, it over its own start.")
    left_out: dict[str, int] = Field(
        default={}, description="Held-out pairs that it could not be asked, by reason: neither side is scored on them."
    )


# How a share of held-out pairs is called wherever it is shown, by the field of EvaluationReport that holds it.
SHARES = {
    "implicit_reward_accuracy": "policy, implicit reward against SFT",
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
    chosen: Perplexity | None = Field(
        default=None, description="Of the chosen answers, with an interval over conversations."
    )

    @property
    def shares(self) -> tuple[tuple[str, Proportion], ...]:
        """Each share of held-out pairs with its name, in the order in which they are shown."""
        return tuple((label, getattr(self, name)) for name, label in SHARES.items())


class GgufWeights(Report):
    """The weights of a GGUF file against those of the merged model, both in fp32 under the merged model's config.

    A weight differs where rounding to the file's type does not explain it. The divergence is KL(merged || file), the
    agreement the share of positions whose most likely next token is the same.
    """

    tensors: int
    differing: tuple[str, ...]
    largest_difference: Number
    kl_per_token: Number
    agreement: Number
    positions: int


class GgufNames(Report):
    """The tensors of the merged model's files by llama.cpp's names for them.

    How many hold the same values, and which of those in another order; which hold others; which have no place by that
    map of names; and which of the file are none of them.
    """

    same: int
    resorted: tuple[str, ...]
    others: tuple[str, ...]
    unplaced: tuple[str, ...]
    beyond: tuple[str, ...]


class GgufReport(Report):
    """A GGUF file as it was read back."""

    file: str
    type: str
    architecture: str = Field(description="As llama.cpp calls it.")
    converter: str
    tensors: int
    values: int = Field(description="Of all its tensors.")
    model_values: int = Field(description="Of the merged language model's.")
    not_finite: tuple[str, ...]
    settings: tuple[str, ...] = Field(description="Settings that are not those of config.json.")
    tokenizer: tuple[str, ...] = Field(description="What is not as in the merged model's tokenizer and chat template.")
    serving: tuple[str, ...] = Field(description="What llama.cpp will do otherwise than training did.")
    weights: GgufWeights | NotMeasured
    names: GgufNames | NotMeasured | None = Field(description="Where `weights` were not measured.")
    template: str = Field(description="Why Ollama's template could not be said; empty where the Modelfile has it.")
