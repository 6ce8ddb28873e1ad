"""A Transformers model run by fused layers. Its modules keep weights, adapter and settings."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_assets.planning import engines
from dpo_assets.planning.decoder import Decoder, QueryGrowth, Rope
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.attention import pads_attention
from dpo_assets.training.engines.base import PlainEngine, attach_engine
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.block import Norm
from dpo_assets.training.engines.fused.build import Builder, frozen_linears, missing_names
from dpo_assets.training.engines.fused.ops import Angles
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import member_of
from dpo_assets.training.models.structure import causal_lm, decoder_of, description_of
from dpo_assets.training.private.torch import for_each, version_of


def why_not_fused(lm: Any, max_length: int | None = None, adapter: str = "default") -> str:
    """Why a model cannot be run by fused layers on rows of up to `max_length` tokens; empty when it can.

    The planner's answer for its description, and what only the loaded model shows.
    """
    description, decoder = description_of(lm), decoder_of(lm)
    if reason := engines.why_not_fused(description, max_length):
        return reason
    if description is None or decoder is None:
        return f"{type(lm).__name__} does not say which of its modules is the decoder"
    if missing := next(missing_names(description, decoder.layers), ""):
        return f"its layers have no {missing}"
    for name, linear in frozen_linears(description, decoder.layers):
        if reason := _why_not_plain_lora(linear, adapter):
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
    active = lora.active_adapters
    if len(active) != 1:
        return f"{len(active)} active adapters"
    return "" if active[0] in lora.lora_A else f"no adapter `{active[0]}`, which is active"


class FusedDecoder(PlainEngine):
    """The decoder of `lm` from token ids to the hidden states that predict scored tokens."""

    name = "fused"

    def __init__(
        self,
        lm: Any,
        dtype: torch.dtype,
        recomputed_layers: int = 0,
        adapter: str = "default",
        description: Decoder | None = None,
    ) -> None:
        decoder, description = decoder_of(lm), description or description_of(lm)
        assert decoder is not None
        assert description is not None
        self._embedding, self._rotary, self._dtype = decoder.embed_tokens, decoder.rotary_emb, dtype
        builder = Builder(description, dtype, decoder.embed_tokens.weight.device, adapter)
        self._norm = builder.norm(getattr(decoder, description.last_norm))
        self.layers = builder.layers(decoder.layers, recomputed_layers)
        self._groups = [group for layer in self.layers for group in layer.groups]
        self._members = [m for group in self._groups for m in group.members if m.factors is not None]
        self._embedding_scale = description.embedding_scale
        attentions = description.attentions
        self._ropes = {a.rope for a in attentions if a.rope is not None}
        self._growths = {a.query_growth for a in attentions if a.query_growth is not None}
        self._seen: tuple[Any, ...] = ()
        self._folded: tuple[Any, ...] = ()  # The adapter whose factors stand in the matrices.
        device = decoder.embed_tokens.weight.device
        self._pads = pads_attention(lm.config.get_text_config(), description, device, dtype)

    @property
    def pads_attention(self) -> bool:
        return self._pads

    def renew(self) -> None:
        """Lets the next call read the adapter again: fused optimizers leave a parameter's version as it was."""
        self._seen = ()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the active adapter's fp32 factors into the matrices, when an optimizer or a switch changed them."""
        writes = version_of()
        for member in self._members:
            member.look()
        now = tuple((m.switched_off, m.scale, *((id(f), writes(f)) for f in m.factors or ())) for m in self._members)
        if now == self._seen:
            return
        slots = [slot for group in self._groups for slot in group.slots()]
        by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for where, factor, scale in slots:
            into, source = by_scale.setdefault(scale, ([], []))
            into.append(where)
            source.append(factor.detach())
        each = for_each()
        for scale, (into, source) in by_scale.items():
            if scale == 0.0:
                for where in into:
                    where.zero_()
            else:
                each.copy(into, source if scale == 1.0 else each.times(source, scale))
        self._seen = self._folded = now

    def refuse_another_adapter(self, folded: tuple[Any, ...]) -> None:
        """At the start of a backward pass: the matrices must hold what its forward multiplied by.

        Raises:
            RuntimeError: another adapter, none, or a later state of this one was folded in since.
        """
        if folded != self._folded:
            raise RuntimeError(
                "fused layers hold one adapter at a time, and since the forward of this backward pass they computed "
                "another one, none, or this one after a step: the gradients would be wrong. Go backward before the "
                "next forward, or set hardware.kernels to `transformers`."
            )

    def stream(self, batch: PackedBatch) -> Stream:
        """The batch with the tables of its positions."""
        positions = batch.positions
        return Stream(
            batch,
            {rope: self._angles(rope, positions) for rope in self._ropes},
            {growth: _growth(growth, positions) for growth in self._growths},
        )

    def _angles(self, rope: Rope, positions: Tensor) -> Angles:
        """By the model's own module, so that scaled and extended variants come out right."""
        like = torch.empty(1, dtype=torch.float32, device=positions.device)
        table = {"layer_type": rope.table} if rope.table else {}
        rows = positions[None] if rope.axes == 1 else positions.expand(rope.axes, 1, -1)
        half = rope.dim // 2
        # Some modules repeat each half of their table, some do not.
        cos, sin = (part[0, :, :half].contiguous() for part in self._rotary(like, rows, **table))
        return Angles(cos, sin)

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None = None) -> Tensor:
        """Its layers choose their own formats, so autocast has no say."""
        with torch.autocast(batch.ids.device.type, enabled=False):
            self.refresh()
            stream = self.stream(batch)
            x = self._embedded(batch.ids)
            # The layers write the adapter's gradients themselves, so the graph hangs on their input alone.
            x.requires_grad_(any(layer.trains for layer in self.layers))
            for layer in self.layers:
                x = layer(x, stream)
            hidden: Tensor = _LastNorm.apply(x.index_select(0, batch.scored.predict), self)
            return hidden

    @property
    def last_norm(self) -> Norm:
        """Behind the highest layer."""
        return self._norm

    @property
    def folded(self) -> tuple[Any, ...]:
        """What tells the adapter, and the state of it, that stands in the matrices."""
        return self._folded

    def _embedded(self, ids: Tensor) -> Tensor:
        weight = self._embedding.weight.detach()
        x = nn.functional.embedding(ids, weight)
        if self._embedding_scale != 1.0:
            # In the weight's own format, to which Gemma rounds the factor.
            x = x * torch.tensor(self._embedding_scale, dtype=weight.dtype)
        return x.to(self._dtype)


def _growth(growth: QueryGrowth, positions: Tensor) -> Tensor:
    return 1 + growth.beta * torch.log1p(torch.floor(positions / growth.length))


class _LastNorm(torch.autograd.Function):
    """The first of a decoder's nodes in a backward pass, so the one that can refuse it before a gradient is written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decoder: FusedDecoder) -> Tensor:
        out, norm = torch.empty_like(x), decoder.last_norm
        ctx.decoder, ctx.folded = decoder, decoder.folded
        ctx.save_for_backward(x, ops.rms_norm(x, norm.weight, norm.eps, out))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.decoder.refuse_another_adapter(ctx.folded)
        x, rstd = ctx.saved_tensors
        out = torch.empty_like(x)
        ctx.decoder.last_norm.backward(grads[0].contiguous(), x, rstd, None, out)
        return out, None


def attach_fused(model: Any, dtype: torch.dtype, recomputed_layers: int = 0, max_length: int | None = None) -> str:
    """Lets a model's scoring go through fused layers. Returns why not, empty when it does."""
    lm = causal_lm(model)
    if reason := why_not_fused(lm, max_length):
        return reason
    attach_engine(lm, FusedDecoder(lm, dtype, recomputed_layers))
    return ""
