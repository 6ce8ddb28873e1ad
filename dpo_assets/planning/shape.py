"""What planning needs to know of a model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from dpo_assets.planning.decoder import Attention, Decoder, Layer, Mlp
from dpo_assets.planning.matrices import Matrices

Kernels = Literal["fused", "transformers", "unsloth", "rows"]
# What an environment may have: engines, fla-core, and fla-core whose gradient is right on Hopper GPUs too.
Part = Kernels | Literal["delta-net", "delta-net on Hopper"]
Trainer = Literal["packed", "trl"]  # `dpo.trainer`.


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
    more_than_text: bool = False  # Whether config.json describes towers too, whose class names the decoder otherwise.
    decoder: Decoder | None = None  # What its layers compute; None where no family is known.
    matrices: tuple[Matrices, ...] | None = None  # Of the decoder layers, where the model's files were read.

    def described(self) -> Decoder:
        """Its own description; where no family is known, that of Llama's layers in these widths, to plan with."""
        if self.decoder is not None:
            return self.decoder
        heads, kv_heads, width = self.heads or 1, self.kv_heads or 1, self.head_dim or self.hidden
        mixer = Attention(heads, kv_heads, width, width**-0.5, rope=None)
        layer = Layer(mixer, Mlp(self.intermediate))
        return Decoder(self.model_type, self.hidden, self.vocabulary, (layer,) * self.layers, eps=1e-6, tied=self.tied)

    def with_matrices(self, matrices: tuple[Matrices, ...]) -> ModelShape:
        """The shape, with what the model's files hold."""
        return self.model_copy(update={"matrices": matrices})
