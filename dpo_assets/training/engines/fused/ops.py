"""The elementwise passes of a fused layer: in Triton on a GPU, in PyTorch elsewhere.

The PyTorch text is what each operation means; the kernels are held against it. Shapes: T tokens of the stream, S slots
of the key/value rows, N scored tokens, V vocabulary. Widths are in elements. Outputs may be column slices of a wider
matrix (row stride above width), which is how LoRA's extra columns are carried along.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

try:  # A CPU build of PyTorch brings no Triton.
    from dpo_assets.training.engines.fused import kernels as kernels
except ImportError:
    kernels = None  # type: ignore[assignment]

SWIGLU_BLOCK, HEAD_BLOCK, DEQUANTISE_BLOCK = 1024, 2048, 2048


# Triton's interpreter runs the kernels on a CPU, which is how they can be tested without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton(x: Tensor) -> bool:
    return kernels is not None and (x.is_cuda or INTERPRETED)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out [T, width] = x / rms(x) * weight, and 1 / rms(x) [T] in fp32 (Zhang & Sennrich, arXiv 1910.07467)."""
    rows, width = x.shape
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if _triton(x):
        block = _power_of_two(width)
        kernels.rms_norm[(rows,)](
            x, weight, out, rstd, x.stride(0), out.stride(0), eps, width, BLOCK=block, num_warps=_warps(block)
        )
        return rstd
    wide = x.float()
    torch.rsqrt(wide.pow(2).mean(-1) + eps, out=rstd)
    out.copy_(wide * rstd[:, None] * weight.float())
    return rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, skip: Tensor | None, out: Tensor) -> Tensor:
    """out [T, width] = gradient of x, plus `skip`, the gradient on the residual stream beside the norm."""
    rows, width = x.shape
    if _triton(x):
        block, past = _power_of_two(width), dy if skip is None else skip
        kernels.rms_norm_backward[(rows,)](
            dy, x, weight, rstd, past, out, dy.stride(0), x.stride(0), past.stride(0), out.stride(0), width,
            HAS_SKIP=skip is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return out
    unit = x.float() * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - unit * (g * unit).mean(-1, keepdim=True))
    out.copy_(dx if skip is None else dx + skip.float())
    return out


@dataclass(frozen=True)
class Angles:
    """Rotary tables of a stream, cos and sin [T, head_dim / 2] in fp32."""

    cos: Tensor
    sin: Tensor


def rotate(src: Tensor, dst: Tensor, angles: Angles, heads: int, inverse: bool = False) -> None:
    """Rotary embedding of `heads` heads that lie side by side in the first columns of src and dst [T, >= heads * dim].

    Rotation by halves, as Transformers' Llama does it (Su et al., arXiv 2104.09864). `inverse` is the backward pass.
    """
    half = angles.cos.shape[1]
    sign = -1.0 if inverse else 1.0
    if _triton(src):
        kernels.rotate[(len(src),)](
            src, dst, angles.cos, angles.sin, src.stride(0), dst.stride(0), sign,
            HEADS=heads, HEADS_BLOCK=_power_of_two(heads), HALF=half, HALF_BLOCK=_power_of_two(half),
        )  # fmt: skip
        return
    x = src[:, : heads * 2 * half].reshape(len(src), heads, 2 * half)
    dst[:, : heads * 2 * half] = _rotated(x, angles.cos, angles.sin * sign).flatten(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, dim] rotated by [n, dim / 2] tables."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def gather_kv(kv: Tensor, source: Tensor, angles: Angles, heads: int) -> Tensor:
    """Rows [S, 2 * heads * dim] of rotated keys and of values, from kv [T, 2 * heads * dim] by source [S]."""
    half = angles.cos.shape[1]
    width = heads * 2 * half
    rows = torch.empty(len(source), 2 * width, dtype=kv.dtype, device=kv.device)
    if _triton(kv):
        kernels.gather_kv[(len(source),)](
            kv, rows, source, angles.cos, angles.sin, kv.stride(0),
            HEADS=heads, HEADS_BLOCK=_power_of_two(heads), HALF=half, HALF_BLOCK=_power_of_two(half),
        )  # fmt: skip
        return rows
    picked = kv[source]
    keys = picked[:, :width].reshape(len(source), heads, 2 * half)
    rows[:, :width] = _rotated(keys, angles.cos[source], angles.sin[source]).flatten(1)
    rows[:, width:] = picked[:, width:]
    return rows


def fold_kv(dk: Tensor, dv: Tensor, slots: Tensor, angles: Angles, out: Tensor) -> None:
    """Backward of gather_kv: out [T, 2 * heads * dim] from dk, dv [S, heads, dim] and a token's slots [T, copies].

    A slot of -1 is none.
    """
    heads, dim = dk.shape[1:]
    if _triton(dk):
        kernels.fold_kv[(len(slots),)](
            dk, dv, out, slots, angles.cos, angles.sin, dk.stride(0), dv.stride(0), out.stride(0),
            COPIES=slots.shape[1], HEADS=heads, HEADS_BLOCK=_power_of_two(heads),
            HALF=dim // 2, HALF_BLOCK=_power_of_two(dim // 2),
        )  # fmt: skip
        return
    there = (slots >= 0)[..., None, None]
    keys, values = ((d[slots.clamp(min=0)].float() * there).sum(1) for d in (dk, dv))
    out[:, : heads * dim] = _rotated(keys, angles.cos, -angles.sin).flatten(1)
    out[:, heads * dim :] = values.flatten(1)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out [T, width] = silu(gate) * up, with gate_up [T, 2 * width] (Shazeer, arXiv 2002.05202)."""
    rows, width = out.shape
    if _triton(out):
        grid = (rows, -(-width // SWIGLU_BLOCK))
        kernels.swiglu[grid](gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=SWIGLU_BLOCK)
        return
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def swiglu_backward(gate_up: Tensor, grad: Tensor, out: Tensor) -> None:
    """out [T, 2 * width] = gradients of gate and up; `grad` [T, width] becomes the activation silu(gate) * up."""
    rows, width = grad.shape
    if _triton(grad):
        grid = (rows, -(-width // SWIGLU_BLOCK))
        kernels.swiglu_backward[grid](
            gate_up, grad, out, gate_up.stride(0), grad.stride(0), out.stride(0), width, BLOCK=SWIGLU_BLOCK
        )
        return
    gate, up = gate_up.float().chunk(2, dim=-1)
    open_ = gate.sigmoid()
    out[:, :width] = grad.float() * up * open_ * (1 + gate * (1 - open_))
    out[:, width:] = grad.float() * gate * open_
    grad.copy_(gate * open_ * up)


@dataclass(frozen=True)
class LogitScores:
    """Of each row of logits [N]: log-probability of the target, entropy, mean logit, whether the target is the top."""

    logps: Tensor
    entropy: Tensor
    mean: Tensor
    top1: Tensor


def score_logits(logits: Tensor, target: Tensor, grad: Tensor | None) -> LogitScores:
    """Scores fp32 logits [N, V]; `grad` [N, V], where given, becomes onehot(target) - softmax(logits).

    Softmax in one pass with running maxima: Milakov & Gimelshein, arXiv 1805.02867.
    """
    if _triton(logits):
        scores = [torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3)]
        top1 = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
        into = logits if grad is None else grad
        kernels.score_logits[(len(logits),)](
            logits, target, *scores, top1, into, logits.stride(0), into.stride(0), logits.shape[1],
            WITH_GRAD=grad is not None, BLOCK=HEAD_BLOCK, num_warps=8,
        )  # fmt: skip
        logps, entropy, mean = scores
        return LogitScores(logps, entropy, mean, top1)
    logp = logits.log_softmax(-1)
    probability = logp.exp()
    if grad is not None:
        grad.copy_(-probability)
        grad.scatter_add_(1, target[:, None], torch.ones_like(grad[:, :1]))
    return LogitScores(
        logp.gather(1, target[:, None])[:, 0],
        -(probability * logp).sum(-1),
        logits.mean(-1),
        logits.argmax(-1) == target,
    )


def matmul_fp32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in fp32 whatever the inputs' dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32) if out is None else torch.mm(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor, *, fresh: bool, scale: float = 1.0) -> None:
    """into += scale * a @ b in fp32; `fresh` overwrites instead."""
    beta = 0.0 if fresh else 1.0
    if a.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(into, a, b, torch.float32, beta=beta, alpha=scale, out=into)
    else:
        torch.addmm(into, a.float(), b.float(), beta=beta, alpha=scale, out=into)
