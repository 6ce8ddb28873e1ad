"""How the language model of a checkpoint with more than text is asked of Transformers: its config, and its names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from dpo_assets.errors import ConfigError
from dpo_assets.planning.text_part import TextPart, read_text_part


@dataclass(frozen=True)
class TextSource:
    """What `from_pretrained` of a causal language model gets beside the folder.

    Attributes:
        arguments: `config` and `key_mapping`; empty for a checkpoint of text alone, which needs neither.
    """

    part: TextPart
    arguments: dict[str, Any]

    def in_files(self, name: str) -> str:
        """What a tensor of the language model is called in the files, or would be."""
        return self.part.stored_as(name)

    def unused(self, unexpected: list[str]) -> list[str]:
        """Tensors in the files that the language model has no place for, by their names there.

        Args:
            unexpected: what Transformers says, which leaves out what a class ignores (`model.visual`, `mtp`).
        """
        if not self.arguments:
            return sorted(unexpected)
        own = {self.part.names[name] for name in unexpected if name in self.part.names}
        return sorted(own.union(self.part.beside))


def text_source(folder: Path) -> TextSource:
    """The language model of a folder. Some wrapper classes (Mistral 3) are no causal language models to Transformers,
    others (Gemma 3) would load every tower with it: here each gives its decoder and head alone.

    Raises:
        ConfigError: as `read_text_part`; when Transformers has no class for the text part alone.
        OSError, ValueError, KeyError: Transformers does not know the config.
    """
    part = read_text_part(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    if not part.beside and text is config:
        return TextSource(part, {})
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(_no_class(folder, config, text))
    text.tie_word_embeddings = part.tied
    return TextSource(part, {"config": text, "key_mapping": {f"^{re.escape(a)}": b for a, b in part.prefixes}})


def _no_class(folder: Path, config: PreTrainedConfig, text: PreTrainedConfig) -> str:
    wrapper = ", ".join(config.architectures or [config.model_type])
    return (
        f"the model in {folder} is a {wrapper}, and Transformers has no causal language model for its text part alone "
        f"({text.model_type}). Take a base of text alone, or one whose text part has a class of its own: Qwen3.5, "
        "Gemma 3 and 4, Mistral 3 and Llama 4 have one."
    )
