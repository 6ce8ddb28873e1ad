"""Which engines compute a decoder, and why another cannot: what the planner, the engines and the support page ask.

An engine is asked for a description, never for a name of a family. The exception is Unsloth, whose own layers are
written family by family. `rows` computes every causal language model: it is the model's own forward.
"""

from __future__ import annotations

from typing import get_args

from dpo_assets.planning.decoder import Activation, Decoder, Mlp, Recurrent
from dpo_assets.planning.precision import Precision
from dpo_assets.planning.shape import Kernels
from dpo_assets.recipe import ALL_LINEAR, LoraSection

KERNELS: tuple[Kernels, ...] = get_args(Kernels)
FUSED_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
# Families whose forward in Unsloth 2026.10.9 takes a table of shared prefixes.
UNSLOTH_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "cohere", "granite")


def why_not(
    kernels: Kernels,
    decoder: Decoder | None,
    max_length: int | None = None,
    lora: LoraSection | None = None,
    precision: Precision | None = None,
) -> str:
    """Why an engine does not compute packed batches of a decoder exactly; empty where it does.

    Args:
        decoder: None where nothing describes the model.
        max_length: tokens of the longest row; None: of any length.
        lora: the resolved section, where adapters count.
        precision: what the base is held in, where that counts.
    """
    match kernels:
        case "fused":
            return why_not_fused(decoder, max_length)
        case "unsloth":
            return why_not_unsloth(decoder, max_length, lora, precision)
        case "transformers":
            return why_not_transformers(decoder, max_length)
        case "rows":
            return ""


def why_not_fused(decoder: Decoder | None, max_length: int | None = None) -> str:
    """Why fused layers do not compute a decoder.

    They compute everything that a description has words for, but Mamba, short convolutions and MLPs without a gate.
    Experts run as Transformers' modules within them, differentiated by autograd, adapters included.
    """
    if decoder is None:
        return "nothing describes what this architecture computes"
    if decoder.beyond:
        return f"they have no words for {decoder.beyond}"
    for mixer in decoder.mixers:
        if isinstance(mixer, Recurrent) and mixer.kind != "delta_net":
            return f"they have no form of its {mixer.kind.replace('_', ' ')} layers"
    for mlp in {layer.mlp for layer in decoder.layers}:
        if isinstance(mlp, Mlp) and not mlp.gated:
            return "its MLP has no gate"
        if isinstance(mlp, Mlp) and mlp.activation not in FUSED_ACTIVATIONS:
            return f"they have no MLP with the activation {mlp.activation}"
    return _why_not_one_stream(decoder, max_length)


def why_not_transformers(decoder: Decoder | None, max_length: int | None = None) -> str:
    """Why Transformers' layers do not compute a decoder's packed batches.

    They compute what positions, windows, soft caps and sinks determine, and recurrent mixers. A model that nothing
    describes is tried: before training, the worker compares its packed scores with those of its own forward.
    """
    if decoder is None:
        return ""
    if decoder.row_by_row:
        return f"a packed stream does not tell it {decoder.row_by_row}"
    return _why_not_one_stream(decoder, max_length)


def why_not_unsloth(
    decoder: Decoder | None,
    max_length: int | None = None,
    lora: LoraSection | None = None,
    precision: Precision | None = None,
) -> str:
    """Why Unsloth's forward with a table of shared prefixes does not compute a decoder (`engines.unsloth.engine`)."""
    if decoder is None:
        return "nothing describes what this architecture computes"
    if decoder.family not in UNSLOTH_FAMILIES:
        return f"its shared-prefix forward knows {', '.join(UNSLOTH_FAMILIES)} alone"
    if any(attention.softcap for attention in decoder.attentions):
        return "its shared-prefix attention leaves soft caps out"
    if short := _short_window(decoder, max_length):
        return f"its shared-prefix attention leaves windows out, and one of {short} tokens is shorter than a row"
    if lora is not None and (other := beyond_unsloth(lora)):
        return f"it adapts {', '.join(ALL_LINEAR)} alone, and lora names {', '.join(other)}"
    if precision == "8bit":
        return "8-bit models are not on its own forward"
    return _why_not_one_stream(decoder, max_length)


def beyond_unsloth(lora: LoraSection) -> list[str]:
    """Targets that Unsloth's own adapter code does not know."""
    named = [] if isinstance(lora.target_modules, str) else lora.target_modules
    return [name for name in named if name not in ALL_LINEAR] + lora.target_parameters


def _short_window(decoder: Decoder, max_length: int | None) -> int | None:
    """The shortest window that some row does not fit into."""
    shortest = min(decoder.windows, default=None)
    return shortest if shortest and (max_length is None or shortest < max_length) else None


def _why_not_one_stream(decoder: Decoder, max_length: int | None) -> str:
    """Rows of one forward share its rotary tables."""
    fixed = min((a.rope.fixed_up_to for a in decoder.attentions if a.rope and a.rope.fixed_up_to), default=None)
    if fixed is None or (max_length is not None and max_length <= fixed):
        return ""
    return f"beyond {fixed:,} tokens its rotary tables are those of the longest row of a forward"
