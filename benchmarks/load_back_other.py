"""The part of `load_back` that runs in another environment: tiny bases as its Transformers writes them, and logits.

For `load_back_files` it asks a release one thing by its folder alone. It needs torch, transformers and safetensors
(adapters: peft), and nothing of this project: `python load_back_other.py request.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

IDS = [1, *range(3, 27)]  # More tokens than the windows below.
WINDOW = 8
QUESTION = "Hello, how are you doing?"
_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_HEADS: dict[str, Any] = {"head_dim": 8}
_BOTH: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LLAMA3: dict[str, Any] = {
    "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_GEMMA3: dict[str, Any] = {**_HEADS, **_BOTH, "query_pre_attn_scalar": 8}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1
}  # fmt: skip
_QWEN3_5: dict[str, Any] = {
    **_SMALL, **_HEADS, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip

# (class, model type, settings), with a rotary base other than the default, where a config says one.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", _SMALL | _LLAMA3),
    "llama, saved by 5": ("LlamaForCausalLM", "llama", _SMALL | {"rope_theta": 5e5}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", _SMALL | {"rope_theta": 1e6}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", _SMALL | _HEADS | {"rope_theta": 1e6}),
    "gemma3 (text)": ("Gemma3ForCausalLM", "gemma3_text", _SMALL | _GEMMA3 | {"rope_local_base_freq": 1e4}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {"text_config": _SMALL | _GEMMA3, "vision_config": _TOWER, "mm_tokens_per_image": 4, "image_token_index": 60},
    ),
    "mistral": ("MistralForCausalLM", "mistral", _SMALL | {"sliding_window": WINDOW, "rope_theta": 1e6}),
    "phi3": ("Phi3ForCausalLM", "phi3", _SMALL | {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", "olmo2", _SMALL | {"rope_theta": 5e5}),
    "granite": (
        "GraniteForCausalLM",
        "granite",
        _SMALL | {"embedding_multiplier": 3.0, "logits_scaling": 3.0, "attention_multiplier": 0.2, "rope_theta": 1e6},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", _SMALL | _HEADS | _EXPERTS | {"rope_theta": 1e6}),
    "gpt_oss": (
        "GptOssForCausalLM", "gpt_oss", _SMALL | _HEADS | _BOTH | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": _SMALL | _HEADS | {"model_type": "mistral", "rope_theta": 1e8, "sliding_window": None},
            "vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 60,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3", _SMALL | {"no_rope_layers": [1, 0], "rope_theta": 5e6}),
    "ministral3": (
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": _SMALL | _HEADS | {"model_type": "ministral3", "sliding_window": None},
            "vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": 60,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        {"text_config": _QWEN3_5, "vision_config": _QWEN_TOWER, "image_token_id": 60, "video_token_id": 61},
    ),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """A random fp32 base of an architecture, as this environment's Transformers saves it."""
    cls, kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(CONFIG_MAPPING[kind](**settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)


@torch.no_grad()
def logits_of(name: str, folder: Path) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the folder, by the class that its config.json names."""
    model = getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(
        folder, local_files_only=True, attn_implementation="eager"
    )
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([IDS])).logits[0]
    return found.float()


@torch.no_grad()
def asked(folder: Path) -> dict[str, Any]:
    """What a release makes of a conversation, by its own tokenizer, chat template and generation defaults."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": QUESTION}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False)
    defaults = transformers.GenerationConfig.from_pretrained(folder)
    return {
        "text": text,
        "ids": ids,
        "inputs": sorted(tokenizer(text)),
        "decoded": tokenizer.decode(ids),
        "special": sorted(tokenizer.all_special_tokens),
        "ends": defaults.eos_token_id,
        "answer": out[0, len(ids) :].tolist(),
    }


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Per architecture: empty, or why this environment cannot do it."""
    said = {}
    for name, folder in request["folders"].items():
        try:
            if request["do"] == "make":
                make(name, Path(folder))
            elif request["do"] == "ask":
                (Path(folder) / request["out"]).write_text(json.dumps(asked(Path(folder))), encoding="utf-8")
            else:
                save_file({"logits": logits_of(name, Path(folder))}, Path(folder) / request["out"])
            said[name] = ""
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return said


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    path = Path(sys.argv[1])
    result = {"version": transformers.__version__, "said": answer(json.loads(path.read_text(encoding="utf-8")))}
    path.with_suffix(".answer.json").write_text(json.dumps(result), encoding="utf-8")
