"""Families with attention and a gated MLP in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.planning.decoder import Attention, Norms, QkNorm, QueryGrowth
from dpo_assets.planning.families.row import AFTER, Family, attention, fused_mlp
from dpo_assets.planning.families.text import SLIDING, Text

PROJECTION_NORM = QkNorm("projection")


def everywhere_windowed(text: Text, number: int) -> Attention:
    """A window, where there is one, in every layer."""
    return attention(text, window=text["sliding_window"])


def ministral_attention(text: Text, number: int) -> Attention:
    """A window in every layer, unless layer types say where."""
    windowed = text.layer_type(number, full_every=0) == SLIDING
    return attention(text, window=text["sliding_window"] if windowed else None)


def ministral3_attention(text: Text, number: int) -> Attention:
    rope = text.rope_parameters()
    beta = rope.get("llama_4_scaling_beta")
    length = rope.get("original_max_position_embeddings") or text["max_position_embeddings"]
    growth = QueryGrowth(float(beta), int(length)) if beta else None
    return attention(text, window=text["sliding_window"], query_growth=growth)


def qwen2_window(text: Text, number: int) -> int | None:
    """Windows from layer `max_window_layers` on, where they are switched on at all."""
    if not text["use_sliding_window"]:
        return None
    stated = text.get("layer_types")
    windowed = stated[number] == SLIDING if stated else number >= text["max_window_layers"]
    return text["sliding_window"] if windowed else None


def qwen2_attention(text: Text, number: int) -> Attention:
    return attention(text, window=qwen2_window(text, number))


def qwen3_attention(text: Text, number: int) -> Attention:
    return attention(text, window=qwen2_window(text, number), qk_norm=QkNorm())


def phi3_attention(text: Text, number: int) -> Attention:
    rope = text.rope(partial=1.0)
    return attention(text, rope=rope, window=text["sliding_window"], projections=("qkv_proj",))


def smollm3_attention(text: Text, number: int) -> Attention:
    """No rotation in every fourth layer; a window, where it is switched on, in the same."""
    interval = text["no_rope_layer_interval"]
    stated = text.get("no_rope_layers")
    rotated = stated[number] if stated is not None else (number + 1) % interval != 0
    kinds = text.get("layer_types")
    windowed = text["use_sliding_window"] and (kinds[number] == SLIDING if kinds else not rotated)
    return attention(text, rope=text.rope() if rotated else None, window=text["sliding_window"] if windowed else None)


def granite_attention(text: Text, number: int) -> Attention:
    return attention(text, scale=float(text["attention_multiplier"]))


def granite_scales(text: Text) -> Mapping[str, Any]:
    return {
        "embedding_scale": float(text["embedding_multiplier"]),
        "residual_scale": float(text["residual_multiplier"]),
        "logit_scale": 1 / float(text["logits_scaling"]),
    }


def olmo2_attention(text: Text, number: int) -> Attention:
    return attention(text, qk_norm=PROJECTION_NORM)


def olmo3_attention(text: Text, number: int) -> Attention:
    kind = text.layer_type(number, full_every=4)
    window = text["sliding_window"] if kind == SLIDING else None
    return attention(text, rope=text.rope(table=kind), window=window, qk_norm=PROJECTION_NORM)


def glm4_attention(text: Text, number: int) -> Attention:
    return attention(text, rope=text.rope(pairs="neighbours", partial=0.5))


def hunyuan_attention(text: Text, number: int) -> Attention:
    norm = QkNorm(after_rotation=True, names=("query_layernorm", "key_layernorm"))
    return attention(text, qk_norm=norm)


def ernie_attention(text: Text, number: int) -> Attention:
    return attention(text, rope=text.rope(pairs="neighbours"))


def exaone4_attention(text: Text, number: int) -> Attention:
    """Where some layers have a window, those without one are not rotated."""
    window = text["sliding_window"]
    windowed = window is not None and text.layer_type(number, text["sliding_window_pattern"]) == SLIDING
    rope = text.rope() if window is None or windowed else None
    return attention(text, rope=rope, window=window if windowed else None, qk_norm=QkNorm())


LLAMA: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2_048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL = LLAMA | {
    "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4_096
}  # fmt: skip
QWEN2 = LLAMA | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "max_position_embeddings": 32_768,
    "use_sliding_window": False, "sliding_window": 4_096, "max_window_layers": 28,
}  # fmt: skip
OLMO2 = LLAMA | {"vocab_size": 50_304, "rms_norm_eps": 1e-5}
GRANITE = LLAMA | {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0
}  # fmt: skip
GLM = LLAMA | {
    "vocab_size": 151_552, "intermediate_size": 13_696, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "head_dim": 128, "max_position_embeddings": 131_072, "rms_norm_eps": 1.5625e-7,
}  # fmt: skip

DENSE: dict[str, Family] = {
    "llama": Family("Llama 2 and 3, SmolLM2", LLAMA),
    "mistral": Family("Mistral 7B, Nemo, Small", MISTRAL, everywhere_windowed, usual={"sliding_window": None}),
    "ministral": Family("Ministral 8B (2410)", MISTRAL, ministral_attention),
    "ministral3": Family(
        "Ministral 3",
        MISTRAL
        | {
            "vocab_size": 131_072, "num_hidden_layers": 34, "head_dim": 128, "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5, "sliding_window": None,
            "rope_parameters": {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16_384},
        },
        ministral3_attention,
    ),
    "qwen2": Family("Qwen2, Qwen2.5", QWEN2, qwen2_attention),
    "qwen3": Family("Qwen3", QWEN2 | {"head_dim": 128}, qwen3_attention),
    "phi3": Family(
        "Phi-3, Phi-4",
        LLAMA
        | {
            "vocab_size": 32_064, "hidden_size": 3_072, "intermediate_size": 8_192, "max_position_embeddings": 4_096,
            "original_max_position_embeddings": 4_096, "rms_norm_eps": 1e-5, "sliding_window": None,
        },
        phi3_attention,
        fused_mlp,
        usual={"max_position_embeddings": 131_072, "rope_scaling": {"type": "longrope"}},
    ),
    "smollm3": Family(
        "SmolLM3",
        LLAMA
        | {
            "vocab_size": 128_256, "hidden_size": 2_048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "max_position_embeddings": 32_768, "use_sliding_window": False,
            "sliding_window": None, "no_rope_layer_interval": 4, "tie_word_embeddings": True,
        },
        smollm3_attention,
    ),
    "granite": Family("Granite 3", GRANITE, granite_attention, whole=granite_scales),
    "olmo2": Family("OLMo 2", OLMO2, olmo2_attention, norms=AFTER),
    "olmo3": Family("OLMo 3", OLMO2 | {"sliding_window": 4_096}, olmo3_attention, norms=AFTER),
    "glm": Family("GLM-4-9B, GLM-Edge", GLM, glm4_attention, fused_mlp),
    "glm4": Family(
        "GLM-4-0414",
        GLM,
        glm4_attention,
        fused_mlp,
        Norms(after_mixer="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    ),
    "seed_oss": Family(
        "Seed-OSS",
        LLAMA
        | {
            "vocab_size": 155_136, "intermediate_size": 27_648, "num_hidden_layers": 64, "num_attention_heads": 80,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524_288,
        },
    ),
    "hunyuan_v1_dense": Family(
        "Hunyuan dense", LLAMA | {"vocab_size": 290_943, "rms_norm_eps": 1e-5}, hunyuan_attention
    ),
    "ernie4_5": Family(
        "ERNIE 4.5",
        LLAMA
        | {
            "vocab_size": 103_424, "hidden_size": 1_024, "intermediate_size": 3_072, "num_hidden_layers": 18,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        },
        ernie_attention,
    ),
    "exaone4": Family(
        "EXAONE 4",
        LLAMA
        | {
            "vocab_size": 102_400, "intermediate_size": 16_384, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
            "sliding_window": 4_096, "sliding_window_pattern": 4,
        },
        exaone4_attention,
        norms=AFTER,
    ),
}  # fmt: skip
