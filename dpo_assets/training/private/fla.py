"""Private names of flash-linear-attention. Read of fla-core 0.6.0. Nothing here imports it before it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from dpo_assets.training.private.library import Library

FLA = Library(
    "fla-core",
    "0.6.0",
    "pip install 'fla-core==0.6.0', or uninstall it: delta nets are then computed by PyTorch.",
)
Kernel = Callable[..., Any]


@cache
def convolution() -> Kernel:
    """`causal_conv1d`: x [1, T, channels], weight [channels, width], bias, activation= -> ([1, T, channels], None)."""
    return _checked("fla.modules.causal_conv1d", "causal_conv1d", ("x", "weight", "bias"), ("activation",))


@cache
def delta_rule() -> Kernel:
    """`chunk_gated_delta_rule`: query, key, value, decay, write [1, T, heads, ...] and the segments' states and starts
    by name -> (out, final states or None). Its backward pass returns the gradient of `initial_state`."""
    state = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens", "cu_seqlens_cpu")
    return _checked("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("q", "k", "v", "g", "beta"), state)


@cache
def gated_norm() -> Kernel:
    """`rms_norm_gated`: x, gate [..., dim], weight, bias, eps= -> norm(x) silu(gate)."""
    return _checked("fla.modules.norm.fused_norm_gate", "rms_norm_gated", ("x", "g", "weight", "bias"), ("eps",))


def _checked(module: str, name: str, positional: tuple[str, ...], keywords: tuple[str, ...]) -> Kernel:
    kernel: Kernel = FLA.find(module, name)
    FLA.check_call(name, kernel, positional, keywords)
    return kernel
