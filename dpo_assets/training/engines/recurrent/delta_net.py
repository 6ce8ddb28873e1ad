"""Gated delta nets (Yang et al., arXiv 2412.06464) on the packed stream, as Qwen3-Next and Qwen3.5 have them.

Projections run once a token of the stream; the convolution and the delta rule run along the segments, so a prompt is
computed once and both of its answers start from its state. flash-linear-attention's kernel returns the gradient of
`initial_state` (`dh0` of `chunk_gated_delta_rule_bwd_dhu`) and takes that of the final state; the PyTorch form of
Transformers differentiates itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.recurrent.convolution import convolve, lead_of
from dpo_assets.training.engines.recurrent.kernels import fla_delta_rule, fla_gated_norm
from dpo_assets.training.engines.recurrent.segments import Segments, Stage
from dpo_assets.training.private.transformers import chunk_gated_delta_rule

NEEDED = ("conv1d", "A_log", "dt_bias", "norm", "out_proj", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")


@dataclass(frozen=True)
class Projected:
    """What a delta net projects its input to, token by token.

    Attributes:
        qkv: [T, 2 * key width + value width], before the convolution.
        gate: [T, value heads, value dim], of the output.
        write: [T, value heads], before its sigmoid.
        decay: [T, value heads], before its softplus.
    """

    qkv: Tensor
    gate: Tensor
    write: Tensor
    decay: Tensor


class DeltaNet:
    """A gated delta net's modules, computed on packed batches.

    Args:
        entries: names of the linear layers that read its input.
        arranged: what their outputs [T, width] are.
    """

    def __init__(
        self, mixer: Any, entries: tuple[str, ...], arranged: Callable[[Any, Sequence[Tensor]], Projected]
    ) -> None:
        self._mixer, self._entries, self._arranged = mixer, entries, arranged

    @classmethod
    def of(cls, mixer: Any) -> DeltaNet | None:
        """A module as a delta net; None where it is another mixer."""
        if not all(hasattr(mixer, name) for name in NEEDED):
            return None
        for entries, arranged in ENTRIES.items():
            if all(hasattr(mixer, name) for name in entries):
                return cls(mixer, entries, arranged)
        return None

    def __call__(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Stream [T, hidden] to stream [T, hidden]."""
        entered = [getattr(self._mixer, name)(x) for name in self._entries]
        out: Tensor = self._mixer.out_proj(self.core(entered, batch))
        return out

    def core(self, entered: Sequence[Tensor], batch: PackedBatch) -> Tensor:
        """All between the projections, of the outputs [T, width] of those that read its input: [T, value width]."""
        mixer = self._mixer
        projected = self._arranged(mixer, entered)
        segments = Segments.of(batch, lead_of(mixer.conv1d))
        mixed = convolve(projected.qkv, mixer.conv1d, mixer.activation, segments)
        keys, values = mixer.num_k_heads * mixer.head_k_dim, mixer.num_v_heads * mixer.head_v_dim
        query, key, value = mixed.split([keys, keys, values], dim=1)
        # In fp32, where Transformers has it too: in fp16 the decay would overflow.
        decay = -mixer.A_log.float().exp() * F.softplus(projected.decay.float() + mixer.dt_bias)
        out = delta_rule(
            query.unflatten(1, (-1, mixer.head_k_dim)),
            key.unflatten(1, (-1, mixer.head_k_dim)),
            value.unflatten(1, (-1, mixer.head_v_dim)),
            segments.own(decay),
            segments.own(projected.write.sigmoid()),
            segments,
        )
        return gated_norm(segments.streamed(out), projected.gate, mixer.norm).flatten(1)


def _four(mixer: Any, entered: Sequence[Tensor]) -> Projected:
    qkv, gate, write, decay = entered
    return Projected(qkv, gate.unflatten(1, (-1, mixer.head_v_dim)), write, decay)


def _two(mixer: Any, entered: Sequence[Tensor]) -> Projected:
    parts = mixer.fix_query_key_value_ordering(*(part[None] for part in entered))
    query, key, value, gate, write, decay = (part[0] for part in parts)
    return Projected(torch.cat([part.flatten(1) for part in (query, key, value)], dim=1), gate, write, decay)


# Qwen3.5's, and Qwen3-Next's.
ENTRIES: dict[tuple[str, ...], Callable[[Any, Sequence[Tensor]], Projected]] = {
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"): _four,
    ("in_proj_qkvz", "in_proj_ba"): _two,
}


def gated_norm(x: Tensor, gate: Tensor, norm: Any) -> Tensor:
    """norm(x) silu(gate) over each head, x and gate [T, heads, dim]; `norm` is the mixer's module."""
    kernel = fla_gated_norm(x.device) if getattr(norm, "activation", "silu") == "silu" else None
    if kernel is not None:
        normed: Tensor = kernel(x, gate, norm.weight, None, eps=norm.variance_epsilon)
        return normed
    plain: Tensor = norm(x.flatten(0, 1), gate.flatten(0, 1))
    return plain.view_as(x)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, write: Tensor, segments: Segments) -> Tensor:
    """The gated delta rule along the segments.

    Args:
        query, key: [S, key heads, key dim] at the segments' places, not yet normed.
        value: [S, value heads, value dim].
        decay: [S, value heads], logarithms of what the state is multiplied by; 0 in leads.
        write: [S, value heads], between 0 and 1; 0 in leads.

    Returns:
        [S, value heads, value dim].
    """
    scan = _fla if fla_delta_rule(query.device) is not None else _torch
    sizes = [stage.places for stage in segments.stages]
    parts = zip(*(part.split(sizes) for part in (query, key, value, decay, write)), strict=True)
    outs: list[Tensor] = []
    states: Tensor | None = None
    for stage, part in zip(segments.stages, parts, strict=True):
        # By indexing, whose backward adds up in a fixed order.
        initial = states[stage.origin] if states is not None and stage.origin is not None else None
        out, states = scan(part, stage, initial, stage is not segments.stages[-1])
        outs.append(out)
    return torch.cat(outs)


def _fla(
    parts: tuple[Tensor, ...], stage: Stage, initial: Tensor | None, leaves_state: bool
) -> tuple[Tensor, Tensor | None]:
    kernel = fla_delta_rule(parts[0].device)
    assert kernel is not None
    query, key, value, decay, write = (part[None] for part in parts)
    out, final = kernel(
        query, key, value, decay, write, initial_state=initial, output_final_state=leaves_state,
        use_qk_l2norm_in_kernel=True, cu_seqlens=stage.starts, cu_seqlens_cpu=stage.starts_cpu,
    )  # fmt: skip
    return out[0], final


def _torch(
    parts: tuple[Tensor, ...], stage: Stage, initial: Tensor | None, leaves_state: bool
) -> tuple[Tensor, Tensor | None]:
    """On padded rows. Past a row's end nothing is written and nothing decays, so its state stays what it was."""
    query, key, value, decay, write = (stage.padded(part).unflatten(0, stage.shape) for part in parts)
    shared = value.shape[2] // query.shape[2]
    out, final = chunk_gated_delta_rule()(
        query.repeat_interleave(shared, dim=2), key.repeat_interleave(shared, dim=2), value, g=decay, beta=write,
        initial_state=initial, output_final_state=leaves_state, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return stage.padded.undone(out.flatten(0, 1)), final
