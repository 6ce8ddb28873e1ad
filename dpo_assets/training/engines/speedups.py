"""Faster layers for what runs on Transformers' own: Liger's kernels, and torch.compile layer by layer.

Both round differently from the plain layers, so both are part of what a reference score depends on. A compiled layer
has two graphs, one for training and one for no_grad, and nothing promises that they round alike (on an H100 with
OPTIONS they did, within 0.0001 nats a row). So where layers are compiled, whatever is compared with the policy goes
through the policy's graph: gradients are recorded and thrown away (`Engine.as_the_policy`). Unsloth's forwards part in
the same way (`unsloth.engine.reference_mode`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.models.structure import causal_lm, decoder_layers
from dpo_assets.training.private.liger import patches

BACKEND = "inductor"
# Round where the plain layers do: by default what is fused stays in fp32, so that rounding depends on what a graph
# happens to fuse, and two graphs of one layer part.
OPTIONS = {"emulate_precision_casts": True}


def speed_up(model: Any, plan: TrainingPlan) -> None:
    """Puts the plan's speedups into a loaded model, its adapter attached.

    Raises:
        ConfigError: when Liger is not installed, or knows no kernels for the architecture.
    """
    lm = causal_lm(model)
    if "liger" in plan.speedups:
        _apply_liger(lm)
    if "compile" in plan.speedups:
        for layer in decoder_layers(lm)[1]:
            # Packed forwards differ in length; static shapes would compile each one anew.
            layer.compile(backend=BACKEND, dynamic=True, options=OPTIONS if BACKEND == "inductor" else None)


def _apply_liger(lm: Any) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "hardware.speedups `liger` needs the package liger-kernel, which this environment lacks: "
            "pip install 'dpo-assets[liger]', or leave it out."
        )
    liger = patches()
    kind = lm.config.model_type
    if kind not in liger.known:
        known = ", ".join(sorted(liger.known))
        raise ConfigError(f"Liger has no layers for `{kind}`; it has: {known}. Leave `liger` out of hardware.speedups.")
    # Layers only: the head is this project's, and it is scored in fp32.
    liger.apply(lm, fused_linear_cross_entropy=False, cross_entropy=False)
