"""Blocks: the two halves of a decoder layer, mixer and MLP, each with a backward pass of its own.

A block computes y = x + scale * norm(f(norm(x))), either norm optional. What it keeps for its backward pass is decided
here and not by autograd: the norms' scales, the projections, attention's output. Everything elementwise is computed
again, because that costs less than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup


class Block(Protocol):
    """Half a decoder layer on a stream of T tokens. Its adapter's gradients go straight to the parameters' `.grad`."""

    @property
    def groups(self) -> Sequence[FrozenGroup]:
        """Its frozen matrices, whose copies of the adapter are renewed before a forward."""

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """The active adapter's parameters in it."""

    def forward(self, x: Tensor, stream: Stream, keep: bool) -> tuple[Tensor, Any]:
        """y [T, hidden] of x [T, hidden], and what `backward` needs beside x.

        With `keep` false that is next to nothing: `replay` makes the rest of it.
        """

    def replay(self, x: Tensor, stream: Stream, light: Any) -> Any:
        """What a forward with `keep` returns beside y, from what one without it returned."""

    def gradient_buffer(self, x: Tensor) -> Tensor:
        """[T, >= hidden], for x [T, hidden]: a gradient of y that stands in its first columns need not be copied."""

    def backward(self, dy: Tensor, x: Tensor, kept: Any, stream: Stream, out: Tensor | None) -> None:
        """Writes the gradient of x to `out` [T, hidden] and accumulates the adapter's.

        Args:
            dy: [T, hidden], or a gradient buffer; overwritten in its further columns.
            out: None where nothing below is trained.
        """


@dataclass(frozen=True)
class Norm:
    """RMS norm of the hidden width; its weight [hidden] has the family's offset in it."""

    weight: Tensor
    eps: float

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, skip: Tensor | None, out: Tensor) -> None:
        ops.rms_norm_backward(dy, x, self.weight, rstd, skip, out)


@dataclass(frozen=True)
class Residual:
    """How a block stands beside the residual stream.

    Attributes:
        scale: of what is added; in the weight of `after` already where there is one.
    """

    before: Norm | None
    after: Norm | None = None
    scale: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the gradient of what is added is that of the sum."""
        return self.after is None and self.scale == 1.0

    def enter(self, x: Tensor, out: Tensor) -> Tensor | None:
        """out [T, hidden] = norm(x), and 1 / rms(x) [T] where there is a norm."""
        if self.before is None:
            out.copy_(x)
            return None
        return ops.rms_norm(x, self.before.weight, self.before.eps, out)

    def enter_backward(self, d: Tensor, x: Tensor, rstd: Tensor | None, dy: Tensor, out: Tensor) -> None:
        """out [T, hidden] = gradient of x from that of norm(x), `d`, and of y, `dy`."""
        if self.before is None or rstd is None:
            torch.add(d, dy, out=out)
        else:
            self.before.backward(d, x, rstd, dy, out)

    def leave(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """y = x + scale * norm(z), and 1 / rms(z) [T] where there is a norm."""
        if self.after is None:
            return torch.add(x, z, alpha=self.scale), None
        y = torch.empty_like(x)
        return y, ops.add_normed(x, z, self.after.weight, self.after.eps, y)

    def leave_backward(self, dy: Tensor, z: Tensor | None, rstd: Tensor | None, out: Tensor) -> None:
        """out [T, hidden] = gradient of z."""
        if self.after is not None and z is not None and rstd is not None:
            self.after.backward(dy, z, rstd, None, out)
        elif self.scale != 1.0:
            torch.mul(dy, self.scale, out=out)
        else:
            out.copy_(dy)


class Core(Protocol):
    """What stands between a block's first products and its last one: attention, or the gated activation."""

    def run(self, projected: Tensor, stream: Stream, keep: bool) -> Any:
        """What it computes from `projected` [T, first.outputs] and keeps; it may change `projected` in place."""

    def inner(self, projected: Tensor, inside: Any, last: FrozenGroup) -> Tensor:
        """What the last product reads: an input buffer of it, or a matrix [T, last.inputs]."""

    def backward(self, grad: Tensor, projected: Tensor, inside: Any, stream: Stream, out: Tensor) -> Tensor:
        """Writes the gradient of `projected` to `out` and returns the last product's input [T, last.inputs] again.

        `grad` [T, last.inputs], the gradient of that input, may be overwritten.
        """


@dataclass(frozen=True)
class _Run:
    """Of a forward until its last product. `thin` is x A^T of the first group, a few columns wide."""

    rstd: Tensor | None
    thin: Tensor
    projected: Tensor
    inside: Any


@dataclass(frozen=True)
class _Kept:
    """`branch` [T, hidden] is what the norm after the block saw.

    Without its `run` it is what a recomputed block keeps. The branch is part of that: it costs as much memory as the
    block's input and spares the last product, which is a quarter of a block's work.
    """

    run: _Run | None
    thin_last: Tensor
    branch: Tensor | None = None
    rstd: Tensor | None = None


@dataclass(frozen=True)
class FrozenBlock:
    """A block that begins and ends with frozen matrices."""

    first: FrozenGroup
    core: Core
    last: FrozenGroup
    residual: Residual

    @property
    def groups(self) -> tuple[FrozenGroup, FrozenGroup]:
        return (self.first, self.last)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.first.parameters, *self.last.parameters]

    def forward(self, x: Tensor, stream: Stream, keep: bool) -> tuple[Tensor, _Kept]:
        run: _Run | None = self._run(x, stream, keep)
        assert run is not None
        inner = self.core.inner(run.projected, run.inside, self.last)
        if not keep:
            run = None
        if self.residual.after is None:
            y, thin = self.last.forward(inner, residual=x, scale=self.residual.scale)
            return y, _Kept(run, thin)
        branch, thin = self.last.forward(inner)
        del inner
        y, rstd = self.residual.leave(x, branch)
        return y, _Kept(run, thin, branch, rstd)

    def replay(self, x: Tensor, stream: Stream, light: _Kept) -> _Kept:
        return replace(light, run=self._run(x, stream, keep=True))  # y was never lost.

    def _run(self, x: Tensor, stream: Stream, keep: bool) -> _Run:
        buffer = self.first.input_buffer(len(x))
        rstd = self.residual.enter(x, buffer[:, : self.first.inputs])
        projected, thin = self.first.forward(buffer)
        del buffer
        return _Run(rstd, thin, projected, self.core.run(projected, stream, keep))

    def gradient_buffer(self, x: Tensor) -> Tensor:
        return self.last.grad_buffer(len(x)) if self.residual.plain else torch.empty_like(x)

    def backward(self, dy: Tensor, x: Tensor, kept: _Kept, stream: Stream, out: Tensor | None) -> None:
        tokens, run = len(x), kept.run
        assert run is not None
        dy_buffer, dy = dy, dy[:, : self.last.outputs]
        if self.residual.plain and dy_buffer.shape[1] == self.last.outputs + self.last.rank:
            grad = dy_buffer
        else:
            grad = self.last.grad_buffer(tokens)
            self.residual.leave_backward(dy, kept.branch, kept.rstd, grad[:, : self.last.outputs])
        self.last.complete(grad)
        d_inner = self.last.backward(grad)
        d_projected = self.first.grad_buffer(tokens)
        inner = self.core.backward(d_inner, run.projected, run.inside, stream, d_projected[:, : self.first.outputs])
        self.last.accumulate(grad, inner, kept.thin_last)
        del grad, d_inner, inner
        self.first.complete(d_projected)
        if self.first.trains:
            entered = x
            if self.residual.before is not None:
                entered = torch.empty_like(x) if out is None else out  # Until the gradient comes.
                self.residual.enter(x, entered)
            self.first.accumulate(d_projected, entered, run.thin)
        if out is not None:
            self.residual.enter_backward(self.first.backward(d_projected), x, run.rstd, dy, out)
