"""Families with layers that carry a state along the row: gated delta nets, short convolutions, Mamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.planning.decoder import Attention, Experts, Linear, Mlp, Norms, QkNorm, Recurrent
from dpo_assets.planning.families.dense import GRANITE, LLAMA, granite_scales
from dpo_assets.planning.families.experts import LOCAL, qwen3_5_experts, qwen3_experts
from dpo_assets.planning.families.row import Family, around_zero, attention
from dpo_assets.planning.families.text import FULL, RECURRENT, Text


def qwen3_5_mixer(text: Text, number: int) -> Attention | Recurrent:
    if not _is_full(text, number):
        keys, values, heads = _delta_net(text)
        projections: tuple[Linear, ...] = (
            ("in_proj_qkv", 2 * keys + values, text.hidden),
            ("in_proj_z", values, text.hidden),
            ("in_proj_b", heads, text.hidden),
            ("in_proj_a", heads, text.hidden),
            ("out_proj", text.hidden, values),
        )
        return Recurrent("delta_net", "linear_attn", values, projections, heads, values // heads)
    return _gated_attention(text, axes=3)


def qwen3_next_mixer(text: Text, number: int) -> Attention | Recurrent:
    if not _is_full(text, number):
        keys, values, heads = _delta_net(text)
        projections: tuple[Linear, ...] = (
            ("in_proj_qkvz", 2 * keys + 2 * values, text.hidden),
            ("in_proj_ba", 2 * heads, text.hidden),
            ("out_proj", text.hidden, values),
        )
        return Recurrent("delta_net", "linear_attn", values, projections, heads, values // heads)
    return _gated_attention(text, axes=1)


def _is_full(text: Text, number: int) -> bool:
    return text.layer_type(number, text["full_attention_interval"], RECURRENT) == FULL


def _delta_net(text: Text) -> tuple[int, int, int]:
    """(width of all keys, width of all values, heads of values)."""
    heads = int(text["linear_num_value_heads"])
    keys = int(text["linear_num_key_heads"]) * int(text["linear_key_head_dim"])
    return keys, heads * int(text["linear_value_head_dim"]), heads


def _gated_attention(text: Text, axes: int) -> Attention:
    return attention(text, rope=text.rope(partial=0.25, axes=axes), qk_norm=QkNorm(), gated=True)


def lfm2_mixer(text: Text, number: int) -> Attention | Recurrent:
    """Full attention everywhere, unless layer types or `full_attn_idxs` say where."""
    where = text.get("full_attn_idxs")
    full = where is None or number in where
    if text.layer_type(number, 0, FULL if full else RECURRENT) == FULL:
        return attention(text, output="out_proj", qk_norm=QkNorm(names=("q_layernorm", "k_layernorm")))
    width = text.hidden
    projections = (("in_proj", 3 * width, width), ("out_proj", width, width))
    return Recurrent("short_conv", "conv", width, projections)


def lfm2_mlp(text: Text, number: int) -> Mlp:
    """Two thirds of the stated width, times a factor, rounded up: so is the parameter count of a plain MLP kept."""
    width = text.width
    if text["block_auto_adjust_ff_dim"]:
        width = int(2 * width / 3)
        if (factor := text["block_ffn_dim_multiplier"]) is not None:
            multiple = int(text["block_multiple_of"])
            width = -(-int(factor * width) // multiple) * multiple
    return Mlp(width, module="feed_forward", projections=("w1", "w3"), output="w2")


def lfm2_whole(text: Text) -> Mapping[str, Any]:
    return {"last_norm": "embedding_norm"}


def _mamba(text: Text, inner: int) -> Recurrent:
    heads = int(text["mamba_n_heads"])
    convolved = inner + 2 * int(text["mamba_n_groups"]) * int(text["mamba_d_state"])
    projections = (("in_proj", inner + convolved + heads, text.hidden), ("out_proj", text.hidden, inner))
    state, chunk = int(text["mamba_d_state"]), int(text["mamba_chunk_size"])
    return Recurrent("mamba", "mamba", inner, projections, heads, inner // heads, state, chunk)


def granite_mixer(text: Text, number: int) -> Attention | Recurrent:
    """No rotation, unless `position_embedding_type` is rope."""
    if text.layer_type(number, 0, RECURRENT) == RECURRENT:
        return _mamba(text, int(text["mamba_expand"] * text.hidden))
    rope = text.rope() if text["position_embedding_type"] == "rope" else None
    return attention(text, scale=float(text["attention_multiplier"]), rope=rope)


def granite_experts(text: Text, number: int) -> Mlp | Experts:
    shared, count = int(text["shared_intermediate_size"]), int(text["num_experts"] or 0)
    if not count:
        return Mlp(
            shared, text.activation(), module="shared_mlp", projections=("input_linear",), output="output_linear"
        )
    text.beyond.append("an MLP beside the experts")
    active, activation = int(text["num_experts_per_tok"]), text.activation()
    return Experts(count, active, text.width, shared, "block_sparse_moe", activation, "router", "shared_mlp")


def falcon_h1_mamba(text: Text, number: int) -> Recurrent:
    return _mamba(text, int(text["mamba_d_ssm"] or text["mamba_expand"] * text.hidden))


def falcon_h1_mlp(text: Text, number: int) -> Mlp:
    return Mlp(text.width, text.activation(), module="feed_forward")


def falcon_h1_whole(text: Text) -> Mapping[str, Any]:
    return {
        "embedding_scale": float(text["embedding_multiplier"]),
        "logit_scale": float(text["lm_head_multiplier"]),
        "last_norm": "final_layernorm",
    }


QWEN3_5: dict[str, Any] = LLAMA | {
    "vocab_size": 248_320, "intermediate_size": 12_288, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "max_position_embeddings": 32_768, "full_attention_interval": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
SPARSE = {
    "hidden_size": 2_048, "num_key_value_heads": 2, "decoder_sparse_step": 1, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "mlp_only_layers": None,
}  # fmt: skip

HYBRID: dict[str, Family] = {
    "qwen3_5_text": Family("Qwen3.5, 3.6, 3.8", QWEN3_5, qwen3_5_mixer, whole=around_zero),
    "qwen3_5_moe_text": Family(
        "Qwen3.5 with experts",
        QWEN3_5 | SPARSE | {"num_hidden_layers": 40, "num_experts_per_tok": 8, "num_experts": 256},
        qwen3_5_mixer,
        qwen3_5_experts,
        whole=around_zero,
        other_names=LOCAL,
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        QWEN3_5
        | SPARSE
        | {
            "vocab_size": 151_936, "intermediate_size": 5_632, "num_hidden_layers": 48, "num_experts_per_tok": 10,
            "num_experts": 512,
        },
        qwen3_next_mixer,
        qwen3_experts,
        whole=around_zero,
        other_names=LOCAL,
    ),
    "lfm2": Family(
        "LFM2",
        LLAMA
        | {
            "vocab_size": 65_536, "hidden_size": 2_560, "intermediate_size": 12_288, "num_key_value_heads": 8,
            "max_position_embeddings": 128_000, "norm_eps": 1e-5, "tie_word_embeddings": True,
            "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
        },
        lfm2_mixer,
        lfm2_mlp,
        Norms("operator_norm", before_mlp="ffn_norm"),
        lfm2_whole,
        eps="norm_eps",
        usual={"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16},
        other_names={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
    ),
    "granitemoehybrid": Family(
        "Granite 4",
        GRANITE
        | {
            "num_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1_024,
            "position_embedding_type": None, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256,
            "mamba_expand": 2, "mamba_chunk_size": 256,
        },
        granite_mixer,
        granite_experts,
        whole=granite_scales,
        usual={"num_local_experts": 0, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
        other_names=LOCAL | {"layers_block_type": "layer_types"},
    ),
    "falcon_h1": Family(
        "Falcon-H1",
        LLAMA
        | {
            "vocab_size": 128_000, "intermediate_size": 14_336, "num_key_value_heads": 8,
            "max_position_embeddings": 8_192, "rms_norm_eps": 1e-5, "embedding_multiplier": 1.0,
            "lm_head_multiplier": 1.0, "mamba_d_ssm": 1_024, "mamba_expand": 2, "mamba_n_heads": 128,
            "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_chunk_size": 256,
        },
        mlp=falcon_h1_mlp,
        norms=Norms(before_mlp="pre_ff_layernorm"),
        whole=falcon_h1_whole,
        beside=falcon_h1_mamba,
        beyond="attention and Mamba side by side, multipliers within them",
    ),
}  # fmt: skip
