"""Families whose norms take the mean away, with what else they have otherwise than Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.planning.decoder import Attention, Mlp, Norms
from dpo_assets.planning.families.dense import LLAMA, everywhere_windowed
from dpo_assets.planning.families.row import Family, around_zero, attention
from dpo_assets.planning.families.text import SLIDING, Text

LAYER_NORMS = "norms that take the mean away"
PARALLEL = "attention and MLP side by side"
ONE_NORM = Norms(before_mlp="")


def cohere_attention(text: Text, number: int) -> Attention:
    return attention(text, rope=text.rope(pairs="neighbours"))


def cohere2_attention(text: Text, number: int) -> Attention:
    """Layers without a window are not rotated."""
    windowed = text.layer_type(number, text["sliding_window_pattern"]) == SLIDING
    window = text["sliding_window"] if windowed else None
    return attention(text, rope=None if window is None else text.rope(pairs="neighbours"), window=window)


def cohere_whole(text: Text) -> Mapping[str, Any]:
    scale = text["logit_scale"]
    return {"logit_scale": 1.0 if scale is None else float(scale)}


def nemotron_attention(text: Text, number: int) -> Attention:
    return attention(text, rope=text.rope(partial=0.5))


def nemotron_mlp(text: Text, number: int) -> Mlp:
    return Mlp(text.width, text.activation(), projections=("up_proj",), gated=False)


def starcoder2_mlp(text: Text, number: int) -> Mlp:
    return Mlp(text.width, text.activation(), projections=("c_fc",), output="c_proj", gated=False)


def gpt2_attention(text: Text, number: int) -> Attention:
    by_layer = number + 1 if text["scale_attn_by_inverse_layer_idx"] else 1
    scale = text.head_dim**-0.5 if text["scale_attn_weights"] else 1.0
    return attention(text, scale=scale / by_layer, rope=None, module="attn", projections=("c_attn",), output="c_proj")


def gpt2_mlp(text: Text, number: int) -> Mlp:
    width = int(text["n_inner"] or 4 * text.hidden)
    return Mlp(width, text.activation("activation_function"), projections=("c_fc",), output="c_proj", gated=False)


def gpt2_whole(text: Text) -> Mapping[str, Any]:
    return {"last_norm": "ln_f"}


COHERE: dict[str, Any] = LLAMA | {
    "vocab_size": 256_000, "hidden_size": 8_192, "intermediate_size": 22_528, "num_hidden_layers": 40,
    "num_attention_heads": 64, "max_position_embeddings": 8_192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}  # fmt: skip

OTHER: dict[str, Family] = {
    "cohere": Family(
        "Command R", COHERE, cohere_attention, norms=ONE_NORM, whole=cohere_whole, eps="layer_norm_eps",
        beyond=f"{LAYER_NORMS}, {PARALLEL}",
    ),
    "cohere2": Family(
        "Command R7B, Command A", COHERE | {"sliding_window": 4_096, "sliding_window_pattern": 4}, cohere2_attention,
        norms=ONE_NORM, whole=cohere_whole, eps="layer_norm_eps", beyond=f"{LAYER_NORMS}, {PARALLEL}",
    ),
    "nemotron": Family(
        "Nemotron 3 and 4, Minitron",
        LLAMA
        | {
            "vocab_size": 256_000, "hidden_size": 6_144, "intermediate_size": 24_576, "num_attention_heads": 48,
            "hidden_act": "relu2", "max_position_embeddings": 4_096, "norm_eps": 1e-5,
        },
        nemotron_attention,
        nemotron_mlp,
        whole=around_zero,
        eps="norm_eps",
        beyond=LAYER_NORMS,
        row_by_row="where rows begin, which its layers do not hand on to their attention",
    ),
    "starcoder2": Family(
        "StarCoder2",
        LLAMA
        | {
            "vocab_size": 49_152, "hidden_size": 3_072, "intermediate_size": 12_288, "num_hidden_layers": 30,
            "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4_096, "norm_epsilon": 1e-5, "sliding_window": None,
            "tie_word_embeddings": True,
        },
        everywhere_windowed,
        starcoder2_mlp,
        eps="norm_epsilon",
        beyond=LAYER_NORMS,
    ),
    "gpt2": Family(
        "GPT-2",
        {
            "vocab_size": 50_257, "max_position_embeddings": 1_024, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "n_inner": None, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
        },
        gpt2_attention,
        gpt2_mlp,
        Norms("ln_1", before_mlp="ln_2"),
        gpt2_whole,
        eps="layer_norm_epsilon",
        beyond=f"{LAYER_NORMS}, learnt positions, linear layers stored the other way round",
        other_names={
            "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
    ),
}  # fmt: skip
