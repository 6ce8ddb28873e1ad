"""What became of the weights in a merged model and in its GGUF file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, computed_field

from dpo_assets.artifact import Number
from dpo_assets.checks.reports.base import NotMeasured, Report


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
