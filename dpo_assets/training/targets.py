"""The matrices of a loaded model's decoder layers: which of them PEFT is told to adapt, and which have an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_assets.planning.matrices import Matrices, Role, is_stack, role_of
from dpo_assets.planning.targets import Covered, LoraCoverage, all_linear, refuse_unknown
from dpo_assets.recipe import EVERY_LINEAR, LoraSection

_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """One weight of a decoder layer: where it is in the model, and where in its layer."""

    full: str  # "model.layers.0.self_attn.q_proj", or of experts the parameter's own name.
    kind: Matrices
    adapted: bool


def peft_targets(model: nn.Module, lora: LoraSection) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` of a LoraConfig, so that it adapts what the section says and no more.

    Short names where they mean nothing outside the decoder layers (an adapter is easier to read, and fits a base of
    another size), full ones otherwise: a multimodal model has a `q_proj` in its vision tower too.

    Raises:
        ConfigError: for a name that matches nothing, with what the model has.
    """
    places = list(places_of(model))
    kinds = [place.kind for place in places]
    names = all_linear(kinds) if lora.target_modules == EVERY_LINEAR else list(lora.target_modules)
    refuse_unknown(names, lora.target_parameters, _distinct(kinds), type(model).__name__, exact=True)
    linear = {p.full for p in places if p.kind.role != "experts" and any(p.kind.answers_to(name) for name in names)}
    if lora.target_modules == EVERY_LINEAR:
        linear -= {p.full for p in places if p.kind.role == "router"}
    experts = {
        p.full for p in places if p.kind.role == "experts" and any(p.kind.answers_to(n) for n in lora.target_parameters)
    }
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    exact = _ending_in(lora.target_parameters, parameters) == experts
    return {
        "target_modules": names if _ending_in(names, modules) == linear else sorted(linear),
        # None and not empty: that is what a plain adapter has.
        "target_parameters": (lora.target_parameters if exact else sorted(experts)) or None,
    }


def coverage(model: nn.Module, adapter: str) -> LoraCoverage:
    """What of the decoder layers has an adapter of that name, as the model is now."""
    kinds: dict[str, Covered] = {}
    for place in places_of(model, adapter):
        known = kinds.get(place.kind.name)
        weights = place.kind.weights + (known.weights if known else 0)
        adapted = place.kind.weights * place.adapted + (known.adapted if known else 0)
        kinds[place.kind.name] = Covered(name=place.kind.name, role=place.kind.role, weights=weights, adapted=adapted)
    return LoraCoverage(kinds=tuple(kinds.values()))


def places_of(model: nn.Module, adapter: str = "") -> Iterator[Place]:
    """Linear layers and stacked experts of the decoder layers, in their order, adapted ones by their own name."""
    name, layers = _decoder_layers(model)
    for number, layer in enumerate(layers):
        adapted = {
            _WRAPPED.sub("", f".{path}") + (f".{module.parameter_name}" if hasattr(module, "parameter_name") else "")
            for path, module in layer.named_modules()
            if isinstance(module, LoraLayer) and adapter in module.lora_A
        }
        for path, shape, stacked in _weights(layer):
            role: Role = "experts" if stacked else "router" if role_of(path) == "router" else "linear"
            kind = re.sub(r"\.experts\.\d+\.", ".experts.", f".{path}")[1:]
            matrices = Matrices.of(kind, role, [(shape[-2], shape[-1])] * (shape[0] if stacked else 1))
            yield Place(f"{name}.{number}.{path}", matrices, f".{path}" in adapted)


def _weights(layer: nn.Module) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(path, shape, whether it is stacked experts) of each weight that LoRA can be put on."""
    for path, module in layer.named_modules():
        if ".lora_" in f".{path}":
            continue
        plain = _WRAPPED.sub("", f".{path}")[1:]
        if isinstance(module, nn.Linear):  # Quantised layers pack their weight, so its own shape says nothing.
            yield plain, (module.out_features, module.in_features), False
        elif isinstance(module, Conv1D):
            yield plain, (module.nf, module.nx), False
        elif not isinstance(module, LoraLayer):
            for own, parameter in module.named_parameters(recurse=False):
                if is_stack(f"{plain}.{own}", parameter.shape):
                    yield f"{plain}.{own}", tuple(parameter.shape), True


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in the model."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, layers = lm.get_decoder(), lm.config.get_text_config().num_hidden_layers
    for name, module in lm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and any(m is module for m in decoder.children()):
            return name, module
    raise AssertionError(f"{type(lm).__name__} has no list of {layers} decoder layers")


def _ending_in(names: list[str], paths: list[str]) -> set[str]:
    """What PEFT takes these names for."""
    return {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}


def _distinct(kinds: list[Matrices]) -> list[Matrices]:
    return list({kind.name: kind for kind in kinds}.values())
