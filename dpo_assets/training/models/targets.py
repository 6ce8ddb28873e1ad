"""The matrices of a loaded model's decoder layers: which of them PEFT is told to adapt, and which have an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_assets.errors import ConfigError
from dpo_assets.planning.matrices import Matrices, Role, is_stack, role_of
from dpo_assets.planning.targets import Covered, LoraCoverage, all_linear, refuse_unknown
from dpo_assets.planning.weights import listed
from dpo_assets.recipe import EVERY_LINEAR, LoraSection
from dpo_assets.training.models.structure import decoder_layers
from dpo_assets.training.private.peft import lora_layer, lora_of, parameter_of

_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """One weight of a decoder layer: where it is in the model, and where in its layer."""

    full: str  # "model.layers.0.self_attn.q_proj", or of experts the parameter's own name.
    kind: Matrices
    adapted: bool


@dataclass(frozen=True)
class Chosen:
    """What a section means in a loaded model: its names, and the full names of linear layers and of experts."""

    names: list[str]
    linear: frozenset[str]
    experts: frozenset[str]


def chosen_places(model: nn.Module, lora: LoraSection) -> Chosen:
    """The places that a section puts an adapter on.

    Raises:
        ConfigError: for a name that matches nothing, with what the model has.
    """
    places = list(places_of(model))
    kinds, every = _distinct([place.kind for place in places]), lora.target_modules == EVERY_LINEAR
    names = all_linear(kinds, model.config.model_type) if every else list(lora.target_modules)
    refuse_unknown(names, lora.target_parameters, kinds, type(model).__name__, exact=True)
    roles: tuple[Role, ...] = ("linear",) if every else ("linear", "router")
    return Chosen(
        names,
        frozenset(p.full for p in places if p.kind.role in roles and any(map(p.kind.answers_to, names))),
        frozenset(
            p.full for p in places if p.kind.role == "experts" and any(map(p.kind.answers_to, lora.target_parameters))
        ),
    )


def refuse_other_places(model: nn.Module, adapter: str, chosen: Chosen) -> None:
    """PEFT rewrites the targets of some model types (experts that Transformers 5 stores otherwise than 4).

    Raises:
        ConfigError: when an adapter is elsewhere than it was asked for, with the names of both.
    """
    asked = chosen.linear | chosen.experts
    has = {place.full for place in places_of(model, adapter) if place.adapted}
    if has == asked:
        return
    faults = [f"{listed(_in_layer(has - asked))} would be adapted"] if has - asked else []
    faults += [f"{listed(_in_layer(asked - has))} would stay frozen"] if asked - has else []
    raise ConfigError(
        f"PEFT reads lora.target_modules [{', '.join(chosen.names)}] otherwise than the plan: {', and '.join(faults)}. "
        "Leave the frozen names out of lora.target_modules, and name experts in lora.target_parameters."
    )


def _in_layer(places: AbstractSet[str]) -> list[str]:
    """Names of places without the number of their layer."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", place) for place in places})


def peft_targets(model: nn.Module, lora: LoraSection) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` of a LoraConfig, so that it adapts what the section says and no more.

    Short names where they mean nothing outside the decoder layers (an adapter is easier to read, and fits a base of
    another size), full ones otherwise: a multimodal model has a `q_proj` in its vision tower too.

    Raises:
        ConfigError: for a name that matches nothing, with what the model has.
    """
    chosen = chosen_places(model, lora)
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    exact = _ending_in(lora.target_parameters, parameters) == chosen.experts
    plain = _ending_in(chosen.names, modules) == chosen.linear
    return {
        "target_modules": chosen.names if plain else sorted(chosen.linear),
        # None and not empty: that is what a plain adapter has.
        "target_parameters": (lora.target_parameters if exact else sorted(chosen.experts)) or None,
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
    name, layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        adapted = {
            _WRAPPED.sub("", f".{path}") + (f".{parameter}" if (parameter := parameter_of(module)) else "")
            for path, module in layer.named_modules()
            if lora_of(module, adapter) is not None
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
        elif isinstance(module, Conv1D):  # GPT-2's linear layers keep their weight the other way round.
            yield plain, (module.nf, module.nx), False
        elif not isinstance(module, lora_layer()):
            for own, parameter in module.named_parameters(recurse=False):
                if is_stack(f"{plain}.{own}", parameter.shape):
                    yield f"{plain}.{own}", tuple(parameter.shape), True


def _ending_in(names: list[str], paths: list[str]) -> set[str]:
    """What PEFT takes these names for."""
    return {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}


def _distinct(kinds: list[Matrices]) -> list[Matrices]:
    return list({kind.name: kind for kind in kinds}.values())
