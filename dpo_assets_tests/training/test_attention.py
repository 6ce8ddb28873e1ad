"""Attention over a packed stream: flash attention and padded rows say the same, for every kind of layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.attention import AttentionKind, joined_by_sinks, packed_attention
from dpo_assets.training.private.torch import FlashAttention

HEADS, KV_HEADS, DIM = 4, 2, 8
GROUPS = [
    Group(list(range(5)), (list(range(7)), list(range(12)))),
    Group([1], ([2], [3, 4])),
    Group(list(range(20)), (list(range(3)), list(range(9)))),
]
SINKS = torch.tensor([-1.0, 0.0, 0.5, 2.0])
KINDS = {
    "full": AttentionKind(),
    "another scale": AttentionKind(scale=0.9),
    "a window": AttentionKind(window=4),
    "a window of one token": AttentionKind(window=1),
    "a window longer than the rows": AttentionKind(window=30),
    "sinks": AttentionKind(scale=0.7, sinks=SINKS),
    "sinks in a window": AttentionKind(window=4, sinks=SINKS),
}
CAPPED = {
    "a soft cap": AttentionKind(scale=1.0, softcap=0.5),
    "a soft cap in a window": AttentionKind(scale=1.0, window=4, softcap=0.5),
    "a soft cap and sinks": AttentionKind(softcap=0.5, sinks=SINKS),
}


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = sum(group.tokens for group in GROUPS)
    shapes = [(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def by_definition(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind) -> Tensor:
    """Token by token: what each token of the stream sees is written out from the groups."""
    out, base = [], 0
    scale = DIM**-0.5 if kind.scale is None else kind.scale
    for group in GROUPS:
        prompt = list(range(base, base + len(group.prompt)))
        start = base + len(prompt)
        rows = []
        for completion in group.completions:
            rows.append(prompt + list(range(start, start + len(completion))))
            start += len(completion)
        asked = [(rows[0], n) for n in range(len(rows[0]))]
        asked += [(row, n) for row in rows[1:] for n in range(len(prompt), len(row))]
        for row, n in asked:
            seen = row[: n + 1] if kind.window is None else row[max(0, n + 1 - kind.window) : n + 1]
            keys, values = (x[seen].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
            scores = torch.einsum("hd,khd->hk", q[row[n]], keys) * scale
            if kind.softcap:
                scores = kind.softcap * torch.tanh(scores / kind.softcap)
            if kind.sinks is not None:
                scores = torch.cat([scores, kind.sinks[:, None]], dim=1)
            shares = scores.softmax(-1)[:, : len(seen)]
            out.append(torch.einsum("hk,khd->hd", shares, values))
        base = start
    return torch.stack(out)


def outcome(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output with the gradients of its inputs."""
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def with_sinks(kind: AttentionKind, leaves: list[Tensor]) -> tuple[AttentionKind, list[Tensor]]:
    if kind.sinks is None:
        return kind, leaves
    sinks = kind.sinks.to(leaves[0].device).requires_grad_()
    return AttentionKind(kind.scale, kind.window, kind.softcap, sinks), [*leaves, sinks]


@pytest.fixture(params=[*KINDS.values(), *CAPPED.values()], ids=[*KINDS, *CAPPED])
def kind(request: pytest.FixtureRequest) -> AttentionKind:
    kind: AttentionKind = request.param
    return kind


def test_padded_rows_compute_each_kind_as_it_is_defined(kind: AttentionKind) -> None:
    kind, leaves = with_sinks(kind, inputs())
    ours = outcome(packed_attention(*leaves[:3], kind, pack(GROUPS)), leaves)
    for got, wanted in zip(ours, outcome(by_definition(*leaves[:3], kind), leaves), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_scores_that_are_held_some_rows_at_a_time_are_the_same(
    kind: AttentionKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 rows of up to 29 tokens, 4 heads: room for two rows, so three parts, computed again in the backward pass."""
    kind, leaves = with_sinks(kind, inputs())
    whole = outcome(packed_attention(*leaves[:3], kind, pack(GROUPS)), leaves)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2 * HEADS * 29 * 29)
    calls: list[int] = []
    by_scores = attention._by_scores
    monkeypatch.setattr(attention, "_by_scores", lambda *args: (calls.append(len(args[0])), by_scores(*args))[1])
    parts = outcome(packed_attention(*leaves[:3], kind, pack(GROUPS)), leaves)
    assert calls == ([2] * 6 if kind.softcap or kind.sinks is not None else [])
    for got, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, wanted)


class StandIn:
    """PyTorch's flash attention on unpadded rows, which has no kernel for a CPU: the same calls, by all scores."""

    def __init__(self) -> None:
        self.calls = 0

    def _shares(
        self, q: Tensor, k: Tensor, starts: tuple[Tensor, Tensor], scale: float | None, left: int | None
    ) -> list[tuple[slice, slice, Tensor]]:
        """Of each row its queries, its keys, and scores [heads, queries, keys] with the causal mask at the end."""
        self.calls += 1
        parts = []
        for (a, b), (c, d) in zip(*(zip(s[:-1].tolist(), s[1:].tolist(), strict=True) for s in starts), strict=True):
            keys = k[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
            place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            distance = place - torch.arange(d - c)
            hidden = (distance < 0) if left is None else (distance < 0) | (distance > left)
            parts.append((slice(a, b), slice(c, d), scores.masked_fill(hidden, -math.inf)))
        return parts

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor, longest_query: int,
        longest_key: int, dropout: float, causal: bool, debug: bool, *, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (dropout, causal, debug) == (0.0, True, False)
        assert longest_query == int(query_starts.diff().max())
        assert longest_key == int(key_starts.diff().max())
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        for queries, keys, scores in self._shares(q, k, (query_starts, key_starts), scale, window_size_left):
            lse[:, queries] = scores.logsumexp(-1)
            values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, query_starts: Tensor,
        key_starts: Tensor, longest_query: int, longest_key: int, dropout: float, causal: bool, state: Tensor,
        unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As the kernel does it: probabilities from lse, and the output times its gradient, both as they are given."""
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        by = q.shape[-1] ** -0.5 if scale is None else scale
        repeat = q.shape[1] // k.shape[1]
        for queries, keys, scores in self._shares(q, k, (query_starts, key_starts), scale, window_size_left):
            shares = torch.exp(scores - lse[:, queries, None])
            values, sums = v[keys].repeat_interleave(repeat, 1), (grad[queries] * out[queries]).sum(-1).T[:, :, None]
            slopes = shares * (torch.einsum("qhd,khd->hqk", grad[queries], values) - sums) * by
            dq[queries] = torch.einsum("hqk,khd->qhd", slopes, k[keys].repeat_interleave(repeat, 1))
            dk[keys] = torch.einsum("hqk,qhd->khd", slopes, q[queries]).unflatten(1, (-1, repeat)).sum(2)
            dv[keys] = torch.einsum("hqk,qhd->khd", shares, grad[queries]).unflatten(1, (-1, repeat)).sum(2)
        return dq, dk, dv


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """This CPU as a device with flash attention."""
    stand_in = StandIn()
    kernels = FlashAttention(stand_in.forward, stand_in.backward)
    monkeypatch.setattr(attention, "flash_attention", lambda: kernels)
    monkeypatch.setattr(attention, "has_flash", lambda *_: True)
    return stand_in


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_flash_attention_on_unpadded_rows_computes_each_kind_as_it_is_defined(
    kind: AttentionKind, flash: StandIn
) -> None:
    """What surrounds the kernel: queries in the stream's order, windows, sinks, the sums over a prompt's copies."""
    kind, leaves = with_sinks(kind, inputs())
    ours = outcome(packed_attention(*leaves[:3], kind, pack(GROUPS)), leaves)
    assert flash.calls == 2
    for got, wanted in zip(ours, outcome(by_definition(*leaves[:3], kind), leaves), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_sinks_join_a_softmax_and_flash_attention_differentiates_it() -> None:
    """PyTorch's flash attention for CPUs: its forward knows no sinks, and its backward reads `out` and `lse` alone."""
    torch.manual_seed(3)
    heads, tokens, dim = 3, 9, 8
    q, k, v, d = (torch.randn(1, heads, tokens, dim) for _ in range(4))
    sinks = torch.tensor([-1.0, 0.5, 3.0])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) * dim**-0.5
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    beside = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, tokens, 1)], dim=-1)
    expected = beside.softmax(-1)[..., :-1] @ leaves[2]
    expected.backward(d)

    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    joined, total = joined_by_sinks(out[0].transpose(0, 1), lse[0], sinks)
    torch.testing.assert_close(joined.transpose(0, 1)[None], expected.detach())
    torch.testing.assert_close(total, beside.detach().logsumexp(-1)[0])
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with_sink = joined.transpose(0, 1)[None].contiguous()
    for ours, leaf in zip(backward(d, q, k, v, with_sink, total[None], 0.0, True), leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad)


@pytest.mark.parametrize("kind", CAPPED.values(), ids=CAPPED)
def test_a_soft_cap_is_not_given_to_flash_attention_which_has_none(kind: AttentionKind, flash: StandIn) -> None:
    leaves = inputs()
    out = packed_attention(*leaves, kind, pack(GROUPS))
    assert flash.calls == 0
    torch.testing.assert_close(out, by_definition(*leaves, kind), atol=1e-5, rtol=1e-5)


def test_dropout_and_values_of_another_width_are_not_given_to_flash_attention(flash: StandIn) -> None:
    q, k, v = inputs()
    packed_attention(q, k, v, AttentionKind(), pack(GROUPS), dropout=0.5)
    assert packed_attention(q, k, v[:, :, :4], AttentionKind(), pack(GROUPS)).shape == (len(q), HEADS, 4)
    assert flash.calls == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_flash_attention_of_the_gpu_is_as_exact_as_its_format(kind: AttentionKind, dtype: torch.dtype) -> None:
    batch: PackedBatch = pack(GROUPS).to("cuda")
    exact: Any = None
    for format_ in (torch.float32, dtype):
        on_gpu, leaves = with_sinks(kind, inputs(format_, "cuda"))
        found = outcome(packed_attention(*leaves[:3], on_gpu, batch), leaves)
        exact = exact or found
    for got, wanted in zip(found, exact, strict=True):
        # A query that sees one token has no gradient, nor has that token's key: what is found there is rounding.
        largest = max(float(wanted.abs().max()), 1e-4)
        torch.testing.assert_close(got.float(), wanted.float(), atol=0.03 * largest, rtol=0.03)
