"""The recipe: one typed description of a pipeline, shared by YAML, launchpad, command line and worker.

Nothing here knows Dagster or torch. Every cross-field rule says what is wrong and what would pass; how a key that does
not exist is refused is in `section`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dpo_assets.errors import ConfigError
from dpo_assets.section import Section, describe_validation_error

BUILTIN = "builtin:"
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Speedup = Literal["liger", "compile"]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
ALL_LINEAR: tuple[LoraTarget, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


class BaseModelSection(Section):
    """The starting model."""

    source: str = Field(
        description="A Hub id (`org/name`), a local folder, or `builtin:stories260k` (a real 260k-parameter model).",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct", "./models/my-base", "builtin:stories260k"],
    )
    revision: str | None = Field(
        default=None,
        description="Commit sha (40 hex digits) of a Hub model. Required for a Hub id: a branch name can move.",
    )
    chat_template: str | None = Field(
        default=None,
        description="Path of a Jinja chat template for a base that has none; it must end each assistant turn with EOS.",
    )
    licence: str | None = Field(
        default=None,
        description="SPDX id of the model's licence, where its model card does not state one.",
    )

    @property
    def is_builtin(self) -> bool:
        return self.source.startswith(BUILTIN)


class SqlSource(Section):
    """A table or query whose rows are feedback. What is new since the last ingest is read; nothing is written."""

    database: str | None = Field(
        default=None,
        description="An SQLite file, relative to the folder of the YAML file.",
        examples=["./feedback.db"],
    )
    url_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable with the URL (`postgresql://user:password@host/db` or `sqlite:///file.db`).",
        examples=["FEEDBACK_DATABASE_URL"],
    )
    table: str | None = Field(default=None, description="Table or view, also `schema.table`.", examples=["votes"])
    query: str | None = Field(
        default=None,
        description="One SELECT instead of a table.",
        examples=["SELECT id, prompt, chosen, rejected, updated_at FROM votes WHERE deleted = false"],
    )
    id: str = Field(description="Column that tells rows apart: it orders them, and tells what was read before.")
    watermark: str | None = Field(
        default=None,
        description=(
            "Column that grows with every new or changed row, such as `updated_at`: only rows at or above the highest "
            "value read so far are asked for. Without one, the whole table is read again when it changed."
        ),
    )

    @model_validator(mode="after")
    def _one_database_and_one_table(self) -> SqlSource:
        if (self.database is None) == (self.url_env is None):
            raise ValueError(
                "name one database: `database: ./feedback.db` for an SQLite file, or `url_env` with the name of the "
                "environment variable that holds the URL."
            )
        if self.database is not None and "://" in self.database:
            raise ValueError("`database` is a file; put a URL into an environment variable and its name in `url_env`.")
        if (self.table is None) == (self.query is None):
            raise ValueError("name one of `table` and `query`.")
        if self.query is not None and not self.query.lstrip().lower().startswith(("select", "with")):
            raise ValueError("`query` is one SELECT (or WITH ... SELECT): feedback is only read.")
        return self


class FeedbackSource(Section):
    """One set of feedback rows of one format: files, a dataset of the Hub, or a SQL table."""

    path: str | None = Field(
        default=None,
        description=(
            "File or glob (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; all but the last also with `.gz` or `.zst` "
            "behind), relative to the folder of the YAML file, or a URL such as `s3://bucket/feedback/*.jsonl.gz`; "
            "`builtin:oasst` is a real sample."
        ),
        examples=["feedback/*.jsonl", "builtin:oasst"],
    )
    hub: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$",
        description="A dataset of the Hugging Face Hub (`org/name`), instead of `path`.",
        examples=["trl-lib/ultrafeedback_binarized"],
    )
    revision: str | None = Field(
        default=None, description="With `hub`: the commit sha (40 hex digits). A branch name can move."
    )
    files: list[str] = Field(
        default=[],
        description="With `hub`: files or patterns in the repository, which is how a config or a split is chosen.",
        examples=[["data/train-*.parquet"]],
    )
    sql: SqlSource | None = Field(default=None, description="A SQL table or query, instead of `path`.")
    # Any name: formats can come from other packages, so the component decides, with the names that there are.
    format: str = Field(
        default="trl",
        min_length=1,
        description=(
            "The reader: `trl` (prompt/chosen/rejected as text or messages), `oasst_tree`, `hh_rlhf` and the others of "
            "docs/feedback.md; `auto` looks at the first rows and says what it saw, or refuses."
        ),
        examples=["trl", "auto", "hh_rlhf"],
    )
    columns: dict[str, str] = Field(
        default={},
        description="Column map: what the reader knows a column as -> its name in the file, or a path (`input.text`).",
        examples=[{"prompt": "question", "chosen": "best", "rejected": "worst"}],
    )
    json_columns: list[str] = Field(
        default=[], description="Columns whose text is JSON, as CSV and SQL have it for lists of messages."
    )
    fields: dict[str, str] = Field(
        default={}, description="Names that a format leaves to its users' configuration (Label Studio, Argilla)."
    )
    companion: str | None = Field(
        default=None,
        description="A second file that the format joins with (Langfuse's observations, LangSmith's runs).",
    )

    @field_validator("files", mode="before")
    @classmethod
    def _one_file_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> FeedbackSource:
        given = [name for name in ("path", "hub", "sql") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"there are {' and '.join(f'`{name}`' for name in given)}" if given else "there is none"
            raise ValueError(
                f"a source has one of `path` (files or a URL), `hub` (a dataset) and `sql` (a table); {said}. Write "
                "further ones as further sources."
            )
        if self.hub is not None and not _is_commit(self.revision):
            raise ValueError(
                f"the dataset `{self.hub}` needs `revision`: the 40-digit commit sha from its page (a branch such as "
                "`main` can change under you)."
            )
        if self.hub is None and (self.revision is not None or self.files):
            raise ValueError("`revision` and `files` belong to `hub`; name files on disk in `path`.")
        if self.path is not None and _has_credentials(self.path):
            raise ValueError(
                "`path` holds credentials, which would be kept in every run's record; set them in the environment, "
                "where the file system's package looks for them."
            )
        return self

    @property
    def shown(self) -> str:
        """The source for people: no secret can be in it."""
        if self.sql is not None:
            database = Path(self.sql.database).name if self.sql.database else self.sql.url_env
            return f"sql:{database}:{self.sql.table or 'query'}"
        return f"hub:{self.hub}@{str(self.revision)[:8]}" if self.hub is not None else str(self.path)


ContentAction = Literal["flag", "redact", "quarantine"]


class CleaningSection(Section):
    """What is done about pairs that are sound one by one, and still not good to train on."""

    near_duplicates: Literal["quarantine", "drop", "keep"] = Field(
        default="quarantine",
        description="Pairs that say nearly what another pair says: set aside, counted and dropped, or kept.",
    )
    near_duplicate_similarity: float = Field(
        default=0.85,
        ge=0.5,
        le=1.0,
        description="Share of runs of three words that prompt, chosen and rejected answers must each have in common.",
    )
    max_pairs_per_prompt: int = Field(
        default=0, ge=0, description="More pairs of one prompt than this are set aside; 0: no limit."
    )
    template_marks: Literal["quarantine", "escape", "keep"] = Field(
        default="quarantine",
        description="Texts that hold marks of a chat template (`<|im_end|>`), which would end a turn in training.",
    )
    personal_data: ContentAction = Field(
        default="flag",
        description="E-mail addresses, card and phone numbers: flag the pair, mask them, or set it aside.",
    )
    secrets: ContentAction = Field(
        default="flag", description="Keys and tokens: flag the pair, mask them, or set it aside."
    )
    evaluation_sets: list[str] = Field(
        default=[],
        description="Files of prompts that models are judged by (JSONL or lines); pairs that ask them are set aside.",
        examples=[["evaluation/mt_bench.jsonl"]],
    )


class ReleaseRule(Section):
    """Rows that are taken out of quarantine, and why."""

    reason: Literal[
        "near_duplicate", "over_prompt_cap", "template_marks", "personal_data", "secret", "conflict",
        "evaluation_overlap",
    ] = Field(description="What they are in quarantine for; what is no sound pair cannot be released.")  # fmt: skip
    source: str = Field(default="*", description="Name of their file, or a pattern.", examples=["export-2026-*"])
    note: str = Field(min_length=10, description="Why they may be trained on; kept in the dataset's report.")


class FeedbackSection(Section):
    """Where preferences come from, and what a pair must satisfy."""

    sources: list[FeedbackSource] = Field(min_length=1, description="Feedback files, read in this order.")
    pairing: Literal["best_worst", "adjacent", "all_above_margin"] = Field(
        default="best_worst",
        description=(
            "How ranked, rated or thumbed answers to one prompt become pairs: best against worst, each against the "
            "next, or every two that lie `min_margin` apart."
        ),
    )
    min_margin: float = Field(
        default=0.0, ge=0.0, description="Least difference of two scores or ranks; equal ones are always a tie."
    )
    include_synthetic: bool = Field(default=False, description="Keep OpenAssistant pairs with a machine-written side.")
    max_length: int = Field(
        default=1024, ge=16, description="Tokens of prompt + answer; longer answers lose their end (TRL keep_start)."
    )
    eval_fraction: float = Field(
        default=0.1, gt=0.0, lt=0.9, description="Share of prompt groups held out for evaluation, never trained on."
    )
    min_pairs: int = Field(default=50, ge=1, description="Fewer training pairs than this block the run.")
    max_quarantine_rate: float = Field(
        default=0.2, ge=0.0, le=1.0, description="A larger share of rejected rows blocks the run; single rows never do."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the train/eval split.")
    cleaning: CleaningSection = Field(default_factory=CleaningSection, description="What is done about unfit pairs.")
    release: list[ReleaseRule] = Field(default=[], description="What is taken out of quarantine, by rule.")


class LoraSection(Section):
    """The adapter that SFT and DPO train."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank r of the LoRA matrices.")
    alpha: int = Field(default=16, ge=1, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="LoRA dropout, SFT only: DPO trains without.")
    target_modules: list[LoraTarget] = Field(
        default=list(ALL_LINEAR), min_length=1, description="Linear layers that get an adapter."
    )


class OptimSection(Section):
    """What SFT and DPO have in common. Every value is explicit: no library default is relied on."""

    learning_rate: float = Field(gt=0.0, description="Peak learning rate of AdamW.")
    epochs: float = Field(default=1.0, gt=0.0, description="Passes over the training pairs.")
    batch_size: int = Field(default=16, ge=1, description="Pairs per optimizer step (the effective batch).")
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0, description="Share of the steps spent warming up.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning-rate schedule after the warm-up."
    )
    weight_decay: float = Field(default=0.0, ge=0.0, description="AdamW weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="Gradient clipping threshold.")
    seed: int = Field(default=42, ge=0, description="Seed of adapter initialisation and data order.")


class SftSection(OptimSection):
    """Supervised fine-tuning on the chosen answers: the policy DPO starts from, and its reference."""

    strategy: Literal["train", "adopt"] = Field(
        default="train", description="`train` on chosen answers, or `adopt` a base that is already an instruct model."
    )
    learning_rate: float = Field(default=2e-4, gt=0.0, description="Peak learning rate of the SFT adapter.")


class DpoSection(OptimSection):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290)."""

    learning_rate: float = Field(
        default=5e-6, gt=0.0, description="Peak learning rate; 5e-6 is TRL's and Unsloth's value for LoRA."
    )
    beta: float = Field(
        default=0.1,
        ge=0.0,
        description="Strength of the pull towards the reference: larger stays closer; its unit depends on the loss.",
    )
    # Any name: the check `loss_supported` decides, so that a wrong one ends in a check that says what to use instead,
    # not in a failed form.
    loss: str | list[str] = Field(
        default="sigmoid",
        description=(
            "DPO loss, or several that are added up: a list, or names with commas between them. `sigmoid` is the "
            "paper's; docs/checks.md lists them all."
        ),
        examples=["sigmoid", ["sigmoid", "sft"]],
    )
    loss_weights: list[float] = Field(
        default=[], description="Weight of each loss, in their order; empty: every loss counts once."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        lt=0.5,
        description="Share of labels taken to be wrong; for cdpo, robust, exo_pair, aot and aot_unpaired.",
    )
    f_divergence: FDivergence = Field(
        default="reverse_kl", description="What the pull towards the reference measures (f-DPO, arXiv 2309.16240)."
    )
    alpha: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="Only for f_divergence `alpha_divergence`: 0 is the forward KL, 1 the reverse KL.",
    )
    discopop_tau: float = Field(
        default=0.05, gt=0.0, description="Only for the loss discopop: its temperature; 0.05 is the paper's."
    )
    reference: Literal["sft", "base"] = Field(
        default="sft",
        description=(
            "What the policy is compared with: `sft`, where DPO starts, or `base`. After a trained SFT, `base` is not "
            "the start, and the first-loss check stops the run."
        ),
    )
    reference_strategy: Literal["cached", "adapter", "merged", "model"] = Field(
        default="cached",
        description=(
            "Where reference scores come from. `cached`: scored once per pair and kept; `adapter`: a frozen copy of "
            "the starting adapter, at every step; `merged`: SFT merged into the base, which then is the reference; "
            "`model`: a second model in memory. `trainer: trl` always keeps a frozen adapter."
        ),
    )
    trainer: Literal["packed", "trl"] = Field(
        default="packed", description="`packed`: shared prompts, no padding; `trl`: TRL's own DPOTrainer (needs a GPU)."
    )
    micro_batch_size: int = Field(
        default=0,
        ge=0,
        description=(
            "Pairs of one forward of `trainer: trl`, accumulated to `batch_size`; 0: two, or one where two do not fit. "
            "The packed trainer cuts a step by memory instead."
        ),
    )

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses that are added up."""
        return (self.loss,) if isinstance(self.loss, str) else tuple(self.loss)

    @field_validator("loss", mode="before")
    @classmethod
    def _one_name_or_several(cls, value: Any) -> str | list[str]:
        """One spelling of each choice, so that equal losses are equal recipes: a name alone, or a list of names."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("a loss is a name, or a list of names such as [sigmoid, sft].")
        names = [part.strip() for part in parts]
        if not names or not all(names):
            raise ValueError("a loss has no name; write one, or a list of names such as [sigmoid, sft].")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`{twice[0]}` stands twice; name it once and set its weight in `loss_weights`.")
        return names[0] if len(names) == 1 else names

    @model_validator(mode="after")
    def _every_loss_has_a_weight(self) -> DpoSection:
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"`loss_weights` has {len(self.loss_weights)} values for {len(self.losses)} losses "
                f"({', '.join(self.losses)}); give one for each, or none at all."
            )
        if self.trainer == "trl" and self.reference_strategy in ("merged", "model"):
            raise ValueError(
                "`trainer: trl` keeps a frozen adapter as its reference; "
                f"`reference_strategy: {self.reference_strategy}` is for the packed trainer."
            )
        if self.trainer == "packed" and self.micro_batch_size:
            raise ValueError("`micro_batch_size` is for `trainer: trl`; the packed trainer cuts a step by memory.")
        if any(weight <= 0 for weight in self.loss_weights):
            raise ValueError("a weight in `loss_weights` is not above 0; leave that loss out of `loss`.")
        return self


class EvaluationSection(Section):
    """How the policy is judged on held-out pairs."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="Level of every interval.")
    min_pairs: int = Field(
        default=50, ge=1, description="Fewer held-out prompt groups than this: `insufficient_evidence`, no release."
    )
    generations: int = Field(default=16, ge=0, description="Held-out prompts that SFT and policy answer.")
    max_new_tokens: int = Field(default=64, ge=1, description="Length limit of those answers.")


class PublishingSection(Section):
    """What a release is, and where it goes. The token comes from the environment (`HF_TOKEN`), never from here."""

    repo_id: str | None = Field(default=None, description="Hub repository (`org/name`) of the release.")
    dry_run: bool = Field(
        default=True, description="Write the exact folder, card and operation list, and send nothing."
    )
    artifact: Literal["merged", "adapter"] = Field(default="merged", description="What is released.")
    private: bool = Field(default=True, description="Create the repository as private.")
    endpoint: str | None = Field(default=None, description="Hub address; default: huggingface_hub's own.")

    @model_validator(mode="after")
    def _a_release_needs_a_repository(self) -> PublishingSection:
        if not self.dry_run and not self.repo_id:
            raise ValueError("`dry_run: false` needs `repo_id` (for example `my-org/my-bot-dpo`).")
        return self


Severity = Literal["warn", "error", "strict"]


class BandOverride(Section):
    """Numbers of one check that this pipeline sets itself, and why."""

    numbers: dict[str, float] = Field(min_length=1, description="Name and value of each number that changes.")
    reason: str = Field(min_length=10, description="Why; every verdict of the check shows it.")


class ChecksSection(Section):
    """How the checks judge this pipeline."""

    severity: dict[str, Severity] = Field(
        default={},
        description=(
            "By name of a check: `warn` shows and never blocks, `error` blocks what crosses its error limit, `strict` "
            "blocks warnings too."
        ),
        examples=[{"length_bias": "error", "displacement": "warn"}],
    )
    bands: dict[str, BandOverride] = Field(
        default={},
        description="By name of a check: numbers that this pipeline changes, with a reason; docs/checks.md has them.",
        examples=[
            {"learning_rate_band": {"numbers": {"error_above": 3e-4}, "reason": "our sweep of 2026-10, 6 seeds"}}
        ],
    )
    probe_prompts: int = Field(
        default=8,
        ge=0,
        le=64,
        description="Prompts that the policy answers at each probe while DPO runs; 0 switches the sampled probe off.",
    )
    probe_every: float = Field(
        default=0.1, gt=0.0, le=1.0, description="Steps from probe to probe, as a share of all DPO steps."
    )
    probe_tokens: int = Field(default=48, ge=8, le=512, description="Longest sampled answer of a probe, in tokens.")
    held_out_pairs: int = Field(
        default=256, ge=0, description="Held-out pairs that judge the adapter after training, at most; 0: none."
    )
    sampled_answers: int = Field(
        default=32, ge=0, le=512, description="Prompts that policy and reference answer after training; 0: none."
    )
    capability_probe: str | None = Field(
        default=None,
        description=(
            "JSONL file of tasks that training must not unlearn, a row each: `prompt` (text or messages), `answers` "
            "(accepted texts), `match` (`contains` or `exact`). Empty: token accuracy on held-out answers is compared."
        ),
        examples=["./probes/facts.jsonl"],
    )


class RefreshSection(Section):
    """When the pipeline runs by itself. Schedule and sensor exist, and are stopped until someone starts them."""

    schedule: str = Field(default="0 3 * * *", description="Cron expression of the refresh job.")
    sensor_interval_seconds: int = Field(default=60, ge=30, description="How often new feedback is looked for.")


class HardwareSection(Section):
    """What the training runs on."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the worker trains; `auto`: the GPU if there is one, else the CPU."
    )
    precision: Literal["auto", "4bit", "8bit", "fp8", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="`auto`: the GPU resource chooses and says why. A choice wins or fails early."
    )
    kernels: Literal["auto", "fused", "transformers", "unsloth"] = Field(
        default="auto",
        description=(
            "Who computes the layers. `fused`: this project's own (Llama, Mistral, Qwen2); `transformers`: the model's "
            "own, with PEFT; `unsloth`: FastLanguageModel (extra `unsloth`). `auto`: fused on a GPU where the model "
            "allows it, else transformers."
        ),
    )
    speedups: list[Speedup] = Field(
        default=[],
        description=(
            "For kernels `transformers`, which `auto` then takes. `liger`: Liger's norms, rotary embedding and SwiGLU "
            "(extra `liger`, needs a GPU). `compile`: torch.compile of each layer, which costs minutes at the start."
        ),
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0.0,
        description="GiB that the plan may use; empty: a GPU's free memory, or a CPU's total.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of the worker.")
    pool: str = Field(default="gpu", description="Dagster pool that the training assets share.")
    timeout_minutes: float = Field(default=24 * 60.0, gt=0.0, description="A worker stage that takes longer is ended.")


class Recipe(Section):
    """Everything that decides what a pipeline produces."""

    base_model: BaseModelSection
    feedback: FeedbackSection
    lora: LoraSection = LoraSection()
    sft: SftSection = SftSection()
    dpo: DpoSection = DpoSection()
    evaluation: EvaluationSection = EvaluationSection()
    checks: ChecksSection = ChecksSection()
    publishing: PublishingSection = PublishingSection()
    refresh: RefreshSection = RefreshSection()
    hardware: HardwareSection = HardwareSection()

    @model_validator(mode="after")
    def _rules_between_sections(self) -> Recipe:
        source, revision = self.base_model.source, self.base_model.revision
        if looks_like_hub_id(source) and not _is_commit(revision):
            raise ValueError(
                f"base_model.source `{source}` is a Hub id and needs `revision`: the 40-digit commit sha from the "
                "model page (a branch such as `main` can change under you). For a local folder write `./` in front."
            )
        if self.hardware.device == "cpu" and self.hardware.precision not in ("auto", "fp32"):
            raise ValueError(
                f"hardware.precision `{self.hardware.precision}` needs a GPU; with `device: cpu` use `fp32` or `auto`."
            )
        return self


def looks_like_hub_id(source: str) -> bool:
    """`org/name` without a path prefix. A folder is told apart by `./`, `../`, `/`, `~` or a drive letter."""
    if source.startswith((BUILTIN, ".", "/", "~")) or ":" in source or "\\" in source:
        return False
    return source.count("/") == 1


def is_url(path: str) -> bool:
    """Whether a path is a URL of a file system (`s3://...`) rather than a local file. One letter is a drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None and not path.lower().startswith("file://")


def _has_credentials(path: str) -> bool:
    return is_url(path) and "@" in path.split("://", 1)[1].split("/", 1)[0] and not path.startswith(("abfs", "hf:"))


def _absolute_source(
    source: FeedbackSource, pattern: Callable[[str], str], file: Callable[[str], str]
) -> FeedbackSource:
    """A source with absolute paths. `pattern` makes one that may hold wildcards absolute, `file` one that does not."""
    changes: dict[str, Any] = {}
    if source.path is not None and not is_url(source.path):
        changes["path"] = pattern(source.path.removeprefix("file://"))
    if source.companion is not None:
        changes["companion"] = file(source.companion)
    if source.sql is not None and source.sql.database is not None:
        changes["sql"] = source.sql.model_copy(update={"database": file(source.sql.database)})
    return source.model_copy(update=changes)


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision.lower())


# The sections that the launchpad may override for one run, in the order a reader meets them.
OVERRIDABLE: tuple[str, ...] = ("lora", "sft", "dpo")

Overrides = Annotated[Mapping[str, Mapping[str, Any]], "section -> field -> value"]


def apply_overrides(recipe: Recipe, overrides: Overrides) -> Recipe:
    """The recipe of one run: the declared one with `overrides` laid over it, validated as a whole.

    Raises:
        ConfigError: when a section may not be overridden, or a value is out of its domain.
    """
    values = recipe.model_dump()
    for section, fields in overrides.items():
        if section not in OVERRIDABLE:
            raise ConfigError(f"section `{section}` cannot be overridden per run; these can: {', '.join(OVERRIDABLE)}")
        values[section] |= fields
    return parse_recipe(values)


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        ConfigError: with one line per fault: where, what is wrong, and a suggestion.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from None


def resolve_paths(recipe: Recipe, base_dir: Path) -> Recipe:
    """The same recipe with relative folders and files made absolute, against the folder of the YAML file."""

    def absolute(path: str, folder: Path = base_dir) -> str:
        return path if path.startswith(BUILTIN) else str((folder / Path(path).expanduser()).absolute())

    model = recipe.base_model
    changes: dict[str, Any] = {}
    if not looks_like_hub_id(model.source):
        changes["source"] = absolute(model.source)
    if model.chat_template is not None:
        changes["chat_template"] = absolute(model.chat_template)
    probe = recipe.checks.capability_probe
    checks = recipe.checks.model_copy(update={"capability_probe": probe and absolute(probe)})
    # The folder is a name, not a pattern: brackets in it must not be read as one.
    folder = Path(glob.escape(str(base_dir)))
    sources = [_absolute_source(s, lambda path: absolute(path, folder), absolute) for s in recipe.feedback.sources]
    sets = [absolute(path) for path in recipe.feedback.cleaning.evaluation_sets]
    cleaning = recipe.feedback.cleaning.model_copy(update={"evaluation_sets": sets})
    return recipe.model_copy(
        update={
            "base_model": model.model_copy(update=changes),
            "feedback": recipe.feedback.model_copy(update={"sources": sources, "cleaning": cleaning}),
            "checks": checks,
        }
    )
