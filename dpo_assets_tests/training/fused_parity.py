"""A model by fused layers and by its own eager forward, row by row: what both say of the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dpo_assets.planning.decoder import Decoder
from dpo_assets.training.batches.batch import UnpaddedRows
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.attention import AttentionKind, Flash
from dpo_assets.training.engines.base import attach_engine
from dpo_assets.training.engines.fused import attention as fused_attention
from dpo_assets.training.engines.fused.decoder import FusedDecoder, why_not_fused
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.logprobs import score_tokens, sequence_logps
from dpo_assets_tests.training.tiny_models import OTHER_PAIR, PAIR

GROUPS = (PAIR, OTHER_PAIR, Group([7, 9], ([11],)))
TOLERANCE = 1e-4
Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]  # Hidden states behind scored tokens, scores of rows, gradients.


def adapted(base: Any, targets: Sequence[str] | str = "all-linear", rank: int = 3) -> Any:
    """A model with a random adapter."""
    config = LoraConfig(
        r=rank,
        lora_alpha=6,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_of(logps: Tensor) -> Tensor:
    """DPO's of both pairs, and the last row's score, so that no gradient cancels."""
    return -torch.nn.functional.logsigmoid(0.1 * (logps[0:4:2] - logps[1:4:2])).sum() - 0.05 * logps[4]


def own(model: Any) -> Outcome:
    """By the model's own forward, one row at a time."""
    lm = causal_lm(model)
    model.zero_grad()
    hidden, logps = [], []
    for group in GROUPS:
        for completion in group.completions:
            row = torch.tensor([[*group.prompt, *completion]])
            out = lm(input_ids=row, use_cache=False, output_hidden_states=True)
            scored = slice(len(group.prompt) - 1, -1)
            hidden.append(out.hidden_states[-1][0, scored].detach())
            wanted = row[0, len(group.prompt) :, None]
            logps.append(out.logits[0, scored].float().log_softmax(-1).gather(1, wanted).sum())
    loss_of(torch.stack(logps)).backward()
    return torch.cat(hidden), torch.stack(logps).detach(), gradients(model)


def fused(
    model: Any, recomputed: int = 0, description: Decoder | None = None, dtype: torch.dtype = torch.float32
) -> Outcome:
    """By fused layers, all rows packed into one stream."""
    lm = causal_lm(model)
    assert why_not_fused(lm) == ""
    engine = FusedDecoder(lm, dtype, recomputed, description=description)
    attach_engine(lm, engine)
    model.zero_grad()
    batch = pack(GROUPS)
    logps = sequence_logps(score_tokens(model, batch), batch)
    loss_of(logps).backward()
    with torch.no_grad():
        return engine.hidden(batch), logps.detach(), gradients(model)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    for mine, exact in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, exact, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(
            ours[2][name], gradient, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def _by_rows(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, unpadded: UnpaddedRows) -> tuple[Tensor, Tensor]:
    """Attention of unpadded rows as flash attention lays them out: out [T, heads, dim] and log-sum-exp [heads, T]."""
    outs, sums = [], []
    queries, keys = unpadded.query_starts.tolist(), unpadded.key_starts.tolist()
    for row in range(len(queries) - 1):
        mine = q[queries[row] : queries[row + 1]].transpose(0, 1)
        theirs, values = (
            x[keys[row] : keys[row + 1]].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v)
        )
        place = torch.arange(theirs.shape[1])
        distance = place[-mine.shape[1] :, None] - place
        hidden = (distance < 0) | (distance >= (kind.window or len(place)))
        scores = (mine @ theirs.transpose(1, 2) * kind.scale).masked_fill(hidden, -torch.inf)
        if kind.sinks is not None:
            scores = torch.cat([scores, kind.sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
            values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
        outs.append((scores.softmax(-1) @ values).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flash attention's kernel needs a GPU, what stands around it does not: the same arithmetic takes its place."""

    def forward(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, rows: UnpaddedRows) -> Flash:
        out, lse = _by_rows(q, k, v, kind, rows)
        return Flash(out.contiguous(), lse, (torch.zeros(2), torch.zeros(0)))

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Flash, kind: AttentionKind, rows: UnpaddedRows
    ) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out, lse = _by_rows(*leaves, kind, rows)
        torch.testing.assert_close((out, lse), (kept.out, kept.lse))
        return torch.autograd.grad(out, leaves, grad)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "has_flash", lambda *args: True)
        patch.setattr(fused_attention, "flash_forward", forward)
        patch.setattr(fused_attention, "flash_backward", backward)
        yield
