"""Settings of a GGUF file against those of config.json: what the file says otherwise, and what it does not say.

Weights are compared under the merged model's config (`gguf_reading.compare_weights`), so what of a computation is no
weight is told here alone. The file's names are those of gguf's `constants.py`, and which of them are written for which
config is llama.cpp's `conversion/`, b10605.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

# By llama.cpp's names, behind that of the architecture: the names in config.json.
SETTINGS = {
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ROPE_BASE, WINDOW, LENGTH = "rope.freq_base", "attention.sliding_window", "context_length"
SCALING = "rope.scaling.type"
OF_SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
# Without these in the file llama.cpp computes without them. The others it derives, or refuses a file that lacks them.
NEEDED = frozenset({LENGTH, "attn_logit_softcapping", "final_logit_softcapping", WINDOW, *OF_SCALING})
OF_LATENT = frozenset({"attention.head_count_kv", "attention.key_length"})  # Otherwise meant where keys are latent.
# What the file says of each kind of rotary scaling: its type and which numbers, or the tensor that holds the factors.
TYPES = {
    "linear": ("rope.scaling.factor",),
    "yarn": tuple(OF_SCALING),
    "longrope": ("rope.scaling.original_context_length",),
}
TENSORS = {"llama3": "rope_freqs.weight", "longrope": "rope_factors_long.weight"}


@dataclass(frozen=True)
class Settings:
    """A file's settings beside those of a text config.

    Args:
        said: a setting of the file by its name behind the architecture's; None where the file has none.
        tensors: names of the file's tensors.
        config: the text part of config.json, as Transformers holds it.
    """

    said: Callable[[str], Any]
    tensors: Collection[str]
    config: Any

    def differ(self) -> tuple[str, ...]:
        """`name: the file's, not config.json's`."""
        found = [
            f"{name}: {here:g}, not {there:g}"
            for name, there in self._stated()
            if _number(here := self.said(name))
            and not math.isclose(here, there, rel_tol=1e-5)
            and not (name == LENGTH and here > there)
        ]
        kind = self._kind if self._kind in TYPES else None
        if self._said_kind not in (None, kind):
            found.append(f"{SCALING}: {self._said_kind}, not {self._kind or 'none'}")
        return tuple(found)

    def doubts(self) -> tuple[str, ...]:
        """What the model computes with and llama.cpp does not learn from the file, and texts longer than the model's.

        A longer context is no fault: the converter writes one where positions are not rotated, or are stretched.
        """
        lacking = [
            f"{name} ({there:g})" for name, there in self._stated() if name in NEEDED and self.said(name) is None
        ]
        kind = self._kind
        if kind is not None and kind not in TYPES and kind not in TENSORS:
            lacking.append(f"rotary scaling of type {kind}, for which GGUF has no name")
        if kind in TYPES and self._said_kind is None:
            lacking.append(f"{SCALING} ({kind})")
        if kind in TENSORS and TENSORS[kind] not in self.tensors:
            lacking.append(f"{TENSORS[kind]}, the factors of rotary scaling of type {kind}")
        said = []
        if lacking:
            said.append(f"the file does not say {', '.join(lacking)}, and llama.cpp computes without")
        here, there = self.said(LENGTH), dict(self._stated()).get(LENGTH)
        if _number(here) and there is not None and here > there:
            said.append(f"llama.cpp takes texts of {here:,} tokens, and config.json says {there:,}")
        return tuple(said)

    def _stated(self) -> Iterator[tuple[str, float]]:
        """The numbers of the config by the file's names."""
        numbers = {name: getattr(self.config, of_config, None) for name, of_config in SETTINGS.items()}
        longest = getattr(self.config, "max_position_embeddings", None)
        numbers |= {LENGTH: longest, ROPE_BASE: self._rope.get("rope_theta"), WINDOW: self._window}
        numbers |= {name: self._rope.get(OF_SCALING[name]) for name in TYPES.get(self._kind or "", ())}
        if getattr(self.config, "kv_lora_rank", None):
            numbers = {name: number for name, number in numbers.items() if name not in OF_LATENT}
        # One that is None is not stated; a list has one for each layer.
        return ((name, number) for name, number in numbers.items() if _number(number))

    @property
    def _rope(self) -> Mapping[str, Any]:
        stated = getattr(self.config, "rope_parameters", None) or {}
        # One of each kind of layer: llama.cpp's plain names are those of full attention.
        found: Mapping[str, Any] = stated.get("full_attention") or stated
        return found

    @property
    def _kind(self) -> str | None:
        """The config's rotary scaling; None: it does not scale."""
        kind = self._rope.get("rope_type")
        return None if kind in (None, "default") else str(kind)

    @property
    def _said_kind(self) -> str | None:
        kind = self.said(SCALING)
        idle = kind == "linear" and self.said("rope.scaling.factor") in (None, 1)
        return None if kind in (None, "none") or idle else str(kind)

    @property
    def _window(self) -> int | None:
        """Of attention; None where no layer has one, or none is shorter than the longest text."""
        window, longest = (getattr(self.config, name, None) for name in ("sliding_window", "max_position_embeddings"))
        layers = getattr(self.config, "layer_types", None)
        if not isinstance(window, int) or (layers and "sliding_attention" not in layers):
            return None
        return None if isinstance(longest, int) and window >= longest else window


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
