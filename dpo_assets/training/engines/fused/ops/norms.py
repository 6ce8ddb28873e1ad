"""RMS norms over the hidden width, before a mixer or an MLP and after it.

RMS norm: Zhang & Sennrich, arXiv 1910.07467. A weight may be fp32 beside 16-bit activations: where a model keeps its
weights around zero (Gemma), the caller gives weight + 1, which 16 bit would round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_assets.training.engines.fused.ops import backend
from dpo_assets.training.engines.fused.ops.backend import in_triton, power_of_two, warps


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out [T, width] = x / rms(x) * weight. Returns 1 / rms(x) [T] in fp32."""
    rows, width = x.shape
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if in_triton(x):
        block = power_of_two(width)
        backend.kernels.rms_norm[(rows,)](
            x, weight, out, rstd, x.stride(0), out.stride(0), eps, width, BLOCK=block, num_warps=warps(block)
        )
        return rstd
    wide = x.float()
    torch.rsqrt(wide.pow(2).mean(-1) + eps, out=rstd)
    out.copy_(wide * rstd[:, None] * weight.float())
    return rstd


def add_normed(x: Tensor, y: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out [T, width] = x + y / rms(y) * weight: a norm after a mixer or an MLP, and the residual stream.

    Returns 1 / rms(y) [T] in fp32. `out` may be x. The gradient of x is that of `out`; the gradient of y is
    `rms_norm_backward(d_out, y, weight, rstd, None, d_y)`.
    """
    rows, width = y.shape
    rstd = torch.empty(rows, dtype=torch.float32, device=y.device)
    if in_triton(y):
        block = power_of_two(width)
        backend.kernels.add_normed[(rows,)](
            x, y, weight, out, rstd, x.stride(0), y.stride(0), out.stride(0), eps, width,
            BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        return rstd
    wide = y.float()
    torch.rsqrt(wide.pow(2).mean(-1) + eps, out=rstd)
    out.copy_(x.float() + wide * rstd[:, None] * weight.float())
    return rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, skip: Tensor | None, out: Tensor) -> Tensor:
    """out [T, width] = gradient of x from dy, that of norm(x), plus `skip`, the gradient beside the norm."""
    rows, width = x.shape
    if in_triton(x):
        block, past = power_of_two(width), dy if skip is None else skip
        backend.kernels.rms_norm_backward[(rows,)](
            dy, x, weight, rstd, past, out, dy.stride(0), x.stride(0), past.stride(0), out.stride(0), width,
            HAS_SKIP=skip is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
        return out
    unit = x.float() * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - unit * (g * unit).mean(-1, keepdim=True))
    out.copy_(dx if skip is None else dx + skip.float())
    return out
