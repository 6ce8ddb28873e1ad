"""Softmax attention over a packed stream, for every engine: flash attention where the device has it, else padded rows.

Every completion attends to its prompt and itself, causally, as in an ordinary row; a row begins at its first token, so
windows, soft caps and sinks are those of that row.

Flash attention (Dao, arXiv 2307.08691; Ampere and later, 16 bit) takes a pair's queries without a copy: the stream
`prompt, chosen, rejected` is already `[prompt chosen]` and `[rejected]`, and the causal mask is aligned at the end
where there are more keys than queries. Only keys and values of the prompt are repeated, for the second answer.
Elsewhere rows are gathered and padded: PyTorch's own attention, with a mask where a window is shorter than the rows,
and explicit scores for what it has no word for, soft caps and sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo_assets.planning.decoder import Decoder
from dpo_assets.training.batches.batch import PackedBatch, PaddedRows, UnpaddedRows
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.private.torch import flash_attention
from dpo_assets.training.private.transformers import attention_functions, attention_of

FLASH_HEAD = 256  # The widest head that flash attention 2 has kernels for; widths are multiples of 8.
SCORES_AT_ONCE = 2**25  # Explicit scores that are held at one time: 128 MiB in fp32.


@dataclass(frozen=True)
class AttentionKind:
    """What an attention layer does beyond softmax(q k^T).

    Attributes:
        scale: what scores are multiplied by; None: one over the root of the head's width.
        window: tokens that a query sees, itself included; None: all before it.
        softcap: scores become cap tanh(score / cap) (Gemma 2, arXiv 2408.00118).
        sinks: [heads] a score per head that takes part in the softmax and has no value (gpt-oss, arXiv 2508.10925).
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def on_rows(self, longest: int) -> AttentionKind:
        """The same for rows of at most `longest` tokens: a window that holds a whole row is none."""
        return self if self.window is None or self.window < longest else replace(self, window=None)


def has_flash(device: torch.device, dtype: torch.dtype, dim: int = 8) -> bool:
    """Whether this device computes flash attention with heads of `dim`."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or dim % 8 or dim > FLASH_HEAD:
        return False
    return bool(torch.cuda.get_device_capability(device) >= (8, 0))


def takes_flash(kind: AttentionKind, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether flash attention computes this kind here. PyTorch's has no soft cap."""
    return not kind.softcap and has_flash(device, dtype, dim)


def pads_attention(config: Any, description: Decoder | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an attention layer of a model runs on padded rows here.

    Args:
        config: its text configuration.
        description: None where nothing describes it; the names count then that Transformers' configurations share.
    """
    keys = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0)
    if keys and keys != getattr(config, "v_head_dim", keys):
        return True  # Multi-head latent attention (arXiv 2405.04434): values are narrower than keys.
    if description is not None:
        heads = {(layer.head_dim, layer.softcap) for layer in description.attentions}
    else:
        count = getattr(config, "num_attention_heads", None) or 1
        width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 8 * count) // count
        heads = {(width, getattr(config, "attn_logit_softcapping", None))}
    return any(not takes_flash(AttentionKind(softcap=cap), device, dtype, width) for width, cap in heads)


# --- flash attention on unpadded rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flash:
    """Of a forward, what its backward needs beside the inputs.

    Attributes:
        out: [T, heads, dim] with the sinks in it.
        lse: [heads, T] logarithm of each query's sum of exponentials, its sink included.
        state: the kernel's random state, unused without dropout.
    """

    out: Tensor
    lse: Tensor
    state: tuple[Tensor, Tensor]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, rows: UnpaddedRows) -> Flash:
    """Queries q [T, heads, dim] of the stream on keys and values k, v [S, kv heads, dim] gathered by `rows.source`."""
    kind = kind.on_rows(rows.longest[1])
    out, lse, *state = flash_attention().forward(
        q, k, v, rows.query_starts, rows.key_starts, *rows.longest, 0.0, True, False,
        scale=kind.scale, **_window(kind),
    )  # fmt: skip
    if kind.sinks is not None:
        out, lse = joined_by_sinks(out, lse, kind.sinks)
    return Flash(out, lse, (state[0], state[1]))


def joined_by_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's output [T, heads, dim] and lse [heads, T] fp32, computed without sinks [heads], with them.

    A sink joins the sum: with s = sigmoid(lse - sink) the output is s times that without it, and the sum's logarithm
    becomes logaddexp(lse, sink).
    """
    sink = sinks.detach().float()[:, None]
    return out * torch.sigmoid(lse - sink).T[:, :, None].to(out.dtype), torch.logaddexp(lse, sink)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Flash, kind: AttentionKind, rows: UnpaddedRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, heads, dim] and of the gathered k and v [S, kv heads, dim].

    Exact with sinks too: a probability is exp(score - lse) with the sink in lse, and the sink's column, whose value is
    zero, adds nothing to the sum of gradient times output that the softmax's derivative subtracts.
    """
    kind = kind.on_rows(rows.longest[1])
    grads: tuple[Tensor, Tensor, Tensor] = flash_attention().backward(
        grad, q, k, v, kept.out, kept.lse, rows.query_starts, rows.key_starts, *rows.longest,
        0.0, True, *kept.state, scale=kind.scale, **_window(kind),
    )  # fmt: skip
    return grads


def sinks_gradient(grad: Tensor, kept: Flash, sinks: Tensor) -> Tensor:
    """Gradient of the sinks [heads]: minus each one's probability times the sum of gradient times output."""
    shares = torch.exp(sinks.detach().float()[:, None] - kept.lse)
    return -(shares * (grad.float() * kept.out.float()).sum(-1).T).sum(1).to(sinks.dtype)


def _window(kind: AttentionKind) -> dict[str, int]:
    """The kernel counts the tokens before the query's own."""
    return {} if kind.window is None else {"window_size_left": kind.window - 1, "window_size_right": 0}


def fold_slots(gathered: Tensor, rows: UnpaddedRows) -> Tensor:
    """Sums gathered keys or values [S, ...] back to the stream [T, ...] in fp32, without atomics."""
    total: Tensor | None = None
    for slots in rows.slots.unbind(1):
        part = gathered.index_select(0, slots.clamp_min(0)).float()
        part = part * (slots >= 0).view(-1, *[1] * (gathered.ndim - 1))
        total = part if total is None else total + part
    assert total is not None
    return total.to(gathered.dtype)


class _PackedFlash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, kind: AttentionKind, rows: UnpaddedRows
    ) -> Tensor:
        rows_k, rows_v = (x.index_select(0, rows.source) for x in (k, v))
        kept = flash_forward(q, rows_k, rows_v, kind, rows)
        ctx.save_for_backward(q, k, v, sinks, kept.out, kept.lse, *kept.state)
        ctx.kind, ctx.rows = kind, rows
        return kept.out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, *state = ctx.saved_tensors
        kept = Flash(out, lse, (state[0], state[1]))
        # The key and value rows are gathered again: keeping them would cost more memory than this pass costs time.
        rows_k, rows_v = (x.index_select(0, ctx.rows.source) for x in (k, v))
        dq, dk, dv = flash_backward(grads[0], q, rows_k, rows_v, kept, ctx.kind, ctx.rows)
        d_sinks = sinks_gradient(grads[0], kept, sinks) if ctx.needs_input_grad[3] else None
        return dq, fold_slots(dk, ctx.rows), fold_slots(dv, ctx.rows), d_sinks, None, None


# --- padded rows ------------------------------------------------------------------------------------------------------


class _Unshare(torch.autograd.Function):
    """Stream [T, ...] to rows [R, W, ...].

    The backward adds up the slots of each stream token with gathers only: every slot list holds a stream token at most
    once, so it needs no atomics and is deterministic. Filler slots get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, rows: PaddedRows) -> Tensor:
        ctx.rows = rows
        return stream.index_select(0, rows.source).view(*rows.shape, *stream.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        slots = grads[0].flatten(0, 1)
        out = slots.index_select(0, ctx.rows.home)
        for stream, further in ctx.rows.shared:
            out[stream] += slots.index_select(0, further)
        return out, None


def unshare(stream: Tensor, rows: PaddedRows) -> Tensor:
    """Stream [T, ...] to rows [R, W, ...], with a deterministic backward pass."""
    unshared: Tensor = _Unshare.apply(stream, rows)
    return unshared


def causal_rows(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, dropout: float = 0.0) -> Tensor:
    """Causal attention of rows: q [R, heads, W, dim], k and v [R, kv heads, W, dim]; returns q's shape, dim that of v.

    Positions of a row are its places: a row begins at its first token.
    """
    kind = kind.on_rows(q.shape[2])
    if kind.softcap or kind.sinks is not None:
        return _explicit(q, k, v, kind, dropout)
    grouped = q.shape[1] != k.shape[1]
    if grouped and (kind.window is not None or (q.is_cuda and not has_flash(q.device, q.dtype, q.shape[-1]))):
        # Without flash attention only the kernel that keeps all W x W scores takes grouped heads; repeated, the
        # memory-efficient one does.
        k, v = _repeated(k, v, q.shape[1])
        grouped = False
    mask = None if kind.window is None else _visible(q.shape[2], kind.window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=kind.scale, dropout_p=dropout, enable_gqa=grouped
    )


def _repeated(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return k.repeat_interleave(heads // k.shape[1], dim=1), v.repeat_interleave(heads // v.shape[1], dim=1)


def _visible(width: int, window: int | None, device: torch.device) -> Tensor:
    """[W, W] whether a query (row) sees a key (column)."""
    place = torch.arange(width, device=device)
    distance = place[:, None] - place
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _explicit(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, dropout: float) -> Tensor:
    """By all scores of a row, some rows at a time; they are computed again in the backward pass where rows are many."""
    k, v = _repeated(k, v, q.shape[1])
    heads, width = q.shape[1:3]
    rows = max(1, SCORES_AT_ONCE // (heads * width * width))
    if len(q) <= rows:
        return _by_scores(q, k, v, kind, dropout)
    parts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
    return torch.cat([checkpoint(_by_scores, *part, kind, dropout, use_reentrant=False) for part in parts])


def _by_scores(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, dropout: float) -> Tensor:
    scale = q.shape[-1] ** -0.5 if kind.scale is None else kind.scale
    scores = (q @ k.transpose(2, 3)).float() * scale
    if kind.softcap:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    scores = scores.masked_fill(~_visible(q.shape[2], kind.window, q.device), -torch.inf)
    if kind.sinks is not None:
        sinks = kind.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        shares = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    return F.dropout(shares, dropout).to(v.dtype) @ v


# --- either -----------------------------------------------------------------------------------------------------------


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, batch: PackedBatch, dropout: float = 0.0
) -> Tensor:
    """[T, heads, dim of v] of a packed stream: q [T, heads, dim], k and v [T, kv heads, dim]; differentiable."""
    if not dropout and q.shape[-1] == v.shape[-1] and takes_flash(kind, q.device, q.dtype, q.shape[-1]):
        out: Tensor = _PackedFlash.apply(q, k, v, kind.sinks, kind, batch.unpadded)
        return out
    rows_q, rows_k, rows_v = (unshare(x, batch.padded).transpose(1, 2) for x in (q, k, v))
    attended = causal_rows(rows_q, rows_k, rows_v, kind, dropout)
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, batch.padded.home)


# --- as an attention of Transformers' layers --------------------------------------------------------------------------

NAME = "packed_rows"


class Tables:
    """A packed batch on its way through the layers: a compiled layer that was given the tables themselves would be
    compiled for every number of groups."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch


@torch.compiler.disable
def packed_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed: Tables | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers attention interface: query [1, heads, T, dim] over the stream; returns [1, T, heads, dim].

    `sliding_window`, `softcap` and `s_aux` (sinks) are the names by which Transformers' layers say what they do. What a
    layer leaves to its mask alone is not computed here; `scoring.proof` finds it out. Without a packed batch in the
    call (generation) it is Transformers' own SDPA attention.

    Never part of a compiled layer: its tables differ in every batch, so that a layer would be compiled for each, up to
    a limit, and computed as it is from then on. The kernel is what takes the time here, and it is compiled already.
    """
    if packed is None:
        plain = attention_functions()["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)  # type: ignore[no-any-return]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):  # The kernels themselves are not among what autocast casts.
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    kind = AttentionKind(scaling, sliding_window, softcap, s_aux)
    return packed_attention(q, k, v, kind, packed.batch, dropout)[None], None


def register() -> None:
    """Makes `attn_implementation="packed_rows"` known to Transformers."""
    attention_functions().register(NAME, packed_rows)


def attend_packed(lm: Any) -> bool:
    """Puts the packed attention into a model's layers. Returns whether they take one."""
    register()
    lm.set_attn_implementation(NAME)
    # Where layers compute attention in a way of their own, Transformers leaves a warning and what was there.
    return attention_of(lm) == NAME


def attend_as_own(lm: Any) -> None:
    """Puts Transformers' own attention back: SDPA; eager where a model has no other, or SDPA leaves a soft cap out."""
    capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        lm.set_attn_implementation("eager" if capped else "sdpa")
    except ValueError:
        lm.set_attn_implementation("eager")


@contextmanager
def plain_attention(model: Any, implementation: str | None = None) -> Iterator[None]:
    """Transformers' own attention for a while: batched generation needs its padding masks.

    Args:
        implementation: None: what Transformers takes by itself.
    """
    lm = causal_lm(model)
    before = attention_of(lm)
    if implementation is None:
        attend_as_own(lm)
    else:
        lm.set_attn_implementation(implementation)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)
