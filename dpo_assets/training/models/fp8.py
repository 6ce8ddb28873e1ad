"""Base weights in fp8: e4m3 codes with one scale a row, computed in 16 bit.

Half the memory of bf16 at about 4 % relative error a weight (three mantissa bits; Micikevicius et al., arXiv
2209.05433). The adapter stays in 16/32 bit, and a merge goes into the original weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_assets.training.models.structure import decoder_layers

LARGEST = 448.0  # Of e4m3.


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in fp8.

    The codes are held as bytes: PEFT gives an adapter the dtype of a floating-point base, and fp8 is no dtype to train.
    """

    weight_scale: Tensor

    @property
    def codes(self) -> Tensor:
        """fp8 codes [out, in]."""
        return self.weight.view(torch.float8_e4m3fn)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.codes.float() * self.weight_scale[:, None]).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes fp8 [out, in], scale fp32 [out]) of a weight [out, in]; each row's largest value keeps its full range."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / LARGEST
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def quantise_layers(lm: Any, device: torch.device | str) -> None:
    """Turns the decoder's linear layers into Fp8Linear on `device`, one at a time, and moves the rest there."""
    for module in decoder_layers(lm)[1].modules():
        if type(module) is nn.Linear:
            codes, scale = quantise_rows(module.weight.data.to(device))
            module.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
            module.register_buffer("weight_scale", scale, persistent=False)
            module.__class__ = Fp8Linear
    lm.to(device)
