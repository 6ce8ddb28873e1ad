"""What a training stage needs of a device's memory, part by part, and the forward size that makes the most of it.

The estimate counts what PyTorch's allocator will hold at the peak: weights, adapter with its optimizer, what each layer
keeps for the backward pass, the layer that is being differentiated, and a chunk of logits. Measured peaks beside the
estimates are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from dpo_assets.planning.activations import kept_bytes, made_bytes, mlp_width, recomputed_bytes, working_bytes
from dpo_assets.planning.cards import Card, find_card
from dpo_assets.planning.decoder import Decoder, Experts, Layer
from dpo_assets.planning.precision import QUANTISED, Precision
from dpo_assets.planning.shape import Kernels, ModelShape, Trainer
from dpo_assets.planning.speed import FITTED_ON, Arithmetic, step_seconds
from dpo_assets.planning.targets import adapted_kinds
from dpo_assets.planning.work import Work
from dpo_assets.recipe import LoraSection

GIB = 2**30
# Bytes a weight of the decoder's linear layers. NF4: half a byte, and per 64 weights one byte of scale, whose own
# scales are 4 bytes per 256. The embeddings, the head and the norms stay in 16 bit (32 on a CPU).
BODY_BYTES: dict[Precision, float] = {
    "fp32": 4, "bf16": 2, "fp16": 2, "8bit": 1, "fp8": 1, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256),
}  # fmt: skip
HEAD_CHUNKS = {"cuda": (1_024, 2_048), "cpu": (1_024, 1_024)}  # Scored tokens whose logits exist at one time.
LARGEST_FORWARD = {"cuda": 32_768, "cpu": 1_536}  # A CPU gains by rows of like length, not by large matrices.
# Tokens of a forward without gradient: an 8B layer's products gained nothing from 4,096 to 12,288 tokens on an H200.
LARGEST_SCORED = 16_384
FRAMEWORK_GIB = {"cuda": 0.35, "cpu": 1.0}  # CUDA context and cuBLAS workspaces; Python and libraries.
USABLE = {"cuda": 0.97, "cpu": 0.9}  # The rest is lost to fragments, or other people's memory.
# More of a GPU that is left where autograd keeps many small tensors: plans of fused layers were tried up to their caps,
# others only well below, where the allocator held 6 to 12 % more than it had given out.
SMALL_TENSORS = 0.03
TRL_TILE = 4_096 * 32_768  # Logits that TRL's own scorer has at one time.
ABOUT_AS_FAST = 1.02  # Of the fastest time: no prediction is surer than that, and less memory leaves more room.
WORTH_SAVING = 0.1  # Of what the fastest needs; for less, fewer and larger forwards are the surer ones.
STEP_SLACK = 1.15  # A step's tokens vary around the mean.


@dataclass(frozen=True)
class MemoryFit:
    """A forward size that fits, or the smallest one that does not."""

    token_budget: int
    recomputed_layers: int
    reference_budget: int
    peak_gib: float
    parts: dict[str, float]
    fits: bool
    step_seconds: float  # Predicted, of an optimizer step.

    @property
    def gradient_checkpointing(self) -> bool:
        return self.recomputed_layers > 0


def body_parameters(shape: ModelShape) -> int:
    """Weights of the decoder's linear layers. Experts are none: they are not quantised, being parameters."""
    if shape.matrices is not None:
        return sum(kind.weights for kind in shape.matrices if kind.role == "linear")
    decoder = shape.described()
    return sum(
        count * sum(rows * columns for _, rows, columns in layer.linears(decoder.hidden))
        for layer, count in decoder.kinds
    )


def weights_bytes(shape: ModelShape, precision: Precision) -> float:
    """The base model with all its experts, of which those in MXFP4 are loaded in 16 bit.

    A file holds two values of MXFP4 in a byte, so that it counts fewer parameters than the loaded model has.
    """
    parameters = max(shape.parameters, described_parameters(shape.decoder) if shape.decoder else 0)
    body = min(body_parameters(shape), parameters)
    return body * BODY_BYTES[precision] + (parameters - body) * (4 if precision == "fp32" else 2)


def usable_share(device: Literal["cpu", "cuda"], kernels: Kernels) -> float:
    """Share of a device's memory that a plan may need."""
    return USABLE[device] - (SMALL_TENSORS if device == "cuda" and kernels != "fused" else 0.0)


def expert_parameters(shape: ModelShape) -> int:
    """Weights of routed experts, by the model's files or its description."""
    if shape.matrices is not None and shape.decoder is None:
        return sum(kind.weights for kind in shape.matrices if kind.role == "experts")
    return _expert_parameters(shape.decoder) if shape.decoder else 0


def _expert_parameters(decoder: Decoder) -> int:
    experts = ((layer.mlp, count) for layer, count in decoder.kinds if isinstance(layer.mlp, Experts))
    return sum(count * 3 * mlp.count * mlp.width * decoder.hidden for mlp, count in experts)


def described_parameters(decoder: Decoder) -> int:
    """Weights of the matrices that a description tells of: layers, experts, embedding and head."""
    total = decoder.hidden * decoder.vocabulary * (1 if decoder.tied else 2) + _expert_parameters(decoder)
    for layer, count in decoder.kinds:
        total += count * sum(rows * columns for _, rows, columns in layer.linears(decoder.hidden))
    return total


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
    working = _forward_bytes(shape, precision, tokens, device, prompts)
    return (weights_bytes(shape, precision) + dequantised_bytes(shape, precision) + working) / GIB


def _forward_bytes(
    shape: ModelShape, precision: Precision, tokens: int, device: Literal["cpu", "cuda"], prompts: int = 0
) -> float:
    """What such a forward takes beside the model: one layer, or a chunk of logits."""
    width = 4 if precision == "fp32" else 2
    inner = max(mlp_width(layer.mlp) for layer, _ in shape.described().kinds)
    layer = max(tokens, prompts) * width * (3 * inner + 5 * shape.hidden)
    head = head_chunk(tokens, device) * shape.vocabulary * (4 + width) + tokens * shape.hidden * width
    return max(layer, head)


def cache_bytes(shape: ModelShape, tokens: int) -> float:
    """Keys and values, in 16 bit, of `tokens` tokens to generate from; of whole width where heads are unknown.

    Layers with a window keep all of them here, as they may where a row is shorter than it. A recurrent layer keeps a
    state that does not grow with the row, which is left out.
    """
    return 4.0 * tokens * sum(attention.kv_width for attention in shape.described().attentions)


def dequantised_bytes(shape: ModelShape, precision: Precision, kernels: Kernels = "fused") -> float:
    """What is dequantised at one time, in 16 bit; 0 where nothing is quantised.

    The largest group of linear layers that a block begins with (q, k and v; gate and up), and in fused layers the
    largest layer that one ends with too.
    """
    if precision not in QUANTISED:
        return 0.0
    decoder = shape.described()
    parts = (part for layer, _ in decoder.kinds for part in (layer.mixer, layer.beside, layer.mlp) if part is not None)
    sizes = [[rows * columns for _, rows, columns in part.linears(decoder.hidden)] for part in parts]
    first, last = max(sum(block[:-1]) for block in sizes), max(sum(block[-1:]) for block in sizes)
    return 2.0 * (first + last if kernels == "fused" else max(first, last))


def head_chunk(budget: int, device: Literal["cpu", "cuda"]) -> int:
    """Scored tokens a chunk: larger ones fill a GPU better, so a run with much memory takes more."""
    smallest, largest = HEAD_CHUNKS[device]
    return max(smallest, min(largest, 1 << max(0, (budget // 4).bit_length() - 1)))


@dataclass(frozen=True)
class Training:
    """What is trained, and by what: the part of an estimate that no forward size changes."""

    shape: ModelShape
    precision: Precision
    kernels: Kernels
    lora: LoraSection
    device: Literal["cpu", "cuda"]
    bases: int = 1  # Models in memory: two where the reference is one of its own.
    trainer: Trainer = "packed"
    fla: bool = False  # Whether gated delta nets are computed by flash-linear-attention.

    @property
    def width(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def usable(self, available_gib: float) -> float:
        """GiB that a plan may need."""
        return usable_share(self.device, self.kernels) * available_gib

    @property
    def stepwise(self) -> bool:
        """Whether a number of layers can be recomputed. Unsloth and TRL's trainer recompute all or none."""
        return self.kernels != "unsloth" and self.trainer == "packed"

    @cached_property
    def decoder(self) -> Decoder:
        return self.shape.described()

    @cached_property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic.of(self.decoder, self.lora)

    @cached_property
    def fixed(self) -> dict[str, float]:
        """Bytes of what every forward size needs."""
        return {
            "weights": self.bases * weights_bytes(self.shape, self.precision),
            "adapter and optimizer": adapter_bytes(self.shape, self.lora),
            "dequantised layers": dequantised_bytes(self.shape, self.precision, self.kernels),
        }

    @cached_property
    def saved(self) -> tuple[float, ...]:
        """Bytes a token that all layers together keep where the lowest 0, 1, ... layers are recomputed."""
        kept = [self._of_layer[0][layer] for layer in self.decoder.layers]
        again = [recomputed_bytes(layer, self.decoder, self.kernels, self.width) for layer in self.decoder.layers]
        lower, upper = accumulate(again, initial=0.0), list(accumulate(reversed(kept), initial=0.0))
        return tuple(below + above for below, above in zip(lower, reversed(upper), strict=True))

    @cached_property
    def made(self) -> tuple[float, ...]:
        """Bytes of experts' weights with their adapters that are kept where the lowest 0, 1, ... layers are recomputed,
        whatever a forward holds."""
        made = [made_bytes(layer, self.decoder, self.lora, self.width) for layer in self.decoder.layers]
        return tuple(reversed(list(accumulate(reversed(made), initial=0.0))))

    @cached_property
    def _making(self) -> float:
        """Bytes that a layer's adapted experts take while they are differentiated, beside those kept: the adapter's
        product and the gradient of their sum."""
        return 2 * max(made_bytes(layer, self.decoder, self.lora, self.width) for layer, _ in self.decoder.kinds)

    @cached_property
    def _of_layer(self) -> tuple[dict[Layer, float], float, float]:
        """Bytes a token: kept of each kind of layer, the most of one, and the most that differentiating one takes."""
        where = (self.decoder, self.kernels, self.lora, self.width, self.trainer)
        kept = {layer: kept_bytes(layer, *where, fla=self.fla) for layer, _ in self.decoder.kinds}
        return kept, max(kept.values()), max(working_bytes(layer, *where, fla=self.fla) for layer in kept)

    def fewest_recomputed(self, budget: int, usable_gib: float) -> int:
        layers = len(self.saved) - 1
        if not self.stepwise:
            return 0 if self.needed(budget, 0) <= usable_gib else layers
        # Each recomputed layer needs less than the one before; where none is kept the first of them all needs more.
        return bisect_left(range(layers), True, key=lambda n: self.needed(budget, n) <= usable_gib)

    def needed(self, budget: int, recomputed: int) -> float:
        """GiB of the device: the allocator's peak and what lies beside it."""
        return self.peak(budget, recomputed) + FRAMEWORK_GIB[self.device]

    def peak(self, budget: int, recomputed: int) -> float:
        """GiB at the peak of forwards of `budget` tokens."""
        kept = budget * self.saved[recomputed] + self.made[recomputed]
        return (self._fixed_bytes + kept + self._working(budget, recomputed)) / GIB

    def reference_budget(self, budget: int, recomputed: int) -> int:
        """Tokens of a forward of the reference pass, in the memory of forwards of `budget` tokens that are trained on.

        Nothing is kept there, so more fit; the larger, the fewer times layers are launched and weights dequantised. Of
        fused layers only: what others hold for a while was not measured.
        """
        if self.kernels != "fused" or self.device == "cpu":
            return budget
        room = self.peak(budget, recomputed) * GIB - self._fixed_bytes
        larger = (tokens for tokens in (8 * budget, 4 * budget, 2 * budget) if tokens <= LARGEST_SCORED)
        fits = (n for n in larger if _forward_bytes(self.shape, self.precision, n, self.device) <= room)
        return next(fits, budget)

    def parts(self, budget: int, recomputed: int) -> dict[str, float]:
        """GiB of each part at that peak."""
        parts = self.fixed | {
            "kept activations": budget * self.saved[recomputed],
            "adapted experts": self.made[recomputed],
            "working memory": self._working(budget, recomputed),
        }
        return {name: size / GIB for name, size in parts.items()}

    @cached_property
    def _fixed_bytes(self) -> float:
        return sum(self.fixed.values())

    def _working(self, budget: int, recomputed: int) -> float:
        """The larger of a chunk of logits and one layer's backward pass: the logits go before that begins."""
        _, kept, working = self._of_layer
        making = self._making
        if recomputed == len(self.saved) - 1:
            # The recomputed layers are the lowest, so all the others' memory is free again when their turn comes.
            working += kept
            making *= 1.5
        return max(self._head_bytes(budget), budget * working + making)

    def _head_bytes(self, budget: int) -> float:
        """The logits of a chunk in fp32 and their gradient, and the gradient of each scored hidden state."""
        chunk = head_chunk(budget, self.device) * self.shape.vocabulary
        logits = TRL_TILE if self.trainer == "trl" else chunk
        return logits * (4 + self.width) + 2 * budget * self.shape.hidden * self.width

    def seconds(self, work: Work, budget: int, recomputed: int, card: Card) -> float:
        """Predicted seconds of an optimizer step."""
        return step_seconds(
            self.decoder, self.arithmetic, self.precision, self.kernels, work, budget, recomputed, card, self.lora.rank
        )  # fmt: skip


def fit(training: Training, work: Work, available_gib: float, card: Card | None = None) -> MemoryFit:
    """The forward size to take, with as many recomputed layers as it needs: of those that fit and are predicted to be
    about as fast as the fastest (ABOUT_AS_FAST), the one that needs least, where that is much less (WORTH_SAVING).

    `peak_gib` is the allocator's; that the device also holds a CUDA context is counted in `fits`. No forward is smaller
    than the longest pair.

    Args:
        available_gib: memory of the device that this run may use.
        card: whose speed decides between forwards; None: that which the constants were fitted on.
    """
    card = card or find_card(FITTED_ON)
    usable = training.usable(available_gib)
    fitting: list[tuple[float, int, int]] = []
    last: tuple[float, int, int] | None = None
    for budget in _candidates(training, work):
        recomputed = training.fewest_recomputed(budget, usable)
        seconds = training.seconds(work, budget, recomputed, card)
        last = (seconds, budget, recomputed)
        if training.needed(budget, recomputed) <= usable:
            fitting.append(last)
    assert last is not None
    fastest = min(fitting, default=last)
    about_as_fast = [each for each in fitting if each[0] <= ABOUT_AS_FAST * fastest[0]]
    least = min(about_as_fast, key=lambda each: training.needed(*each[1:]), default=last)
    saved = training.needed(*fastest[1:]) - training.needed(*least[1:])
    seconds, budget, recomputed = least if saved > WORTH_SAVING * training.needed(*fastest[1:]) else fastest
    parts, scored = training.parts(budget, recomputed), training.reference_budget(budget, recomputed)
    return MemoryFit(budget, recomputed, scored, sum(parts.values()), parts, bool(fitting), seconds)


def _candidates(training: Training, work: Work) -> Iterator[int]:
    """Budgets that cut a step into 1, 2, 3, ... forwards, from the largest to the longest pair.

    TRL's trainer has forwards of whole micro-batches. A budget of `rows` counts filler.
    """
    if work.trainer == "trl":
        yield from (work.classic_tokens(pairs) for pairs in work.micro_batches())
        return
    longest = work.longest_forward(training.kernels)
    whole = math.ceil(work.computed_tokens(training.kernels, longest) * STEP_SLACK)
    largest = max(longest, min(whole, LARGEST_FORWARD[training.device]))
    if training.kernels != "rows":
        largest = work.whole_pairs(largest)
    seen = set()
    forwards = 1
    while True:
        budget = max(longest, min(largest, math.ceil(whole / forwards / 64) * 64))
        if budget not in seen:
            seen.add(budget)
            yield budget
        if budget <= max(longest, 64):
            return
        forwards += max(1, forwards // 64)
