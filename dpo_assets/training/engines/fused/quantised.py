"""Weights that are kept in fewer bits, and how each becomes a matrix again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dpo_assets.training.engines.fused import ops
from dpo_assets.training.models.fp8 import Fp8Linear
from dpo_assets.training.private.bitsandbytes import QuantState, four_bit_state, row_scales


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
