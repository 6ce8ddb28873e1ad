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
