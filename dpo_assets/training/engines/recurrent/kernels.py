"""Kernels of flash-linear-attention where they can be had: on a CUDA device, with the package installed.

`private.fla` has their names and arguments.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from dpo_assets.training.private import fla

HOPPER = 9  # Major capability.
MISCOMPILES = ((3, 4, 0), (3, 7, 1))  # Versions of Triton, from the first to the first that does not.


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def _runs(device: torch.device) -> bool:
    return device.type == "cuda" and _installed()


def fla_convolution(device: torch.device) -> Callable[..., Any] | None:
    """`causal_conv1d`: x [1, T, channels], weight [channels, width], bias -> ([1, T, channels], None)."""
    return fla.convolution() if _runs(device) else None


def fla_delta_rule(device: torch.device) -> Callable[..., Any] | None:
    """`chunk_gated_delta_rule`: query, key, value, decay, write [1, T, heads, ...] -> (out, final states or None).

    None too where its gradient would be wrong; a warning says so once.
    """
    if not _runs(device):
        return None
    if reason := why_wrong_gradient(torch.cuda.get_device_capability(device)):
        _warn_once(reason)
        return None
    return fla.delta_rule()


def why_wrong_gradient(capability: tuple[int, int]) -> str:
    """Why fla's delta rule must not be differentiated on a device of this capability; empty where it may.

    fla-core 0.6 refuses it in the middle of the backward pass (`chunk_bwd_dqkwg`, its issue 640); TileLang, where it is
    installed, is used in place of Triton there.
    """
    if capability[0] != HOPPER or importlib.util.find_spec("tilelang") is not None:
        return ""
    triton = importlib.metadata.version("triton")
    if not MISCOMPILES[0] <= _release(triton) < MISCOMPILES[1]:
        return ""
    return (
        f"Triton {triton} compiles flash-linear-attention's gradient wrong on Hopper GPUs, so delta nets are computed "
        "by PyTorch, several times slower: pip install 'triton>=3.7.1', or tilelang."
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@lru_cache(maxsize=8)
def _warn_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=2)


def fla_gated_norm(device: torch.device) -> Callable[..., Any] | None:
    """`rms_norm_gated`: x, gate [..., dim], weight, bias -> norm(x) silu(gate)."""
    return fla.gated_norm() if _runs(device) else None
