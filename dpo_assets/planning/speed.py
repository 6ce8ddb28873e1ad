"""How long an optimizer step takes on an engine: what pairs a second are predicted from, and engines ranked by.

A step's time is that of its matrix products, of the memory that passes between them, and of what Python launches,
where the GPU waits for it. The constants are fitted to blocks of six steps on an H100 and an H200 (the benchmark's
rows; tests hold each prediction to its row); other cards are scaled by their published rates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dpo_assets.planning.activations import adapts, made_bytes, mlp_width
from dpo_assets.planning.cards import Card, Rates, find_card, rates_of
from dpo_assets.planning.decoder import Attention, Decoder, Experts
from dpo_assets.planning.precision import QUANTISED, Device, Precision
from dpo_assets.planning.shape import Kernels, Trainer
from dpo_assets.planning.work import Work
from dpo_assets.recipe import LoraSection

FITTED_ON = "h100"  # Whose rates stand in for those of a card that is not in the catalogue.
# Of a card's dense rate, in layers much wider than HALF_RATE_WIDTH; attention is flash attention on rows of 1,000 to
# 8,000 tokens. Experts' products are small: half the rate is assumed, and no row measured it.
GEMM_SHARE, ATTENTION_SHARE, EXPERT_SHARE = 0.79, 0.6, 0.4
HALF_RATE_WIDTH = 630
MADE_TRAFFIC = 3  # Times that a weight of adapted experts passes through memory: read, added to, written.
DEQUANTISED_BYTES = 2.5  # Of each quantised weight, once in every pass of every forward.
# Each use of a quantised matrix is a launch more. Llama-8B in 4 bit on an H200: forwards of 1,984 tokens took 192 ms,
# and ones of 5,248 tokens 360 ms, of which launches hid behind the GPU.
QUANTISED_LAUNCHES = 1.5
FUSED_RECOMPUTED = 0.75  # Of a layer's forward: the down projection's output is the next layer's saved input.


@dataclass(frozen=True)
class Engine:
    """What an engine adds to the arithmetic.

    Attributes:
        traffic: bytes through memory for each byte of a layer's widths, in one pass.
        launch: seconds that Python takes to launch a layer's forward, and its backward pass.
        recomputed: share of a layer's forward that is computed again where it is recomputed.
    """

    traffic: float
    launch: tuple[float, float]
    recomputed: float = 1.0


ENGINE_COSTS: dict[tuple[Kernels, Trainer], Engine] = {
    ("fused", "packed"): Engine(5.1, (1.45e-3, 2.2e-3), FUSED_RECOMPUTED),
    ("transformers", "packed"): Engine(18.5, (5.0e-3, 7.4e-3)),
    ("unsloth", "packed"): Engine(11.9, (4.1e-3, 6.1e-3)),
    # Not measured yet: the layers are those of `transformers`, on more tokens.
    ("rows", "packed"): Engine(18.5, (5.0e-3, 7.4e-3)),
    ("transformers", "trl"): Engine(23.2, (4.0e-3, 6.0e-3)),
    ("unsloth", "trl"): Engine(5.3, (2.8e-3, 4.2e-3)),
}


@dataclass(frozen=True)
class Arithmetic:
    """What a model's layers compute for one token, and hold."""

    linear: float  # Weights of linear layers, which are quantised where anything is.
    experts: float  # Weights of the experts that are active for a token; these are parameters, and never quantised.
    adapter: float  # LoRA weights of linear layers.
    routed: float  # Weights of all experts, which a forward reads however few tokens it has.
    made: float  # Of these the ones with an adapter, of which PEFT makes new ones at every use.
    attentions: tuple[tuple[int, int | None, int], ...]  # (query width, window, layers that have them).
    values: float  # Widths of all layers' activations.
    head: float

    @classmethod
    def of(cls, decoder: Decoder, lora: LoraSection) -> Arithmetic:
        linear = experts = adapter = routed = made = values = 0.0
        attentions: Counter[tuple[int, int | None]] = Counter()
        for layer, count in decoder.kinds:
            linears = layer.linears(decoder.hidden)
            linear += count * sum(rows * columns for _, rows, columns in linears)
            adapter += count * lora.rank * sum(rows + cols for name, rows, cols in linears if adapts(lora, name))
            if isinstance(layer.mlp, Experts):
                one = count * 3 * layer.mlp.width * decoder.hidden
                experts += one * layer.mlp.active
                routed += one * layer.mlp.count
                made += count * made_bytes(layer, decoder, lora, 1)
            values += count * (4 * decoder.hidden + 3 * mlp_width(layer.mlp))
            if isinstance(layer.mixer, Attention):
                values += count * 2 * (layer.mixer.query_width + layer.mixer.kv_width)
                attentions[layer.mixer.query_width, layer.mixer.window] += count
            values += count * sum(8 * mixer.inner for mixer in layer.recurrents)
        return cls(
            linear, experts, adapter, routed, made, tuple((w, n, c) for (w, n), c in attentions.items()), values,
            decoder.hidden * decoder.vocabulary,
        )  # fmt: skip


def step_seconds(
    decoder: Decoder, arithmetic: Arithmetic, precision: Precision, kernels: Kernels, work: Work, budget: int,
    recomputed: int, card: Card, rank: int,
) -> float:  # fmt: skip
    """Predicted seconds of an optimizer step in forwards of `budget` tokens, `rank` that of the adapter."""
    engine = ENGINE_COSTS[kernels, work.trainer]
    tokens, forwards = work.computed_tokens(kernels, budget), work.forwards(kernels, budget)
    layers = max(1, len(decoder.layers))
    again = recomputed / layers * engine.recomputed
    reference = float(work.trainer == "trl")  # TRL scores its reference in every step.
    passes = 2 + again + reference
    width = 4 if precision == "fp32" else 2
    # Narrow layers fill a GPU less.
    filled = decoder.hidden / (decoder.hidden + HALF_RATE_WIDTH)
    products = (
        passes * 2 * arithmetic.linear * tokens / GEMM_SHARE
        + passes * 2 * arithmetic.experts * tokens / EXPERT_SHARE
        + (6 + 2 * again) * arithmetic.adapter * tokens / GEMM_SHARE
        + (3 + reference) * 2 * arithmetic.head * work.answer_tokens / GEMM_SHARE
    ) / filled
    # Causal: half of the square of a row, for scores and for values; the backward pass is two and a half times as much.
    attention = sum(2 * wide * work.attended(window) * count for wide, window, count in arithmetic.attentions)
    products += (3.5 + again + reference) * attention / ATTENTION_SHARE
    # Of adapted experts: the gradient of every weight by tokens, the adapter's product and its gradients by forwards.
    trained = arithmetic.made / max(1.0, arithmetic.routed)
    products += 2 * trained * arithmetic.experts * tokens / EXPERT_SHARE / filled
    products += (3 + again + reference) * 2 * rank * arithmetic.made * forwards / EXPERT_SHARE / filled
    moved = passes * engine.traffic * arithmetic.values * width * tokens
    moved += forwards * width * (passes * arithmetic.routed + MADE_TRAFFIC * (2 + again + reference) * arithmetic.made)
    if precision in QUANTISED:
        moved += passes * forwards * arithmetic.linear * DEQUANTISED_BYTES
    gpu = products / (card.tflops * 1e12) + moved / (card.terabytes_per_s * 1e12)
    launch, back = engine.launch
    launches = forwards * layers * ((1 + again + reference) * launch + back)
    if precision in QUANTISED and kernels == "fused":
        launches *= QUANTISED_LAUNCHES
    # A tenth of the launches counts in any case: not all of them hide behind the GPU's work.
    return max(gpu, launches) + 0.1 * launches


def predicted_by(device: Device) -> Rates:
    """The rates to predict with: the device's own, or those of the card that the constants were fitted on."""
    fitted = find_card(FITTED_ON)
    if device.kind == "cpu":
        return Rates(fitted)
    return rates_of(device) or Rates(
        fitted, f"at an {fitted.key.upper()}'s rates: {device.name} is not in the catalogue"
    )
