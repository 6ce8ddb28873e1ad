"""Frozen experts by grouped products: no loop over experts, and a backward pass without gradients of their weights.

Registered with Transformers as an experts implementation, so every model whose experts take one runs on it, in each
engine that runs the model's own modules. Experts with an adapter on them go through Transformers' own grouped products,
which differentiate the weights.

Kept for the backward pass are gate and up of each token and expert; the activation is computed again, and the outputs
of the experts are not needed: a routing weight's gradient <dy, W a> is <W^T dy, a>.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from dpo_assets.training.private.transformers import experts_functions, gated_by, is_experts, own_experts_forward

NAME = "frozen_grouped"
ALIGNMENT = 16  # Bytes that the strides of a grouped product's operands are multiples of on CUDA.


def serve_experts(lm: Any) -> None:
    """Lets the experts of a causal language model run by grouped products, where Transformers lets one choose."""
    functions = experts_functions()
    if not any(is_experts(module) for module in lm.modules()):
        return
    functions.register(NAME, experts_forward)
    lm.set_experts_implementation(NAME)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a Transformers module of stacked experts computes: hidden states [T, hidden] through k experts each.

    Args:
        top_k_index, top_k_weights: [T, k].
    """
    if _is_plain(self):
        out: Tensor = _FrozenExperts.apply(hidden_states, top_k_weights, top_k_index, self)
        return out.to(hidden_states.dtype)
    grouped = experts_functions()["grouped_mm"]
    # What Transformers does in its stead on older GPUs makes a gradient of every weight, frozen or not.
    own = grouped if _has_grouped_products(hidden_states.device) else own_experts_forward(self)
    trained: Tensor = own(self, hidden_states, top_k_index, top_k_weights)
    return trained


def _is_plain(experts: Any) -> bool:
    """Whether experts have a gate and are frozen. PEFT makes an adapter on them a parametrisation of the weights."""
    trained = any(parameter.requires_grad for parameter in experts.parameters(recurse=False))
    return getattr(experts, "has_gate", True) and not is_parametrized(experts) and not trained


@dataclass(frozen=True)
class _Order:
    """Tokens sorted by expert: S = T * k places.

    Attributes:
        token: [S], whose each place is.
        place: [T * k], where each token's choices went.
        expert: [S].
        ends: [experts], int32, where each expert's places end.
    """

    token: Tensor
    place: Tensor
    expert: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index: Tensor, experts: int) -> _Order:
        expert, order = torch.sort(index.flatten(), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True)
        return cls(order // index.shape[1], place, expert, ends.to(torch.int32))


class _FrozenExperts(torch.autograd.Function):
    """(x [T, hidden], weights [T, k], index [T, k], module) -> [T, hidden]; gradients of x and the routing weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, experts: Any) -> Tensor:
        order = _Order.of(index, experts.num_experts)
        first, last = experts.gate_up_proj.detach(), experts.down_proj.detach()
        gate_up = _product(x.to(first.dtype).index_select(0, order.token), _inward(first, experts), order.ends)
        if experts.has_bias:
            gate_up += experts.gate_up_proj_bias.detach()[order.expert]
        out = _product(gated_by(experts, gate_up), _inward(last, experts), order.ends)
        if experts.has_bias:
            out += experts.down_proj_bias.detach()[order.expert]
        ctx.save_for_backward(gate_up, weights)
        ctx.order, ctx.experts, ctx.dtype = order, experts, x.dtype
        return _weighted_sum(out.index_select(0, order.place).unflatten(0, weights.shape), weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_up, weights = ctx.saved_tensors
        order, experts = ctx.order, ctx.experts
        first, last = experts.gate_up_proj.detach(), experts.down_proj.detach()
        dy = grads[0].to(last.dtype).index_select(0, order.token)
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            activated = gated_by(experts, leaf)
        d_activated = _product(dy, _outward(last, experts), order.ends)
        slope = (d_activated * activated.detach()).sum(dim=1, dtype=torch.float32)
        if experts.has_bias:
            slope += (dy * experts.down_proj_bias.detach()[order.expert]).sum(dim=1, dtype=torch.float32)
        sorted_weights = torch.empty_like(weights.flatten())
        sorted_weights[order.place] = weights.flatten()
        d_activated *= sorted_weights[:, None]
        (d_gate_up,) = torch.autograd.grad(activated, leaf, d_activated)
        del activated, leaf, d_activated, dy
        dx = _product(d_gate_up, _outward(first, experts), order.ends)
        dx = dx.index_select(0, order.place).unflatten(0, weights.shape).sum(dim=1)
        return dx.to(ctx.dtype), slope[order.place].view_as(weights).to(weights.dtype), None, None


def _weighted_sum(outs: Tensor, weights: Tensor) -> Tensor:
    """[T, hidden] of outs [T, k, hidden] and weights [T, k]; summed in fp32, without atomics."""
    if outs.dtype == weights.dtype:
        return torch.bmm(weights[:, None], outs)[:, 0]
    return (outs * weights[..., None]).sum(dim=1)


def _inward(weight: Tensor, experts: Any) -> Tensor:
    """Weights as the forward takes them: [experts, inputs, outputs]."""
    return weight if experts.is_transposed else weight.transpose(1, 2)


def _outward(weight: Tensor, experts: Any) -> Tensor:
    """Weights as the backward takes them: [experts, outputs, inputs]."""
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y [S, outputs] of x [S, inputs], sorted by expert, and weights [experts, inputs, outputs]."""
    if _can_group(x, weight):
        product: Tensor = F.grouped_mm(x, weight, offs=ends)
        return product
    out = x.new_empty(len(x), weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):  # GPUs before Ampere have no grouped product.
        if end > start:
            torch.mm(x[start:end], weight[expert], out=out[start:end])
        start = end
    return out


def _can_group(x: Tensor, weight: Tensor) -> bool:
    aligned = all(side * weight.element_size() % ALIGNMENT == 0 for side in weight.shape[1:])
    return (aligned or not x.is_cuda) and _has_grouped_products(x.device)


def _has_grouped_products(device: torch.device) -> bool:
    return hasattr(F, "grouped_mm") and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0))
