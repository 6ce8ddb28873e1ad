# mypy: disable-error-code="no-untyped-def"
"""Weights that are kept in fewer bits, written out in 16 (`weights`)."""

from __future__ import annotations

import triton
import triton.language as tl


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
