"""A family as a row: the defaults of its configuration class, and where its layers differ from Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_assets.planning.decoder import Attention, Decoder, Experts, Layer, Mlp, Norms, Recurrent
from dpo_assets.planning.families.text import Text

BEFORE = Norms()
AFTER = Norms(
    before_mixer="",
    after_mixer="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)
AROUND = Norms(
    after_mixer="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def attention(text: Text, **differs: Any) -> Attention:
    """Llama's attention of grouped heads, rotated whole by halves, with what differs from it."""
    plain: dict[str, Any] = {
        "heads": text.heads, "kv_heads": text.kv_heads, "head_dim": text.head_dim, "scale": text.head_dim**-0.5,
    }  # fmt: skip
    if "rope" not in differs:
        plain["rope"] = text.rope()
    return Attention(**plain | differs)


def llama_attention(text: Text, number: int) -> Attention:
    return attention(text)


def gated_mlp(text: Text, number: int) -> Mlp:
    return Mlp(text.width, text.activation())


def fused_mlp(text: Text, number: int) -> Mlp:
    """One module makes gate and up."""
    return Mlp(text.width, text.activation(), projections=("gate_up_proj",))


def nothing_else(text: Text) -> Mapping[str, Any]:
    return {}


def around_zero(text: Text) -> Mapping[str, Any]:
    """Norms whose weights are kept around zero."""
    return {"norm_offset": 1.0}


@dataclass(frozen=True)
class Family:
    """What a family computes, as far as it differs from Llama.

    Attributes:
        models: what its models are called.
        defaults: of its configuration class, for the keys that its description reads.
        whole: fields of `Decoder` beside its layers.
        eps: key of the norms' epsilon.
        beyond, row_by_row: of all its models, as in `Decoder`.
        beside: the second mixer of every layer.
        usual: what its published models set that decides which engines compute them, where it is no default.
        other_names: keys that it has under another name, and that name's meaning; stated, they win.
    """

    models: str
    defaults: Mapping[str, Any]
    mixer: Callable[[Text, int], Attention | Recurrent] = llama_attention
    mlp: Callable[[Text, int], Mlp | Experts] = gated_mlp
    norms: Norms = BEFORE
    whole: Callable[[Text], Mapping[str, Any]] = nothing_else
    eps: str = "rms_norm_eps"
    beyond: str = ""
    row_by_row: str = ""
    beside: Callable[[Text, int], Recurrent] | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)

    def describe(self, family: str, stated: Mapping[str, Any]) -> Decoder:
        """The decoder of a config.json's text part.

        Raises:
            LookupError, TypeError, ValueError, ArithmeticError: for one that its own class would not read either.
        """
        renamed = {key: stated[other] for other, key in self.other_names.items() if other in stated}
        text = Text({**stated, **renamed}, self.defaults, [self.beyond] if self.beyond else [])
        layers = tuple(self._layer(text, number) for number in range(text.layers))
        whole = {"tied": bool(text["tie_word_embeddings"])} | dict(self.whole(text))
        return Decoder(
            family=family,
            hidden=text.hidden,
            vocabulary=int(text["vocab_size"]),
            layers=layers,
            eps=float(text[self.eps]),
            beyond=", ".join(dict.fromkeys(text.beyond)),
            row_by_row=self.row_by_row,
            **whole,
        )

    def _layer(self, text: Text, number: int) -> Layer:
        beside = self.beside(text, number) if self.beside else None
        return Layer(self.mixer(text, number), self.mlp(text, number), self.norms, beside)
