"""What the worker measured, as the checks judge it. A stage writes one of these; its asset reads it back."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field


class Carried(BaseModel):
    """What became of the base's tensors in the release, file against file."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    tensors: int = Field(description="Tensors in the base's files.")
    adapted: int = Field(description="Of these, changed by the merge.")
    beside: int = Field(default=0, description="Of these, no part of the language model: towers, projectors, heads.")
    lost: tuple[str, ...] = Field(default=(), description="Not in the release, or in another shape or format.")
    altered: tuple[str, ...] = Field(default=(), description="Without an adapter, and yet other bytes.")
    added: tuple[str, ...] = Field(default=(), description="In the release, and not in the base.")

    @property
    def whole(self) -> bool:
        return not (self.lost or self.altered or self.added)


class MergeReport(BaseModel):
    """What stage `merge` measured. Differences are nats per token between adapter and merged model."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    mean_difference_per_token: float
    max_difference_per_token: float
    probe_pairs: int
    parameters: int = Field(description="Values that were looked at, of the release as it loads.")
    not_finite: tuple[str, ...] = Field(default=(), description="The weights that are not all numbers, by name.")
    method: Literal["streamed", "peft"]
    carried: Carried | None = Field(
        default=None, description="Not known where PEFT wrote the model in another layout than the base's."
    )
    proven_in: str = Field(default="", description="What both were computed in, and where.")

    @computed_field(description="Whether all of them are numbers.")  # type: ignore[prop-decorator]
    @property
    def finite(self) -> bool:
        return not self.not_finite
