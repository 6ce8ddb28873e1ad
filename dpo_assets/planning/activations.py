"""What a decoder layer keeps of a token for its backward pass, and what that pass works with besides. In bytes.

Fused layers keep what `training/engines/fused/layer.py` saves. All other engines run modules that autograd
differentiates, and keep what PyTorch's formulas of these operations need. Tests count that on tiny models: of 17 dense
families and of PyTorch's delta nets within 10 %, of experts, short convolutions and Falcon-H1 within a factor of two;
nothing counts other families, or what flash-linear-attention keeps. How much the backward pass of one such layer works
with is fitted to peaks on an H100 and an H200.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpo_assets.planning.decoder import Attention, Decoder, Experts, Layer, Mlp, Recurrent
from dpo_assets.planning.engines import UNSLOTH_FAMILIES
from dpo_assets.planning.shape import Kernels, Trainer
from dpo_assets.recipe import EVERY_LINEAR, LoraSection

# Slots of padded attention rows for each token of the stream, as the transformers engine gathered them when the peaks
# were measured (rows of UltraFeedback's lengths, 2.2 to 2.4).
GATHERED = 2.3
REPEATED = 1.2  # Of that, prompts that stand before both of their answers; delta nets compute them once.
DELTA_CHUNK = 64  # Tokens between two states that a gated delta net keeps.
# Of TRL's own trainer: hidden states in fp32 with their gradients, and its own adapters' casts (peaks on an H100).
TRL_STATES = 16.0


def kept_bytes(
    layer: Layer, decoder: Decoder, kernels: Kernels, lora: LoraSection, width: int, trainer: Trainer = "packed",
    *, fla: bool = False,
) -> float:  # fmt: skip
    """Bytes a token that one layer keeps where it is not recomputed; filler of padded rows counts as tokens.

    Args:
        width: bytes of a value in the format that layers compute in.
        fla: whether gated delta nets are computed by flash-linear-attention.
    """
    if kernels == "fused":
        return _fused(layer, decoder, lora, width)
    written = decoder.family in UNSLOTH_FAMILIES and not (layer.norms.after_mixer or layer.norms.after_mlp)
    if kernels == "unsloth" and written:
        return _unsloth(layer, decoder, lora, width)
    casts = width * sum(_inputs(layer, decoder.hidden, lora)) if trainer == "trl" and kernels == "transformers" else 0.0
    return _autograd(layer, decoder, kernels, lora, width, trainer, fla=fla) + casts


def made_bytes(layer: Layer, decoder: Decoder, lora: LoraSection, width: int) -> float:
    """Bytes of the experts' weights that PEFT makes in a layer, whatever a forward holds.

    W + scale B A of each adapted parameter, for all experts: the backward pass of the grouped products reads it
    (`ParamWrapper` of PEFT 0.21).
    """
    if not isinstance(layer.mlp, Experts):
        return 0.0
    parts = {"gate_up_proj": 2, "down_proj": 1}
    adapted = sum(part for name, part in parts.items() if any(t.endswith(name) for t in lora.target_parameters))
    return float(width * adapted * layer.mlp.count * layer.mlp.width * decoder.hidden)


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
    layer: Layer, decoder: Decoder, kernels: Kernels, lora: LoraSection, width: int, trainer: Trainer = "packed",
    *, fla: bool = False,
) -> float:  # fmt: skip
    """Bytes a token of the gradients inside one layer while it is differentiated, its kept values apart."""
    inner = mlp_width(layer.mlp)
    scans = _scan(layer, kernels, trainer)
    sorted_rows = 0.0
    if isinstance(layer.mlp, Experts):  # Gradients of the rows sorted by expert, on both sides of them and inside.
        sorted_rows = width * layer.mlp.active * (2.0 * decoder.hidden + 3 * layer.mlp.width)
    if kernels == "fused":
        # A mixer with a state is computed again here, by autograd.
        again = _recurrents(layer, width, kernels, trainer, fla=fla)
        return width * (3 * inner + 5 * decoder.hidden) + sorted_rows + again + scans
    states = TRL_STATES * decoder.hidden if trainer == "trl" else 0.0
    gradients = 3 if kernels == "unsloth" else 2
    return width * (gradients * inner + decoder.hidden) + states + sorted_rows + scans


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
    """Layers that Unsloth wrote itself: both blocks' inputs, normed and not, q, k and v, the rotated ones, the
    attention's output, gate and up. The factor of `hidden` is fitted (1B, H200). Of other families it compiles the
    model's own blocks."""
    hidden = decoder.hidden
    values: float = 5 * hidden + lora.rank * len(_inputs(layer, hidden, lora)) + 2 * mlp_width(layer.mlp)
    if isinstance(layer.mixer, Recurrent):
        return width * values + _recurrent(layer.mixer, width, 1.0, fla=False)
    a = layer.mixer
    values += (3 + bool(a.qk_norm)) * a.query_width + (2 + bool(a.qk_norm)) * a.kv_width
    return width * values


def _autograd(
    layer: Layer, decoder: Decoder, kernels: Kernels, lora: LoraSection, width: int, trainer: Trainer, *, fla: bool
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
        padded = _padded(kernels, trainer)
        total += _attention(layer.mixer, width, padded=padded, spread=1.0 if padded else GATHERED)
    total += _recurrents(layer, width, kernels, trainer, fla=fla)
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


def _padded(kernels: Kernels, trainer: Trainer) -> bool:
    """Whether an engine computes padded rows, so that filler is counted among its tokens."""
    return kernels == "rows" or trainer == "trl"


def _recurrents(layer: Layer, width: int, kernels: Kernels, trainer: Trainer, *, fla: bool) -> float:
    """What autograd keeps of all of a layer's mixers with a state."""
    return sum(_recurrent(mixer, width, _spread(mixer, kernels, trainer), fla=fla) for mixer in layer.recurrents)


def _spread(mixer: Recurrent, kernels: Kernels, trainer: Trainer) -> float:
    """Slots of the padded rows that PyTorch's form of a mixer computes, for each token of the stream."""
    if _padded(kernels, trainer):
        return 1.0
    return GATHERED if mixer.kind == "mamba" else GATHERED / REPEATED


def _recurrent(mixer: Recurrent, width: int, spread: float, *, fla: bool) -> float:
    """What autograd keeps of a mixer with a state: what its projections make, what its convolution makes in fp32, and
    what its scan computes from these, of which flash-linear-attention's delta rule computes most again."""
    made = float(sum(rows for _, rows, _ in mixer.projections) or 3 * mixer.inner)
    match mixer.kind:
        case "short_conv":
            return width * (made + 2 * mixer.inner)
        case "delta_net":
            # A state of each chunk, and matrices of its tokens against one another.
            state, square = mixer.head_dim * mixer.inner / DELTA_CHUNK, mixer.heads * DELTA_CHUNK
            if fla:
                return 2.0 * width * made + 4.0 * (3 * mixer.inner + state + 2 * square)
            # Keys and queries as they come, normed, written, decayed, and again chunk by chunk; values as they come,
            # solved, corrected; products with and without decay (Transformers' `torch_chunk_gated_delta_rule`, counted
            # on heads of 8 to 128).
            scan = 15 * mixer.inner + state + 5 * square
            return 2.0 * width * made + 4.0 * (2 * mixer.inner + spread * scan)
        case "mamba":
            # Values three times, keys and queries of every head, decayed keys; decay, products and both together.
            each = mixer.heads * mixer.state
            states = 3 * mixer.inner * mixer.state / max(1, mixer.chunk)
            scan = 3 * mixer.inner + 3 * each + 3 * mixer.heads * mixer.chunk + states
            return 2.0 * width * made * spread + 4.0 * spread * scan


def _scan(layer: Layer, kernels: Kernels, trainer: Trainer) -> float:
    """What PyTorch's form of Mamba-2 works with: keys times queries of a chunk's tokens, before they are summed over
    the state; or values times keys, where a head is wider than a chunk is long."""
    return max(
        (
            4.0 * _spread(mixer, kernels, trainer) * mixer.heads * mixer.state * max(mixer.chunk, mixer.head_dim)
            for mixer in layer.recurrents
            if mixer.kind == "mamba"
        ),
        default=0.0,
    )


def _experts(mlp: Experts, hidden: int, width: int, lora: LoraSection) -> float:
    """Gate and up of frozen experts (`training/models/experts.py`).

    Of adapted ones rows sorted by expert, gate and up, activation and product, and outputs, which the router's weights
    scale.
    """
    each = 4 * mlp.width + 2 * hidden if lora.target_parameters else 2 * mlp.width
    return float(width * (mlp.active * each + 4 * mlp.shared) + 8 * mlp.count)


def _inputs(layer: Layer, hidden: int, lora: LoraSection) -> Sequence[int]:
    """Input widths of the layer's linear layers that have an adapter."""
    return [columns for name, _, columns in layer.linears(hidden) if adapts(lora, name)]
