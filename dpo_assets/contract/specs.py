"""What each stage of the worker is told, and what its files are called."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.catalog import severity_of
from dpo_assets.checks.collapse import CHECK, CollapseLimits
from dpo_assets.checks.configuration import Configuration, rate_ceilings
from dpo_assets.hashing import file_sha256
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import TEMPLATE_DATE, ChecksSection, GgufType

Stage = Literal[
    "verify", "tokenize", "sft", "dpo", "merge", "evaluate", "reward", "benchmark", "harness", "tasks", "gguf"
]
# What the stages `verify` and `tokenize` write.
VERIFIED = "verified.json"
TOKENS, CHAT_FORMAT = "tokens.parquet", "chat_format.json"
# What the stage `gguf` writes beside its report: a folder to hand on, or in a rehearsal this file alone.
GGUF_FOLDER, MODELFILE, GGUF_REHEARSED = "gguf", "Modelfile", "rehearsed.json"
REWARDED = "rewarded.json"  # Of stage `reward`.
ANSWERED, LEFT_OUT = "answers.parquet", "left_out.json"  # Of stage `benchmark`.
QUESTION = "answers_sha256"  # Column of `ANSWERED`: of the texts of all answers to a row, the right ones first.
SAMPLES = "samples.json"  # Of stage `harness`.
LOOKED_UP = "looked_up.json"  # Of stage `tasks`.


class TemplateSettings(BaseModel):
    """How the base's chat template is rendered, wherever it is: part of the base's identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    arguments: Mapping[str, JsonValue] = Field(default={}, description="What the template gets beside the messages.")
    day: date = Field(default=TEMPLATE_DATE, description="The day that a template which asks for today's is told.")


class Spec(BaseModel):
    """What every stage is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str = Field(default="", description="What the artefact is called; default: the stage.")
    output_dir: Path = Field(description="Empty directory that becomes the artefact; its manifest is written last.")
    fingerprint: str
    inputs: dict[str, str] = Field(description="Digests of the artefacts this one is made from.")
    base_model: Path = Field(description="Folder of the base model and its tokenizer; of stage `reward`, the scorer's.")
    template: TemplateSettings = TemplateSettings()
    threads: int = 1

    @property
    def scratch(self) -> Path:
        """Where a stage puts what must not stay: it is removed before the artefact is sealed."""
        return self.output_dir / "trainer"


class VerifySpec(Spec):
    """Whether the base's files are a whole model, which this environment loads as they are written."""


class VerifiedBase(BaseModel):
    """What `verify` found of a base that it did not refuse."""

    unused_tensors: tuple[str, ...] = Field(
        description="Tensors of the files that the model has no place for: released as they are, not trained."
    )
    ends: tuple[str, ...] = Field(description="Tokens that end a turn.")


class ChatFormatFacts(BaseModel):
    """What `tokenize` knows of the chat format and the model's files alone do not tell."""

    ends: tuple[int, ...] = Field(description="Ids of all tokens that end a turn, the template's own included.")


class TokenizeSpec(Spec):
    """Token ids of prompt, chosen and rejected for each pair of a Parquet file."""

    pairs: Path
    vocabulary: int = Field(default=0, description="Rows of the model's embedding; 0: not known.")
    known: tuple[Path, ...] = Field(
        default=(),
        description="Tables of token ids by the same tokenizer, each in the order of pair ids: what stands in one is "
        "not tokenized again.",
    )


class PlannedSpec(Spec):
    """A stage that follows a plan. Out of memory, it is started again with a smaller token budget in that plan."""

    plan: TrainingPlan
    out_of_memory_retries: int = Field(default=0, ge=0, description="Earlier processes of this stage that ran out.")

    @property
    def working_plan(self) -> TrainingPlan:
        """The plan as this stage computes by it."""
        return self.plan

    @property
    def largest_forward(self) -> int:
        """Most tokens of a forward of this stage."""
        return self.working_plan.token_budget

    def smaller_forwards(self) -> Self | None:
        """The same stage in forwards of half the size; None where its own have the least size already.

        A plan may have larger ones left that this stage does not run: then another try would be the same one.
        """
        plan = self.plan.with_half_budget()
        if plan is None:
            return None
        smaller = self.model_copy(update={"plan": plan, "out_of_memory_retries": self.out_of_memory_retries + 1})
        return smaller if smaller.largest_forward < self.largest_forward else None

    def memory_record(self) -> dict[str, int]:
        """What the artefact keeps, outside its digest, of the forwards it was made with."""
        return {"token_budget_used": self.plan.token_budget, "out_of_memory_retries": self.out_of_memory_retries}


class GuardSpec(BaseModel):
    """What stops a DPO run, and what is measured on its adapter: the recipe's numbers, resolved for this run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    limits: CollapseLimits
    source: str = Field(description="Where the limits come from; with the pipeline's reason where it changed some.")
    stops: bool = Field(default=True, description="False: the first trigger is recorded, and training goes on.")
    reference_rate: float = Field(
        default=0.0, description="What a higher learning rate is advised to come down to; 0: unknown."
    )
    usual_beta: float = Field(
        default=0.0, description="What this run's beta is advised to rise to; 0: it is not weak for its loss."
    )
    probe_prompts: int = 8
    probe_every: float = 0.1
    probe_tokens: int = 48
    held_out_pairs: int = 256
    sampled_answers: int = 32
    tasks: Path | None = Field(default=None, description="JSONL file of the user's capability probe.")
    tasks_digest: str = ""

    @classmethod
    def of(cls, plan: TrainingPlan, bands: Bands, checks: ChecksSection) -> GuardSpec:
        """The guard of a run. `severity: {collapse: warn}` records and goes on."""
        tasks = Path(checks.capability_probe) if checks.capability_probe else None
        weak = bands.weak_beta(plan.dpo.losses, plan.dpo.beta)
        fields = ("probe_prompts", "probe_every", "probe_tokens", "held_out_pairs", "sampled_answers")
        return cls(
            limits=CollapseLimits.of(
                bands, losses=plan.dpo.losses, beta=plan.dpo.beta, warmup_steps=plan.dpo_warmup_steps
            ),
            source="; ".join(filter(None, (bands.limit(CHECK).source, bands.reasons.get(CHECK)))),
            stops=severity_of(CHECK, checks.severity) != "warn",
            reference_rate=rate_ceilings(Configuration.of_plan(plan), bands).band.reference,
            usual_beta=weak.usual if weak else 0.0,
            tasks=tasks,
            tasks_digest=file_sha256(tasks) if tasks and tasks.is_file() else "",
            **{name: getattr(checks, name) for name in fields},
        )

    def identity(self) -> dict[str, object]:
        """What an adapter's identity takes from it: what is measured, and on which tasks, wherever their file lies.

        Limits are no part of it: a run that was not stopped is the same under any, and the checks can be asked again.
        """
        kept = {"probe_prompts", "probe_every", "probe_tokens", "held_out_pairs", "sampled_answers", "tasks_digest"}
        return self.model_dump(mode="json", include=kept)


# Of stages whose work falls into parts of equal standing.
OF_PARTS = "Folder of the stage's own, outside its output, for what a try that is ended has made; None: it is lost."


class CheckpointSpec(BaseModel):
    """Where a training stage keeps what its next try goes on from, and how much that may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path = Field(description="The stage's own, outside its output: that one goes with a try that fails.")
    share: float = Field(
        ge=0.0, le=0.5, description="Largest share of the stage's time that it waits for them; 0: none."
    )
    least_seconds: float = Field(ge=0.0, description="Between two; less in a stage that is short.")


class TrainSpec(PlannedSpec):
    """One training stage on a prepared dataset."""

    dataset: Path
    start_adapter: Path | None = None
    reference_cache: Path | None = None
    base_digest: str = ""
    tokenizer_digest: str = ""
    guard: GuardSpec | None = Field(default=None, description="For stage `dpo`; without one nothing is probed.")
    goes_on_from: Path | None = Field(
        default=None,
        description="Adapter of a release that DPO goes on from; the reference is `start_adapter`. None: that, too.",
    )
    training_set: Path | None = Field(
        default=None, description="Folder with the train split that DPO trains on; None: all of that in `dataset`."
    )
    checkpoints: CheckpointSpec | None = Field(default=None, description="None: a try that is ended is lost.")

    @property
    def train_folder(self) -> Path:
        """Where the pairs that are trained on lie. Held-out pairs, and those for the record, lie in `dataset`."""
        return self.training_set or self.dataset

    @property
    def largest_forward(self) -> int:
        """With those of a reference that is scored before DPO; others are scored in the forwards of training."""
        dpo = self.plan.dpo
        ahead = self.reference_cache is not None and dpo.trainer == "packed" and dpo.reference_strategy == "cached"
        return max(self.plan.token_budget, self.plan.reference_budget if ahead else 0)


class MergeSpec(PlannedSpec):
    """Base + adapter as one model, and the proof that it is the same policy."""

    parts: Path | None = Field(default=None, description=OF_PARTS)
    adapter: Path
    dataset: Path
    probe_pairs: int = 32

    @property
    def working_plan(self) -> TrainingPlan:
        """That of the proof."""
        return self.plan.at_proof()


class ChampionSpec(BaseModel):
    """The policy that is live: its release and what it was made from, to be scored again on the pairs of now."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(description="What the ledger calls it.")
    base_model: Path
    template: TemplateSettings = TemplateSettings()
    sft_adapter: Path | None = Field(description="Its own start; None: the base as it is.")
    adapter: Path
    policy: Path = Field(description="Folder of its merged model.")
    inputs: dict[str, str] = Field(description="Digests of its base, SFT checkpoint, adapter and merged model.")
    same_start: bool = Field(description="Whether its start is the challenger's own, which is then scored once.")


class ReleaseSpec(PlannedSpec):
    """A stage that compares the release with the SFT policy that it started from, by the plan's `scoring`."""

    sft_adapter: Path | None
    policy: Path = Field(description="Folder of the merged model.")
    adapter: Path | None = Field(default=None, description="The DPO adapter, for a merged model that does not fit.")

    @model_validator(mode="after")
    def _adapter_is_there_to_be_scored(self) -> Self:
        if self.plan.scoring.subject == "adapter" and self.adapter is None:
            raise ValueError("the plan scores the adapter on its quantised base, and no `adapter` is given")
        return self

    @property
    def compared(self) -> tuple[tuple[str, Path, Path | None], tuple[str, Path, Path | None]]:
        """(what it is, model folder, adapter) of SFT, and of what is scored as the release."""
        merged = self.plan.scoring.subject == "merged"
        release = (self.policy, None) if merged else (self.base_model, self.adapter)
        return ("SFT", self.base_model, self.sft_adapter), ("policy", *release)

    @property
    def working_plan(self) -> TrainingPlan:
        """That of the release: training may have had larger forwards."""
        return self.plan.at_release()


class EvaluateSpec(ReleaseSpec):
    """Held-out scores of the SFT policy, of the release, and of the champion with its own start."""

    dataset: Path
    parts: Path | None = Field(default=None, description=OF_PARTS)
    champion: ChampionSpec | None = Field(default=None, description="None: nothing is live yet.")
    sampled_answers: int = Field(default=0, description="Answers of the policy's own that its KL from SFT is of.")
    corpus: Path | None = Field(default=None, description="File of neutral texts (`checks.neutral`); None: not asked.")
    instructions: int = Field(default=0, description="How many of `checks.instructions` are asked.")
    score_cache: Path | None = Field(default=None, description="Where scores are kept from one time to the next.")
    confidence: float
    generations: int
    max_new_tokens: int
    min_pairs: int


class GgufSpec(Spec):
    """A model as one GGUF file, read back; or whether there could be one, before anything is trained for it.

    `base_model` is the folder to convert: the merged model, or the base in a rehearsal, which writes no weights.
    """

    name: str = Field(description="What the model is called in the file, and the file after it.")
    type: GgufType
    converter: Path | None = Field(default=None, description="A convert_hf_to_gguf.py; None: the package's.")
    rehearsal: bool = False


class RewardSpec(PlannedSpec):
    """Scores of a reward model, the folder of which `base_model` names. Of the plan it follows the device.

    Attributes:
        answers: JSON, a list of `prompt` (messages), `sft` and `policy` (texts), one of each prompt.
        people: the dataset whose held-out pairs people ranked.
    """

    answers: Path
    people: Path
    human_pairs: int
    max_length: int
    confidence: float
    name: str = Field(description="What the report calls the reward model.")


class BenchmarkFile(BaseModel):
    """A file of questions, as stage `benchmark` is told of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    path: Path
    format: Literal["auto", "rewardbench", "rewardbench2"]


class BenchmarkSpec(ReleaseSpec):
    """Implicit rewards of the release against SFT for the answers of benchmarks."""

    benchmarks: tuple[BenchmarkFile, ...]
    confidence: float
    vocabulary: int = Field(default=0, description="Rows of the model's embedding; 0: not known.")


class TasksSpec(Spec):
    """Whether lm-evaluation-harness knows these tasks and has their documents; nothing is asked."""

    tasks: tuple[str, ...]
    include_path: Path | None


class HarnessSpec(ReleaseSpec):
    """Tasks of lm-evaluation-harness for SFT and the release. Paths in the tasks start from `include_path`."""

    tasks: tuple[str, ...]
    include_path: Path | None
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    batch_size: int
    confidence: float

    def smaller_forwards(self) -> Self | None:
        """Half the requests in a forward: lm-eval makes its own, of no token budget. None where there is one only."""
        retries = self.out_of_memory_retries + 1
        if self.batch_size == 1:
            return None
        return self.model_copy(update={"batch_size": self.batch_size // 2, "out_of_memory_retries": retries})
