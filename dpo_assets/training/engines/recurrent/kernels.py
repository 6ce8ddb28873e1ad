"""Kernels of flash-linear-attention where they can be had: on a CUDA device, with the package installed.

Names and arguments are those of fla-core 0.6; a version that has them elsewhere is told in the error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from dpo_assets.errors import ConfigError
from dpo_assets.planning.delta_nets import has_fla, why_wrong_gradient

TESTED = "0.6"
_installed = lru_cache(maxsize=1)(has_fla)


def _kernel(device: torch.device, module: str, name: str) -> Callable[..., Any] | None:
    """A function of fla, or None where it cannot run.

    Raises:
        ConfigError: when the installed version has no such function.
    """
    if device.type != "cuda" or not _installed():
        return None
    try:
        kernel: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError(
            f"fla-core {_version()} has no {module}.{name}; install fla-core {TESTED}, or uninstall it: delta nets are "
            "then computed by PyTorch."
        ) from None
    return kernel


def _version() -> str:
    try:
        return importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def fla_convolution(device: torch.device) -> Callable[..., Any] | None:
    """`causal_conv1d`: x [1, T, channels], weight [channels, width], bias -> ([1, T, channels], None)."""
    return _kernel(device, "fla.modules.causal_conv1d", "causal_conv1d")


def fla_delta_rule(device: torch.device) -> Callable[..., Any] | None:
    """`chunk_gated_delta_rule`: query, key, value, decay, write [1, T, heads, ...] -> (out, final states or None).

    None too where its gradient would be wrong; a warning says so once.
    """
    kernel = _kernel(device, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    if kernel is not None and (reason := why_wrong_gradient(torch.cuda.get_device_capability(device))):
        _warn_once(reason)
        return None
    return kernel


@lru_cache(maxsize=8)
def _warn_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=2)


def fla_gated_norm(device: torch.device) -> Callable[..., Any] | None:
    """`rms_norm_gated`: x, gate [..., dim], weight, bias -> norm(x) silu(gate)."""
    return _kernel(device, "fla.modules.norm.fused_norm_gate", "rms_norm_gated")
