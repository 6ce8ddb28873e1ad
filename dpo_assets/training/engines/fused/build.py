"""Fused layers from a description and a Transformers model: the one place that reads its modules by their names.

The modules go on holding weights, adapter and settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpo_assets.planning.decoder import Attention, Decoder, Experts, Layer, Mlp, Recurrent
from dpo_assets.training.engines.fused.attention import AttentionCore
from dpo_assets.training.engines.fused.block import Block, FrozenBlock, Norm, Residual
from dpo_assets.training.engines.fused.delta_net import DeltaNetCore
from dpo_assets.training.engines.fused.differentiated import AutogradBlock
from dpo_assets.training.engines.fused.layer import FusedLayer
from dpo_assets.training.engines.fused.mlp import GatedCore
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup, Scratch, member_of
from dpo_assets.training.engines.recurrent.delta_net import NEEDED


class Builder:
    """Builds the layers of one model."""

    def __init__(self, description: Decoder, dtype: torch.dtype, device: torch.device, adapter: str) -> None:
        self._decoder, self._dtype, self._adapter = description, dtype, adapter
        # One for what blocks begin with, one for what they end with: a layer that is computed again asks for gate and
        # up twice, and only for the down projection in between.
        self._firsts, self._lasts = Scratch(dtype, device), Scratch(dtype, device)

    def layers(self, modules: Sequence[Any], recomputed: int) -> list[FusedLayer]:
        """The lowest `recomputed` are recomputed: they are differentiated last, when the others' memory is free."""
        return [
            FusedLayer(
                mixer=self._mixer(module, layer),
                mlp=self._mlp(module, layer),
                recompute=n < recomputed,
                lowest=n == 0,
            )
            for n, (module, layer) in enumerate(zip(modules, self._decoder.layers, strict=True))
        ]

    def _mixer(self, module: Any, layer: Layer) -> Block:
        mixer, names = layer.mixer, layer.norms
        residual = self._residual(module, names.before_mixer, names.after_mixer)
        match mixer:
            case Attention():
                part = getattr(module, mixer.module)
                return FrozenBlock(
                    self._group(part, mixer.projections, self._firsts),
                    self._attention(part, mixer),
                    self._group(part, (mixer.output,), self._lasts),
                    residual,
                )
            case Recurrent():
                part, (*entries, output) = getattr(module, mixer.module), _linears(mixer)
                first, last = self._group(part, entries, self._firsts), self._group(part, (output,), self._lasts)
                return FrozenBlock(first, DeltaNetCore.of(part, first), last, residual)

    def _mlp(self, module: Any, layer: Layer) -> Block:
        mlp, names = layer.mlp, layer.norms
        residual = self._residual(module, names.before_mlp, names.after_mlp)
        part = getattr(module, mlp.module)
        match mlp:
            case Mlp():
                activation = mlp.activation
                if activation == "relu2" or activation == "clamped_silu":
                    raise TypeError(f"no gated MLP has the activation {activation}")
                return FrozenBlock(
                    self._group(part, mlp.projections, self._firsts),
                    GatedCore(activation),
                    self._group(part, (mlp.output,), self._lasts),
                    residual,
                )
            case Experts():
                return AutogradBlock(_by_token(part), residual, modules=[part])

    def _attention(self, part: Any, shape: Attention) -> AttentionCore:
        norms = None
        if shape.qk_norm is not None:
            of_query, of_key = (self._norm_weight(getattr(part, name)).float() for name in shape.qk_norm.names)
            norms = (of_query, of_key)
        return AttentionCore(shape, self._decoder.eps, norms, part.sinks.detach() if shape.sinks else None)

    def _group(self, part: Any, names: Sequence[str], scratch: Scratch) -> FrozenGroup:
        members = [member_of(getattr(part, name), self._adapter) for name in names]
        return FrozenGroup(members, self._dtype, scratch)

    def _residual(self, module: Any, before: str, after: str) -> Residual:
        scale = self._decoder.residual_scale
        return Residual(
            self.norm(getattr(module, before)) if before else None,
            self.norm(getattr(module, after), scale) if after else None,
            scale,
        )

    def norm(self, module: Any, scale: float = 1.0) -> Norm:
        weight = self._norm_weight(module)
        return Norm(weight if scale == 1.0 else weight.float() * scale, self._decoder.eps)

    def _norm_weight(self, module: Any) -> Tensor:
        """With the family's offset in it: in fp32 then, because 16 bit would round the sum."""
        weight: Tensor = module.weight.detach()
        return weight.float() + self._decoder.norm_offset if self._decoder.norm_offset else weight


def _by_token(module: nn.Module) -> Any:
    """A module that computes every token by itself, so that a packed stream is one row to it."""

    def function(x: Tensor, stream: Stream) -> Tensor:
        out = module(x[None])
        hidden: Tensor = out[0] if isinstance(out, tuple) else out  # Beside it a router may return its scores.
        return hidden[0] if hidden.ndim == 3 else hidden

    return function


def missing_names(description: Decoder, modules: Sequence[Any]) -> Iterator[str]:
    """Names of the description that a model does not have."""
    for module, layer in zip(modules, description.layers, strict=True):
        wanted = [name for name in vars(layer.norms).values() if name]
        for part in (layer.mixer, layer.mlp):
            wanted += [part.module, *(f"{part.module}.{name}" for name in (*_linears(part), *_others(part)))]
        for name in wanted:
            found = module
            for step in name.split("."):
                found = getattr(found, step, None)
            if found is None:
                yield name


def frozen_linears(description: Decoder, modules: Sequence[Any]) -> Iterator[tuple[str, nn.Module]]:
    """(name in its layer, module) of every linear layer that becomes a frozen matrix, wrapped by PEFT or not."""
    for module, layer in zip(modules, description.layers, strict=True):
        for part in (layer.mixer, layer.mlp):
            for name in _linears(part):
                yield f"{part.module}.{name}", module.get_submodule(f"{part.module}.{name}")


def _linears(part: Attention | Recurrent | Mlp | Experts) -> tuple[str, ...]:
    if isinstance(part, Recurrent):
        return tuple(name for name, _, _ in part.projections)
    return (*part.projections, part.output) if isinstance(part, Attention | Mlp) else ()


def _others(part: Attention | Recurrent | Mlp | Experts) -> tuple[str, ...]:
    """Names of what else is read of a module."""
    if isinstance(part, Recurrent):
        return NEEDED
    if not isinstance(part, Attention):
        return ()
    return (*(part.qk_norm.names if part.qk_norm else ()), *(["sinks"] if part.sinks else ()))
