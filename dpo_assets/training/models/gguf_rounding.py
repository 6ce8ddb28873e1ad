"""How far a weight may be from itself, once it is stored in a GGUF file."""

from __future__ import annotations

from torch import Tensor

from dpo_assets.recipe import GgufType

BLOCK = 32  # Weights of Q8_0 that share a scale.
# What is added to and taken from a norm's weights in between (Gemma) costs a rounding of fp32.
SLACK = 1e-6


def rounding(weights: Tensor, type_: GgufType) -> Tensor:
    """How far each weight may be from itself, once stored: half a step of the type's.

    For Q8_0 a step is the largest weight of its block of 32 over 127, and that scale is kept in fp16, which is coarse
    where it is small.
    """
    size = weights.abs()
    if type_ == "f16":
        return size * 2**-11 + 2**-25 + SLACK
    if type_ == "bf16":
        return size * 2**-8 + SLACK
    if type_ == "q8_0":
        whole = weights.shape[-1] % BLOCK == 0
        blocks = size.reshape(-1, BLOCK) if whole else size.reshape(-1, weights.shape[-1])
        of_block = blocks.amax(-1, keepdim=True) * (1 / 254 + 2**-11) + 127 * 2**-25
        return of_block.expand_as(blocks).reshape(weights.shape) + SLACK
    return size * SLACK + SLACK
