"""Model shapes: published configurations that are filled with random weights. Pure Python: the coordinator imports it.

A shape is a model type of Transformers and the arguments of its configuration class, as the published config.json has
them. Only the vocabulary's special tokens differ, because all shapes share one small tokenizer. What a training step of
a shape computes is read off the model itself (`arithmetic`), so nothing here has to know families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

LORA_RANK = 16
TINY, SMALL = "tiny", "small"
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_TARGETS = LLAMA_TARGETS[:4]
FUSED_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
DELTA_NET_TARGETS = (*LLAMA_TARGETS, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Shape:
    """A configuration of Transformers, and where LoRA goes.

    Attributes:
        gib: bf16 weights, for whoever has to place them before they exist.
        targets: names of the linear layers that get an adapter, in every arm.
        published_layers: where fewer layers are built than the published model has, how many that has.
    """

    model_type: str
    gib: float
    arguments: Mapping[str, Any]
    targets: tuple[str, ...] = LLAMA_TARGETS
    published_layers: int | None = None

    def config(self) -> dict[str, Any]:
        """Arguments of the configuration class."""
        return {**self.arguments, **SPECIAL_TOKENS}

    def tiny(self) -> Shape:
        """The same architecture in miniature, with windows shorter than its rows: does everything run on a CPU?"""
        arguments = {**self.arguments, **{key: _MINIATURE[key] for key in _MINIATURE.keys() & self.arguments.keys()}}
        if rope := arguments.get("rope_parameters"):
            arguments["rope_parameters"] = _miniature_rope(rope)
        return replace(self, gib=0.01, arguments=arguments, published_layers=None)

    def small(self) -> Shape:
        """Few and narrow layers with heads of the published size, for a GPU's kernels: does it compute the same?"""
        sizes = {key: min(_SMALL[key], self.arguments[key]) for key in _SMALL.keys() & self.arguments.keys()}
        return replace(self, gib=0.3, arguments={**self.arguments, **sizes}, published_layers=None)


_MINIATURE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8_192, "sliding_window": 32, "query_pre_attn_scalar": 16,
    "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
# At most these: what is smaller is kept.
_SMALL: dict[str, Any] = {
    "hidden_size": 1_024, "intermediate_size": 2_048, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 16_384, "sliding_window": 256,
    "num_local_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8,
}  # fmt: skip


def _miniature_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """LongRoPE has a factor for each rotated pair of columns."""
    pairs = int(_MINIATURE["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    return {key: value[:pairs] if isinstance(value, list) else value for key, value in rope.items()}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int,
           tied: bool, **more: Any) -> dict[str, Any]:  # fmt: skip
    """What the configurations of all dense decoders have."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip
    return sizes | more


_LLAMA3 = {"max_position_embeddings": 16_384, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
_QWEN3 = {
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# Long rows turn faster columns by these (config.json of microsoft/Phi-4-mini-instruct); rows below 4,096 tokens by 1.
_PHI4_LONG = [
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
    18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
    32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip

# Sizes of the published config.json files. Two mixtures of experts have fewer layers, so that both arms of both fit one
# card together.
_PUBLISHED = {
    "1b": Shape("llama", 2.3, _llama(2_048, 8_192, 16, 32, 8, 64, 128_256, True, **_LLAMA3)),
    "8b": Shape("llama", 15.0, _llama(4_096, 14_336, 32, 32, 8, 128, 128_256, False, **_LLAMA3)),
    "qwen3-8b": Shape("qwen3", 15.3, _llama(4_096, 12_288, 36, 32, 8, 128, 151_936, False, **_QWEN3)),
    "qwen3-1.7b": Shape("qwen3", 3.2, _llama(2_048, 6_144, 28, 16, 8, 128, 151_936, True, **_QWEN3)),
    "gemma3-4b": Shape(
        "gemma3_text", 7.2,
        _llama(
            2_560, 10_240, 34, 8, 4, 256, 262_208, True,
            max_position_embeddings=131_072, rms_norm_eps=1e-6, sliding_window=1_024, query_pre_attn_scalar=256,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        ),
    ),
    "ministral3-8b": Shape(
        "ministral3", 15.8,
        _llama(
            4_096, 14_336, 34, 32, 8, 128, 131_072, False,
            max_position_embeddings=262_144, rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
    "phi4-mini": Shape(
        "phi3", 7.2,
        _llama(
            3_072, 8_192, 32, 24, 8, 128, 200_064, True,
            max_position_embeddings=131_072, original_max_position_embeddings=4_096, rms_norm_eps=1e-5,
            sliding_window=262_144, resid_pdrop=0.0, embd_pdrop=0.0,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4_096, "long_factor": _PHI4_LONG, "short_factor": [1.0] * 48,
            },
        ),
        FUSED_TARGETS,
    ),
    "olmo3-7b": Shape(
        "olmo3", 13.6,
        _llama(
            4_096, 11_008, 32, 32, 32, 128, 100_278, False,
            max_position_embeddings=65_536, rms_norm_eps=1e-6, sliding_window=4_096,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
                "full_attention": {
                    "rope_type": "yarn", "rope_theta": 500_000.0, "factor": 8.0,
                    "original_max_position_embeddings": 8_192, "attention_factor": 1.2079441541679836,
                    "beta_fast": 32.0, "beta_slow": 1.0,
                },
            },
        ),
    ),
    "smollm3-3b": Shape(
        "smollm3", 5.7,
        _llama(
            2_048, 11_008, 36, 16, 4, 128, 128_256, True,
            max_position_embeddings=65_536, rms_norm_eps=1e-6, no_rope_layer_interval=4,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        ),
    ),
    "qwen3.5-9b": Shape(
        "qwen3_5_text", 16.7,
        _llama(
            4_096, 12_288, 32, 16, 4, 256, 248_320, False,
            max_position_embeddings=262_144, rms_norm_eps=1e-6,
            linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128,
            linear_num_key_heads=16, linear_num_value_heads=32,
            rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        ),
        DELTA_NET_TARGETS,
    ),
    "gpt-oss-20b": Shape(
        "gpt_oss", 14.4,
        _llama(
            2_880, 2_880, 8, 64, 8, 64, 201_088, False,
            max_position_embeddings=131_072, rms_norm_eps=1e-5, sliding_window=128,
            num_local_experts=32, num_experts_per_tok=4,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4_096,
            },
        ),
        ATTENTION_TARGETS, published_layers=24,
    ),
    "qwen3-30b-a3b": Shape(
        "qwen3_moe", 15.1,
        _llama(
            2_048, 6_144, 12, 32, 4, 128, 151_936, False,
            max_position_embeddings=40_960, rms_norm_eps=1e-6, num_local_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        ATTENTION_TARGETS, published_layers=48,
    ),
}  # fmt: skip
SHAPES = {
    TINY: Shape("llama", 0.01, _llama(64, 128, 2, 4, 2, 16, 8_192, True, **_LLAMA3)),
    **_PUBLISHED,
    **{f"{TINY}-{name}": shape.tiny() for name, shape in _PUBLISHED.items()},
    **{f"{SMALL}-{name}": shape.small() for name, shape in _PUBLISHED.items()},
}


def is_tiny(name: str) -> bool:
    """Whether a shape is for a CPU: short rows, fp32."""
    return name.startswith(TINY)
