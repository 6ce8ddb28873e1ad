"""Attention over the packed stream as a forward and a backward, for layers that differentiate themselves.

On a GPU with flash attention (Ampere and later) a pair's queries need no copy at all: the stream
`prompt, chosen, rejected` is already `[prompt chosen]` and `[rejected]`, and flash attention aligns the causal mask at
the end when there are more keys than queries. Only keys and values of the prompt are repeated, for the second answer.
Elsewhere rows are gathered and padded (dpo_assets.training.engines.attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.batches.packing import PackedBatch
from dpo_assets.training.engines.attention import AttentionKind, causal_rows, has_flash, unshare
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.ops import Angles


@dataclass(frozen=True)
class Heads:
    """Shape of an attention layer."""

    query: int
    kv: int
    dim: int
    scale: float

    @property
    def query_width(self) -> int:
        return self.query * self.dim

    @property
    def kv_width(self) -> int:
        return self.kv * self.dim


@dataclass(frozen=True)
class Attended:
    """What the backward pass needs. `qkv` [T, (query + 2 kv) dim] holds q rotated, k and v as projected."""

    qkv: Tensor
    out: Tensor  # [T, query * dim]
    extra: Any


def attend(qkv: Tensor, heads: Heads, angles: Angles, batch: PackedBatch, differentiable: bool) -> Attended:
    """Causal attention of every completion over its prompt and itself; q is rotated in place.

    Grouped-query heads: Ainslie et al., arXiv 2305.13245. Kernel: Dao, arXiv 2307.08691.
    """
    ops.rotate(qkv, qkv, angles, heads.query)
    if has_flash(qkv.device, qkv.dtype, heads.dim):
        return _flash(qkv, heads, angles, batch)
    return _rows(qkv, heads, angles, batch, differentiable)


def attend_backward(
    grad: Tensor, kept: Attended, heads: Heads, angles: Angles, batch: PackedBatch, out: Tensor
) -> None:
    """out [T, (query + 2 kv) dim] = gradient of the projected q, k, v; grad [T, query * dim]."""
    if has_flash(grad.device, grad.dtype, heads.dim):
        dq, dk, dv = _flash_backward(grad, kept, heads, angles, batch)
        ops.rotate(dq.view(len(dq), -1), out, angles, heads.query, inverse=True)
        ops.fold_kv(dk, dv, batch["slots"], angles, out[:, heads.query_width :])
        return
    leaves, attended = kept.extra
    dq, dk, dv = torch.autograd.grad(attended, leaves, grad.view_as(attended))
    ops.rotate(dq.flatten(1), out, angles, heads.query, inverse=True)
    ops.rotate(dk.flatten(1), out[:, heads.query_width :], angles, heads.kv, inverse=True)
    out[:, heads.query_width + heads.kv_width :] = dv.flatten(1)


def _views(qkv: Tensor, heads: Heads, angles: Angles, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    rows = ops.gather_kv(qkv[:, heads.query_width :], batch["kv_source"], angles, heads.kv)
    query = qkv[:, : heads.query_width].unflatten(1, (heads.query, heads.dim))
    key, value = (part.unflatten(1, (heads.kv, heads.dim)) for part in rows.split(heads.kv_width, dim=1))
    return query, key, value


def _flash(qkv: Tensor, heads: Heads, angles: Angles, batch: PackedBatch) -> Attended:
    query, key, value = _views(qkv, heads, angles, batch)
    longest_query, longest_key = batch["longest"]
    out, *rest = torch.ops.aten._flash_attention_forward(
        query, key, value, batch["query_starts"], batch["key_starts"], longest_query, longest_key,
        0.0, True, False, scale=heads.scale,
    )  # fmt: skip
    return Attended(qkv, out.flatten(1), rest[:3])


def _flash_backward(
    grad: Tensor, kept: Attended, heads: Heads, angles: Angles, batch: PackedBatch
) -> tuple[Tensor, Tensor, Tensor]:
    # The key and value rows are gathered again: keeping them would cost more memory than this pass costs time.
    query, key, value = _views(kept.qkv, heads, angles, batch)
    longest_query, longest_key = batch["longest"]
    lse, state, unused = kept.extra
    shape = (-1, heads.query, heads.dim)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad.view(shape), query, key, value, kept.out.view(shape), lse,
        batch["query_starts"], batch["key_starts"], longest_query, longest_key, 0.0, True, state, unused,
        scale=heads.scale,
    )  # fmt: skip
    return grads


def _rows(qkv: Tensor, heads: Heads, angles: Angles, batch: PackedBatch, differentiable: bool) -> Attended:
    """PyTorch's attention on gathered rows; it differentiates itself."""
    key = torch.empty_like(qkv[:, : heads.kv_width])
    ops.rotate(qkv[:, heads.query_width :], key, angles, heads.kv)
    value = qkv[:, heads.query_width + heads.kv_width :]
    leaves = [
        part.unflatten(1, (-1, heads.dim)).detach().requires_grad_(differentiable)
        for part in (qkv[:, : heads.query_width], key, value)
    ]
    with torch.set_grad_enabled(differentiable):
        q, k, v = (unshare(leaf, batch).transpose(1, 2) for leaf in leaves)
        rows = causal_rows(q, k, v, AttentionKind(heads.scale))
        attended = rows.transpose(1, 2).flatten(0, 1).index_select(0, batch["home"])
    return Attended(qkv, attended.detach().flatten(1), (leaves, attended))
