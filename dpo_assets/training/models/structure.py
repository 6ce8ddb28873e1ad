"""Where the parts of a loaded model are, whatever its family calls them, and an adapter around it or none."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpo_assets.errors import ConfigError
from dpo_assets.planning.decoder import Decoder
from dpo_assets.planning.families import describe


def causal_lm(model: Any) -> Any:
    """The Transformers model inside a PEFT wrapper, its LoRA layers still in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(lm: Any) -> Any | None:
    """What makes hidden states of token ids; None where the model does not say."""
    # Llama 4's names its own prefix wrongly, so that Transformers takes the whole model for its decoder.
    found = [module for module in (lm.get_decoder(), getattr(lm, "model", None)) if module is not None]
    return next((module for module in found if module is not lm), None)


def description_of(lm: Any) -> Decoder | None:
    """What a loaded model computes, from its configuration; None where nothing describes its family."""
    return describe(lm.config.get_text_config().to_dict())


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in the model.

    Raises:
        ConfigError: when there is none, or nothing tells which one it is.
    """
    lm = causal_lm(model)
    decoder, layers = lm.get_decoder(), lm.config.get_text_config().num_hidden_layers
    lists = {name: held for name, held in lm.named_modules() if isinstance(held, nn.ModuleList) and len(held) == layers}
    own = {name: held for name, held in lists.items() if any(child is held for child in decoder.children())}
    # Llama 4's decoder is the whole language model: one of its children owns the list.
    below = {
        name: held
        for name, held in lists.items()
        if any(grandchild is held for child in decoder.children() for grandchild in child.children())
    }
    if not own and len(below) != 1:
        has = f"several, {', '.join(below)}" if below else "none"
        raise ConfigError(
            f"{type(lm).__name__} should have one list of its {layers} decoder layers, and has {has}; take a decoder "
            "language model of another family."
        )
    return next(iter((own or below).items()))
