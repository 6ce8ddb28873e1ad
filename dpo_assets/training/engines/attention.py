"""Attention over a packed stream: gather causal rows, attend, return to the stream.

Registered with Transformers as `packed_rows`. Without a packed batch in the call (generation, the unpacked scorer) it
is Transformers' own SDPA attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_assets.training.batches.packing import PackedBatch

NAME = "packed_rows"


class Tables:
    """A packed batch on its way through the layers: a compiled layer that was given the tables themselves would be
    compiled for every number of groups."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch


class _Unshare(torch.autograd.Function):
    """Stream [T, ...] to rows [R, W, ...].

    The backward adds up the slots of each stream token with gathers only: every slot list holds a stream token at most
    once, so it needs no atomics and is deterministic. Filler slots get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        ctx.batch = batch
        return stream.index_select(0, batch["row_src"]).view(*batch["shape"], *stream.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = grads[0].flatten(0, 1)
        out = rows.index_select(0, ctx.batch["home"])
        for stream, slot in ctx.batch["shared"]:
            out[stream] += rows.index_select(0, slot)
        return out, None


def unshare(stream: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Stream [T, ...] to rows [R, W, ...], with a deterministic backward pass."""
    rows: torch.Tensor = _Unshare.apply(stream, batch)
    return rows


def causal_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention of rows: q [R, heads, W, dim], k and v [R, kv heads, W, dim]."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and not has_flash(q.device, q.dtype, q.shape[-1]):
        # Without flash attention only the kernel that keeps all W x W scores takes grouped heads; repeated, the
        # memory-efficient one does.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=grouped)


def has_flash(device: torch.device, dtype: torch.dtype, dim: int = 8) -> bool:
    """Whether this device computes flash attention with heads of `dim`."""
    if device.type != "cuda" or dtype == torch.float32 or dim % 8 or dim > 256:
        return False
    return bool(torch.cuda.get_device_capability(device) >= (8, 0))


@torch.compiler.disable
def packed_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Tables | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers attention interface: query [1, heads, T, dim] over the stream; returns [1, T, heads, dim].

    Never part of a compiled layer: its tables differ in every batch, so that a layer would be compiled for each, up to
    a limit, and computed as it is from then on. The kernel is what takes the time here, and it is compiled already.
    """
    if packed is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)  # type: ignore[no-any-return]
    batch = packed.batch
    q, k, v = (unshare(x[0].transpose(0, 1), batch).transpose(1, 2) for x in (query, key, value))
    out = causal_rows(q, k, v, scaling, dropout)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, batch["home"])[None], None


def register() -> None:
    """Makes `attn_implementation="packed_rows"` known to Transformers."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_rows)
