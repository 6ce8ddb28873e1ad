"""A gated delta net between its products: convolution, delta rule and gated norm along the segments of a packed batch.

Of its forward nothing is kept but what the first product made. The backward pass computes it again and lets autograd
differentiate it: it costs a few passes over memory beside the products, and would keep some twenty times its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup
from dpo_assets.training.engines.recurrent.delta_net import DeltaNet


@dataclass
class _Output:
    """[T, value width], until the last product has read it."""

    tensor: Tensor | None

    def take(self) -> Tensor:
        assert self.tensor is not None
        tensor, self.tensor = self.tensor, None
        return tensor


@dataclass(frozen=True)
class DeltaNetCore:
    """The core of a block.

    Attributes:
        widths: of the linear layers that read the input, side by side in the first product.
    """

    net: DeltaNet
    widths: list[int]

    @classmethod
    def of(cls, mixer: Any, first: FrozenGroup) -> DeltaNetCore:
        """Of a module that is a delta net, whose entries are the members of `first` in their order."""
        net = DeltaNet.of(mixer)
        assert net is not None
        return cls(net, first.widths)

    def run(self, projected: Tensor, stream: Stream, keep: bool) -> _Output:
        with torch.no_grad():
            return _Output(self.net.core(projected.split(self.widths, dim=1), stream.batch))

    def inner(self, projected: Tensor, inside: _Output, last: FrozenGroup) -> Tensor:
        return inside.take()

    def backward(self, grad: Tensor, projected: Tensor, inside: _Output, stream: Stream, out: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = projected.detach().requires_grad_()
            again = self.net.core(leaf.split(self.widths, dim=1), stream.batch)
        (d_projected,) = torch.autograd.grad(again, leaf, grad)
        out.copy_(d_projected)
        return again.detach()
