"""What a description says, computed word by word in plain PyTorch on one row: logits that must be the model's own.

Weights and rotary tables are the model's; delta nets and experts, whose inside a description does not tell, are its
modules. Everything else is computed here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_assets.planning.decoder import Activation, Attention, Decoder, Layer, Mlp, QkNorm, Rope

ACTIVATIONS: dict[Activation, Any] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@torch.no_grad()
def described_logits(lm: Any, decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of a row of token ids [T]."""
    model = lm.get_decoder()
    x = model.embed_tokens.weight[ids] * decoder.embedding_scale
    for module, layer in zip(model.layers, decoder.layers, strict=True):
        x = x + _branch(_mixer, layer.norms.before_mixer, layer.norms.after_mixer, x, model, module, layer, decoder)
        x = x + _branch(_mlp, layer.norms.before_mlp, layer.norms.after_mlp, x, model, module, layer, decoder)
    x = _norm(x, getattr(model, decoder.last_norm).weight, decoder)
    logits = decoder.logit_scale * F.linear(x, lm.get_output_embeddings().weight)
    cap = decoder.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _branch(
    part: Any, before: str, after: str, x: Tensor, model: Any, module: Any, layer: Layer, decoder: Decoder
) -> Tensor:
    y = part(_norm(x, getattr(module, before).weight, decoder) if before else x, model, module, layer, decoder)
    y = _norm(y, getattr(module, after).weight, decoder) if after else y
    return decoder.residual_scale * y


def _norm(x: Tensor, weight: Tensor, decoder: Decoder) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + decoder.eps) * (weight + decoder.norm_offset)


def _mlp(x: Tensor, model: Any, module: Any, layer: Layer, decoder: Decoder) -> Tensor:
    part, mlp = module.get_submodule(layer.mlp.module), layer.mlp
    if not isinstance(mlp, Mlp):
        out = part(x[None])
        return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
    made = torch.cat([getattr(part, name)(x) for name in mlp.projections], dim=-1)
    act = ACTIVATIONS[mlp.activation]
    gate, up = made.split(mlp.width, dim=-1) if mlp.gated else (made, torch.ones_like(made))
    return getattr(part, mlp.output)(act(gate) * up)  # type: ignore[no-any-return]


def _mixer(x: Tensor, model: Any, module: Any, layer: Layer, decoder: Decoder) -> Tensor:
    part, mixer = module.get_submodule(layer.mixer.module), layer.mixer
    if not isinstance(mixer, Attention):
        return part(x[None])[0]  # type: ignore[no-any-return]
    made = torch.cat([getattr(part, name)(x) for name in mixer.projections], dim=-1)
    width = mixer.query_width * (2 if mixer.gated else 1)
    q, k, v = made.split([width, mixer.kv_width, mixer.kv_width], dim=-1)
    gate = None
    if mixer.gated:
        q, gate = (half.flatten(1) for half in q.view(len(x), mixer.heads, 2, mixer.head_dim).unbind(2))
    q, k = _prepared(q, k, model, part, mixer, decoder)
    out = _attended(q, k, v.view(len(x), mixer.kv_heads, mixer.head_dim), part, mixer)
    return getattr(part, mixer.output)(out if gate is None else out * torch.sigmoid(gate))  # type: ignore[no-any-return]


def _prepared(q: Tensor, k: Tensor, model: Any, part: Any, mixer: Attention, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Queries and keys [T, heads, dim], normed, rotated and grown."""
    norm = mixer.qk_norm
    if norm is not None and norm.over == "projection":
        q, k = _both_normed(q, k, part, norm, decoder)
    q, k = q.view(len(q), mixer.heads, -1), k.view(len(k), mixer.kv_heads, -1)
    if norm is not None and norm.over == "head" and not norm.after_rotation:
        q, k = _both_normed(q, k, part, norm, decoder)
    if mixer.rope is not None:
        cos, sin = _tables(model.rotary_emb, mixer.rope, len(q))
        q, k = (_rotated(x, cos, sin, mixer.rope) for x in (q, k))
    if norm is not None and norm.after_rotation:
        q, k = _both_normed(q, k, part, norm, decoder)
    if (growth := mixer.query_growth) is not None:
        place = torch.arange(len(q))
        q = q * (1 + growth.beta * torch.log(1 + torch.floor(place / growth.length)))[:, None, None]
    return q, k


def _both_normed(q: Tensor, k: Tensor, part: Any, norm: QkNorm, decoder: Decoder) -> tuple[Tensor, Tensor]:
    of_query, of_key = (getattr(part, name).weight for name in norm.names)
    return _norm(q, of_query, decoder), _norm(k, of_key, decoder)


def _tables(rotary: Any, rope: Rope, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, dim / 2] of the model's own tables."""
    places = torch.arange(length)[None]
    if rope.axes > 1:
        places = places.expand(rope.axes, 1, -1)
    table = {"layer_type": rope.table} if rope.table else {}
    cos, sin = rotary(torch.zeros(1), places, **table)
    assert cos.shape[-1] in (rope.dim, rope.dim // 2)
    return cos[0, :, : rope.dim // 2], sin[0, :, : rope.dim // 2]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
    turned, rest = x[..., : rope.dim], x[..., rope.dim :]
    pairs = turned.unflatten(-1, (2, -1) if rope.pairs == "halves" else (-1, 2))
    axis = -2 if rope.pairs == "halves" else -1
    a, b = pairs.unbind(axis)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _attended(q: Tensor, k: Tensor, v: Tensor, part: Any, mixer: Attention) -> Tensor:
    """[T, heads * dim]."""
    k, v = (x.repeat_interleave(mixer.heads // mixer.kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * mixer.scale
    if mixer.softcap:
        scores = mixer.softcap * torch.tanh(scores / mixer.softcap)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (back >= 0) & (back < (mixer.window or math.inf))
    scores = scores.masked_fill(~seen, -math.inf)
    if mixer.sinks:
        scores = torch.cat([scores, part.sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
