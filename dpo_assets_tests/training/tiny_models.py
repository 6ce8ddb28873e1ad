"""A tiny random model of each architecture that people tune, whole enough that another computation gives other scores.

Windows are of 8 tokens, shorter than the rows of PAIR; hybrids have both kinds of layers. Names are model types of text
configs; what follows a `+` is the setting that matters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo_assets.training.batches.packing import Group

VOCABULARY = 64
WINDOW = 8
# Rows of 18 and 30 tokens. Prompt and first answer end differently: a state that crossed rows must be seen.
PAIR = Group(list(range(3, 13)), (list(range(50, 58)), list(range(20, 40))))
OTHER_PAIR = Group(list(range(30, 36)), (list(range(40, 57)), list(range(8, 12))))
SHORT_PAIR = Group([3, 4], ([5, 6], [7]))  # Shorter than every window here.

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_HEADS = {"head_dim": 8}
_WINDOW: dict[str, Any] = {"sliding_window": WINDOW}
_BOTH: dict[str, Any] = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
_DELTA_NET: dict[str, Any] = _HEADS | {
    "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED_EXPERT: dict[str, Any] = _EXPERTS | {"shared_expert_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_GROWING: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_chunk_size": 8,
}  # fmt: skip
_SHARED_KEYS: dict[str, Any] = _WINDOW | {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen3_moe": _HEADS | _EXPERTS,
    "ministral": _HEADS | _BOTH,
    "ministral3": _HEADS | {"rope_parameters": _GROWING},
    "phi3": {"sliding_window": None, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 3.0
    },
    "glm": _HEADS | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "glm4": _HEADS | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "qwen2_moe": _SHARED_EXPERT,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2, "logits_scaling": 3.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "ernie4_5": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "seed_oss": _HEADS | {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "starcoder2": {},
    "gpt2": {},
    "qwen3_next": _DELTA_NET | _SHARED_EXPERT,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET | _SHARED_EXPERT,
    "gemma": _HEADS,
    "gemma2": _HEADS | _BOTH | {
        "query_pre_attn_scalar": 1, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0
    },
    "gemma3_text": _HEADS | _BOTH | {"query_pre_attn_scalar": 8},
    "gemma4_text": _HEADS | _SHARED_KEYS | {"final_logit_softcapping": 3.0},
    "gpt_oss": _HEADS | _BOTH | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral+window": _HEADS | _WINDOW,
    "phi3+window": _WINDOW,
    "olmo3": _BOTH,
    "cohere2": _HEADS | _BOTH | {"logit_scale": 0.5},
    "exaone4": _HEADS | _BOTH,
    "llama4_text": _HEADS | {
        "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "floor_scale": 8,
        "moe_layers": [1],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": _HEADS | _MAMBA | {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.5},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 16, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 8, "mamba_chunk_size": 8, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "nemotron": _HEADS | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "bloom": {},
    "mpt": {},
    "falcon+alibi": {"alibi": True},
    "mamba": {"state_size": 4},
}  # fmt: skip
_OTHER_WORDS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "xglm": {"vocab_size": VOCABULARY},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
}
NAMES = tuple(SETTINGS)


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of an architecture, with `changes` on top."""
    kind = name.partition("+")[0]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[kind](**_OTHER_WORDS.get(kind, _SMALL) | tokens | SETTINGS[name] | changes)


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model on its own eager attention, in evaluation mode.

    Matrices are large enough that layers matter, states decay slowly enough to be seen further on, and nothing is left
    at zero or one, biases and norms included.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(name, **changes), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(4)
            elif parameter.ndim > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.random.set_rng_state(state)
    return model.eval()


def tiny_folder(name: str, folder: Path, **changes: Any) -> Path:
    """That model's weights and configuration in a folder, without a tokenizer."""
    tiny_model(name, **changes).save_pretrained(folder)
    return folder
