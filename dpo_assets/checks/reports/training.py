"""What the stages `sft` and `dpo` saw, and what an adapter did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import Field, RootModel

from dpo_assets.artifact import Artifact, Number, read_kept
from dpo_assets.checks.reports.base import FILE, NotMeasured, Report
from dpo_assets.checks.statistics import Proportion
from dpo_assets.planning.targets import LoraCoverage


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, one a logged step. What was no finite number reads as NaN."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


class HeldOutPairs(Report):
    """Implicit rewards of held-out pairs. `margin_nats` is the mean of chosen minus rejected log-ratio.

    `margins` holds it of each pair, by `pair_id`; it is empty in a report of an earlier version.
    """

    pairs: int
    accuracy: Proportion
    margin_nats: Number
    margins: dict[str, Number] = Field(default={})
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


def read_sft(artifact: Artifact) -> SftReport | AdoptedBase:
    """The report of an `sft_checkpoint`.

    Raises:
        ConfigError: it is neither; one of an earlier version, or cut.
    """
    return read_kept(artifact, FILE, SftOutcome).root
