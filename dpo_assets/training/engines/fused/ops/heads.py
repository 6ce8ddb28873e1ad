"""What happens to the heads of queries and keys between their projection and attention, and back.

T tokens of the stream, S slots of the key/value rows. Everything is recomputed from the raw projections, so a layer
keeps those alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.engines.fused.ops import backend
from dpo_assets.training.engines.fused.ops.backend import in_triton, power_of_two

TILE = 4096  # Values a program holds, so that a backward pass (gradient, raw, weight) stays within its registers.


@dataclass(frozen=True)
class Angles:
    """Rotary tables of a stream, cos and sin [T, rotated / 2] in fp32; a scaled table (YaRN) holds scaled values."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class HeadTransform:
    """RMS norm and rotary embedding of `heads` heads of `dim` columns, for the tokens of one stream.

    Norm, rotation, factor, in this order; what is None is left out.

    Attributes:
        angles: rotates the first 2 * angles.cos.shape[1] columns of each head; the rest passes (Su et al., arXiv
            2104.09864).
        neighbours: columns 2 i and 2 i + 1 form a pair, as in the paper, instead of i and i + half (GPT-NeoX).
        norm: fp32 weight [dim] or [heads * dim] of an RMS norm, offset included (Zhang & Sennrich, arXiv 1910.07467; of
            queries and keys: Henry et al., arXiv 2010.04245).
        over_projection: the norm's mean square is taken over all heads together (OLMo 2), instead of over each.
        after_rotation: the rotation comes before the norm.
        eps: of the norm.
        factor: fp32 [T], multiplies a token's heads last.

    Raises:
        ValueError: a table that is not contiguous, or of another size than the heads.
    """

    heads: int
    dim: int
    angles: Angles | None = None
    neighbours: bool = False
    norm: Tensor | None = None
    over_projection: bool = False
    after_rotation: bool = False
    eps: float = 0.0
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        cos, sin = (None, None) if self.angles is None else (self.angles.cos, self.angles.sin)
        if any(table is not None and not table.is_contiguous() for table in (cos, sin, self.norm, self.factor)):
            raise ValueError("kernels read the tables of a head transform as they lie in memory: make them contiguous")
        rotated = 0 if cos is None else 2 * cos.shape[1]
        if self.dim % 2 or rotated > self.dim:
            raise ValueError(f"{rotated} columns cannot be rotated in pairs in heads of {self.dim}")
        if self.norm is not None and self.norm.numel() not in (self.dim, self.width):
            raise ValueError(f"a norm of {self.norm.numel()} weights beside {self.heads} heads of {self.dim}")

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def in_place(self) -> bool:
        """Whether the backward pass can do without the raw heads, so that they may be overwritten."""
        return self.norm is None

    @cached_property
    def tiles(self) -> _Tiles:
        """How its kernels are launched."""
        return _Tiles.of(self)

    def at(self, source: Tensor) -> HeadTransform:
        """The transform of tokens `source` [S] of the stream."""
        angles = None if self.angles is None else Angles(self.angles.cos[source], self.angles.sin[source])
        return replace(self, angles=angles, factor=None if self.factor is None else self.factor[source])


def transform(src: Tensor, dst: Tensor, t: HeadTransform, stride_head: int = 0) -> None:
    """dst [T, >= heads * dim] = the transformed heads of src, side by side in its first columns.

    Args:
        src: [T, >= heads * dim], raw. It may be dst; where `t.in_place` is false the backward pass wants it raw.
        stride_head: columns from one head of src to the next; 0: dim. More where each head is followed by its gate.
    """
    if in_triton(src):
        tiles = t.tiles
        backend.kernels.transform[(len(src), tiles.blocks)](
            src, dst, *tiles.tables(src), src.stride(0), dst.stride(0), tiles.angle_stride, t.eps,
            STRIDE_HEAD=stride_head or t.dim, **tiles.constants,
        )  # fmt: skip
        return
    x = _heads(src, t, stride_head).float()
    dst[:, : t.width] = _forward(x, t).to(dst.dtype).flatten(1)


def transform_backward(grad: Tensor, src: Tensor, out: Tensor, t: HeadTransform, stride_head: int = 0) -> None:
    """out [T, >= heads * dim] = gradient of the raw heads; columns between heads stay as they are.

    Args:
        grad: [T, heads, dim] or [T, heads * dim], gradient of the transformed heads.
        src: [T, >= heads * dim], raw; not read where `t.in_place`.
        out: it may be grad where heads lie side by side.
        stride_head: columns from one head to the next in src and in out; 0: dim.
    """
    if in_triton(src):
        tiles, flat = t.tiles, grad.reshape(len(grad), t.width)
        backend.kernels.transform_backward[(len(src), tiles.blocks)](
            flat, src, out, *tiles.tables(src),
            flat.stride(0), src.stride(0), out.stride(0), tiles.angle_stride, t.eps,
            STRIDE_HEAD=stride_head or t.dim, **tiles.constants,
        )  # fmt: skip
        return
    d = grad.reshape(len(grad), t.heads, t.dim).float()
    raw = None if t.in_place else _heads(src, t, stride_head).float()
    _heads(out, t, stride_head).copy_(_backward(d, raw, t))


def gather_kv(kv: Tensor, source: Tensor, t: HeadTransform) -> Tensor:
    """Rows [S, 2 * heads * dim] of transformed keys and of values, from raw kv [T, 2 * heads * dim] by source [S]."""
    rows = torch.empty(len(source), 2 * t.width, dtype=kv.dtype, device=kv.device)
    if in_triton(kv):
        tiles = t.tiles
        backend.kernels.gather_kv[(len(source), tiles.blocks)](
            kv, rows, source, *tiles.tables(kv), kv.stride(0), tiles.angle_stride, t.eps, **tiles.constants
        )
        return rows
    picked = kv[source]
    transform(picked, rows, t.at(source))
    rows[:, t.width :] = picked[:, t.width :]
    return rows


def fold_kv(dk: Tensor, dv: Tensor, kv: Tensor, slots: Tensor, t: HeadTransform, out: Tensor) -> None:
    """Backward of gather_kv: out [T, 2 * heads * dim] = gradient of the raw keys and of the values.

    Args:
        dk: [S, heads, dim], gradient of the transformed keys; `dv`: of the values.
        kv: [T, 2 * heads * dim], raw.
        slots: [T, copies] of each token in S; -1 is none.
    """
    if in_triton(dk):
        tiles, dk, dv = t.tiles, dk.reshape(len(dk), t.width), dv.reshape(len(dv), t.width)
        backend.kernels.fold_kv[(len(slots), tiles.blocks)](
            dk, dv, kv, out, slots, *tiles.tables(dk),
            dk.stride(0), dv.stride(0), kv.stride(0), out.stride(0), tiles.angle_stride, t.eps,
            COPIES=slots.shape[1], **tiles.constants,
        )  # fmt: skip
        return
    there = (slots >= 0)[..., None, None]
    keys, values = ((d[slots.clamp(min=0)].float() * there).sum(1) for d in (dk, dv))
    transform_backward(keys, kv, out, t)
    out[:, t.width :] = values.flatten(1)


@dataclass(frozen=True)
class _Tiles:
    """A transform as its kernels take it: who holds which heads, and what is known when they are compiled."""

    t: HeadTransform
    block: int  # heads a program holds

    @classmethod
    def of(cls, t: HeadTransform) -> _Tiles:
        every = power_of_two(t.heads)
        return cls(t, every if t.over_projection else min(every, max(1, TILE // power_of_two(t.dim))))

    @cached_property
    def blocks(self) -> int:
        return -(-self.t.heads // self.block)

    @cached_property
    def angle_stride(self) -> int:
        return 0 if self.t.angles is None else self.t.angles.cos.stride(0)

    def tables(self, unused: Tensor) -> tuple[Tensor, ...]:
        """cos, sin, norm, factor; `unused` stands for what there is not."""
        t = self.t
        cos, sin = (None, None) if t.angles is None else (t.angles.cos, t.angles.sin)
        return tuple(unused if table is None else table for table in (cos, sin, t.norm, t.factor))

    @cached_property
    def constants(self) -> dict[str, Any]:
        t = self.t
        half = 0 if t.angles is None else t.angles.cos.shape[1]
        return {
            "HEADS": t.heads,
            "HEADS_BLOCK": self.block,
            "DIM": t.dim,
            "PAIRS_BLOCK": power_of_two(t.dim // 2),
            "HALF": half,
            "NEIGHBOURS": t.neighbours and half > 0,
            "ALIGNED": gcd(half, t.dim // 2, power_of_two(t.dim)),
            "NORM": 0 if t.norm is None else 2 if t.after_rotation else 1,
            "OVER": t.over_projection and t.norm is not None,
            "W_STRIDE": 0 if t.norm is None or t.norm.numel() == t.dim else t.dim,
            "FACTOR": t.factor is not None,
            "num_warps": min(16, max(4, self.block * power_of_two(t.dim) // 1024)),
        }


def _heads(x: Tensor, t: HeadTransform, stride_head: int) -> Tensor:
    """View [T, heads, dim] of the heads in x."""
    return x.as_strided((len(x), t.heads, t.dim), (x.stride(0), stride_head or t.dim, 1))


def _forward(x: Tensor, t: HeadTransform) -> Tensor:
    """x [T, heads, dim] in fp32."""
    if t.norm is not None and t.after_rotation:
        y = _unit(_rotated(x, t), t)[0] * _weight(t)
    elif t.norm is not None:
        y = _rotated(_unit(x, t)[0] * _weight(t), t)
    else:
        y = _rotated(x, t)
    return y if t.factor is None else y * t.factor[:, None, None]


def _backward(d: Tensor, x: Tensor | None, t: HeadTransform) -> Tensor:
    """Gradient of raw x [T, heads, dim] from that of the transformed heads, both in fp32."""
    if t.factor is not None:
        d = d * t.factor[:, None, None]
    if x is None:
        return _rotated(d, t, inverse=True)
    if t.after_rotation:
        return _rotated(_norm_backward(d, _rotated(x, t), t), t, inverse=True)
    return _norm_backward(_rotated(d, t, inverse=True), x, t)


def _rotated(x: Tensor, t: HeadTransform, inverse: bool = False) -> Tensor:
    """x [T, heads, dim] rotated. `inverse` is the transpose, which is the inverse too where the table is not scaled."""
    if t.angles is None:
        return x
    cos, sin = t.angles.cos[:, None], t.angles.sin[:, None]
    if inverse:
        sin = -sin
    half = cos.shape[-1]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    if t.neighbours:
        first, second = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def _unit(x: Tensor, t: HeadTransform) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x)."""
    rstd = torch.rsqrt(x.pow(2).mean(_norm_dims(t), keepdim=True) + t.eps)
    return x * rstd, rstd


def _norm_backward(d: Tensor, x: Tensor, t: HeadTransform) -> Tensor:
    unit, rstd = _unit(x, t)
    g = d * _weight(t)
    return rstd * (g - unit * (g * unit).mean(_norm_dims(t), keepdim=True))


def _norm_dims(t: HeadTransform) -> tuple[int, ...]:
    return (-2, -1) if t.over_projection else (-1,)


def _weight(t: HeadTransform) -> Tensor:
    assert t.norm is not None
    return t.norm if t.norm.numel() == t.dim else t.norm.view(t.heads, t.dim)
