"""What planning needs to know of a model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Kernels = Literal["fused", "transformers", "unsloth"]


class ModelShape(BaseModel):
    """What planning needs to know of a base model."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = False
    architecture: str = ""
    fusable: bool = False  # Whether the fused kernels compute this architecture as it is configured.
    sliding_window: int | None = None  # Tokens that attention looks back; None: all.

    def fused_at(self, max_length: int) -> bool:
        """Whether the fused kernels serve rows of `max_length` tokens: they attend to the whole row."""
        return self.fusable and (self.sliding_window is None or self.sliding_window >= max_length)
