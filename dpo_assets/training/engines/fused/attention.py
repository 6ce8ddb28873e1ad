"""Attention between its projections and its output, as a forward and a backward over the packed stream.

Which kernel computes it is `engines.attention`'s choice; here is what stands around it: norms and rotation of queries
and keys, the repeated prompt of the second answer, and the output gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpo_assets.planning.decoder import Attention
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.attention import (
    AttentionKind,
    Flash,
    causal_rows,
    flash_backward,
    flash_forward,
    takes_flash,
    unshare,
)
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.ops import HeadTransform
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup


@dataclass(frozen=True)
class _Rows:
    """Attention on padded rows with its graph: q, k and v [T, heads, dim] as leaves, and the output [T, heads, dim]."""

    leaves: tuple[Tensor, Tensor, Tensor]
    attended: Tensor


@dataclass(frozen=True)
class Attended:
    """`out` [T, heads * dim] before the gate; how it came about, where the backward pass wants it.

    `transforms` are those of queries and of keys.
    """

    out: Tensor
    by: Flash | _Rows | None
    transforms: tuple[HeadTransform, HeadTransform]


@dataclass(frozen=True)
class AttentionCore:
    """Causal attention of every completion over its prompt and itself.

    Grouped-query heads: Ainslie et al., arXiv 2305.13245. The projections are q [T, heads * dim] (each head followed by
    its gate where there are gates), k and v [T, kv heads * dim], side by side.

    Attributes:
        norms: fp32 weights of the norms of queries and keys, the family's offset in them.
        sinks: [heads], frozen.
    """

    shape: Attention
    eps: float
    norms: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None

    @cached_property
    def kind(self) -> AttentionKind:
        return AttentionKind(self.shape.scale, self.shape.window, self.shape.softcap, self.sinks)

    @property
    def _stride(self) -> int:
        """Columns from one query head to the next."""
        return self.shape.head_dim * (2 if self.shape.gated else 1)

    @property
    def _keys(self) -> int:
        """The first column of the keys."""
        return self.shape.heads * self._stride

    def run(self, projected: Tensor, stream: Stream, keep: bool) -> Attended:
        """Queries are rotated in place where the backward pass can do without them as they were."""
        of_query, of_key = transforms = self._transforms(stream)
        if self._in_place(of_query):
            ops.transform(projected, projected, of_query)
        query = self._query(projected, of_query)
        if takes_flash(self.kind, query.device, query.dtype, self.shape.head_dim):
            flash = flash_forward(query, *self._rows(projected, of_key, stream.batch), self.kind, stream.batch.unpadded)
            return Attended(flash.out.flatten(1), flash if keep else None, transforms)
        out, rows = self._on_rows(projected, query, of_key, stream.batch, keep)
        return Attended(out, rows, transforms)

    def inner(self, projected: Tensor, inside: Attended, last: FrozenGroup) -> Tensor:
        if not self.shape.gated:
            return inside.out
        buffer = last.input_buffer(len(projected))
        dim = self.shape.head_dim
        ops.output_gate(inside.out, projected[:, dim:], buffer[:, : last.inputs], dim, self._stride)
        return buffer

    def backward(self, grad: Tensor, projected: Tensor, inside: Attended, stream: Stream, out: Tensor) -> Tensor:
        inner, dim = inside.out, self.shape.head_dim
        if self.shape.gated:
            inner = torch.empty_like(inside.out)
            ops.output_gate_backward(grad, inside.out, projected[:, dim:], out[:, dim:], inner, dim, self._stride)
        of_query, of_key = inside.transforms
        heads = grad.unflatten(1, (self.shape.heads, dim))
        d_kv, kv = out[:, self._keys :], projected[:, self._keys :]
        if isinstance(inside.by, Flash):
            rows = self._rows(projected, of_key, stream.batch)
            query = self._query(projected, of_query)
            dq, dk, dv = flash_backward(heads, query, *rows, inside.by, self.kind, stream.batch.unpadded)
            del rows, query
            ops.transform_backward(dq, projected, out, of_query, self._stride)
            ops.fold_kv(dk, dv, kv, stream.batch.unpadded.slots, of_key, d_kv)
        else:
            assert inside.by is not None
            dq, dk, dv = torch.autograd.grad(inside.by.attended, inside.by.leaves, heads)
            ops.transform_backward(dq, projected, out, of_query, self._stride)
            ops.transform_backward(dk, kv, d_kv, of_key)
            d_kv[:, self.shape.kv_width :] = dv.flatten(1)
        return inner

    def _transforms(self, stream: Stream) -> tuple[HeadTransform, HeadTransform]:
        """Of queries and of keys."""
        shape, qk = self.shape, self.shape.qk_norm
        common: dict[str, Any] = {"dim": shape.head_dim, "eps": self.eps}
        if shape.rope is not None:
            common |= {"angles": stream.angles[shape.rope], "neighbours": shape.rope.pairs == "neighbours"}
        if qk is not None:
            common |= {"over_projection": qk.over == "projection", "after_rotation": qk.after_rotation}
        of_query, of_key = self.norms or (None, None)
        growth = None if shape.query_growth is None else stream.growth[shape.query_growth]
        return (
            HeadTransform(shape.heads, norm=of_query, factor=growth, **common),
            HeadTransform(shape.kv_heads, norm=of_key, **common),
        )

    def _in_place(self, of_query: HeadTransform) -> bool:
        return of_query.in_place and not self.shape.gated

    def _query(self, projected: Tensor, of_query: HeadTransform) -> Tensor:
        """Transformed queries [T, heads, dim]: a view of the projections where they were transformed in place."""
        shape = self.shape
        if self._in_place(of_query):
            return projected[:, : shape.query_width].unflatten(1, (shape.heads, shape.head_dim))
        query = projected.new_empty(len(projected), shape.query_width)
        ops.transform(projected, query, of_query, self._stride)
        return query.unflatten(1, (shape.heads, shape.head_dim))

    def _rows(self, projected: Tensor, of_key: HeadTransform, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Transformed keys and values [S, kv heads, dim] of every row, one after the other."""
        rows = ops.gather_kv(projected[:, self._keys :], batch.unpadded.source, of_key)
        key, value = rows.unflatten(1, (2, self.shape.kv_heads, self.shape.head_dim)).unbind(1)
        return key, value

    def _on_rows(
        self, projected: Tensor, query: Tensor, of_key: HeadTransform, batch: PackedBatch, keep: bool
    ) -> tuple[Tensor, _Rows | None]:
        """PyTorch's attention on padded rows; it differentiates itself. Its output [T, heads * dim]."""
        shape = self.shape
        kv = projected[:, self._keys :]
        key = torch.empty_like(kv[:, : shape.kv_width])
        ops.transform(kv, key, of_key)
        value = kv[:, shape.kv_width :]
        q, k, v = (
            part.unflatten(-1, (-1, shape.head_dim)).detach().requires_grad_(keep)
            for part in (query.flatten(1), key, value)
        )
        with torch.set_grad_enabled(keep):
            q_rows, k_rows, v_rows = (unshare(leaf, batch.padded).transpose(1, 2) for leaf in (q, k, v))
            rows = causal_rows(q_rows, k_rows, v_rows, self.kind)
            attended = rows.transpose(1, 2).flatten(0, 1).index_select(0, batch.padded.home)
        return attended.detach().flatten(1), _Rows((q, k, v), attended) if keep else None
