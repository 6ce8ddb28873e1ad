# mypy: disable-error-code="no-untyped-def"
"""RMS norms over the hidden width (`ops.norms`)."""

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
def add_normed(
    x_ptr, y_ptr, w_ptr, out_ptr, rstd_ptr, x_stride, y_stride, out_stride, eps, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    y = tl.load(y_ptr + row * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(y * y) / width + eps)
    out = x + y * rstd * w
    tl.store(out_ptr + row * out_stride + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def rms_norm_backward(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, skip_ptr, out_ptr,
    dy_stride, x_stride, skip_stride, out_stride, width,
    HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the input of the norm, plus the gradient that came past the norm on the residual stream."""
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
