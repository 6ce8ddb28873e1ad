"""The gated MLP between its products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.ops import Activation
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup


@dataclass(frozen=True)
class GatedCore:
    """activation(gate) * up; gate's columns stand before up's."""

    activation: Activation

    def run(self, projected: Tensor, stream: Stream, keep: bool) -> None:
        """Nothing is worth keeping."""

    def inner(self, projected: Tensor, inside: None, last: FrozenGroup) -> Tensor:
        buffer = last.input_buffer(len(projected))
        ops.gated(projected, buffer[:, : last.inputs], self.activation)
        return buffer

    def backward(self, grad: Tensor, projected: Tensor, inside: None, stream: Stream, out: Tensor) -> Tensor:
        ops.gated_backward(projected, grad, out, self.activation)
        return grad  # Now the activation.
