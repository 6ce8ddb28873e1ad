"""The language model inside a checkpoint that holds more: which tensors are its own, and where its names differ.

A vision-language checkpoint keeps its decoder behind a prefix (`model.language_model.`, `language_model.model.`), and
the towers, projectors and extra heads of other parts beside it. What is trained is the decoder, under the names that a
checkpoint of text alone has. Planner, loader and merge ask here which is which, so that they cannot differ.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_assets.artifact import read_object
from dpo_assets.planning.families import describe
from dpo_assets.planning.matrices import decoder_list
from dpo_assets.planning.weights import read_weights

# What the causal classes of Transformers 5 call their decoder and their head.
DECODER, HEAD = "model.", "lm_head."
# Parts of a config.json, each of another model of the checkpoint.
PARTS = ("text_config", "vision_config", "audio_config")
TIED = "tie_word_embeddings"
# Layers that predict further tokens, under a name of their own (Qwen3-Next, Qwen3.5, MiMo).
_FURTHER = re.compile(r"(^|\.)mtp(_\w+)?\.")


@dataclass(frozen=True)
class TextPart:
    """Which tensors of a checkpoint are the language model's.

    Attributes:
        names: by the name that a checkpoint of text alone gives a tensor, its name in the files.
        beside: names in the files that are none of the language model's.
        prefixes: (in the files, in a checkpoint of text alone) where the two differ, longest first.
        tied: whether the head is the embedding.
    """

    names: Mapping[str, str]
    beside: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], names: Iterable[str]) -> TextPart:
        """The text part of tensors of these names, under this config.json.

        Of a checkpoint that is text alone, and of one whose decoder is not found, every tensor is its own, but for
        layers that predict further tokens: no causal language model of Transformers has a place for them.

        Raises:
            LookupError, TypeError, ValueError, ArithmeticError: as `describe`, where the layers are not stated.
        """
        held = list(names)
        layers = _layers(config)
        found = decoder_list(held, layers)
        stored = [name for name in held if not _predicts_further(name, found, layers)]
        decoder = found.rpartition(".")[0] if has_other_parts(config) else ""
        if not decoder:
            beside = tuple(sorted(set(held).difference(stored)))
            return cls({name: name for name in stored}, beside, (), _tied(config, stored))
        decoder = f"{decoder}."
        # A tower may have a head of its own; the language model's stands at the top or beside its decoder.
        heads = {before for before in map(_before_head, stored) if before is not None and decoder.startswith(before)}
        pairs = [(decoder, DECODER)] + ([(max(heads, key=len) + HEAD, HEAD)] if heads else [])
        pairs.sort(key=lambda pair: -len(pair[0]))
        plain = {
            here + name.removeprefix(there): name
            for name in stored
            for there, here in [next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))]
            if there
        }
        own = frozenset(plain.values())
        return cls(
            plain,
            tuple(sorted(set(held) - own)),
            tuple(pair for pair in pairs if pair[0] != pair[1]),
            _tied(config, own),
        )

    def stored_as(self, name: str) -> str:
        """What the files call a tensor of the language model, also one that they lack."""
        if name in self.names:
            return self.names[name]
        there, here = next((pair for pair in self.prefixes if name.startswith(pair[1])), ("", ""))
        return there + name.removeprefix(here)


def read_text_part(folder: Path) -> TextPart:
    """The text part of a model folder. Headers only.

    Raises:
        ConfigError: as `read_weights`; when config.json is missing or no JSON object.
    """
    config = read_object(folder / "config.json", "a model folder needs it")
    return TextPart.of(config, read_weights(folder).tensors)


def has_other_parts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes more than a language model."""
    return any(isinstance(config.get(part), Mapping) for part in PARTS)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model: the whole, where nothing else is described."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return text


def _layers(config: Mapping[str, Any]) -> int:
    """Decoder layers of the model: as stated, else its family's default; where neither is known, all that there are."""
    if stated := text_config(config).get("num_hidden_layers"):
        return int(stated)
    decoder = describe(config)
    return len(decoder.layers) if decoder else sys.maxsize


def _predicts_further(name: str, decoder: str, layers: int) -> bool:
    """Whether a tensor is one of multi-token prediction: under a name of its own, or a layer beyond the model's
    (DeepSeek-V3, GLM-4.5)."""
    number = name.removeprefix(f"{decoder}.").partition(".")[0] if decoder and name.startswith(f"{decoder}.") else ""
    return _FURTHER.search(name) is not None or (number.isdigit() and int(number) >= layers)


def _before_head(name: str) -> str | None:
    """What stands before `lm_head.`, or None where a name is no head's."""
    before, mark, _ = f".{name}".rpartition(f".{HEAD}")
    return f"{before[1:]}." if mark and before else "" if mark else None


def _tied(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the head is the embedding: as config.json says, and where it does not, or at both places otherwise, as
    the files do (Gemma leaves it to its class; Transformers 5 writes its own default beside Mistral 3's)."""
    stated = {bool(part[TIED]) for part in (config, text_config(config)) if part.get(TIED) is not None}
    if len(stated) == 1:
        return stated.pop()
    held = list(names)
    return bool(held) and not any(_before_head(name) is not None for name in held)
