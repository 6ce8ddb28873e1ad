"""Families whose MLP is a mixture of experts, in all layers or in some."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from dpo_assets.planning.decoder import Attention, Experts, Mlp, QkNorm
from dpo_assets.planning.families.dense import (
    GRANITE,
    LLAMA,
    MISTRAL,
    OLMO2,
    PROJECTION_NORM,
    everywhere_windowed,
    granite_attention,
    granite_scales,
)
from dpo_assets.planning.families.row import Family, attention, gated_mlp
from dpo_assets.planning.families.text import FULL, SLIDING, Text


def routed(text: Text, width: int) -> Experts:
    return Experts(int(text["num_experts"]), int(text["num_experts_per_tok"]), width, activation=text.activation())


def mixtral_experts(text: Text, number: int) -> Experts:
    return routed(text, text.width)


def gpt_oss_attention(text: Text, number: int) -> Attention:
    windowed = text.layer_type(number, full_every=2) == SLIDING
    return attention(text, window=text["sliding_window"] if windowed else None, sinks=True)


def gpt_oss_experts(text: Text, number: int) -> Experts:
    """Both halves clamped, gate times sigmoid(1.702 gate) times up + 1; gate and up take turns in their projection."""
    return replace(routed(text, text.width), activation="clamped_silu", router="router")


def qwen3_moe_attention(text: Text, number: int) -> Attention:
    """A window, where it is switched on, in every layer."""
    window = text["sliding_window"] if text["use_sliding_window"] else None
    return attention(text, window=window, qk_norm=QkNorm())


def qwen3_experts(text: Text, number: int) -> Mlp | Experts:
    """Experts in every `decoder_sparse_step`-th layer that is not named as dense."""
    dense = number in (text["mlp_only_layers"] or ()) or (number + 1) % text["decoder_sparse_step"]
    return gated_mlp(text, number) if dense or not text["num_experts"] else qwen3_5_experts(text, number)


def qwen3_5_experts(text: Text, number: int) -> Experts:
    shared = int(text.get("shared_expert_intermediate_size") or 0)
    return replace(routed(text, int(text["moe_intermediate_size"])), shared=shared)


def qwen2_moe_attention(text: Text, number: int) -> Attention:
    """Windows, where they are switched on, in every other layer below `max_window_layers`."""
    below = number < text["max_window_layers"] and text["use_sliding_window"]
    windowed = text.layer_type(number, full_every=2 if below else 1) == SLIDING
    return attention(text, window=text["sliding_window"] if windowed and text["use_sliding_window"] else None)


def olmoe_attention(text: Text, number: int) -> Attention:
    if text["clip_qkv"] is not None:
        text.beyond.append("clipped queries, keys and values")
    return attention(text, qk_norm=PROJECTION_NORM)


def granite_moe_experts(text: Text, number: int) -> Experts:
    return replace(routed(text, text.width), module="block_sparse_moe", router="router")


def deepseek_attention(text: Text, number: int) -> Attention:
    """Heads as wide as their values; queries and keys, `qk_nope_head_dim` wider than what is rotated, are beyond."""
    pairs: Literal["neighbours", "halves"] = "neighbours" if text["rope_interleave"] else "halves"
    whole = int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"])
    return attention(
        text,
        head_dim=int(text["v_head_dim"]),
        scale=whole**-0.5,
        rope=text.rope(head_dim=int(text["qk_rope_head_dim"]), pairs=pairs),
    )


def deepseek_experts(text: Text, number: int) -> Mlp | Experts:
    if number < text["first_k_dense_replace"]:
        return gated_mlp(text, number)
    width = int(text["moe_intermediate_size"])
    return replace(routed(text, width), shared=width * int(text["n_shared_experts"]), shared_module="shared_experts")


def llama4_attention(text: Text, number: int) -> Attention:
    stated = text.get("no_rope_layers")
    rotated = stated[number] if stated else (number + 1) % text["no_rope_layer_interval"] != 0
    kind = text.layer_type(number, 0, "chunked_attention" if rotated else FULL)
    if kind == "chunked_attention":
        text.beyond.append(f"attention in chunks of {text['attention_chunk_size']} tokens")
    return attention(text, rope=text.rope(pairs="neighbours") if rotated else None)


def llama4_experts(text: Text, number: int) -> Mlp | Experts:
    step, stated = text["interleave_moe_layer_step"], text.get("moe_layers")
    sparse = number in stated if stated is not None else (number + 1) % step == 0
    if not sparse:
        return Mlp(int(text["intermediate_size_mlp"]), text.activation(), module="feed_forward")
    return replace(routed(text, text.width), shared=text.width, module="feed_forward", router="router")


LOCAL = {"num_local_experts": "num_experts"}
MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2, "num_experts": 8
}  # fmt: skip
QWEN3_MOE = LLAMA | {
    "vocab_size": 151_936, "hidden_size": 2_048, "intermediate_size": 6_144, "num_hidden_layers": 24,
    "num_key_value_heads": 4, "max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4_096,
    "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
    "mlp_only_layers": None,
}  # fmt: skip

EXPERTS: dict[str, Family] = {
    "gpt_oss": Family(
        "gpt-oss",
        LLAMA
        | {
            "vocab_size": 201_088, "hidden_size": 2_880, "intermediate_size": 2_880, "num_hidden_layers": 36,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5, "sliding_window": 128, "num_experts": 128, "num_experts_per_tok": 4,
        },
        gpt_oss_attention,
        gpt_oss_experts,
        other_names=LOCAL,
    ),
    "mixtral": Family("Mixtral", MIXTRAL, everywhere_windowed, mixtral_experts, other_names=LOCAL),
    "qwen3_moe": Family("Qwen3 with experts", QWEN3_MOE, qwen3_moe_attention, qwen3_experts, other_names=LOCAL),
    "qwen2_moe": Family(
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        QWEN3_MOE
        | {
            "intermediate_size": 5_632, "num_attention_heads": 16, "num_key_value_heads": 16, "max_window_layers": 28,
            "moe_intermediate_size": 1_408, "shared_expert_intermediate_size": 5_632, "num_experts_per_tok": 4,
            "num_experts": 60,
        },
        qwen2_moe_attention,
        qwen3_experts,
        other_names=LOCAL,
    ),
    "olmoe": Family(
        "OLMoE",
        OLMO2
        | {
            "hidden_size": 2_048, "intermediate_size": 2_048, "num_hidden_layers": 16, "num_attention_heads": 16,
            "max_position_embeddings": 4_096, "clip_qkv": None, "num_experts_per_tok": 8, "num_experts": 64,
        },
        olmoe_attention,
        mixtral_experts,
        other_names=LOCAL,
    ),
    "granitemoe": Family(
        "Granite 3 with experts",
        GRANITE | {"num_experts": 8, "num_experts_per_tok": 2},
        granite_attention,
        granite_moe_experts,
        whole=granite_scales,
        other_names=LOCAL,
    ),
    "deepseek_v3": Family(
        "DeepSeek V3, R1",
        LLAMA
        | {
            "vocab_size": 129_280, "hidden_size": 7_168, "intermediate_size": 18_432, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 4_096,
            "moe_intermediate_size": 2_048, "n_shared_experts": 1, "num_experts": 256, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "rope_interleave": True,
        },
        deepseek_attention,
        deepseek_experts,
        beyond="latent queries, keys and values, experts chosen by groups",
        other_names=LOCAL | {"n_routed_experts": "num_experts"},
    ),
    "llama4_text": Family(
        "Llama 4",
        LLAMA
        | {
            "vocab_size": 202_048, "hidden_size": 5_120, "intermediate_size": 8_192, "intermediate_size_mlp": 16_384,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 1,
            "num_experts": 16, "interleave_moe_layer_step": 1, "no_rope_layer_interval": 4,
            "attention_chunk_size": 8_192,
        },
        llama4_attention,
        llama4_experts,
        beyond="norms of queries and keys without weights, queries that grow where nothing is rotated, "
        "experts whose input is weighted",
        row_by_row="the chunk that a token attends in, and its place, by which queries grow",
        other_names=LOCAL,
    ),
}  # fmt: skip
