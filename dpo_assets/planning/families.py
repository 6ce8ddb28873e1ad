"""Families of decoders: what each computes beyond Llama, and what its config.json may leave out.

A row holds the defaults of the family's configuration class in Transformers 5.17, because config.json need not state
what equals a default, and says where its layers differ from Llama's. A new family is a row here and a tiny model in
the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_assets.planning.decoder import (
    Activation,
    Attention,
    Decoder,
    Experts,
    Layer,
    Mlp,
    Norms,
    QkNorm,
    Recurrent,
    Rope,
)

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """The text part of a config.json over its class's defaults. `beyond` collects what no word describes."""

    stated: Mapping[str, Any]
    defaults: Mapping[str, Any]
    beyond: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        """What is stated, null included, else the class's default.

        Raises:
            KeyError: where neither is.
        """
        return self.stated[key] if key in self.stated else self.defaults[key]

    def get(self, key: str) -> Any:
        return self[key] if key in self.stated or key in self.defaults else None

    @property
    def layers(self) -> int:
        return int(self["num_hidden_layers"])

    @property
    def hidden(self) -> int:
        return int(self["hidden_size"])

    @property
    def heads(self) -> int:
        return int(self["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim") or self.hidden // self.heads)

    def activation(self, key: str = "hidden_act") -> Activation:
        name = self[key]
        if name not in ACTIVATIONS:
            self.beyond.append(f"the activation {name}")
        return ACTIVATIONS.get(name, "silu")


def llama_attention(text: Text, number: int) -> Attention:
    """Llama's: grouped heads, rotated whole by halves; a window where the family has one in every layer."""
    return Attention(
        heads=text.heads,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        scale=text.head_dim**-0.5,
        rope=Rope(text.head_dim),
    )


def mistral_attention(text: Text, number: int) -> Attention:
    return _with(llama_attention(text, number), window=text["sliding_window"])


def qwen2_attention(text: Text, number: int) -> Attention:
    """Windows in the layers above `max_window_layers`, where they are switched on at all."""
    window = text["sliding_window"] if text["use_sliding_window"] else None
    kinds = text.get("layer_types")
    windowed = kinds[number] == "sliding_attention" if kinds else number >= text["max_window_layers"]
    return _with(llama_attention(text, number), window=window if windowed else None)


def qwen3_attention(text: Text, number: int) -> Attention:
    return _with(qwen2_attention(text, number), qk_norm=QkNorm())


def gated_mlp(text: Text, number: int) -> Mlp:
    return Mlp(int(text["intermediate_size"]), text.activation())


def nothing_more(text: Text) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A row: what differs from Llama.

    Attributes:
        defaults: of the configuration class, for keys that the description reads.
        whole: fields of `Decoder` beside its layers.
    """

    defaults: Mapping[str, Any]
    mixer: Callable[[Text, int], Attention | Recurrent] = llama_attention
    mlp: Callable[[Text, int], Mlp | Experts] = gated_mlp
    norms: Norms = field(default_factory=Norms)
    whole: Callable[[Text], Mapping[str, Any]] = nothing_more

    def describe(self, family: str, stated: Mapping[str, Any]) -> Decoder:
        text = Text(stated, self.defaults)
        layers = tuple(Layer(self.mixer(text, n), self.mlp(text, n), self.norms) for n in range(text.layers))
        values: dict[str, Any] = {
            "eps": float(text["rms_norm_eps"]),
            "tied": bool(text["tie_word_embeddings"]),
        } | dict(self.whole(text))
        beyond = dict.fromkeys([*filter(None, [values.pop("beyond", "")]), *text.beyond])
        return Decoder(
            family=family,
            hidden=text.hidden,
            vocabulary=int(text["vocab_size"]),
            layers=layers,
            beyond=", ".join(beyond),
            **values,
        )


def _with(attention: Attention, **changes: Any) -> Attention:
    return replace(attention, **changes)


LLAMA = {
    "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2 = LLAMA | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32, "use_sliding_window": False,
    "sliding_window": 4_096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA),
    "mistral": Family(
        LLAMA | {"intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4_096}, mistral_attention
    ),
    "qwen2": Family(QWEN2, qwen2_attention),
    "qwen3": Family(QWEN2 | {"head_dim": 128}, qwen3_attention),
}


def describe(config: Mapping[str, Any]) -> Decoder | None:
    """The decoder that a config.json describes; None where no row has its family.

    Raises:
        KeyError, TypeError, ValueError: for a config.json that its own class would not read.
    """
    stated = config.get("text_config") or config
    family = stated.get("model_type") or ""
    row = FAMILIES.get(family)
    return row.describe(family, stated) if row else None
