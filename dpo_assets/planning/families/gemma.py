"""Gemma: norms kept around zero, embeddings times the root of the width, windows between layers that see everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.planning.decoder import Attention, Mlp, QkNorm
from dpo_assets.planning.families.dense import LLAMA
from dpo_assets.planning.families.row import AROUND, Family, attention
from dpo_assets.planning.families.text import FULL, SLIDING, Text


def gemma_whole(text: Text) -> Mapping[str, Any]:
    if text.get("use_bidirectional_attention"):
        text.beyond.append("attention to what follows")
    return {
        "norm_offset": 1.0,
        "embedding_scale": text.hidden**0.5,
        "logit_softcap": text.get("final_logit_softcapping"),
    }


def gemma_mlp(text: Text, number: int) -> Mlp:
    return Mlp(text.width, text.activation("hidden_activation"))


def gemma2_attention(text: Text, number: int) -> Attention:
    windowed = text.layer_type(number, full_every=2) == SLIDING
    return attention(
        text,
        scale=text["query_pre_attn_scalar"] ** -0.5,
        window=text["sliding_window"] if windowed else None,
        softcap=text["attn_logit_softcapping"],
    )


def gemma3_attention(text: Text, number: int) -> Attention:
    """Its `attn_logit_softcapping` is read by the configuration class alone: no attention applies it."""
    kind = text.layer_type(number, text["sliding_window_pattern"])
    return attention(
        text,
        scale=text["query_pre_attn_scalar"] ** -0.5,
        rope=text.rope(table=kind),
        window=text["sliding_window"] if kind == SLIDING else None,
        qk_norm=QkNorm(),
    )


def gemma4_kind(text: Text, number: int) -> str:
    """The last layer always sees everything."""
    return FULL if number == text.layers - 1 else text.layer_type(number, full_every=6)


def gemma4_attention(text: Text, number: int) -> Attention:
    kind = gemma4_kind(text, number)
    own = _own_settings(text, number, kind)
    head_dim = int(own.get("head_dim") or text.head_dim)
    return attention(
        text,
        kv_heads=int(own.get("num_key_value_heads") or text.kv_heads),
        head_dim=head_dim,
        scale=1.0,
        # "Proportional" tables are as wide as the head, with a frequency of zero where it is not rotated.
        rope=text.rope(head_dim=head_dim, table=kind),
        window=text["sliding_window"] if kind == SLIDING else None,
        qk_norm=QkNorm(),
    )


def _own_settings(text: Text, number: int, kind: str) -> Mapping[str, Any]:
    """What a layer has otherwise than the others, as Transformers 5 writes it down or as earlier checkpoints do."""
    by_layer: Mapping[str, Any] | None = text.get("per_layer_config")
    if by_layer is not None:
        return next((own for layer, own in by_layer.items() if int(layer) == number), {})
    if kind != FULL:
        return {}
    heads = text.get("num_global_key_value_heads") if text["attention_k_eq_v"] else None
    return {"head_dim": text["global_head_dim"], "num_key_value_heads": heads}


def gemma4_mlp(text: Text, number: int) -> Mlp:
    shares = number >= text.layers - text["num_kv_shared_layers"] > 0
    wide = 2 if text["use_double_wide_mlp"] and shares else 1
    return Mlp(wide * text.width, text.activation("hidden_activation"))


def gemma4_whole(text: Text) -> Mapping[str, Any]:
    more = {
        "num_kv_shared_layers": "keys and values of other layers",
        "attention_k_eq_v": "keys as values",
        "hidden_size_per_layer_input": "embeddings for each layer",
        "enable_moe_block": "experts beside the MLP",
    }
    text.beyond.extend(words for key, words in more.items() if text[key])
    return {**gemma_whole(text), "norm_offset": 0.0}


GEMMA: dict[str, Any] = LLAMA | {
    "vocab_size": 256_000, "hidden_size": 2_304, "intermediate_size": 9_216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8_192, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = GEMMA | {"query_pre_attn_scalar": 256, "sliding_window": 4_096}

GEMMAS: dict[str, Family] = {
    "gemma": Family(
        "Gemma",
        GEMMA
        | {
            "hidden_size": 3_072, "intermediate_size": 24_576, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh",
        },
        whole=gemma_whole,
    ),
    "gemma2": Family(
        "Gemma 2",
        GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        gemma2_attention,
        gemma_mlp,
        AROUND,
        gemma_whole,
    ),
    "gemma3_text": Family(
        "Gemma 3",
        GEMMA2 | {"vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6},
        gemma3_attention,
        gemma_mlp,
        AROUND,
        gemma_whole,
        other_names={"_sliding_window_pattern": "sliding_window_pattern"},
    ),
    "gemma4_text": Family(
        "Gemma 4",
        GEMMA
        | {
            "vocab_size": 262_144, "num_hidden_layers": 30, "max_position_embeddings": 131_072, "sliding_window": 512,
            "global_head_dim": 512, "num_kv_shared_layers": 0, "attention_k_eq_v": False,
            "hidden_size_per_layer_input": 256, "enable_moe_block": False, "use_double_wide_mlp": False,
        },
        gemma4_attention,
        gemma4_mlp,
        AROUND,
        gemma4_whole,
        beyond="normed values, a scalar for each layer",
        usual={"num_kv_shared_layers": 10},
    ),
}  # fmt: skip
