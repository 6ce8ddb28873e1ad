"""Tiny random models of more than text, saved as their own classes save them, with the embedded model's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCABULARY = 512
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
}  # fmt: skip
IMAGES: dict[str, Any] = {"image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502}
QWEN_IMAGES: dict[str, Any] = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503
}  # fmt: skip
GEMMA4_TOKENS: dict[str, Any] = {
    "image_token_id": 500, "boi_token_id": 501, "eoi_token_id": 502, "audio_token_id": 503, "video_token_id": 504
}  # fmt: skip


def _gemma3(**more: Any) -> Any:
    text = TEXT | {"sliding_window": 256, "query_pre_attn_scalar": 8} | more
    return transformers.Gemma3Config(text_config=text, vision_config=TOWER, mm_tokens_per_image=4, **IMAGES)


def _mistral3(*, tied: bool, **more: Any) -> Any:
    tower = TOWER | {"model_type": "pixtral", "head_dim": 16}
    text = TEXT | {"sliding_window": None, "model_type": "ministral3", "tie_word_embeddings": tied} | more
    return transformers.Mistral3Config(
        text_config=text, vision_config=tower, image_token_index=500, tie_word_embeddings=tied
    )


def _llama4() -> Any:
    text = TEXT | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 256}
    tower = TOWER | {"intermediate_size": 128, "vision_output_dim": 32}
    tower |= {"projector_input_dim": 32, "projector_output_dim": 32}
    return transformers.Llama4Config(text_config=text, vision_config=tower, **IMAGES)


def _gemma4() -> Any:
    text = TEXT | {"global_head_dim": 16, "sliding_window": 256, "hidden_size_per_layer_input": 8}
    text |= {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
    tower = TOWER | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 32}
    return transformers.Gemma4Config(text_config=text, vision_config=tower, audio_config=None, **GEMMA4_TOKENS)


def _internvl() -> Any:
    experts = EXPERTS | {"model_type": "qwen3_moe", "tie_word_embeddings": False, "sliding_window": None}
    tower = TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}
    return transformers.InternVLConfig(
        text_config=TEXT | experts, vision_config=tower, image_token_id=500, tie_word_embeddings=False
    )


def _multimodal_rope(*section: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}}


def _qwen3_vl() -> Any:
    tower = QWEN_TOWER | {"deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(
        text_config=TEXT | _multimodal_rope(2, 1, 1), vision_config=tower, tie_word_embeddings=True, **QWEN_IMAGES
    )


def _qwen2_5_vl() -> Any:
    tower = QWEN_TOWER | {"fullatt_block_indexes": [1]}
    return transformers.Qwen2_5_VLConfig(
        text_config=TEXT | _multimodal_rope(1, 1, 2), vision_config=tower, tie_word_embeddings=False, **QWEN_IMAGES
    )


@dataclass(frozen=True)
class Kind:
    """A checkpoint of more than text.

    Attributes:
        decoder: what its files put before the decoder's tensors.
        causal: whether AutoModelForCausalLM loads the folder by itself.
        rename: from what `save_pretrained` writes to what the published checkpoints have.
        shards: whether it is stored in several files.
    """

    wrapper: str
    config: Callable[[], Any]
    decoder: str
    causal: bool = True
    rename: Callable[[str], str] = lambda name: name
    extra: tuple[str, ...] = ()
    shards: bool = False

    @property
    def wrapper_class(self) -> Any:
        return getattr(transformers, self.wrapper)


def _older_vl(name: str) -> str:
    """As Qwen2-VL and Qwen2.5-VL are published: the decoder without a prefix of its own, beside the tower."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _newer(name: str) -> str:
    """As Transformers names Gemma 3's tensors in memory, and as some tools store them."""
    return f"model.{name.replace('language_model.model.', 'language_model.')}"


KINDS: dict[str, Kind] = {
    "gemma3": Kind("Gemma3ForConditionalGeneration", _gemma3, "language_model.model."),
    "gemma3, newer names": Kind(
        "Gemma3ForConditionalGeneration", _gemma3, "model.language_model.", rename=_newer, shards=True
    ),
    "gemma4": Kind("Gemma4ForConditionalGeneration", _gemma4, "model.language_model."),
    "mistral3": Kind(
        "Mistral3ForConditionalGeneration", lambda: _mistral3(tied=False), "language_model.model.", causal=False
    ),
    "mistral3, tied, of mistral": Kind(
        "Mistral3ForConditionalGeneration",
        lambda: _mistral3(tied=True, model_type="mistral"),
        "language_model.model.",
        causal=False,
        shards=True,
    ),
    "qwen3_5": Kind(
        "Qwen3_5ForConditionalGeneration",
        lambda: transformers.Qwen3_5Config(text_config=TEXT | DELTA_NET, vision_config=QWEN_TOWER, **QWEN_IMAGES),
        "model.language_model.",
        extra=("mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight"),
    ),
    "qwen3_5_moe": Kind(
        "Qwen3_5MoeForConditionalGeneration",
        lambda: transformers.Qwen3_5MoeConfig(
            text_config=TEXT | DELTA_NET | EXPERTS, vision_config=QWEN_TOWER, **QWEN_IMAGES
        ),
        "model.language_model.",
        extra=("mtp.layers.0.self_attn.q_proj.weight",),
        shards=True,
    ),
    "internvl of qwen3_moe": Kind("InternVLForConditionalGeneration", _internvl, "language_model.model.", causal=False),
    "qwen3_vl": Kind("Qwen3VLForConditionalGeneration", _qwen3_vl, "model.language_model.", causal=False),
    "qwen2_5_vl": Kind("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, "model.", causal=False, rename=_older_vl),
    "llama4": Kind("Llama4ForConditionalGeneration", _llama4, "language_model.model."),
}


def save(kind: Kind, folder: Path, tokenizer: Path) -> Path:
    """A folder of that kind, its weights large enough that each matters, with a processor's files beside them."""
    torch.manual_seed(0)
    model = kind.wrapper_class(kind.config()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tensors = {kind.rename(name): tensor for name, tensor in tensors_of(folder).items()}
    tensors |= {name: torch.randn(32, 32) for name in kind.extra}
    _store(folder, tensors, 3 if kind.shards else 1)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(f'{{"of": "{name}",   "size":  [28, 28]}}\n')
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _store(folder: Path, tensors: dict[str, Tensor], parts: int) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if parts == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(parts):
        name = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
        part = dict(list(tensors.items())[number::parts])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
