"""Products that are accumulated in fp32 whatever the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_assets.training.private.torch import addmm_in_place


def matmul_fp32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in fp32 whatever the inputs' dtype; in fp64 where they are."""
    if a.dtype == torch.float64:
        return torch.mm(a, b, out=out)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32) if out is None else torch.mm(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(into: Tensor, a: Tensor, b: Tensor, *, fresh: bool, scale: float = 1.0) -> None:
    """into += scale * a @ b in fp32; `fresh` overwrites instead."""
    beta = 0.0 if fresh else 1.0
    if a.is_cuda and a.dtype != torch.float32:
        addmm_in_place()(into, a, b, torch.float32, beta=beta, alpha=scale, out=into)
    else:
        torch.addmm(into, a.float(), b.float(), beta=beta, alpha=scale, out=into)
