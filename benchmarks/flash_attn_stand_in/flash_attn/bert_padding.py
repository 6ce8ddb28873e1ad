"""Padding to a stream and back (what Transformers 4 imports of flash-attn beside the kernels)."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(values: Tensor, indices: Tensor) -> Tensor:
    """The rows at `indices`."""
    return values[indices]


def unpad_input(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Stream, its places in the padded batch, cumulative lengths, the longest, and all lengths."""
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    places = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    cumulative = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[places], places, cumulative, int(lengths.max()), lengths


def pad_input(stream: Tensor, places: Tensor, batch: int, length: int) -> Tensor:
    """The padded batch [batch, length, ...], zero where there is no token."""
    padded = stream.new_zeros((batch * length, *stream.shape[1:]))
    return padded.index_copy(0, places, stream).view(batch, length, *stream.shape[1:])
