"""What a decoder layer keeps of a token for its backward pass, and what that pass works with besides. In bytes.

Fused layers keep what `training/engines/fused/layer.py` saves. All other engines run modules that autograd
differentiates, and keep what PyTorch's formulas of these operations need; tests count that on tiny models of every
family. How much the backward pass of one such layer works with is fitted to peaks on an H100 and an H200.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpo_assets.planning.decoder import Attention, Decoder, Experts, Layer, Mlp, Recurrent
from dpo_assets.planning.shape import Kernels, Trainer
from dpo_assets.recipe import EVERY_LINEAR, LoraSection

# Slots of padded attention rows for each token of the stream, as the transformers engine gathered them when the peaks
# were measured (rows of UltraFeedback's lengths, 2.2 to 2.4).
GATHERED = 2.3
DELTA_CHUNK = 64  # Tokens between two states that a gated delta net keeps.
# Of TRL's own trainer: hidden states in fp32 with their gradients, and its own adapters' casts (peaks on an H100).
TRL_STATES = 16.0


def kept_bytes(
    layer: Layer, decoder: Decoder, kernels: Kernels, lora: LoraSection, width: int, trainer: Trainer = "packed"
) -> float:
    """Bytes a token that one layer keeps where it is not recomputed; filler of padded rows counts as tokens.

    Args:
        width: bytes of a value in the format that layers compute in.
    """
    if kernels == "fused":
        return _fused(layer, decoder, lora, width)
    if kernels == "unsloth" and not (layer.norms.after_mixer or layer.norms.after_mlp):
        return _unsloth(layer, decoder, lora, width)
    casts = width * sum(_inputs(layer, decoder.hidden, lora)) if trainer == "trl" and kernels == "transformers" else 0.0
    return _autograd(layer, decoder, kernels, lora, width, trainer) + casts


def recomputed_bytes(layer: Layer, decoder: Decoder, kernels: Kernels, width: int) -> float:
    """Bytes a token that one layer keeps where it is recomputed: its input.

    Fused layers keep what a norm behind the MLP saw besides, which spares them the last product. Unsloth moves a
    layer's input to the CPU's memory.
    """
    if kernels == "unsloth":
        return 0.0
    behind = kernels == "fused" and isinstance(layer.mlp, Mlp) and bool(layer.norms.after_mlp)
    return float(width * decoder.hidden * (1 + behind))


def working_bytes(
    layer: Layer, decoder: Decoder, kernels: Kernels, lora: LoraSection, width: int, trainer: Trainer = "packed"
) -> float:
    """Bytes a token of the gradients inside one layer while it is differentiated, its kept values apart."""
    inner = mlp_width(layer.mlp)
    sorted_rows = 0.0
    if isinstance(layer.mlp, Experts):  # Gradients of the rows sorted by expert, on both sides of them and inside.
        sorted_rows = width * layer.mlp.active * (2.0 * decoder.hidden + 3 * layer.mlp.width)
    if kernels == "fused":
        # A mixer with a state is computed again here, by autograd.
        again = _recurrent(layer.mixer, width) if isinstance(layer.mixer, Recurrent) else 0.0
        return width * (3 * inner + 5 * decoder.hidden) + sorted_rows + again
    states = TRL_STATES * decoder.hidden if trainer == "trl" else 0.0
    gradients = 3 if kernels == "unsloth" else 2
    return width * (gradients * inner + decoder.hidden) + states + sorted_rows


def mlp_width(mlp: Mlp | Experts) -> int:
    """Values between the two halves of an MLP for each token: of experts, of those that are active."""
    return mlp.width if isinstance(mlp, Mlp) else mlp.active * mlp.width + mlp.shared


def adapts(lora: LoraSection, name: str) -> bool:
    """Whether the section puts an adapter on a linear layer of this name in a decoder layer."""
    targets = lora.target_modules
    return targets == EVERY_LINEAR or any(f".{name}".endswith(f".{target}") for target in targets)


def _fused(layer: Layer, decoder: Decoder, lora: LoraSection, width: int) -> float:
    """Both blocks' inputs, raw q, k and v, the attention's output, gate and up, and x A^T of each adapter.

    Of a mixer with a state, what its first product made.
    """
    hidden, norms = decoder.hidden, layer.norms
    values: float = 2 * hidden + hidden * (bool(norms.after_mixer) + bool(norms.after_mlp))
    more = 8.0  # Two fp32 statistics of norms.
    if isinstance(layer.mixer, Attention):
        a = layer.mixer
        values += (2 + a.gated) * a.query_width + 2 * a.kv_width
        more += 4 * a.heads
    else:
        values += sum(rows for _, rows, _ in layer.mixer.projections[:-1])
    if isinstance(layer.mlp, Mlp):
        values += (1 + layer.mlp.gated) * layer.mlp.width
    else:
        more += _experts(layer.mlp, hidden, width, lora)
    return width * (values + lora.rank * len(_inputs(layer, hidden, lora))) + more


def _unsloth(layer: Layer, decoder: Decoder, lora: LoraSection, width: int) -> float:
    """Unsloth's own layers, which it has for decoders without norms after a block: both blocks' inputs, normed and not,
    q, k and v, the rotated ones, the attention's output, gate and up. The factor of `hidden` is fitted (1B, H200)."""
    hidden = decoder.hidden
    values: float = 5 * hidden + lora.rank * len(_inputs(layer, hidden, lora)) + 2 * mlp_width(layer.mlp)
    if isinstance(layer.mixer, Recurrent):
        return width * values + _recurrent(layer.mixer, width)
    a = layer.mixer
    values += (3 + bool(a.qk_norm)) * a.query_width + (2 + bool(a.qk_norm)) * a.kv_width
    return width * values


def _autograd(
    layer: Layer, decoder: Decoder, kernels: Kernels, lora: LoraSection, width: int, trainer: Trainer
) -> float:
    hidden = decoder.hidden
    norms = layer.norms
    count = sum(map(bool, (norms.before_mixer, norms.after_mixer, norms.before_mlp, norms.after_mlp)))
    inputs = _inputs(layer, hidden, lora)
    # A norm computes in fp32 from a copy that it keeps; linear layers with an adapter keep their input.
    total: float = count * 4.0 * (hidden + 1) + width * lora.rank * len(inputs)
    if any(adapts(lora, name) for name, _, _ in layer.mixer.linears(hidden)[:-1]):
        total += width * hidden
    if isinstance(layer.mixer, Attention):
        padded = kernels == "rows" or trainer == "trl"
        total += _attention(layer.mixer, width, padded=padded, spread=1.0 if padded else GATHERED)
    else:
        total += _recurrent(layer.mixer, width)
    if isinstance(layer.mlp, Experts):
        return total + _experts(layer.mlp, hidden, width, lora)
    *into, (down, _, _) = layer.mlp.linears(hidden)
    if any(adapts(lora, name) for name, _, _ in into):
        total += width * hidden
    # Gate, its activation and up are factors of products; the product is down's input.
    factors = 3 if layer.mlp.gated else 1
    return total + width * layer.mlp.width * (factors + adapts(lora, down))


def _attention(a: Attention, width: int, *, padded: bool, spread: float) -> float:
    """Rotated q and k, v and the output, `spread` slots for each token, and what is computed before and after them."""
    wide, kv = a.query_width, a.kv_width
    # With a window, rows are masked, and masked attention repeats keys and values for every head.
    repeated = wide if padded and a.window is not None else kv
    total = spread * width * (2 * wide + 2 * repeated) + 4 * a.heads * spread
    if spread > 1:
        total += width * wide  # The output again, back in the stream.
    if a.qk_norm is not None:
        total += 4 * (wide + kv)
    if len(a.projections) == 1:
        total += width * (wide + kv)  # v is a view into what the one projection made, which stays whole.
    return total + (2 * width * wide if a.gated else 0)


def _recurrent(mixer: Recurrent, width: int) -> float:
    """What autograd keeps of a mixer with a state: what its projections make, what its convolution makes in fp32."""
    made = sum(rows for _, rows, _ in mixer.projections) or 3 * mixer.inner
    # A state of each chunk, and two matrices of its tokens against one another.
    states = 4.0 * (mixer.head_dim * mixer.inner / DELTA_CHUNK + 2 * mixer.heads * DELTA_CHUNK)
    match mixer.kind:
        case "short_conv":
            return float(width * (made + 2 * mixer.inner))
        case "delta_net" | "mamba":
            return 2.0 * width * made + 4.0 * 3 * mixer.inner + states


def _experts(mlp: Experts, hidden: int, width: int, lora: LoraSection) -> float:
    """Gate and up of frozen experts (`training/engines/experts.py`).

    Of adapted ones rows sorted by expert, gate and up, activation and product, and outputs, which the router's weights
    scale.
    """
    each = 4 * mlp.width + 2 * hidden if lora.target_parameters else 2 * mlp.width
    return float(width * (mlp.active * each + 4 * mlp.shared) + 8 * mlp.count)


def _inputs(layer: Layer, hidden: int, lora: LoraSection) -> Sequence[int]:
    """Input widths of the layer's linear layers that have an adapter."""
    return [columns for name, _, columns in layer.linears(hidden) if adapts(lora, name)]
