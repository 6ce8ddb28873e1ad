"""One decoder layer that computes its own backward pass, from two blocks.

A layer marked `recompute` keeps its input alone (gradient checkpointing, Chen et al., arXiv 1604.06174) and runs its
forward again, without the last product where nothing needs it: its output is the next layer's input and was never lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.engines.fused.block import Block
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup


@dataclass
class FusedLayer:
    """A mixer, then an MLP."""

    mixer: Block
    mlp: Block
    recompute: bool = False
    lowest: bool = False  # Nothing below it is trained.

    @property
    def groups(self) -> tuple[FrozenGroup, ...]:
        return (*self.mixer.groups, *self.mlp.groups)

    @property
    def trains(self) -> bool:
        """Whether the active adapter has trained parameters in it."""
        return any(p.requires_grad for block in (self.mixer, self.mlp) for p in block.trained)

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        """x, y [T, hidden]. The adapter's gradients go straight to the parameters' `.grad`."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Layer.apply(x, self, stream)
            return y
        middle, _ = self.mixer.forward(x, stream, keep=False)
        return self.mlp.forward(middle, stream, keep=False)[0]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FusedLayer, stream: Stream) -> Tensor:
        keep = not layer.recompute
        middle, of_mixer = layer.mixer.forward(x, stream, keep)
        y, of_mlp = layer.mlp.forward(middle, stream, keep)
        ctx.layer, ctx.stream = layer, stream
        ctx.kept = (x, middle, of_mixer, of_mlp) if keep else (x, None, None, of_mlp)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (x, middle, of_mixer, of_mlp), layer, stream = ctx.kept, ctx.layer, ctx.stream
        del ctx.kept  # Frees each layer's memory as soon as it is differentiated.
        if middle is None:
            middle, of_mixer = layer.mixer.forward(x, stream, keep=True)
            of_mlp = layer.mlp.replay(middle, stream, of_mlp)
        d_middle = layer.mixer.gradient_buffer(x)
        layer.mlp.backward(grads[0], middle, of_mlp, stream, d_middle[:, : x.shape[1]])
        del middle, of_mlp
        dx = None if layer.lowest else torch.empty_like(x)
        layer.mixer.backward(d_middle, x, of_mixer, stream, dx)
        return dx, None, None
