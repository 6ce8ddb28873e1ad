"""What multiplies activations elementwise: the gated MLP, and the gate on attention's output."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dpo_assets.training.engines.fused.ops import backend
from dpo_assets.training.engines.fused.ops.backend import in_triton

GATE_BLOCK = 1024

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated(gate_up: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """out [T, width] = activation(gate) * up, with gate_up [T, 2 * width] (Shazeer, arXiv 2002.05202).

    `gelu` is x Phi(x); `gelu_tanh` its approximation (Hendrycks & Gimpel, arXiv 1606.08415).

    Raises:
        ValueError: another activation.
    """
    rows, width = _known(activation, out)
    if in_triton(out):
        backend.kernels.gated[_grid(rows, width)](
            gate_up, out, gate_up.stride(0), out.stride(0), width, ACTIVATION=activation, BLOCK=GATE_BLOCK
        )
        return
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(_activated(gate, activation)[0] * up)


def gated_backward(gate_up: Tensor, grad: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """out [T, 2 * width] = gradients of gate and up; `grad` [T, width] becomes activation(gate) * up."""
    rows, width = _known(activation, grad)
    if in_triton(grad):
        backend.kernels.gated_backward[_grid(rows, width)](
            gate_up, grad, out, gate_up.stride(0), grad.stride(0), out.stride(0), width,
            ACTIVATION=activation, BLOCK=GATE_BLOCK,
        )  # fmt: skip
        return
    gate, up = gate_up.float().chunk(2, dim=-1)
    value, slope = _activated(gate, activation)
    d = grad.float()
    out[:, :width] = d * up * slope
    out[:, width:] = d * value
    grad.copy_(value * up)


def output_gate(attended: Tensor, gate: Tensor, out: Tensor, dim: int, stride_head: int = 0) -> None:
    """out [T, heads * dim] = attended * sigmoid(gate), elementwise (Qiu et al., arXiv 2505.06708); it may be attended.

    Args:
        attended: [T, heads * dim], attention's output.
        gate: column slice of a matrix [T, ...] that begins at the first head's gate.
        stride_head: columns from one head's gate to the next; 0: dim.
    """
    rows, width = attended.shape
    if in_triton(attended):
        backend.kernels.output_gate[_grid(rows, width)](
            attended, gate, out, attended.stride(0), gate.stride(0), out.stride(0), width,
            DIM=dim, STRIDE_HEAD=stride_head or dim, BLOCK=GATE_BLOCK,
        )  # fmt: skip
        return
    opened = _strided(gate, width, dim, stride_head).float().sigmoid().flatten(1)
    out.copy_(attended.float() * opened)


def output_gate_backward(
    grad: Tensor, attended: Tensor, gate: Tensor, d_gate: Tensor, out: Tensor, dim: int, stride_head: int = 0
) -> None:
    """`grad` [T, heads * dim] becomes the gradient of `attended`; out [T, heads * dim] = attended * sigmoid(gate).

    The gradient of the gate is written into `d_gate`, which is strided as `gate` is; columns between stay as they are.
    """
    rows, width = attended.shape
    if in_triton(attended):
        backend.kernels.output_gate_backward[_grid(rows, width)](
            grad, attended, gate, d_gate, out,
            grad.stride(0), attended.stride(0), gate.stride(0), d_gate.stride(0), out.stride(0), width,
            DIM=dim, STRIDE_HEAD=stride_head or dim, BLOCK=GATE_BLOCK,
        )  # fmt: skip
        return
    opened = _strided(gate, width, dim, stride_head).float().sigmoid()
    flat = opened.flatten(1)
    gated_output = attended.float() * flat
    slope = (grad.float() * gated_output).view_as(opened) * (1 - opened)
    _strided(d_gate, width, dim, stride_head).copy_(slope)
    grad.copy_(grad.float() * flat)
    out.copy_(gated_output)


def _known(activation: str, values: Tensor) -> tuple[int, int]:
    """Rows and width of the MLP's inner values."""
    if activation not in get_args(Activation):
        raise ValueError(f"a gated MLP has no activation {activation!r} here; it has {', '.join(get_args(Activation))}")
    return values.shape[0], values.shape[1]


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, -(-width // GATE_BLOCK)


def _strided(x: Tensor, width: int, dim: int, stride_head: int) -> Tensor:
    """View [T, heads, dim] of heads that lie `stride_head` columns apart."""
    return x.as_strided((len(x), width // dim, dim), (x.stride(0), stride_head or dim, 1))


def _activated(gate: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """activation(gate) and its derivative."""
    if activation == "silu":
        opened = gate.sigmoid()
        return gate * opened, opened * (1 + gate * (1 - opened))
    if activation == "gelu":
        phi = 0.5 * (1 + torch.erf(gate * 0.5**0.5))
        return gate * phi, phi + gate * torch.exp(-0.5 * gate * gate) * (2 * torch.pi) ** -0.5
    root = (2 / torch.pi) ** 0.5
    tanh = torch.tanh(root * (gate + 0.044715 * gate**3))
    inner = root * (1 + 3 * 0.044715 * gate * gate)
    return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * inner
