"""Triton kernels of the fused layers. Each does in one pass over memory what `ops` says in PyTorch.

All of them are bound by memory, so what counts is that every value is read and written once. Arithmetic is fp32. Triton
reads these functions itself: their arguments are pointers and numbers without types, and it asks for bare names.
"""

from __future__ import annotations

from dpo_assets.training.engines.fused.kernels.dequantise import dequantise_nf4, dequantise_rows
from dpo_assets.training.engines.fused.kernels.gates import gated, gated_backward, output_gate, output_gate_backward
from dpo_assets.training.engines.fused.kernels.heads import fold_kv, gather_kv, transform, transform_backward
from dpo_assets.training.engines.fused.kernels.norms import add_normed, rms_norm, rms_norm_backward
from dpo_assets.training.engines.fused.kernels.scores import score_logits

__all__ = [
    "add_normed",
    "dequantise_nf4",
    "dequantise_rows",
    "fold_kv",
    "gated",
    "gated_backward",
    "gather_kv",
    "output_gate",
    "output_gate_backward",
    "rms_norm",
    "rms_norm_backward",
    "score_logits",
    "transform",
    "transform_backward",
]
