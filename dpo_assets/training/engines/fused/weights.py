"""Frozen matrices with their LoRA folded in, so that an adapter costs a few columns and not passes over memory.

Linear layers that read the same input (q, k, v; gate, up) form one group with weight W [out, in]. With the members'
LoRA pairs A [R, in] and B [out, R] (block-diagonal, scaled by alpha / r) a group is one matrix

        M = [ W  B ]     y  = [x, x A^T] [W B]^T
            [ A  0 ]     dx = [dy, dy B] [W; A]

so forward and backward are one product each, beside two thin ones. For a 16-bit base M is built once and the modules'
own weights become views of it: no byte is held twice. A quantised base is dequantised into one scratch matrix, that
all groups of all layers share, each time a group is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_assets.errors import ConfigError
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.models.fp8 import Fp8Linear
from dpo_assets.training.private.bitsandbytes import QuantState, four_bit_state, row_scales
from dpo_assets.training.private.peft import Lora, lora_of

ALIGNMENT = 8  # Row strides stay multiples of 16 bytes, which fast matrix kernels ask for.


class Quantised(Protocol):
    """A weight that is kept in fewer bits."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def dequantise(self, out: Tensor) -> None:
        """Writes the weight into `out` [rows, columns], a slice of a wider matrix."""


@dataclass(frozen=True)
class Nf4:
    """bitsandbytes' Params4bit: packed codes, one scale per block, the scales themselves in 8 bit when nested."""

    packed: Tensor
    state: QuantState
    shape: tuple[int, int]

    def dequantise(self, out: Tensor) -> None:
        state = self.state
        bytes_, block = self.packed.numel(), ops.DEQUANTISE_BLOCK
        nested = state.nested
        inner = state.state2 if nested else state
        ops.kernels.dequantise_nf4[(-(-bytes_ // block),)](
            self.packed, state.code, state.absmax,
            inner.code if nested else state.absmax, inner.absmax, state.offset if nested else state.absmax, out,
            bytes_, self.shape[1], out.stride(0),
            NESTED=nested, BLOCKSIZE=state.blocksize, BLOCKSIZE2=inner.blocksize, BLOCK=block, num_warps=8,
        )  # fmt: skip


@dataclass(frozen=True)
class RowScaled:
    """8-bit codes (int8, or fp8 e4m3) and one scale a row."""

    codes: Tensor
    scale: Tensor  # fp32 [rows]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantise(self, out: Tensor) -> None:
        if self.codes.is_cuda and ops.kernels is not None:
            rows, width = self.codes.shape
            grid = (rows, -(-width // ops.DEQUANTISE_BLOCK))
            ops.kernels.dequantise_rows[grid](
                self.codes, self.scale, out, width, self.codes.stride(0), out.stride(0), BLOCK=ops.DEQUANTISE_BLOCK
            )
        else:
            out.copy_(self.codes.float() * self.scale[:, None])


def quantised_weight(linear: nn.Module) -> Quantised | None:
    """How a linear layer keeps its weight, or None when it is a plain matrix."""
    weight: Any = linear.weight
    match type(weight).__name__:
        case "Params4bit":
            state = four_bit_state(weight)
            return Nf4(weight.data, state, (state.shape[0], state.shape[1]))
        case "Int8Params":
            return RowScaled(weight.data, (row_scales(linear) / 127.0).float())
    return RowScaled(linear.codes, linear.weight_scale) if isinstance(linear, Fp8Linear) else None


@dataclass
class Member:
    """A linear layer of a group, and its LoRA pair if it has one."""

    linear: nn.Module
    lora: Lora | None = None

    @property
    def adapter(self) -> str:
        """The adapter that is active now: a policy and its frozen reference may share the base."""
        assert self.lora is not None
        return self.lora.active_adapters[0]

    @property
    def rank(self) -> int:
        return 0 if self.lora is None else int(self.lora.r[self.adapter])

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """A [r, in] and B [out, r] of the active adapter."""
        if self.lora is None:
            return None
        return self.lora.lora_A[self.adapter].weight, self.lora.lora_B[self.adapter].weight

    @property
    def scale(self) -> float:
        return 0.0 if self.lora is None else float(self.lora.scaling[self.adapter])

    @property
    def switched_off(self) -> bool:
        return self.lora is not None and bool(self.lora.disable_adapters)


def member_of(module: nn.Module, adapter: str) -> Member:
    """A projection of a decoder layer, wrapped by PEFT or not."""
    if hasattr(module, "base_layer"):
        return Member(module.base_layer, lora_of(module, adapter))  # type: ignore[arg-type]
    return Member(module)


@dataclass
class Scratch:
    """The one matrix that quantised groups are dequantised into, as large as the largest of them."""

    dtype: torch.dtype
    device: torch.device
    _flat: Tensor | None = field(default=None, repr=False)
    _size: int = 0

    def reserve(self, elements: int) -> None:
        self._size = max(self._size, elements)

    def matrix(self, rows: int, columns: int) -> Tensor:
        if self._flat is None or self._flat.numel() < rows * columns:
            self._flat = torch.empty(max(self._size, rows * columns), dtype=self.dtype, device=self.device)
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


class FrozenGroup:
    """Linear layers of one input as the matrix M above."""

    def __init__(self, members: Sequence[Member], dtype: torch.dtype, scratch: Scratch) -> None:
        self.members = list(members)
        self.quantised = [quantised_weight(m.linear) for m in members]
        shapes = [q.shape if q else tuple(m.linear.weight.shape) for m, q in zip(members, self.quantised, strict=True)]
        self.widths = [int(shape[0]) for shape in shapes]
        self.inputs, self.outputs = int(shapes[0][1]), sum(self.widths)
        self._ranks = [m.rank for m in members]
        self._grad_a: Tensor | None = None  # [R, in] fp32, the gradients of all A in one.
        self.rank = math.ceil(sum(self._ranks) / ALIGNMENT) * ALIGNMENT
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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each member that has them, in order, of the active adapter."""
        return [factor for member in self.members for factor in member.factors or ()]

    @property
    def trains(self) -> bool:
        """Whether gradients of any of its factors are asked for."""
        return any(factor.requires_grad for factor in self.parameters)

    def slots(self) -> list[tuple[Tensor, Tensor, float]]:
        """(where, from, scale): where each factor stands in M. A scale of zero is for zeros, whatever the factor holds:
        nothing that diverged reaches a base whose adapter is switched off."""
        if [m.rank for m in self.members] != self._ranks:
            raise ConfigError(
                "fused kernels hold adapters of one rank, and one of another rank is active; "
                "set hardware.kernels to `transformers`."
            )
        entries, row, column = [], 0, 0
        for member, width in zip(self.members, self.widths, strict=True):
            if member.factors is not None:
                a, b = member.factors
                on = not member.switched_off
                entries.append((self._a[column : column + member.rank], a, 1.0 if on else 0.0))
                place = self._b[row : row + width, column : column + member.rank]
                entries.append((place, b, member.scale if on else 0.0))
                column += member.rank
            row += width
        return entries

    def matrix(self) -> _Views:
        """M, ready for use until the next group asks for its own."""
        if self._views is not None:
            return self._views
        matrix = self._scratch.matrix(self.outputs + self.rank, self.inputs + self.rank)
        row = 0
        for member, quantised, width in zip(self.members, self.quantised, self.widths, strict=True):
            part = matrix[row : row + width, : self.inputs]
            if quantised is None:
                part.copy_(member.linear.weight)
            else:
                quantised.dequantise(part)
            row += width
        if self.rank:
            matrix[: self.outputs, self.inputs :] = self._b
            matrix[self.outputs :, : self.inputs] = self._a
        return _Views.of(matrix, self.outputs, self.inputs)

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
            return self._product(x, self.matrix().forward, residual, scale), thin
        y = self._product(x, self.matrix().plain, residual, scale)
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
        return torch.mm(dy, self.matrix().backward)

    def accumulate(self, dy: Tensor, x: Tensor, thin: Tensor) -> None:
        """Adds the fp32 gradients of the factors to their `.grad`.

        From the complete gradient buffer, the input [T, in] and x A^T [T, R]. Written where they belong and not handed
        to autograd: a step has hundreds of small factors, and on a small model adding them up one by one takes longer
        than the layers do.
        """
        self._accumulate_a(dy[:, self.outputs :], x)
        row = column = 0
        for member, width in zip(self.members, self.widths, strict=True):
            if member.factors is not None:
                b, ranks = member.factors[1], slice(column, column + member.rank)
                if b.requires_grad:
                    _add_gradient(b, dy[:, row : row + width].T, thin[:, ranks], member.scale)
                column += member.rank
            row += width

    def _accumulate_a(self, d_thin: Tensor, x: Tensor) -> None:
        """Adds the gradients of all A: by one product as long as they are trained together, else each by its own.

        A factor may be frozen beside others that train, and anyone may set, clear or replace a single `.grad`.
        """
        factors: list[tuple[nn.Parameter, slice]] = []
        column = 0
        for member in self.members:
            if member.factors is not None:
                factors.append((member.factors[0], slice(column, column + member.rank)))
                column += member.rank
        together = bool(factors) and all(a.requires_grad for a, _ in factors)
        if together and all(a.grad is None for a, _ in factors):
            self._grad_a = torch.empty(self.rank, self.inputs, dtype=torch.float32, device=x.device)
            ops.add_product(self._grad_a, d_thin.T, x, fresh=True)
            for a, ranks in factors:
                a.grad = self._grad_a[ranks]
        elif together and all(self._is_part(a.grad, ranks) for a, ranks in factors):
            assert self._grad_a is not None
            ops.add_product(self._grad_a, d_thin.T, x, fresh=False)
        else:
            for a, ranks in factors:
                if a.requires_grad:
                    _add_gradient(a, d_thin[:, ranks].T, x)

    def _is_part(self, gradient: Tensor | None, ranks: slice) -> bool:
        """Whether a gradient is still the part of the common matrix that was put there."""
        if gradient is None or self._grad_a is None:
            return False
        return bool(gradient.data_ptr() == self._grad_a[ranks].data_ptr())


def _add_gradient(factor: nn.Parameter, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Adds scale * a @ b to a factor's `.grad`, in fp32."""
    fresh = factor.grad is None
    if factor.grad is None:
        factor.grad = torch.empty_like(factor)
    ops.add_product(factor.grad, a, b, fresh=fresh, scale=scale)
