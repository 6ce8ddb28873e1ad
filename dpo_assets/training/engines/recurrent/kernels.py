"""Kernels of flash-linear-attention where they can be had: on a CUDA device, with the package installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def fla_convolution(device: torch.device) -> Callable[..., Any] | None:
    """`causal_conv1d` of fla, or None where it cannot run."""
    if device.type != "cuda" or not _installed():
        return None
    kernel: Callable[..., Any] = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    return kernel


def fla_delta_rule(device: torch.device) -> Callable[..., Any] | None:
    """`chunk_gated_delta_rule` of fla, or None where it cannot run."""
    if device.type != "cuda" or not _installed():
        return None
    kernel: Callable[..., Any] = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return kernel
