"""Versions of the installed packages: what an artefact records, and what decides how a score is rounded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

# Each computes part of a model wherever it is installed: recurrent layers, Transformers' and this project's, take
# fla-core, mamba-ssm, causal-conv1d and the Hub's `kernels` unasked; in fla-core tilelang takes Triton's place.
COMPUTING = (
    "torch", "triton", "transformers", "peft", "fla-core", "tilelang", "mamba-ssm", "causal-conv1d", "kernels",
)  # fmt: skip
# These compute where the plan says so.
OF_KERNELS = {"unsloth": ("unsloth", "unsloth_zoo")}
OF_PRECISION = {"4bit": ("bitsandbytes",), "8bit": ("bitsandbytes",)}
OF_SPEEDUP = {"liger": ("liger-kernel",)}
RECORDED = (
    *COMPUTING, "unsloth", "unsloth_zoo", "bitsandbytes", "liger-kernel",
    "trl", "accelerate", "datasets", "tokenizers", "lm_eval",
)  # fmt: skip


def versions(packages: Iterable[str] = RECORDED) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def computing(kernels: str, precision: str, speedups: Iterable[str]) -> dict[str, str]:
    """The versions of what computes a model by an engine: scores of two of them must not meet in one run."""
    named = (*OF_KERNELS.get(kernels, ()), *OF_PRECISION.get(precision, ()))
    return versions((*COMPUTING, *named, *(package for speedup in speedups for package in OF_SPEEDUP.get(speedup, ()))))
