"""Stands in for flash-attn, which has no wheel: PyTorch's own build of the same kernels under its names.

Only what LoRA training on a GPU calls is here: rows of different lengths, causal, without dropout or a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **ignored: Any,
) -> Tensor:
    """Attention [tokens, heads, head] of rows that lie behind each other; the causal mask is aligned at their ends."""
    if dropout_p or tuple(window_size) != (-1, -1):
        raise NotImplementedError("this stand-in has neither dropout nor windows")
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale
    )
    return found[0]


def flash_attn_func(*args: Any, **kwargs: Any) -> Tensor:
    """Rows of one length, which no batch here has."""
    raise NotImplementedError("this stand-in has rows of different lengths only")
