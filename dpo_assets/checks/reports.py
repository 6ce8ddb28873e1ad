"""What the worker measured, as the checks judge it. A stage writes one of these; its asset reads it back."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field


class MergeReport(BaseModel):
    """What stage `merge` measured. Differences are nats per token between adapter and merged model."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    mean_difference_per_token: float
    max_difference_per_token: float
    probe_pairs: int
    parameters: int = Field(description="Values that were looked at, of the release as it loads.")
    not_finite: tuple[str, ...] = Field(default=(), description="The weights that are not all numbers, by name.")
    method: Literal["streamed", "peft"]
    proven_in: str = Field(default="", description="What both were computed in, and where.")
    kernels: str = Field(default="", description="The engine that scored both.")

    @computed_field(description="Whether all of them are numbers.")  # type: ignore[prop-decorator]
    @property
    def finite(self) -> bool:
        return not self.not_finite
