# mypy: disable-error-code="no-untyped-def"
# (Triton reads these functions itself: their arguments are pointers and numbers, and it asks for bare names.)
"""Triton kernels of the fused layers. Each does in one pass over memory what `ops` says in PyTorch.

All of them are bound by memory, so what counts is that every value is read and written once. Arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x_ptr, w_ptr, out_ptr, rstd_ptr, x_stride, out_stride, eps, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    tl.store(out_ptr + row * out_stride + columns, (x * rstd * w).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def rms_norm_backward(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, skip_ptr, out_ptr,
    dy_stride, x_stride, skip_stride, out_stride, width,
    HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, plus the gradient that came past the norm on the residual stream."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    rstd = tl.load(rstd_ptr + row)
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32) * rstd
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32) * w
    dx = rstd * (g - x * (tl.sum(g * x) / width))
    if HAS_SKIP:
        dx += tl.load(skip_ptr + row * skip_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, dx.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, src_stride, dst_stride, sign,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of a token's heads; sign -1 is its inverse, and its backward pass."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (column < HALF)
    angle = token * HALF + tl.arange(0, HALF_BLOCK)
    angle_mask = tl.arange(0, HALF_BLOCK) < HALF
    cos = tl.load(cos_ptr + angle, mask=angle_mask, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=angle_mask, other=0.0)[None, :] * sign
    at = head * (2 * HALF) + column
    first = tl.load(src_ptr + token * src_stride + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(src_ptr + token * src_stride + at + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = dst_ptr.dtype.element_ty
    tl.store(dst_ptr + token * dst_stride + at, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(dst_ptr + token * dst_stride + at + HALF, (second * cos + first * sin).to(kind), mask=mask)


@triton.jit
def gather_kv(
    kv_ptr, rows_ptr, source_ptr, cos_ptr, sin_ptr, kv_stride,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Key rows, rotated, and value rows of each slot, from the stream."""
    slot = tl.program_id(0).to(tl.int64)
    token = tl.load(source_ptr + slot)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < HEADS) & (column < HALF)
    angle = token * HALF + tl.arange(0, HALF_BLOCK)
    angle_mask = tl.arange(0, HALF_BLOCK) < HALF
    cos = tl.load(cos_ptr + angle, mask=angle_mask, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=angle_mask, other=0.0)[None, :]
    at = head * (2 * HALF) + column
    width = HEADS * 2 * HALF
    source = kv_ptr + token * kv_stride + at
    target = rows_ptr + slot * (2 * width) + at
    kind = rows_ptr.dtype.element_ty
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(kind), mask=mask)
    tl.store(target + width, tl.load(source + width, mask=mask, other=0.0), mask=mask)
    tl.store(target + width + HALF, tl.load(source + width + HALF, mask=mask, other=0.0), mask=mask)


@triton.jit
def fold_kv(
    dk_ptr, dv_ptr, out_ptr, slots_ptr, cos_ptr, sin_ptr, dk_stride, dv_stride, out_stride,
    COPIES: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of gather_kv: sums the gradients of a token's copies, so it needs no atomics."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    at = head * (2 * HALF) + column
    k1 = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    k2 = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    v1 = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    v2 = tl.zeros((HEADS_BLOCK, HALF_BLOCK), tl.float32)
    for copy in tl.static_range(COPIES):
        slot = tl.load(slots_ptr + token * COPIES + copy)
        mask = inside & (slot >= 0)
        dk, dv = dk_ptr + slot * dk_stride + at, dv_ptr + slot * dv_stride + at
        k1 += tl.load(dk, mask=mask, other=0.0).to(tl.float32)
        k2 += tl.load(dk + HALF, mask=mask, other=0.0).to(tl.float32)
        v1 += tl.load(dv, mask=mask, other=0.0).to(tl.float32)
        v2 += tl.load(dv + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = token * HALF + tl.arange(0, HALF_BLOCK)
    angle_mask = tl.arange(0, HALF_BLOCK) < HALF
    cos = tl.load(cos_ptr + angle, mask=angle_mask, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=angle_mask, other=0.0)[None, :]
    kind = out_ptr.dtype.element_ty
    out = out_ptr + token * out_stride + at
    width = HEADS * 2 * HALF
    tl.store(out, (k1 * cos + k2 * sin).to(kind), mask=inside)
    tl.store(out + HALF, (k2 * cos - k1 * sin).to(kind), mask=inside)
    tl.store(out + width, v1.to(kind), mask=inside)
    tl.store(out + width + HALF, v2.to(kind), mask=inside)


@triton.jit
def swiglu(gate_up_ptr, out_ptr, in_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up_ptr + row * in_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * in_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * out_stride + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(
    gate_up_ptr, grad_ptr, out_ptr, in_stride, grad_stride, out_stride, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of gate and up; the activation itself takes the place of its gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up_ptr + row * in_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * in_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    silu = gate * open_
    kind = out_ptr.dtype.element_ty
    d_gate = grad * up * open_ * (1.0 + gate * (1.0 - open_))
    tl.store(out_ptr + row * out_stride + columns, d_gate.to(kind), mask=mask)
    tl.store(out_ptr + row * out_stride + width + columns, (grad * silu).to(kind), mask=mask)
    tl.store(grad_ptr + row * grad_stride + columns, (silu * up).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def score_logits(
    logits_ptr, target_ptr, logp_ptr, entropy_ptr, mean_ptr, top1_ptr, grad_ptr,
    logits_stride, grad_stride, vocabulary, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits: log-probability of its target, entropy, mean, greedy match, and onehot - softmax."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    logits = logits_ptr + row * logits_stride
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        x = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        known = tl.where(inside, x, 0.0)
        new_top = tl.maximum(top, x)
        # A lane that has seen nothing yet has top = -inf, and -inf - -inf is no number.
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp(top - new_top))
        weight = tl.where(inside, tl.exp(x - new_top), 0.0)
        mass = mass * shrink + weight
        weighted = weighted * shrink + weight * known
        total += known
        top = new_top
    highest = tl.max(top)
    scale = tl.where(top == float("-inf"), 0.0, tl.exp(top - highest))
    all_mass = tl.sum(mass * scale)
    lse = highest + tl.log(all_mass)
    target = tl.load(target_ptr + row)
    wanted = tl.load(logits + target).to(tl.float32)
    tl.store(logp_ptr + row, wanted - lse)
    tl.store(entropy_ptr + row, lse - tl.sum(weighted * scale) / all_mass)
    tl.store(mean_ptr + row, tl.sum(total) / vocabulary)
    tl.store(top1_ptr + row, wanted >= highest)
    if WITH_GRAD:
        grad = grad_ptr + row * grad_stride
        for start in range(0, vocabulary, BLOCK):
            at = start + lanes
            inside = at < vocabulary
            x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(at == target, 1.0, 0.0) - tl.exp(x - lse)
            tl.store(grad + at, slope.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantise_nf4(
    packed_ptr, table_ptr, absmax_ptr, absmax_table_ptr, absmax2_ptr, offset_ptr, out_ptr,
    bytes_, in_width, out_stride, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bitsandbytes' NF4: two codes a byte, the high half first; one scale a block, itself in 8 bit if nested."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < bytes_
    byte = tl.load(packed_ptr + at, mask=mask, other=0).to(tl.int32)
    block = at * 2 // BLOCKSIZE
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax_table_ptr + code) * tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        scale += tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    high = tl.load(table_ptr + (byte >> 4)) * scale
    low = tl.load(table_ptr + (byte & 15)) * scale
    values = tl.interleave(high, low)
    element = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    out = out_ptr + (element // in_width) * out_stride + element % in_width
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=element < 2 * bytes_)


@triton.jit
def dequantise_rows(codes_ptr, scale_ptr, out_ptr, width, codes_stride, out_stride, BLOCK: tl.constexpr):
    """8-bit codes (int8 or fp8) times one scale a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    codes = tl.load(codes_ptr + row * codes_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value = codes * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * out_stride + columns, value.to(out_ptr.dtype.element_ty), mask=mask)
