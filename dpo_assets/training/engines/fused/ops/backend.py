"""Where an operation runs: in Triton on a GPU, in PyTorch elsewhere."""

from __future__ import annotations

import os

from torch import Tensor

try:  # A CPU build of PyTorch brings no Triton.
    from dpo_assets.training.engines.fused import kernels as kernels
except ImportError:
    kernels = None  # type: ignore[assignment]

# Triton's interpreter runs the kernels on a CPU, which is how they can be tested without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def in_triton(x: Tensor) -> bool:
    return kernels is not None and (x.is_cuda or INTERPRETED)


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


def warps(block: int) -> int:
    return min(16, max(1, block // 512))
