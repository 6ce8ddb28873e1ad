"""Families of decoders: what each computes beyond Llama, and what its config.json may leave out.

A row holds the defaults of the family's configuration class in Transformers 5.17, because config.json need not state
what equals a default, and says where its layers differ from Llama's. A new family is a row here and a tiny model in
the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.planning.decoder import Decoder
from dpo_assets.planning.families.dense import DENSE
from dpo_assets.planning.families.experts import EXPERTS
from dpo_assets.planning.families.gemma import GEMMAS
from dpo_assets.planning.families.hybrid import HYBRID
from dpo_assets.planning.families.other import OTHER
from dpo_assets.planning.families.row import Family

__all__ = ["FAMILIES", "Family", "describe"]

FAMILIES: dict[str, Family] = DENSE | GEMMAS | EXPERTS | HYBRID | OTHER
# Checkpoints with more than text, whose text part may leave its type to them.
TEXT_OF = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "llama4": "llama4_text", "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
}  # fmt: skip


def describe(config: Mapping[str, Any]) -> Decoder | None:
    """The decoder that a config.json describes; None where no row has its family.

    Raises:
        LookupError, TypeError, ValueError, ArithmeticError: for a config.json that its own class would not read either.
    """
    stated: Mapping[str, Any] = config.get("text_config") or {}
    if stated and "tie_word_embeddings" in config:
        stated = {"tie_word_embeddings": config["tie_word_embeddings"]} | dict(stated)
    stated = stated or config
    outer = config.get("model_type") or ""
    family = stated.get("model_type") or TEXT_OF.get(outer, outer)
    row = FAMILIES.get(family)
    return row.describe(family, stated) if row else None
