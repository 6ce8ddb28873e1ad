"""Causal depthwise convolutions of packed batches: each token with those before it in its own row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dpo_assets.training.engines.recurrent.kernels import fla_convolution
from dpo_assets.training.engines.recurrent.segments import Segments
from dpo_assets.training.private.transformers import activation_of


def lead_of(convolution: nn.Conv1d) -> int:
    """How many tokens back it looks."""
    return int(convolution.kernel_size[0]) - 1


def convolve(stream: Tensor, convolution: nn.Conv1d, activation: str | None, segments: Segments) -> Tensor:
    """Stream [T, channels] to its convolution at the segments' places [S, channels].

    All sequences are convolved as one: only a lead sees anything of the sequence before it.
    """
    led = segments.led(stream.to(convolution.weight.dtype))
    weight, bias = convolution.weight.squeeze(1), convolution.bias
    kernel = fla_convolution(led.device) if activation in (None, "silu", "swish") else None
    if kernel is not None:
        out = kernel(led[None], weight, bias, activation=activation)[0][0]
    else:
        lead = lead_of(convolution)
        padded = F.pad(led.T[None], (lead, 0))
        out = F.conv1d(padded, convolution.weight, bias, groups=convolution.groups)[0].T
        out = activation_of(activation)(out) if activation is not None else out
    return out.to(stream.dtype)
