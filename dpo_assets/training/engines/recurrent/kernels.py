"""Kernels of flash-linear-attention where they can be had: on a CUDA device, with the package installed.

`private.fla` has their names and arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from dpo_assets.planning.delta_nets import has_fla, why_wrong_gradient
from dpo_assets.training.private import fla

_installed = lru_cache(maxsize=1)(has_fla)


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


@lru_cache(maxsize=8)
def _warn_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=2)


def fla_gated_norm(device: torch.device) -> Callable[..., Any] | None:
    """`rms_norm_gated`: x, gate [..., dim], weight, bias -> norm(x) silu(gate)."""
    return fla.gated_norm() if _runs(device) else None
