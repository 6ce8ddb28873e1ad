"""A block that autograd differentiates: for what has no backward pass of its own here, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_assets.training.engines.fused.block import Residual
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup

Function = Callable[[Tensor, Stream], Tensor]


@dataclass(frozen=True)
class _Kept:
    entered: Tensor  # A leaf: norm(x).
    rstd: Tensor | None
    branch: Tensor  # f(norm(x)), with its graph.
    rstd_after: Tensor | None


@dataclass(frozen=True)
class AutogradBlock:
    """y = x + scale * norm(f(norm(x))) for any differentiable f.

    Attributes:
        function: f, from [T, hidden] and the stream to [T, hidden]; a token may only see earlier ones of its own row.
            Called with gradients switched on where they are wanted, and outside of autocast. Parameters that it uses
            get their gradients from autograd.
        residual: as of every block; its norms are computed here.
        modules: whose trained parameters f uses.
    """

    function: Function
    residual: Residual
    modules: Sequence[nn.Module] = ()

    @property
    def groups(self) -> tuple[FrozenGroup, ...]:
        """None: its modules read their own parameters."""
        return ()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    def forward(self, x: Tensor, stream: Stream, keep: bool) -> tuple[Tensor, _Kept | None]:
        entered = torch.empty_like(x)
        rstd = self.residual.enter(x, entered)
        entered.requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            branch = self.function(entered, stream)
        y, rstd_after = self.residual.leave(x, branch.detach())
        return y, _Kept(entered, rstd, branch, rstd_after) if keep else None

    def replay(self, x: Tensor, stream: Stream, light: None) -> _Kept:
        kept = self.forward(x, stream, keep=True)[1]
        assert kept is not None
        return kept

    def gradient_buffer(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def backward(self, dy: Tensor, x: Tensor, kept: _Kept, stream: Stream, out: Tensor | None) -> None:
        dy = dy[:, : x.shape[1]]
        grad = torch.empty_like(x)
        self.residual.leave_backward(dy, kept.branch.detach(), kept.rstd_after, grad)
        torch.autograd.backward(kept.branch, grad)
        if out is not None:
            entered_grad = kept.entered.grad
            d = torch.zeros_like(x) if entered_grad is None else entered_grad
            self.residual.enter_backward(d, x, kept.rstd, dy, out)
