"""The text part of a config.json, read as its configuration class in Transformers would read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_assets.planning.decoder import Activation, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}  # fmt: skip
# Names that layer types had in earlier checkpoints (`configuration_utils.remap_legacy_layer_types`).
LAYER_TYPES = {"conv": "linear_attention", "mamba": "linear_attention", "attention": "full_attention"}
SLIDING, FULL, RECURRENT = "sliding_attention", "full_attention", "linear_attention"


@dataclass(frozen=True)
class Text:
    """What is stated, over the defaults of the class.

    Attributes:
        beyond: collects what is met that no word of a description tells.
    """

    stated: Mapping[str, Any]
    defaults: Mapping[str, Any]
    beyond: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        """What is stated, null included, else the default.

        Raises:
            KeyError: where neither is.
        """
        return self.stated[key] if key in self.stated else self.defaults[key]

    def get(self, key: str) -> Any:
        """The same, None where neither is."""
        return self.stated.get(key, self.defaults.get(key))

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

    @property
    def width(self) -> int:
        return int(self["intermediate_size"])

    def activation(self, key: str = "hidden_act") -> Activation:
        name = self[key]
        if name not in ACTIVATIONS:
            self.beyond.append(f"the activation {name}")
        return ACTIVATIONS.get(name, "silu")

    def layer_type(self, number: int, full_every: int, others: str = SLIDING) -> str:
        """The stated type of a layer, else `full_attention` for each n-th (0: for none) and `others` between."""
        if stated := self.get("layer_types"):
            return LAYER_TYPES.get(stated[number], str(stated[number]))
        return FULL if full_every and (number + 1) % full_every == 0 else others

    def rope(
        self,
        *,
        head_dim: int | None = None,
        pairs: Literal["halves", "neighbours"] = "halves",
        partial: float | None = None,
        table: str = "",
        axes: int = 1,
    ) -> Rope:
        """How a layer rotates.

        Args:
            partial: the share of a head that is rotated where nothing states it; None for families that rotate it all.
            table: the layer's type, in families that have a table for each.
        """
        stated, dim = self.rope_parameters(table), head_dim or self.head_dim
        if partial is not None:
            share = stated.get("partial_rotary_factor", self.stated.get("partial_rotary_factor", partial))
            dim = int(dim * share)
        return Rope(dim, pairs, table, axes, self._fixed_up_to(stated))

    def rope_parameters(self, table: str = "") -> Mapping[str, Any]:
        """Parameters of a rotary table: those of Transformers 5, or `rope_scaling` as earlier checkpoints have it.

        Where each layer type has a table, `rope_scaling` is that of full attention (Gemma 3, OLMo 3).
        """
        new: Mapping[str, Any] = self.get("rope_parameters") or {}
        old: Mapping[str, Any] = self.stated.get("rope_scaling") or {}
        if not table:
            return old or new
        return {**(new.get(table) or {}), **(old if table == FULL else {})}

    def _fixed_up_to(self, rope: Mapping[str, Any]) -> int | None:
        """Up to which length the tables stay (`modeling_rope_utils.dynamic_rope_update`)."""
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "dynamic":
            return int(self["max_position_embeddings"])
        if kind not in ("longrope", "su"):
            return None
        names = (self.get("original_max_position_embeddings"), rope.get("original_max_position_embeddings"))
        return int(next((length for length in names if length), self["max_position_embeddings"]))
