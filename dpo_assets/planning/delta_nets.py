"""Whether gated delta nets are computed by flash-linear-attention or by PyTorch. Nothing is imported to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from dpo_assets.planning.decoder import Decoder

HOPPER = 9  # Major capability.
MISCOMPILES = ((3, 4, 0), (3, 7, 1))  # Versions of Triton, from the first to the first that does not.
BY_PYTORCH = "delta nets by PyTorch, several times slower"


def has_fla() -> bool:
    """Whether fla-core (extra `delta-net`) is installed."""
    return importlib.util.find_spec("fla") is not None


def why_wrong_gradient(capability: tuple[int, int]) -> str:
    """Why fla's delta rule must not be differentiated on a device of this capability; empty where it may.

    fla-core 0.6 refuses it in the middle of the backward pass (`chunk_bwd_dqkwg`, its issue 640); TileLang, where it is
    installed, is used in place of Triton there.
    """
    if capability[0] != HOPPER or importlib.util.find_spec("tilelang") is not None:
        return ""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""  # A plan is made where no GPU is; what runs fla has Triton.
    if not MISCOMPILES[0] <= _release(triton) < MISCOMPILES[1]:
        return ""
    return (
        f"Triton {triton} compiles flash-linear-attention's gradient wrong on Hopper GPUs, so delta nets are computed "
        "by PyTorch, several times slower: pip install 'triton>=3.7.1', or tilelang."
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def has_delta_nets(decoder: Decoder) -> bool:
    return any(mixer.kind == "delta_net" for layer, _ in decoder.kinds for mixer in layer.recurrents)
