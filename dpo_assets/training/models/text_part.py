"""How the language model of a checkpoint with more than text is asked of Transformers: its config, and its names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from dpo_assets.errors import ConfigError
from dpo_assets.planning.text_part import TextPart, read_text_part
from dpo_assets.training.private.transformers import check_tied_weights

# Text parts that Transformers has a decoder for, and no class with a head. Each was held against its wrapper's logits.
HEADLESS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text")


@dataclass(frozen=True)
class TextSource:
    """What `from_pretrained` of a causal language model gets beside the folder.

    Attributes:
        arguments: `config` and `key_mapping`; empty for a checkpoint of text alone, which needs neither.
        cls: the class to load, where Transformers has none; None: AutoModelForCausalLM chooses.
    """

    part: TextPart
    arguments: dict[str, Any]
    cls: type[Any] | None = None

    def in_files(self, name: str) -> str:
        """What a tensor of the language model is called in the files, or would be."""
        return self.part.stored_as(name)

    def unused(self, unexpected: list[str]) -> list[str]:
        """Tensors in the files that the language model has no place for, by their names there.

        Args:
            unexpected: what Transformers met and had no place for (`every_unexpected`).
        """
        beside = self.part.beside
        own = {self.part.names[name] for name in unexpected if name in self.part.names}
        # Of a part that is loaded renamed the rest is towers, which are beside it.
        rest = set() if self.arguments else set(unexpected).difference(self.part.names)
        # Experts beside it were joined under one name before they were met; their own names are the files'.
        joined = {name for name in rest if any(one.startswith(_experts_of(name)) for one in beside)}
        return sorted(own.union(rest - joined, beside))


def _experts_of(name: str) -> str:
    """What the names of a layer's experts begin with; the whole name of any other tensor."""
    before, mark, _ = name.partition(".experts.")
    return before + mark if mark else name


def text_source(folder: Path) -> TextSource:
    """The language model of a folder. Some wrapper classes (Mistral 3) are no causal language models to Transformers,
    others (Gemma 3) would load every tower with it: here each gives its decoder and head alone.

    Raises:
        ConfigError: as `read_text_part`; when there is no class for the text part alone.
        OSError, ValueError, KeyError: Transformers does not know the config.
    """
    part = read_text_part(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    if text is config and not part.prefixes:
        return TextSource(part, {})
    text.tie_word_embeddings = part.tied
    renamed = {f"^{re.escape(stored)}": plain for stored, plain in part.prefixes}
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and text.model_type in HEADLESS:
        # Not registered: Transformers takes no second class for a config of its own, and says nothing.
        return TextSource(part, {"config": text, "key_mapping": renamed}, with_head(MODEL_MAPPING[type(text)]))
    return TextSource(part, {"config": _loadable(folder, config, text), "key_mapping": renamed})


def _loadable(folder: Path, config: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """The config by which AutoModelForCausalLM builds the text part: its own, or one that stands for it (Llama 3.2
    Vision)."""
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        stands_for = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "config_class", None)
        if stands_for is type(text):
            return config
    wrapper = ", ".join(config.architectures or [config.model_type])
    raise ConfigError(
        f"the model in {folder} is a {wrapper}, and there is no causal language model for its text part alone "
        f"({text.model_type}). Take a base of text alone, or one whose text part has a class of its own: Qwen3.5, "
        "Gemma 3 and 4, Mistral 3, Llama 4 and Qwen3-VL have one."
    )


@cache
def with_head(decoder: Any) -> type[Any]:
    """A causal language model of a decoder class that has none: `model` and `lm_head`, as every other names them."""
    check_tied_weights()
    # The class below the decoder's own says how the family's weights start and which attention it supports.
    family: Any = decoder.__mro__[1]

    class TextForCausalLM(family, GenerationMixin):  # type: ignore[misc]
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as Transformers reads it
        base_model_prefix = "model"
        config_class = decoder.config_class

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            logits_to_keep: int | torch.Tensor = 0,
            **inputs: Any,
        ) -> CausalLMOutputWithPast:
            """Logits [rows, tokens, vocabulary]; of the last `logits_to_keep` tokens, or of those it names."""
            inputs.pop("labels", None)
            out = self.model(input_ids=input_ids, **inputs)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(out.last_hidden_state[:, kept, :])
            return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    TextForCausalLM.__name__ = decoder.__name__.replace("TextModel", "TextForCausalLM")
    return TextForCausalLM
