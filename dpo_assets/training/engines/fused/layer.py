"""One decoder layer that computes its own backward pass.

What a layer keeps is decided here and not by autograd: its two inputs, q, k, v, the attention's output, gate and up.
Everything elementwise is computed again, because that costs less than the memory. A layer marked `recompute` keeps its
input alone (gradient checkpointing, Chen et al., arXiv 1604.06174) and runs its forward again, without the down
projection, whose output is the next layer's input and was never lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.batches.packing import PackedBatch
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.attention import Attended, Heads, attend, attend_backward
from dpo_assets.training.engines.fused.ops import Angles
from dpo_assets.training.engines.fused.weights import FrozenGroup


@dataclass(frozen=True)
class Stream:
    """A packed batch on the device, with the rotary tables of its positions."""

    batch: PackedBatch
    angles: Angles


@dataclass(frozen=True)
class _Kept:
    """Of a layer's forward. `thin_*` are x A^T of each group, a few columns wide."""

    rstd1: Tensor
    thin_qkv: Tensor
    attended: Attended
    thin_out: Tensor
    middle: Tensor
    rstd2: Tensor
    thin_gate_up: Tensor
    gate_up: Tensor


@dataclass
class FusedLayer:
    """x + attention(norm(x)), then + mlp(norm(.)): a layer of the Llama family."""

    qkv: FrozenGroup
    out: FrozenGroup
    gate_up: FrozenGroup
    down: FrozenGroup
    norm1: Tensor
    norm2: Tensor
    eps: float
    heads: Heads
    recompute: bool = False
    lowest: bool = False  # Nothing below it is trained.

    @property
    def groups(self) -> tuple[FrozenGroup, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    def __call__(self, x: Tensor, stream: Stream) -> Tensor:
        """x, y [T, hidden]. The adapter's gradients go straight to the parameters' `.grad`."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Layer.apply(x, self, stream)
            return y
        kept = self.until_down(x, stream, differentiable=False)
        return self.down_projection(kept)[0]

    def _normed(self, x: Tensor, weight: Tensor, group: FrozenGroup) -> tuple[Tensor, Tensor]:
        buffer = group.input_buffer(len(x))
        return buffer, ops.rms_norm(x, weight, self.eps, buffer[:, : group.inputs])

    def until_down(self, x: Tensor, stream: Stream, differentiable: bool) -> _Kept:
        normed, rstd1 = self._normed(x, self.norm1, self.qkv)
        qkv, thin_qkv = self.qkv.forward(normed)
        thin_qkv = thin_qkv.clone() if differentiable else thin_qkv
        del normed
        attended = attend(qkv, self.heads, stream.angles, stream.batch, differentiable)
        middle, thin_out = self.out.forward_plain(attended.out, residual=x)
        normed, rstd2 = self._normed(middle, self.norm2, self.gate_up)
        gate_up, thin_gate_up = self.gate_up.forward(normed)
        thin_gate_up = thin_gate_up.clone() if differentiable else thin_gate_up
        return _Kept(rstd1, thin_qkv, attended, thin_out, middle, rstd2, thin_gate_up, gate_up)

    def down_projection(self, kept: _Kept) -> tuple[Tensor, Tensor]:
        buffer = self.down.input_buffer(len(kept.middle))
        ops.gated(kept.gate_up, buffer[:, : self.down.inputs])
        y, thin = self.down.forward(buffer, residual=kept.middle)
        return y, thin.clone()

    def backward(self, dy: Tensor, x: Tensor, kept: _Kept, thin_down: Tensor, stream: Stream) -> Tensor | None:
        """Gradient of x [T, hidden]; the adapter's gradients are accumulated on the way."""
        tokens = len(x)
        # down
        grad = self.down.grad_buffer(tokens)
        grad[:, : self.down.outputs] = dy
        self.down.complete(grad)
        d_act = self.down.backward(grad)
        d_gate_up = self.gate_up.grad_buffer(tokens)
        ops.gated_backward(kept.gate_up, d_act, d_gate_up[:, : self.gate_up.outputs])
        self.down.accumulate(grad, d_act, thin_down)
        del grad, d_act
        # gate and up, second norm
        self.gate_up.complete(d_gate_up)
        d_normed = self.gate_up.backward(d_gate_up)
        normed = torch.empty_like(x)
        ops.rms_norm(kept.middle, self.norm2, self.eps, normed)
        self.gate_up.accumulate(d_gate_up, normed, kept.thin_gate_up)
        del d_gate_up
        d_middle = self.out.grad_buffer(tokens)
        d_residual = d_middle[:, : self.out.outputs]
        ops.rms_norm_backward(d_normed, kept.middle, self.norm2, kept.rstd2, dy, d_residual)
        # attention
        self.out.complete(d_middle)
        d_attended = self.out.backward(d_middle)
        self.out.accumulate(d_middle, kept.attended.out, kept.thin_out)
        d_qkv = self.qkv.grad_buffer(tokens)
        attend_backward(
            d_attended, kept.attended, self.heads, stream.angles, stream.batch, d_qkv[:, : self.qkv.outputs]
        )
        del d_attended
        # q, k and v, first norm
        self.qkv.complete(d_qkv)
        ops.rms_norm(x, self.norm1, self.eps, normed)
        self.qkv.accumulate(d_qkv, normed, kept.thin_qkv)
        if self.lowest:
            return None
        d_normed = self.qkv.backward(d_qkv)
        return ops.rms_norm_backward(d_normed, x, self.norm1, kept.rstd1, d_residual, normed)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FusedLayer, stream: Stream) -> Tensor:
        kept = layer.until_down(x, stream, differentiable=not layer.recompute)
        y, thin_down = layer.down_projection(kept)
        ctx.layer, ctx.stream = layer, stream
        ctx.kept = (x, None if layer.recompute else kept, thin_down)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        x, kept, thin_down = ctx.kept
        del ctx.kept  # Frees each layer's memory as soon as it is differentiated.
        if kept is None:
            kept = ctx.layer.until_down(x, ctx.stream, differentiable=True)
        return ctx.layer.backward(grads[0], x, kept, thin_down, ctx.stream), None, None
