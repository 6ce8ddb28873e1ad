# mypy: disable-error-code="no-untyped-def"
"""The gated MLP and the gate on attention's output (`ops.gates`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """activation(gate) and its derivative."""
    if ACTIVATION == "silu":
        opened = tl.sigmoid(gate)
        slope = opened * (1.0 + gate * (1.0 - opened))
    elif ACTIVATION == "gelu":
        opened = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = opened + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        # (1 + tanh(x)) / 2 = sigmoid(2 x), and x here is sqrt(2 / pi) (gate + 0.044715 gate^3).
        square = gate * gate
        opened = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
        slope = opened + gate * opened * (1.0 - opened) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    return gate * opened, slope


@triton.jit
def gated(gate_up_ptr, out_ptr, in_stride, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up_ptr + row * in_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * in_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activated(gate, ACTIVATION)
    tl.store(out_ptr + row * out_stride + columns, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward(
    gate_up_ptr, grad_ptr, out_ptr, in_stride, grad_stride, out_stride, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up; the activation itself takes the place of its gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up_ptr + row * in_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * in_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activated(gate, ACTIVATION)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * out_stride + columns, (grad * up * slope).to(kind), mask=mask)
    tl.store(out_ptr + row * out_stride + width + columns, (grad * value).to(kind), mask=mask)
    tl.store(grad_ptr + row * grad_stride + columns, (value * up).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def output_gate(
    attended_ptr, gate_ptr, out_ptr, attended_stride, gate_stride, out_stride, width,
    DIM: tl.constexpr, STRIDE_HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    strided = columns // DIM * STRIDE_HEAD + columns % DIM
    attended = tl.load(attended_ptr + row * attended_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + strided, mask=mask, other=0.0).to(tl.float32)
    out = attended * tl.sigmoid(gate)
    tl.store(out_ptr + row * out_stride + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def output_gate_backward(
    grad_ptr, attended_ptr, gate_ptr, d_gate_ptr, out_ptr,
    grad_stride, attended_stride, gate_stride, d_gate_stride, out_stride, width,
    DIM: tl.constexpr, STRIDE_HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of attention's output in place of that of the gated one; the gated output is made again."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    strided = columns // DIM * STRIDE_HEAD + columns % DIM
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    attended = tl.load(attended_ptr + row * attended_stride + columns, mask=mask, other=0.0).to(tl.float32)
    opened = tl.sigmoid(tl.load(gate_ptr + row * gate_stride + strided, mask=mask, other=0.0).to(tl.float32))
    out = attended * opened
    d_gate = grad * out * (1.0 - opened)
    tl.store(grad_ptr + row * grad_stride + columns, (grad * opened).to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + row * out_stride + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_ptr + row * d_gate_stride + strided, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
