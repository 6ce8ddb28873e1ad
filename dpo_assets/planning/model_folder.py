"""What a local model folder holds, read without torch: its shape, its weights' format, its template, its licence."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpo_assets.errors import ConfigError
from dpo_assets.planning.shape import ModelShape

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# What a release or a run needs of a model folder; nothing else is fetched or copied.
KEPT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*")
# Architectures whose decoder layers the fused kernels compute.
FUSED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True)
class ModelFolder:
    """Facts of a model folder."""

    shape: ModelShape
    architecture: str
    safetensors: tuple[str, ...]
    pickled: tuple[str, ...]
    licence: str | None
    has_chat_template: bool
    eos_token: str | None


def inspect_model(folder: Path) -> ModelFolder:
    """Reads a folder.

    Raises:
        ConfigError: when the folder, its config.json or its tokenizer is missing or unreadable.
    """
    if not folder.is_dir():
        raise ConfigError(f"base_model.source: there is no folder {folder}; a Hub id looks like `org/name`.")
    config = _json(folder / "config.json", "a model folder needs it")
    tokenizer = _json(folder / "tokenizer_config.json", "the tokenizer is missing")
    safetensors = tuple(sorted(p.name for p in folder.glob("*.safetensors")))
    pickled = tuple(sorted(p.name for pattern in PICKLED for p in folder.glob(pattern)))
    text = config.get("text_config") or config
    architecture = ", ".join(config.get("architectures") or ["unknown"])
    weights = sum(count_parameters(folder / name) for name in safetensors)
    try:
        heads = text.get("num_attention_heads") or 0
        shape = ModelShape(
            parameters=weights,
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text.get("intermediate_size") or 4 * text["hidden_size"],
            vocabulary=text["vocab_size"],
            context=text.get("max_position_embeddings") or 2**20,
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or (text["hidden_size"] // heads if heads else 0),
            tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings")) or False,
            architecture=architecture,
            fusable=bool(heads) and _fusable(architecture, text),
            sliding_window=text.get("sliding_window") if text.get("use_sliding_window", True) else None,
        )
    except KeyError as error:
        raise ConfigError(
            f"{folder / 'config.json'} has no {error}: only decoder language models are supported"
        ) from None
    except (ValidationError, TypeError, AttributeError):
        raise ConfigError(f"{folder / 'config.json'} holds a value of the wrong type; download it again") from None
    eos = tokenizer.get("eos_token")
    return ModelFolder(
        shape=shape,
        architecture=architecture,
        safetensors=safetensors,
        pickled=pickled,
        licence=card_licence(folder / "README.md"),
        has_chat_template=bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file(),
        eos_token=eos.get("content") if isinstance(eos, dict) else eos,
    )


def _fusable(architecture: str, config: Mapping[str, Any]) -> bool:
    """Whether the fused kernels compute this architecture as configured: SiLU, and no bias but that of q, k and v."""
    plain = config.get("hidden_act", "silu") in ("silu", "swish") and not config.get("mlp_bias")
    # Llama's attention_bias also gives o_proj a bias; Qwen2 has q, k and v biases of its own and no such key.
    return architecture in FUSED_ARCHITECTURES and plain and not config.get("attention_bias")


def count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header.

    Raises:
        ConfigError: when the header cannot be read.
    """
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(length, 100_000_000)))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path} is not a readable safetensors file; download it again") from None


def card_licence(card: Path) -> str | None:
    """The licence in the front matter of a model card."""
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in (closing := [line.rstrip() for line in lines[1:]]):
        return None
    try:
        front = yaml.safe_load("\n".join(closing[: closing.index("---")]))
    except yaml.YAMLError:
        return None
    value = front.get("license") if isinstance(front, dict) else None
    return value if isinstance(value, str) else None


def _json(path: Path, why: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: {why}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value
