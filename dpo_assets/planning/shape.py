"""What planning needs to know of a model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from dpo_assets.planning.decoder import Decoder
from dpo_assets.planning.matrices import Matrices

Kernels = Literal["fused", "transformers", "unsloth", "rows"]


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
    model_type: str = ""  # Of config.json: by it PEFT and Transformers tell families apart.
    stored: str = ""  # What most weights are stored in, as `compute` names it; empty where no file was read.
    beside: int = 0  # Values in the files that are none of the language model's: towers, heads for further tokens.
    decoder: Decoder | None = None  # What its layers compute; None where no family is known.
    matrices: tuple[Matrices, ...] | None = None  # Of the decoder layers, where the model's files were read.

    def with_matrices(self, matrices: tuple[Matrices, ...]) -> ModelShape:
        """The shape, with what the model's files hold."""
        return self.model_copy(update={"matrices": matrices})

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(output, input) width of each linear layer of a decoder layer of the Llama family."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (attention, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, attention),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
