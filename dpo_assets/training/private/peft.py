"""Private names of PEFT. Read of 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_assets.training.private.library import Library

PEFT = Library("peft", "0.21.2", "pip install -c constraints.txt peft")


class Lora(Protocol):
    """What is read of `peft.tuners.lora.LoraLayer`, the module that stands in an adapted layer's place.

    Attributes:
        base_layer: the layer itself.
        lora_A, lora_B: A [r, in] and B [out, r] by the adapter's name.
        r, scaling: rank, and what B A is multiplied by.
        use_dora, lora_bias, lora_dropout: what makes an adapter more than B A.
        active_adapters: names of those that are computed now.
        disable_adapters: whether none is.
    """

    base_layer: nn.Module
    lora_A: Mapping[str, nn.Linear]  # noqa: N815 - as PEFT calls it
    lora_B: Mapping[str, nn.Linear]  # noqa: N815
    r: Mapping[str, int]
    scaling: Mapping[str, float]
    use_dora: Mapping[str, bool]
    lora_bias: Mapping[str, bool]
    lora_dropout: Mapping[str, nn.Module]

    @property
    def active_adapters(self) -> Sequence[str]: ...

    @property
    def disable_adapters(self) -> bool: ...


_READ = (
    *("base_layer", "lora_A", "lora_B", "r", "scaling", "use_dora", "lora_bias", "lora_dropout"),
    *("active_adapters", "disable_adapters", "get_base_layer"),
)


@cache
def lora_layer() -> type[Any]:
    """`peft.tuners.lora.LoraLayer`, with all that `Lora` names."""
    layer: type[Any] = PEFT.find("peft.tuners.lora", "LoraLayer")
    with torch.random.fork_rng(devices=[]):  # What is drawn after a seed stays what it was.
        made = PEFT.made("LoraLayer", lambda: layer(nn.Linear(1, 1)))
    PEFT.check_has("LoraLayer", made, _READ)
    return layer


def lora_of(module: nn.Module, adapter: str) -> Lora | None:
    """An adapted layer as it is read here; None where it has no adapter of that name."""
    return module if isinstance(module, lora_layer()) and adapter in module.lora_A else None


@cache
def _dequantize() -> Any:
    function = PEFT.find("peft.utils.integrations", "dequantize_module_weight")
    PEFT.check_call("dequantize_module_weight", function, ("module",))
    return function


def dequantised(base: nn.Module) -> Tensor:
    """`peft.utils.integrations.dequantize_module_weight`: the weight [out, in] of a layer however it is kept."""
    weight: Tensor = _dequantize()(base)
    return weight


@cache
def _parameter_wrapper() -> type[Any]:
    wrapper: type[Any] = PEFT.find("peft.tuners.lora.layer", "ParamWrapper")
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.zeros(2, 1, 1), requires_grad=False)
    config = PEFT.find("peft", "LoraConfig")()
    with torch.random.fork_rng(devices=[]):
        made = PEFT.made(
            "ParamWrapper", lambda: wrapper(experts, "default", parameter_name="weight", config=config, r=1)
        )
    PEFT.check_has("ParamWrapper", made, ("parameter_name", "num_experts", "get_param"))
    return wrapper


def parameter_of(module: nn.Module) -> str | None:
    """`ParamWrapper.parameter_name`: the parameter that a module adapts, in place of a linear layer's weight."""
    return str(module.parameter_name) if isinstance(module, _parameter_wrapper()) else None


def stacked_weight(module: nn.Module) -> Tensor:
    """`ParamWrapper.get_param`: the parameter itself [experts, ...]."""
    weight: Tensor = module.get_param()  # type: ignore[operator]
    return weight


def experts_of(module: nn.Module) -> int:
    """`ParamWrapper.num_experts`: how many experts' factors one A and one B hold; 1 of a linear layer."""
    return int(module.num_experts) if isinstance(module, _parameter_wrapper()) else 1  # type: ignore[arg-type]
