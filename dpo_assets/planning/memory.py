"""What a training stage needs of a device's memory, part by part, and the forward size that makes the most of it.

The estimate counts what PyTorch's allocator will hold at the peak: weights, adapter with its optimizer, what each layer
keeps for the backward pass, the layer that is being differentiated, and a chunk of logits. Measured peaks beside the
estimates are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dpo_assets.planning.precision import QUANTISED, Precision
from dpo_assets.planning.shape import Kernels, ModelShape
from dpo_assets.planning.targets import adapted_kinds
from dpo_assets.recipe import LoraSection

GIB = 2**30
# Bytes a weight of the decoder's linear layers. NF4: half a byte, and per 64 weights one byte of scale, whose own
# scales are 4 bytes per 256. The embeddings, the head and the norms stay in 16 bit (32 on a CPU).
BODY_BYTES: dict[Precision, float] = {
    "fp32": 4, "bf16": 2, "fp16": 2, "8bit": 1, "fp8": 1, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256),
}  # fmt: skip
# Fitted for Transformers' layers with PEFT: bytes per token, layer and hidden unit (2.05 MiB a token at 1B, 7.4 at 8B,
# 0.6 at 8B with checkpointing, on an H200).
TRANSFORMERS_KEPT, TRANSFORMERS_CHECKPOINTED = 62.0, 5.0
HEAD_CHUNKS = {"cuda": (1_024, 2_048), "cpu": (1_024, 1_024)}  # Scored tokens whose logits exist at one time.
LARGEST_FORWARD = {"cuda": 32_768, "cpu": 1_536}  # A CPU gains by rows of like length, not by large matrices.
FRAMEWORK_GIB = {"cuda": 0.35, "cpu": 1.0}  # CUDA context and cuBLAS workspaces; Python and libraries.
USABLE = {"cuda": 0.97, "cpu": 0.9}  # The rest is lost to fragments, or other people's memory.
# What decides between larger forwards with recomputed layers and smaller ones without, as seen on an H200: matrix rate,
# memory rate (a quantised base is dequantised once a pass, 2.5 bytes a weight), and the time Python takes to launch a
# layer's kernels, forward and backward. A forward whose layers are faster than their launches leaves the GPU idle.
FLOPS, HALF_RATE_WIDTH, BYTES_PER_SECOND, DEQUANTISED_BYTES = 560e12, 1_100, 3.5e12, 2.5
LAUNCH_FORWARD, LAUNCH_BACKWARD = 1.6e-3, 2.4e-3
RECOMPUTED_SHARE = 0.75  # Of a layer's forward: the down projection's output is the next layer's saved input.
STEP_SLACK = 1.15  # A step's tokens vary around the mean.


@dataclass(frozen=True)
class MemoryFit:
    """A forward size that fits, or the smallest one that does not."""

    token_budget: int
    recomputed_layers: int
    peak_gib: float
    parts: dict[str, float]
    fits: bool

    @property
    def gradient_checkpointing(self) -> bool:
        return self.recomputed_layers > 0


def body_parameters(shape: ModelShape) -> int:
    """Weights of the decoder's linear layers. Experts are none: they are not quantised, being parameters."""
    if shape.matrices is not None:
        return sum(kind.weights for kind in shape.matrices if kind.role == "linear")
    return shape.layers * sum(rows * columns for rows, columns in shape.linear_shapes().values())


def weights_bytes(shape: ModelShape, precision: Precision) -> float:
    """The base model."""
    body = min(body_parameters(shape), shape.parameters)
    return body * BODY_BYTES[precision] + (shape.parameters - body) * (4 if precision == "fp32" else 2)


def adapter_bytes(shape: ModelShape, lora: LoraSection) -> float:
    """LoRA weights, gradients and both Adam moments in fp32, and the 16-bit copy that the layers compute with."""
    return 18 * lora.rank * sum(kind.sides for kind in adapted_kinds(lora, shape))


def forward_peak(
    shape: ModelShape, precision: Precision, tokens: int, device: Literal["cpu", "cuda"], prompts: int = 0
) -> float:
    """Estimated peak in GiB of forwards without gradient: nothing is kept from layer to layer.

    Args:
        tokens: of a forward that scores answers.
        prompts: tokens of a batch of prompts that answers are generated from, computed in one forward too; of these
            only the last has logits.
    """
    width = 4 if precision == "fp32" else 2
    layer = max(tokens, prompts) * width * (3 * shape.intermediate + 5 * shape.hidden)
    head = head_chunk(tokens, device) * shape.vocabulary * (4 + width) + tokens * shape.hidden * width
    return (weights_bytes(shape, precision) + dequantised_bytes(shape, precision) + max(layer, head)) / GIB


def cache_bytes(shape: ModelShape, tokens: int) -> float:
    """Keys and values, in 16 bit, of `tokens` tokens to generate from; of whole width where heads are unknown."""
    return 4.0 * tokens * shape.layers * (shape.kv_heads * shape.head_dim or shape.hidden)


def dequantised_bytes(shape: ModelShape, precision: Precision) -> float:
    """The largest group of linear layers that is dequantised at one time, in 16 bit; 0 where nothing is quantised."""
    if precision not in QUANTISED:
        return 0.0
    shapes = shape.linear_shapes()
    return 2.0 * max(2 * math.prod(shapes["gate_proj"]), sum(math.prod(shapes[f"{p}_proj"]) for p in "qkv"))


def head_chunk(budget: int, device: Literal["cpu", "cuda"]) -> int:
    """Scored tokens a chunk: larger ones fill a GPU better, so a run with much memory takes more."""
    smallest, largest = HEAD_CHUNKS[device]
    return max(smallest, min(largest, 1 << max(0, (budget // 4).bit_length() - 1)))


def fit(
    shape: ModelShape,
    precision: Precision,
    kernels: Kernels,
    lora: LoraSection,
    available_gib: float,
    longest_pair: int,
    step_tokens: float,
    device: Literal["cpu", "cuda"],
    bases: int = 1,
) -> MemoryFit:
    """The fastest forward size that fits, with as many recomputed layers as it needs.

    `peak_gib` is the allocator's; that the device also holds a CUDA context is counted in `fits`.

    Args:
        available_gib: memory of the device that this run may use.
        longest_pair: tokens of the longest pair with its prompt shared; no forward can be smaller.
        step_tokens: mean tokens of an optimizer step.
        bases: models in memory: two where the reference is one of its own.
    """
    usable = USABLE[device] * available_gib
    best: tuple[float, MemoryFit] | None = None
    last: MemoryFit | None = None
    for budget in _candidates(longest_pair, step_tokens, device):
        estimate = _Estimate(shape, precision, kernels, lora, budget, device, bases)
        recomputed = estimate.fewest_recomputed(usable)
        last = MemoryFit(budget, recomputed, estimate.peak(recomputed), estimate.parts(recomputed), True)
        if estimate.needed(recomputed) > usable:
            continue
        cost = estimate.cost_per_token(recomputed)
        if best is None or cost < best[0]:
            best = (cost, last)
    if best is not None:
        return best[1]
    assert last is not None
    return MemoryFit(last.token_budget, last.recomputed_layers, last.peak_gib, last.parts, False)


def estimate_peak(
    shape: ModelShape,
    precision: Precision,
    kernels: Kernels,
    lora: LoraSection,
    tokens: int,
    recomputed_layers: int,
    device: Literal["cpu", "cuda"],
) -> float:
    """Estimated peak in GiB of forwards of `tokens` tokens."""
    return _Estimate(shape, precision, kernels, lora, tokens, device).peak(recomputed_layers)


def _candidates(longest_pair: int, step_tokens: float, device: Literal["cpu", "cuda"]) -> Iterator[int]:
    """Budgets that cut a step into 1, 2, 3, ... forwards, from the largest to the longest pair."""
    whole = math.ceil(step_tokens * STEP_SLACK)
    largest = max(longest_pair, min(whole, LARGEST_FORWARD[device]))
    seen = set()
    forwards = 1
    while True:
        budget = max(longest_pair, min(largest, math.ceil(whole / forwards / 64) * 64))
        if budget not in seen:
            seen.add(budget)
            yield budget
        if budget <= max(longest_pair, 64):
            return
        forwards += max(1, forwards // 64)


@dataclass(frozen=True)
class _Estimate:
    shape: ModelShape
    precision: Precision
    kernels: Kernels
    lora: LoraSection
    budget: int
    device: Literal["cpu", "cuda"]
    bases: int = 1

    @property
    def _width(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @cached_property
    def _adapter_bytes(self) -> float:
        return adapter_bytes(self.shape, self.lora)

    @cached_property
    def _adapted_a_layer(self) -> int:
        return len(adapted_kinds(self.lora, self.shape))

    def fewest_recomputed(self, usable_gib: float) -> int:
        layers = self.shape.layers
        steps = range(layers + 1) if self.kernels == "fused" else (0, layers)
        return next((n for n in steps if self.needed(n) <= usable_gib), layers)

    def cost_per_token(self, recomputed: int) -> float:
        """Seconds, to compare forwards of different sizes by: the slower of GPU and launches.

        A tenth of the launches counts in any case: not all of them hide behind the GPU's work.
        """
        layers = self.shape.layers
        again = recomputed / layers * (RECOMPUTED_SHARE if self.kernels == "fused" else 1.0)
        weights = body_parameters(self.shape)
        # Narrow layers spend more of their time on what is no matrix product.
        rate = FLOPS * self.shape.hidden / (self.shape.hidden + HALF_RATE_WIDTH)
        gpu = 2 * weights * self.budget / rate
        if self.precision in QUANTISED:
            gpu += weights * DEQUANTISED_BYTES / BYTES_PER_SECOND
        launches = layers * ((1 + again) * LAUNCH_FORWARD + LAUNCH_BACKWARD)
        return (max((2 + again) * gpu, launches) + 0.1 * launches) / self.budget

    def needed(self, recomputed: int) -> float:
        """GiB of the device: the allocator's peak and what lies beside it."""
        return self.peak(recomputed) + FRAMEWORK_GIB[self.device]

    def peak(self, recomputed: int) -> float:
        return sum(self.parts(recomputed).values())

    def parts(self, recomputed: int) -> dict[str, float]:
        """GiB of each part at the peak."""
        s, tokens, chunk = self.shape, self.budget, head_chunk(self.budget, self.device)
        if self.kernels == "fused":
            kept = self._kept_layer()
            saved: float = tokens * ((s.layers - recomputed) * kept + recomputed * self._width * s.hidden)
            working: float = tokens * self._width * (3 * s.intermediate + 5 * s.hidden)
            # The recomputed layers are the lowest, so all the others' memory is free again when their turn comes.
            working += tokens * kept if recomputed == s.layers else 0
        else:
            unit = TRANSFORMERS_CHECKPOINTED if recomputed else TRANSFORMERS_KEPT
            saved, working = tokens * unit * (self._width / 2) * s.layers * s.hidden, 0.0
        # The logits of a chunk in fp32 and their gradient, and the gradient of each scored hidden state.
        head = chunk * s.vocabulary * (4 + self._width) + 2 * tokens * s.hidden * self._width
        # The logits go before the first layer is differentiated.
        parts = {
            "weights": self.bases * weights_bytes(s, self.precision),
            "adapter and optimizer": self._adapter_bytes,
            "kept activations": saved,
            "dequantised layer": dequantised_bytes(s, self.precision),
            "working memory": max(head, working),
        }
        return {name: size / GIB for name, size in parts.items()}

    def _kept_layer(self) -> float:
        """Bytes per token that a fused layer keeps: its input, q, k, v, attention, its second input, gate and up."""
        s = self.shape
        attention = s.heads * s.head_dim
        values = 2 * s.hidden + attention + 2 * s.kv_heads * s.head_dim + attention + 2 * s.intermediate
        ranks = self.lora.rank * self._adapted_a_layer
        return self._width * (values + ranks) + 4 * (s.heads + 2)
