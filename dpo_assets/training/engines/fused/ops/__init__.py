"""The elementwise passes of a fused layer: in Triton on a GPU, in PyTorch elsewhere.

The PyTorch text is what each operation means; the kernels are held against it. Shapes: T tokens of the stream, S slots
of the key/value rows, N scored tokens, V vocabulary. Widths are in elements. Outputs may be column slices of a wider
matrix (row stride above width), which is how LoRA's extra columns are carried along. Arithmetic is in fp32.
"""

from __future__ import annotations

from dpo_assets.training.engines.fused.ops.backend import INTERPRETED, kernels
from dpo_assets.training.engines.fused.ops.gates import (
    Activation,
    gated,
    gated_backward,
    output_gate,
    output_gate_backward,
)
from dpo_assets.training.engines.fused.ops.heads import (
    Angles,
    HeadTransform,
    fold_kv,
    gather_kv,
    transform,
    transform_backward,
)
from dpo_assets.training.engines.fused.ops.norms import add_normed, rms_norm, rms_norm_backward
from dpo_assets.training.engines.fused.ops.products import add_product, matmul_fp32
from dpo_assets.training.engines.fused.ops.scores import LogitScores, score_logits

DEQUANTISE_BLOCK = 2048

__all__ = [
    "DEQUANTISE_BLOCK",
    "INTERPRETED",
    "Activation",
    "Angles",
    "HeadTransform",
    "LogitScores",
    "add_normed",
    "add_product",
    "fold_kv",
    "gated",
    "gated_backward",
    "gather_kv",
    "kernels",
    "matmul_fp32",
    "output_gate",
    "output_gate_backward",
    "rms_norm",
    "rms_norm_backward",
    "score_logits",
    "transform",
    "transform_backward",
]
