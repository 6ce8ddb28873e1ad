# mypy: disable-error-code="no-untyped-def"
"""Norm, rotation and factor of query and key heads, and their backward passes (`ops.heads`).

A program holds a token's heads, or a block of them, as two tiles [heads, dim / 2]: the two members of each pair.
Columns that are not rotated are paired too, with an angle of zero, so that one text serves every rotation.

Compile-time arguments that all kernels here share:
    HEADS, HEADS_BLOCK, DIM: shape; heads a program holds (all of them where OVER).
    PAIRS_BLOCK: DIM / 2 rounded up to a power of two.
    HALF: rotated pairs, 0 for none; NEIGHBOURS: pairs are 2 i, 2 i + 1. ALIGNED: columns come in runs of so many.
    NORM: 0 none, 1 before the rotation, 2 after it; OVER: over all heads; W_STRIDE: DIM for weights of each head, or 0.
    FACTOR: whether there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(
    DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Columns of the first and of the second member of each pair."""
    pair = tl.arange(0, PAIRS_BLOCK)
    if HALF == 0 or (HALF * 2 == DIM and not NEIGHBOURS):
        first = pair
        second = pair + DIM // 2
    elif NEIGHBOURS:
        first = tl.where(pair < HALF, 2 * pair, pair + HALF)
        second = tl.where(pair < HALF, 2 * pair + 1, pair + DIM // 2)
    else:
        # Columns run on in groups of ALIGNED; the compiler cannot see that by itself and would load them one by one.
        first = tl.where(pair < HALF, pair, pair + HALF)
        second = tl.where(pair < HALF, pair + HALF, pair + DIM // 2)
        first = tl.max_contiguous(tl.multiple_of(first, ALIGNED), ALIGNED)
        second = tl.max_contiguous(tl.multiple_of(second, ALIGNED), ALIGNED)
    return first[None, :], second[None, :]


@triton.jit
def _angles(cos_ptr, sin_ptr, token, angle_stride, PAIRS_BLOCK: tl.constexpr, HALF: tl.constexpr):
    pair = tl.arange(0, PAIRS_BLOCK)
    turns = pair < HALF
    cos = tl.load(cos_ptr + token * angle_stride + pair, mask=turns, other=1.0)[None, :]
    sin = tl.load(sin_ptr + token * angle_stride + pair, mask=turns, other=0.0)[None, :]
    return cos, sin


@triton.jit
def _weights(
    w_ptr, head, column1, column2, mask, DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr, W_STRIDE: tl.constexpr
):  # fmt: skip
    if W_STRIDE:
        w1 = tl.load(w_ptr + head * W_STRIDE + column1, mask=mask, other=0.0)
        w2 = tl.load(w_ptr + head * W_STRIDE + column2, mask=mask, other=0.0)
    else:
        inside = (tl.arange(0, PAIRS_BLOCK) < DIM // 2)[None, :]
        w1 = tl.load(w_ptr + column1, mask=inside, other=0.0)
        w2 = tl.load(w_ptr + column2, mask=inside, other=0.0)
    return w1.to(tl.float32), w2.to(tl.float32)


@triton.jit
def _mean(tile, DIM: tl.constexpr, HEADS: tl.constexpr, OVER: tl.constexpr):
    """Mean of each head's values [heads, 1], or of all."""
    if OVER:
        mean = tl.sum(tl.sum(tile, axis=1, keep_dims=True), axis=0, keep_dims=True) / (HEADS * DIM)
    else:
        mean = tl.sum(tile, axis=1, keep_dims=True) / DIM
    return mean


@triton.jit
def _normed(first, second, w1, w2, eps, DIM: tl.constexpr, HEADS: tl.constexpr, OVER: tl.constexpr):
    rstd = 1.0 / tl.sqrt(_mean(first * first + second * second, DIM, HEADS, OVER) + eps)
    return first * rstd * w1, second * rstd * w2


@triton.jit
def _norm_backward(d1, d2, first, second, w1, w2, eps, DIM: tl.constexpr, HEADS: tl.constexpr, OVER: tl.constexpr):
    rstd = 1.0 / tl.sqrt(_mean(first * first + second * second, DIM, HEADS, OVER) + eps)
    first, second = first * rstd, second * rstd
    d1, d2 = d1 * w1, d2 * w2
    along = _mean(d1 * first + d2 * second, DIM, HEADS, OVER)
    return rstd * (d1 - first * along), rstd * (d2 - second * along)


@triton.jit
def _forward(
    first, second, cos_ptr, sin_ptr, w_ptr, factor_ptr, token, angle_stride, eps, head, column1, column2, mask,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, OVER: tl.constexpr, W_STRIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The transformed tiles of raw tiles."""
    if NORM:
        w1, w2 = _weights(w_ptr, head, column1, column2, mask, DIM, PAIRS_BLOCK, W_STRIDE)
    if NORM == 1:
        first, second = _normed(first, second, w1, w2, eps, DIM, HEADS, OVER)
    if HALF:
        cos, sin = _angles(cos_ptr, sin_ptr, token, angle_stride, PAIRS_BLOCK, HALF)
        first, second = first * cos - second * sin, second * cos + first * sin
    if NORM == 2:
        first, second = _normed(first, second, w1, w2, eps, DIM, HEADS, OVER)
    if FACTOR:
        factor = tl.load(factor_ptr + token)
        first, second = first * factor, second * factor
    return first, second


@triton.jit
def _backward(
    d1, d2, src_row, cos_ptr, sin_ptr, w_ptr, factor_ptr, token, angle_stride, eps, head, column1, column2, mask,
    HEADS: tl.constexpr, DIM: tl.constexpr, STRIDE_HEAD: tl.constexpr, PAIRS_BLOCK: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, OVER: tl.constexpr, W_STRIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The gradients of raw tiles, which are read from `src_row` where a norm needs them."""
    if FACTOR:
        factor = tl.load(factor_ptr + token)
        d1, d2 = d1 * factor, d2 * factor
    if HALF:
        cos, sin = _angles(cos_ptr, sin_ptr, token, angle_stride, PAIRS_BLOCK, HALF)
    if NORM:
        w1, w2 = _weights(w_ptr, head, column1, column2, mask, DIM, PAIRS_BLOCK, W_STRIDE)
        first = tl.load(src_row + head * STRIDE_HEAD + column1, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(src_row + head * STRIDE_HEAD + column2, mask=mask, other=0.0).to(tl.float32)
    if NORM == 2:
        if HALF:
            first, second = first * cos - second * sin, second * cos + first * sin
        d1, d2 = _norm_backward(d1, d2, first, second, w1, w2, eps, DIM, HEADS, OVER)
    if HALF:
        d1, d2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
    if NORM == 1:
        d1, d2 = _norm_backward(d1, d2, first, second, w1, w2, eps, DIM, HEADS, OVER)
    return d1, d2


@triton.jit
def transform(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, w_ptr, factor_ptr, src_stride, dst_stride, angle_stride, eps,
    STRIDE_HEAD: tl.constexpr,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
    HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr, OVER: tl.constexpr, W_STRIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
    mask = (head < HEADS) & (tl.arange(0, PAIRS_BLOCK) < DIM // 2)[None, :]
    column1, column2 = _columns(DIM, PAIRS_BLOCK, HALF, NEIGHBOURS, ALIGNED)
    src = src_ptr + token * src_stride + head * STRIDE_HEAD
    first = tl.load(src + column1, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(src + column2, mask=mask, other=0.0).to(tl.float32)
    first, second = _forward(
        first, second, cos_ptr, sin_ptr, w_ptr, factor_ptr, token, angle_stride, eps, head, column1, column2, mask,
        HEADS, DIM, PAIRS_BLOCK, HALF, NORM, OVER, W_STRIDE, FACTOR,
    )  # fmt: skip
    dst = dst_ptr + token * dst_stride + head * DIM
    tl.store(dst + column1, first.to(dst_ptr.dtype.element_ty), mask=mask)
    tl.store(dst + column2, second.to(dst_ptr.dtype.element_ty), mask=mask)


@triton.jit
def transform_backward(
    grad_ptr, src_ptr, out_ptr, cos_ptr, sin_ptr, w_ptr, factor_ptr,
    grad_stride, src_stride, out_stride, angle_stride, eps, STRIDE_HEAD: tl.constexpr,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
    HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr, OVER: tl.constexpr, W_STRIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
    mask = (head < HEADS) & (tl.arange(0, PAIRS_BLOCK) < DIM // 2)[None, :]
    column1, column2 = _columns(DIM, PAIRS_BLOCK, HALF, NEIGHBOURS, ALIGNED)
    grad = grad_ptr + token * grad_stride + head * DIM
    d1 = tl.load(grad + column1, mask=mask, other=0.0).to(tl.float32)
    d2 = tl.load(grad + column2, mask=mask, other=0.0).to(tl.float32)
    d1, d2 = _backward(
        d1, d2, src_ptr + token * src_stride,
        cos_ptr, sin_ptr, w_ptr, factor_ptr, token, angle_stride, eps, head, column1, column2, mask,
        HEADS, DIM, STRIDE_HEAD, PAIRS_BLOCK, HALF, NORM, OVER, W_STRIDE, FACTOR,
    )  # fmt: skip
    out = out_ptr + token * out_stride + head * STRIDE_HEAD
    tl.store(out + column1, d1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + column2, d2.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_kv(
    kv_ptr, rows_ptr, source_ptr, cos_ptr, sin_ptr, w_ptr, factor_ptr, kv_stride, angle_stride, eps,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
    HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr, OVER: tl.constexpr, W_STRIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Transformed key rows and value rows of each slot, from the stream."""
    slot = tl.program_id(0).to(tl.int64)
    token = tl.load(source_ptr + slot)
    head = (tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
    mask = (head < HEADS) & (tl.arange(0, PAIRS_BLOCK) < DIM // 2)[None, :]
    column1, column2 = _columns(DIM, PAIRS_BLOCK, HALF, NEIGHBOURS, ALIGNED)
    source = kv_ptr + token * kv_stride + head * DIM
    first = tl.load(source + column1, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + column2, mask=mask, other=0.0).to(tl.float32)
    first, second = _forward(
        first, second, cos_ptr, sin_ptr, w_ptr, factor_ptr, token, angle_stride, eps, head, column1, column2, mask,
        HEADS, DIM, PAIRS_BLOCK, HALF, NORM, OVER, W_STRIDE, FACTOR,
    )  # fmt: skip
    width = HEADS * DIM
    target = rows_ptr + slot * (2 * width) + head * DIM
    tl.store(target + column1, first.to(rows_ptr.dtype.element_ty), mask=mask)
    tl.store(target + column2, second.to(rows_ptr.dtype.element_ty), mask=mask)
    tl.store(target + width + column1, tl.load(source + width + column1, mask=mask, other=0.0), mask=mask)
    tl.store(target + width + column2, tl.load(source + width + column2, mask=mask, other=0.0), mask=mask)


@triton.jit
def fold_kv(
    dk_ptr, dv_ptr, kv_ptr, out_ptr, slots_ptr, cos_ptr, sin_ptr, w_ptr, factor_ptr,
    dk_stride, dv_stride, kv_stride, out_stride, angle_stride, eps, COPIES: tl.constexpr,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
    HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr, OVER: tl.constexpr, W_STRIDE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Backward of gather_kv: sums the gradients of a token's copies, so it needs no atomics."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
    inside = (head < HEADS) & (tl.arange(0, PAIRS_BLOCK) < DIM // 2)[None, :]
    column1, column2 = _columns(DIM, PAIRS_BLOCK, HALF, NEIGHBOURS, ALIGNED)
    k1 = tl.zeros((HEADS_BLOCK, PAIRS_BLOCK), tl.float32)
    k2 = tl.zeros((HEADS_BLOCK, PAIRS_BLOCK), tl.float32)
    v1 = tl.zeros((HEADS_BLOCK, PAIRS_BLOCK), tl.float32)
    v2 = tl.zeros((HEADS_BLOCK, PAIRS_BLOCK), tl.float32)
    for copy in tl.static_range(COPIES):
        slot = tl.load(slots_ptr + token * COPIES + copy)
        mask = inside & (slot >= 0)
        dk, dv = dk_ptr + slot * dk_stride + head * DIM, dv_ptr + slot * dv_stride + head * DIM
        k1 += tl.load(dk + column1, mask=mask, other=0.0).to(tl.float32)
        k2 += tl.load(dk + column2, mask=mask, other=0.0).to(tl.float32)
        v1 += tl.load(dv + column1, mask=mask, other=0.0).to(tl.float32)
        v2 += tl.load(dv + column2, mask=mask, other=0.0).to(tl.float32)
    k1, k2 = _backward(
        k1, k2, kv_ptr + token * kv_stride,
        cos_ptr, sin_ptr, w_ptr, factor_ptr, token, angle_stride, eps, head, column1, column2, inside,
        HEADS, DIM, DIM, PAIRS_BLOCK, HALF, NORM, OVER, W_STRIDE, FACTOR,
    )  # fmt: skip
    kind = out_ptr.dtype.element_ty
    out = out_ptr + token * out_stride + head * DIM
    width = HEADS * DIM
    tl.store(out + column1, k1.to(kind), mask=inside)
    tl.store(out + column2, k2.to(kind), mask=inside)
    tl.store(out + width + column1, v1.to(kind), mask=inside)
    tl.store(out + width + column2, v2.to(kind), mask=inside)
