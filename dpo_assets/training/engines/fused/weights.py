"""Frozen matrices with their LoRA folded in, so that an adapter costs a few columns and not passes over memory.

Linear layers that read the same input (q, k, v; gate, up) form one group with weight W [out, in]. With the members'
LoRA pairs A [R, in] and B [out, R] (block-diagonal, scaled by alpha / r) a group is one matrix

        M = [ W  B ]     y  = [x, x A^T] [W B]^T
            [ A  0 ]     dx = [dy, dy B] [W; A]

so forward and backward are one product each, beside two thin ones. For a 16-bit base M is built once and the modules'
own weights become views of it: no byte is held twice. A quantised base is dequantised into scratch matrices that groups
of all layers share, each time another of them is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dpo_assets.errors import ConfigError
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.quantised import quantised_weight
from dpo_assets.training.private.peft import Lora, lora_of

ALIGNMENT = 8  # Row strides stay multiples of 16 bytes, which fast matrix kernels ask for.


@dataclass
class Member:
    """A linear layer of a group, and its LoRA pair if it has one.

    Attributes:
        factors: A [r, in] and B [out, r] of the adapter that was active at the last `look`.
        rank, scale: its own.
        switched_off: whether adapters counted for nothing then.
    """

    linear: nn.Module
    lora: Lora | None = None
    factors: tuple[nn.Parameter, nn.Parameter] | None = field(default=None, init=False)
    rank: int = field(default=0, init=False)
    scale: float = field(default=0.0, init=False)
    switched_off: bool = field(default=False, init=False)

    def look(self) -> None:
        """Reads which adapter is active: a policy and its frozen reference may share the base.

        Asking PEFT takes as long as launching a kernel, so a forward asks once, and its layers use what was found.
        """
        if (lora := self.lora) is not None:
            adapter = lora.active_adapters[0]
            self.factors = lora.lora_A[adapter].weight, lora.lora_B[adapter].weight
            self.rank, self.scale = int(lora.r[adapter]), float(lora.scaling[adapter])
            self.switched_off = bool(lora.disable_adapters)


def member_of(module: nn.Module, adapter: str) -> Member:
    """A projection of a decoder layer, wrapped by PEFT or not."""
    if hasattr(module, "base_layer"):
        return Member(module.base_layer, lora_of(module, adapter))  # type: ignore[arg-type]
    return Member(module)


@dataclass
class Scratch:
    """One matrix that quantised groups are dequantised into by turns, as large as the largest of them.

    Attributes:
        holds: the group whose weights stand in it. They are frozen, so they need not be written again.
    """

    dtype: torch.dtype
    device: torch.device
    holds: FrozenGroup | None = field(default=None, repr=False)
    _flat: Tensor | None = field(default=None, repr=False)
    _size: int = 0

    def reserve(self, elements: int) -> None:
        """Room for a group, before the first is used."""
        self._size = max(self._size, elements)

    def matrix(self, rows: int, columns: int) -> Tensor:
        if self._flat is None:
            self._flat = torch.empty(self._size, dtype=self.dtype, device=self.device)
        return self._flat[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class _Views:
    """M as the products take it."""

    forward: Tensor  # [in + R, out]
    plain: Tensor  # [in, out], without LoRA
    backward: Tensor  # [out + R, in]

    @classmethod
    def of(cls, matrix: Tensor, outputs: int, inputs: int) -> _Views:
        return cls(matrix[:outputs].T, matrix[:outputs, :inputs].T, matrix[:, :inputs])


@dataclass(frozen=True)
class _InScratch:
    """Where the parts of a quantised group's M stand in the scratch matrix: made once, as views cost more to make than
    to use."""

    members: Sequence[Tensor]  # [width, in] of each.
    a: Tensor  # [R, in]
    b: Tensor  # [out, R]
    views: _Views

    @classmethod
    def of(cls, matrix: Tensor, widths: Sequence[int], inputs: int) -> _InScratch:
        outputs = sum(widths)
        members = matrix[:outputs, :inputs].split(list(widths))
        return cls(members, matrix[outputs:, :inputs], matrix[:outputs, inputs:], _Views.of(matrix, outputs, inputs))


class FrozenGroup:
    """Linear layers of one input as the matrix M above."""

    def __init__(self, members: Sequence[Member], dtype: torch.dtype, scratch: Scratch) -> None:
        self.members = list(members)
        for member in self.members:
            member.look()
        self.quantised = [quantised_weight(m.linear) for m in members]
        shapes = [q.shape if q else tuple(m.linear.weight.shape) for m, q in zip(members, self.quantised, strict=True)]
        self.widths = [int(shape[0]) for shape in shapes]
        self.inputs, self.outputs = int(shapes[0][1]), sum(self.widths)
        self._ranks = [m.rank for m in members]
        self._grad_a: Tensor | None = None  # [R, in] fp32, the gradients of all A in one.
        self._grad_a_parts: list[Tensor] = []  # As they were handed to the factors.
        self.rank = math.ceil(sum(self._ranks) / ALIGNMENT) * ALIGNMENT
        self._columns = [*self.widths, self.rank]  # Of a gradient buffer.
        self._scratch, self._dtype = scratch, dtype
        device: torch.device = members[0].linear.weight.device  # type: ignore[assignment]
        biases = [getattr(m.linear, "bias", None) for m in members]
        self.bias = None
        if any(b is not None for b in biases):
            parts = [
                torch.zeros(w, dtype=dtype, device=device) if b is None else b.detach().to(dtype)
                for b, w in zip(biases, self.widths, strict=True)
            ]
            self.bias = torch.cat(parts)
        if any(self.quantised):
            scratch.reserve((self.outputs + self.rank) * (self.inputs + self.rank))
            self._matrix = None
            self._a = torch.zeros(self.rank, self.inputs, dtype=dtype, device=device)
            self._b = torch.zeros(self.outputs, self.rank, dtype=dtype, device=device)
        else:
            self._matrix = torch.zeros(self.outputs + self.rank, self.inputs + self.rank, dtype=dtype, device=device)
            row = 0
            for member, width in zip(self.members, self.widths, strict=True):
                weight = member.linear.weight
                self._matrix[row : row + width, : self.inputs] = weight.data
                weight.data = self._matrix[row : row + width, : self.inputs]
                row += width
            self._a = self._matrix[self.outputs :, : self.inputs]
            self._b = self._matrix[: self.outputs, self.inputs :]
        # Views cost more to make than to use on a small model, so each is made once.
        self._a_t, self._b_t = self._a.T, self._b.T
        self._views = None if self._matrix is None else _Views.of(self._matrix, self.outputs, self.inputs)
        self._in_scratch: _InScratch | None = None
        self._places = self._places_of_factors()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each member that has them, in order, of the active adapter."""
        return [factor for member in self.members for factor in member.factors or ()]

    @property
    def trains(self) -> bool:
        """Whether gradients of any of its factors are asked for."""
        return any(factor.requires_grad for factor in self.parameters)

    def _places_of_factors(self) -> list[tuple[Member, Tensor, Tensor]]:
        """Where A and B of each member stand in M."""
        places, row, column = [], 0, 0
        for member, width in zip(self.members, self.widths, strict=True):
            if member.factors is not None:
                ranks = slice(column, column + member.rank)
                places.append((member, self._a[ranks], self._b[row : row + width, ranks]))
                column += member.rank
            row += width
        return places

    def slots(self) -> list[tuple[Tensor, Tensor, float]]:
        """(where, from, scale): where each factor stands in M. A scale of zero is for zeros, whatever the factor holds:
        nothing that diverged reaches a base whose adapter is switched off."""
        if [m.rank for m in self.members] != self._ranks:
            raise ConfigError(
                "fused kernels hold adapters of one rank, and one of another rank is active; "
                "set hardware.kernels to `transformers`."
            )
        entries: list[tuple[Tensor, Tensor, float]] = []
        for member, of_a, of_b in self._places:
            assert member.factors is not None
            (a, b), on = member.factors, not member.switched_off
            entries += (of_a, a, 1.0 if on else 0.0), (of_b, b, member.scale if on else 0.0)
        return entries

    def _place(self) -> _InScratch:
        """The scratch matrix with this group's weights in it; A and B are written where they are read."""
        scratch = self._scratch
        if self._in_scratch is None:
            matrix = scratch.matrix(self.outputs + self.rank, self.inputs + self.rank)
            self._in_scratch = _InScratch.of(matrix, self.widths, self.inputs)
        if scratch.holds is not self:
            scratch.holds = None  # Until all is written: whoever goes on after an error must not read half of it.
            for member, quantised, part in zip(self.members, self.quantised, self._in_scratch.members, strict=True):
                if quantised is None:
                    part.copy_(member.linear.weight)
                else:
                    quantised.dequantise(part)
            scratch.holds = self
        return self._in_scratch

    def _with_b(self) -> Tensor:
        """[W B]^T, ready for use until another group asks for its own."""
        if self._views is not None:
            return self._views.forward
        place = self._place()
        if self.rank:
            place.b.copy_(self._b)
        return place.views.forward

    def _with_a(self) -> Tensor:
        """[W; A], likewise."""
        if self._views is not None:
            return self._views.backward
        place = self._place()
        if self.rank:
            place.a.copy_(self._a)
        return place.views.backward

    def _plain(self) -> Tensor:
        """W^T, likewise."""
        return (self._views or self._place().views).plain

    # ---- the products

    def input_buffer(self, tokens: int) -> Tensor:
        """[T, in + R]: fill the first `inputs` columns, then call `forward`."""
        return torch.empty(tokens, self.inputs + self.rank, dtype=self._dtype, device=self._a.device)

    def grad_buffer(self, tokens: int) -> Tensor:
        """[T, out + R]: fill the first `outputs` columns, then call `backward`."""
        return torch.empty(tokens, self.outputs + self.rank, dtype=self._dtype, device=self._a.device)

    def forward(self, x: Tensor, residual: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """y [T, out], or residual + scale * y; and x A^T [T, R], which the backward pass wants.

        Args:
            x: an input buffer, whose last R columns are filled here; or an input [T, in] that is in no buffer, for
                which the LoRA term is a product of its own.
        """
        thin = torch.mm(x[:, : self.inputs], self._a_t)
        if x.shape[1] == self.inputs + self.rank:
            x[:, self.inputs :] = thin
            return self._product(x, self._with_b(), residual, scale), thin
        y = self._product(x, self._plain(), residual, scale)
        return y.addmm_(thin, self._b_t, alpha=1.0 if residual is None else scale), thin

    def _product(self, x: Tensor, weight: Tensor, residual: Tensor | None, scale: float) -> Tensor:
        if residual is not None:
            y = torch.addmm(residual, x, weight, alpha=scale)
            return y if self.bias is None else y.add_(self.bias, alpha=scale)
        return torch.mm(x, weight) if self.bias is None else torch.addmm(self.bias, x, weight)

    def complete(self, dy: Tensor) -> None:
        """Fills the last R columns of a gradient buffer with dy B."""
        if self.rank:
            torch.mm(dy[:, : self.outputs], self._b, out=dy[:, self.outputs :])

    def backward(self, dy: Tensor) -> Tensor:
        """dx [T, in] of a complete gradient buffer."""
        return torch.mm(dy, self._with_a())

    def accumulate(self, dy: Tensor, x: Tensor, thin: Tensor) -> None:
        """Adds the fp32 gradients of the factors to their `.grad`.

        From the complete gradient buffer, the input [T, in] and x A^T [T, R]. Written where they belong and not handed
        to autograd: a step has hundreds of small factors, and on a small model adding them up one by one takes longer
        than the layers do.
        """
        *d_members, d_thin = dy.split(self._columns, dim=1)
        self._accumulate_a(d_thin, x)
        for member, d_member, thin_member in zip(self.members, d_members, self._by_member(thin, dim=1), strict=True):
            if member.factors is not None and member.factors[1].requires_grad:
                _add_gradient(member.factors[1], d_member.T, thin_member, member.scale)

    def _are_parts(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether gradients are still the parts of the common matrix that were put there."""
        parts = self._grad_a_parts
        return len(gradients) == len(parts) and all(map(_same_memory, gradients, parts))

    def _by_member(self, ranks: Tensor, dim: int) -> list[Tensor]:
        """The part of each member in a tensor of R columns or rows."""
        return list(ranks.split([*self._ranks, self.rank - sum(self._ranks)], dim=dim)[:-1])

    def _accumulate_a(self, d_thin: Tensor, x: Tensor) -> None:
        """Adds the gradients of all A: by one product as long as they are trained together, else each by its own.

        A factor may be frozen beside others that train, and anyone may set, clear or replace a single `.grad`.
        """
        factors = [member.factors[0] for member in self.members if member.factors is not None]
        gradients = [a.grad for a in factors]
        together = bool(factors) and all(a.requires_grad for a in factors)
        if together and all(gradient is None for gradient in gradients):
            self._grad_a = torch.empty(self.rank, self.inputs, dtype=torch.float32, device=x.device)
            ops.add_product(self._grad_a, d_thin.T, x, fresh=True)
            parts = zip(self.members, self._by_member(self._grad_a, dim=0), strict=True)
            self._grad_a_parts = [part for member, part in parts if member.factors is not None]
            for a, part in zip(factors, self._grad_a_parts, strict=True):
                a.grad = part
        elif together and self._are_parts(gradients):
            assert self._grad_a is not None
            ops.add_product(self._grad_a, d_thin.T, x, fresh=False)
        else:
            for member, d_member in zip(self.members, self._by_member(d_thin, dim=1), strict=True):
                if member.factors is not None and member.factors[0].requires_grad:
                    _add_gradient(member.factors[0], d_member.T, x)


def _same_memory(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.data_ptr() == other.data_ptr()


def _add_gradient(factor: nn.Parameter, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Adds scale * a @ b to a factor's `.grad`, in fp32."""
    fresh = factor.grad is None
    if factor.grad is None:
        factor.grad = torch.empty_like(factor)
    ops.add_product(factor.grad, a, b, fresh=fresh, scale=scale)
