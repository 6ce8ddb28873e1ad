"""Computing the lowest layers again in the backward pass, where the model's own layers compute (Chen et al., arXiv
1604.06174).

Transformers' `gradient_checkpointing_enable` is for all layers or none. The plan says how many have to be recomputed to
fit, so the flag is taken from the layers above. The lowest are differentiated last, when the memory of all others is
free again.
"""

from __future__ import annotations

from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.training.models.structure import causal_lm, decoder_layers, decoder_of
from dpo_assets.training.private.transformers import checkpointing_layer


def recompute_lowest(model: Any, layers: int) -> None:
    """From now on the lowest `layers` decoder layers keep their input alone while training.

    Where a model's layers are not Transformers' checkpointing layers, or nothing tells which modules its layers are,
    all of them are recomputed, or none.

    Raises:
        ConfigError: for a model that cannot recompute any.
    """
    lm = causal_lm(model)
    if not layers:
        if lm.supports_gradient_checkpointing:
            lm.gradient_checkpointing_disable()
        return
    if not lm.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(lm).__name__} cannot recompute its layers in the backward pass, and the plan recomputes {layers} "
            "to fit. Lower feedback.max_length, or use a card with more memory: `dpo-assets plan` says which would do."
        )
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if decoder_of(lm) is None:
        return
    try:
        upper = decoder_layers(lm)[1][layers:]
    except ConfigError:
        return
    for layer in upper:
        for module in layer.modules():
            if isinstance(module, checkpointing_layer()):
                module.gradient_checkpointing = False
