"""Private names of bitsandbytes. Read of 0.50.2. Weights are told by the names of their classes, without an import."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from dpo_assets.training.private.library import Library

BITSANDBYTES = Library(
    "bitsandbytes", "0.50.2", "pip install 'bitsandbytes==0.50.2', or set hardware.precision to bf16"
)


class NestedState(Protocol):
    """Scales in 8 bit: a table, one scale for each `blocksize` of them."""

    code: Tensor
    absmax: Tensor
    blocksize: int


class QuantState(Protocol):
    """What is read of `Params4bit.quant_state` (`functional.QuantState`).

    Attributes:
        code: [16] values of the codes.
        absmax: a scale for each `blocksize` weights, or its code where they are `nested` in `state2`.
        offset: what is added to nested scales.
    """

    shape: tuple[int, ...]
    code: Tensor
    absmax: Tensor
    blocksize: int
    nested: bool
    offset: Tensor
    state2: NestedState


def four_bit_state(weight: Any) -> QuantState:
    """`Params4bit.quant_state` of a weight that is on its device.

    Raises:
        ConfigError: when it lacks something.
    """
    BITSANDBYTES.check_has("Params4bit", weight, ("quant_state",))
    state: QuantState = weight.quant_state
    BITSANDBYTES.check_has("QuantState", state, ("shape", "code", "absmax", "blocksize", "nested", "offset", "state2"))
    if state.nested:
        BITSANDBYTES.check_has("the nested QuantState", state.state2, ("code", "absmax", "blocksize"))
    return state


def row_scales(linear: nn.Module) -> Tensor:
    """[out] largest absolute value of each row of an `Int8Params` weight: its `SCB`, which bitsandbytes moves from the
    weight into the layer's `state` at its first own forward.

    Raises:
        ConfigError: when neither has them.
    """
    weight: Any = linear.weight
    BITSANDBYTES.check_has("Int8Params", weight, ("SCB",))
    if weight.SCB is not None:
        scales: Tensor = weight.SCB
        return scales
    state = getattr(linear, "state", None)
    BITSANDBYTES.check_has("Linear8bitLt.state", state, ("SCB",))
    moved: Tensor = state.SCB  # type: ignore[union-attr]
    return moved
