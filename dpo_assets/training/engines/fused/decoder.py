"""A Transformers model of the Llama family, run by fused layers. Its modules keep weights, adapter and settings."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_assets.training.batches.packing import PackedBatch
from dpo_assets.training.engines.base import PlainEngine, attach_engine, causal_lm
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.attention import Heads
from dpo_assets.training.engines.fused.layer import FusedLayer, Stream
from dpo_assets.training.engines.fused.ops import Angles
from dpo_assets.training.engines.fused.weights import FrozenGroup, Scratch, member_of

FAMILIES = ("llama", "mistral", "qwen2")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def why_not_fused(lm: Any, max_length: int | None = None, adapter: str = "default") -> str:
    """Why a model cannot be run by fused layers on rows of up to `max_length` tokens; empty when it can."""
    config = lm.config
    if config.model_type not in FAMILIES:
        return f"{type(lm).__name__} is not of the Llama family ({', '.join(FAMILIES)})"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and (max_length is None or max_length > window):
        return f"its attention sees {window} tokens back"
    if getattr(config, "mlp_bias", False) or getattr(lm.get_output_embeddings(), "bias", None) is not None:
        return "its projections have biases"
    for layer in lm.get_decoder().layers:
        for name in PROJECTIONS:
            module = _projection(layer, name)
            if (
                name in ("o_proj", *PROJECTIONS[4:])
                and getattr(member_of(module, adapter).linear, "bias", None) is not None
            ):
                return f"{name} has a bias"
            if reason := _why_not_plain_lora(module, adapter):
                return f"{name} has {reason}"
    return ""


def _why_not_plain_lora(module: nn.Module, adapter: str) -> str:
    lora = member_of(module, adapter).lora
    if lora is None:
        return ""
    if lora.use_dora.get(adapter, False):
        return "a DoRA adapter"
    if getattr(lora.lora_dropout[adapter], "p", 0.0) > 0:
        return "an adapter with dropout"
    if lora.lora_bias.get(adapter, False):
        return "an adapter with a bias"
    return "" if len(lora.active_adapters) == 1 else "several active adapters"


def _projection(layer: Any, name: str) -> nn.Module:
    parent = layer.mlp if name in ("gate_proj", "up_proj", "down_proj") else layer.self_attn
    module: nn.Module = getattr(parent, name)
    return module


class FusedDecoder(PlainEngine):
    """The decoder of `lm` from token ids to the hidden states that predict scored tokens."""

    name = "fused"

    def __init__(self, lm: Any, dtype: torch.dtype, recomputed_layers: int = 0, adapter: str = "default") -> None:
        decoder, config = lm.get_decoder(), lm.config
        self._embedding, self._norm = decoder.embed_tokens, decoder.norm
        self._rotary, self._dtype = decoder.rotary_emb, dtype
        scratch = Scratch(dtype, decoder.embed_tokens.weight.device)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim, dim**-0.5)
        self.layers = []
        for n, layer in enumerate(decoder.layers):

            def group(*names: str, layer: Any = layer) -> FrozenGroup:
                return FrozenGroup([member_of(_projection(layer, name), adapter) for name in names], dtype, scratch)

            self.layers.append(
                FusedLayer(
                    qkv=group("q_proj", "k_proj", "v_proj"),
                    out=group("o_proj"),
                    gate_up=group("gate_proj", "up_proj"),
                    down=group("down_proj"),
                    norm1=layer.input_layernorm.weight.detach(),
                    norm2=layer.post_attention_layernorm.weight.detach(),
                    eps=config.rms_norm_eps,
                    heads=heads,
                    # The lowest layers are differentiated last, when the others' memory is free again.
                    recompute=n < recomputed_layers,
                    lowest=n == 0,
                )
            )
        self._groups = [group for layer in self.layers for group in layer.groups]
        self._members = [m for group in self._groups for m in group.members if m.factors is not None]
        self._seen: tuple[Any, ...] = ()

    def renew(self) -> None:
        """Lets the next call read the adapter again: fused optimizers leave a parameter's version as it was."""
        self._seen = ()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the active adapter's fp32 factors into the matrices, when an optimizer or a switch changed them."""
        now = tuple(v for m in self._members for v in (m.switched_off, *((id(f), f._version) for f in m.factors or ())))
        if now == self._seen:
            return
        slots = [slot for group in self._groups for slot in group.slots()]
        by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for where, factor, scale in slots:
            into, source = by_scale.setdefault(scale, ([], []))
            into.append(where)
            source.append(factor.detach())
        for scale, (into, source) in by_scale.items():
            torch._foreach_copy_(into, source if scale == 1.0 else torch._foreach_mul(source, scale))
        self._seen = now

    def angles(self, positions: Tensor) -> Angles:
        """Rotary tables by the model's own module, so that scaled and extended variants come out right."""
        cos, sin = self._rotary(torch.empty(1, dtype=torch.float32, device=positions.device), positions[None])
        half = cos.shape[-1] // 2
        return Angles(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None = None) -> Tensor:
        """Its layers choose their own formats, so autocast has no say."""
        with torch.autocast(batch["ids"].device.type, enabled=False):
            self.refresh()
            stream = Stream(batch, self.angles(batch["pos"]))
            x = nn.functional.embedding(batch["ids"], self._embedding.weight).detach().to(self._dtype)
            # The layers write the adapter's gradients themselves, so the graph hangs on their input alone.
            x.requires_grad_(any(f.requires_grad for m in self._members for f in m.factors or ()))
            for layer in self.layers:
                x = layer(x, stream)
            hidden: Tensor = _LastNorm.apply(
                x.index_select(0, batch["predict"]), self._norm.weight, self._norm.variance_epsilon
            )
            return hidden


class _LastNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        ctx.save_for_backward(x, weight, ops.rms_norm(x, weight.detach(), eps, out))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        return ops.rms_norm_backward(grads[0].contiguous(), x, weight, rstd, None, torch.empty_like(x)), None, None


def attach_fused(model: Any, dtype: torch.dtype, recomputed_layers: int = 0, max_length: int | None = None) -> str:
    """Lets a model's scoring go through fused layers. Returns why not, empty when it does."""
    lm = causal_lm(model)
    if reason := why_not_fused(lm, max_length):
        return reason
    attach_engine(lm, FusedDecoder(lm, dtype, recomputed_layers))
    return ""
