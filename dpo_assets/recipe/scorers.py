"""What else scores a policy, where a pipeline asks for it: each in an asset of its own, and none of them needed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dpo_assets.recipe.address import LocalPath
from dpo_assets.recipe.model import refuse_unpinned
from dpo_assets.section import Section


class RewardModelSection(Section):
    """A reward model that scores the answers of SFT and policy: a sequence classifier with one output."""

    source: LocalPath = Field(
        description="A Hub id (`org/name`) or a local folder, with safetensors weights and a chat template.",
        examples=["Skywork/Skywork-Reward-V2-Qwen3-0.6B", "./models/my-reward-model"],
    )
    revision: str | None = Field(
        default=None,
        description="Commit sha (40 hex digits) of a Hub model. Required for a Hub id: a branch name can move.",
    )
    human_pairs: int = Field(
        default=200, ge=0, description="Held-out pairs of people that it scores too, to measure its own errors by."
    )
    max_length: int = Field(
        default=2048,
        ge=1,
        description="Most tokens of a conversation with its answer. A longer one gets no score, and is counted.",
    )

    @model_validator(mode="after")
    def _is_pinned(self) -> RewardModelSection:
        refuse_unpinned("evaluation.reward_model", self.source, self.revision)
        return self


class BenchmarkSection(Section):
    """A file of questions with right and wrong answers, scored by the policy's implicit reward against SFT."""

    name: str = Field(pattern=r"^[\w.-]+$", description="What the scores are shown under; each once.")
    path: LocalPath = Field(
        description="A JSONL, JSON, CSV or Parquet file with the columns of RewardBench or RewardBench 2.",
        examples=["./benchmarks/reward-bench-2.parquet"],
    )
    format: Literal["auto", "rewardbench", "rewardbench2"] = Field(
        default="auto",
        description="`rewardbench`: one chosen and one rejected answer a row. `rewardbench2`: lists of them, best of "
        "four and Ties. `auto`: by the first row.",
    )
    guards: bool = Field(
        default=False,
        description="A share of right rows that fell beyond chance against the champion's holds a promotion.",
    )


class HarnessSection(Section):
    """Tasks of lm-evaluation-harness (extra `lm-eval`) that SFT and policy both answer.

    The worker has no network: the datasets of tasks that come with lm-eval must lie in the Hub's cache (`HF_HOME`)
    before, as `lm_eval --tasks NAME --limit 1` leaves them.
    """

    tasks: list[str] = Field(min_length=1, description="Names of tasks: those of `include_path`, or lm-eval's own.")
    include_path: LocalPath | None = Field(
        default=None,
        description="Folder of task YAML files. Paths in them start from it; code that they name is run.",
        examples=["./tasks"],
    )
    limit: int | None = Field(default=None, ge=1, description="Documents of each task, at most; empty: all.")
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples in a prompt; empty: as the task says.")
    apply_chat_template: bool = Field(
        default=False,
        description="Ask in the base's chat template. Off, as lm-eval's own default is: published scores are so.",
    )
    batch_size: int = Field(default=8, ge=1, description="Requests of one forward.")
    guards: bool = Field(
        default=False,
        description="A metric that fell beyond chance, document by document, against the champion's (before the first "
        "release against SFT's) holds a promotion.",
    )
