"""The one scorer: log-probabilities of completion tokens, for SFT, reference, DPO and evaluation alike.

Two forwards that round differently are the classic cause of a first loss off ln 2, so there is only this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.training.loading import plain_attention
from dpo_assets.training.packing import Group, PackedBatch, pack, under_budget

HEAD_CHUNK = 1024  # Scored tokens whose logits exist at one time.
PROBE_TOLERANCE = 1e-3  # Nats per token between packed and plain scoring in fp32; measured differences are below 1e-5.


@dataclass(frozen=True)
class TokenScores:
    """Per scored token [N]: log-probability (with gradient), and entropy, mean logit, greedy match (without)."""

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    top1: Tensor


class _ChunkedHead(torch.autograd.Function):
    """log softmax of the target token in fp32, a chunk of tokens at a time; backward recomputes each chunk's logits.

    Only the hidden states get a gradient: the head is frozen under LoRA.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for part, wanted in zip(hidden.split(HEAD_CHUNK), target.split(HEAD_CHUNK), strict=True):
            logits, _ = _logits(part, weight, bias, scale, softcap)
            logp = logits.log_softmax(-1)
            picked = logp.gather(-1, wanted[:, None])[:, 0]
            outs.append((picked, -(logp.exp() * logp).sum(-1), logits.mean(-1), logits.argmax(-1) == wanted))
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.scale, ctx.softcap = scale, softcap
        logps, entropy, mean_logits, top1 = (torch.cat(column) for column in zip(*outs, strict=True))
        ctx.mark_non_differentiable(entropy, mean_logits, top1)
        return logps, entropy, mean_logits, top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        hidden, weight, bias, target = ctx.saved_tensors
        out = torch.empty_like(hidden)
        pieces = zip(
            hidden.split(HEAD_CHUNK),
            target.split(HEAD_CHUNK),
            grads[0].split(HEAD_CHUNK),
            out.split(HEAD_CHUNK),
            strict=True,
        )
        for part, wanted, grad, into in pieces:
            logits, slope = _logits(part, weight, bias, ctx.scale, ctx.softcap)
            # d logp(target) / d logits = onehot(target) - softmax(logits)
            d_logits = -logits.softmax(-1)
            d_logits.scatter_add_(-1, wanted[:, None], torch.ones_like(d_logits[:, :1]))
            d_logits *= grad[:, None].float()
            if slope is not None:
                d_logits *= slope
            into.copy_((d_logits * ctx.scale).to(weight.dtype) @ weight)
        return out, None, None, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Logits in fp32, and their slope with respect to the uncapped ones where a soft cap bends them."""
    logits = F.linear(hidden.to(weight.dtype), weight, bias).float() * scale
    if not softcap:
        return logits, None
    bent = torch.tanh(logits / softcap)
    return softcap * bent, 1 - bent**2


def causal_lm(model: Any) -> Any:
    """The Transformers model inside a PEFT wrapper, its LoRA layers still in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def score_tokens(model: Any, batch: PackedBatch, autocast: AbstractContextManager[Any] | None = None) -> TokenScores:
    """Scores the completion tokens of a packed batch that is on the model's device.

    The decoder is called directly, so the autocast that accelerate puts around `model.forward` must be passed in.
    """
    lm = causal_lm(model)
    with autocast or nullcontext():
        hidden = lm.get_decoder()(
            input_ids=batch["ids"][None], position_ids=batch["pos"][None], use_cache=False, packed=batch
        ).last_hidden_state[0]
        picked = hidden.index_select(0, batch["predict"])
    head = lm.get_output_embeddings()
    scale, softcap = _head_scale(lm.config)
    return TokenScores(
        *_ChunkedHead.apply(picked, head.weight, getattr(head, "bias", None), batch["target"], scale, softcap)
    )


def _head_scale(config: Any) -> tuple[float, float]:
    """(factor, soft cap) that some architectures put on their logits."""
    text = config.get_text_config()
    factor = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere
    factor /= float(getattr(text, "logits_scaling", None) or 1.0)  # Granite
    return factor, float(getattr(text, "final_logit_softcapping", None) or 0.0)  # Gemma


def sequence_logps(scores: TokenScores, batch: PackedBatch) -> Tensor:
    """Summed log-probability of each completion [R], in the order of `pack`."""
    rows = batch["shape"][0]
    return scores.logps.new_zeros(rows).index_add(0, batch["owner"], scores.logps)


def to_device(batch: PackedBatch, device: Any) -> PackedBatch:
    """The batch with its tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return [move(v) for v in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in batch.items()}


@torch.no_grad()
def score_groups(
    model: Any, groups: Sequence[Group], budget: int, autocast: AbstractContextManager[Any] | None = None
) -> tuple[list[float], list[int]]:
    """(summed log-probability, token count) of every completion, group by group, completion by completion."""
    logps: list[float] = []
    lengths: list[int] = []
    for run in under_budget(groups, [g.tokens for g in groups], budget):
        batch = to_device(pack(run), causal_lm(model).device)
        logps += sequence_logps(score_tokens(model, batch, autocast), batch).tolist()
        lengths += [len(c) for g in run for c in g.completions]
    return logps, lengths


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while: an adapter's dropout would make two scores of one pair differ."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def assert_packing_is_exact(model: Any, group: Group, autocast: AbstractContextManager[Any] | None = None) -> None:
    """Scores one group packed and, row by row, through the model's own forward with eager attention.

    Give it the pair with the longest row: a window of attention shows only on rows that are longer than it. Scores that
    are not finite pass, because they say nothing about attention; the guards of training name them.

    Raises:
        ConfigError: when they differ, as they do for architectures whose attention is not plain causal attention.
    """
    lm = causal_lm(model)
    with evaluating(model):
        packed, lengths = score_groups(model, [group], budget=group.tokens, autocast=autocast)
        with plain_attention(model, "eager"):
            plain = [_row_logp(lm, group.prompt, completion, autocast) for completion in group.completions]
    tolerance = PROBE_TOLERANCE if lm.dtype == torch.float32 else 0.1
    for ours, theirs, length in zip(packed, plain, lengths, strict=True):
        if math.isfinite(theirs) and not abs(ours - theirs) <= tolerance * length:
            raise ConfigError(
                f"{type(lm).__name__} scores {theirs:.4f} nats row by row and {ours:.4f} packed: its attention is not "
                "plain causal attention, so the packed trainer cannot serve it. Set `dpo.trainer: trl`."
            )


def _row_logp(
    lm: Any, prompt: Sequence[int], completion: Sequence[int], autocast: AbstractContextManager[Any] | None
) -> float:
    row = torch.tensor([[*prompt, *completion]], device=lm.device)
    with autocast or nullcontext():
        logits = lm(input_ids=row, use_cache=False).logits[0].float()
    wanted = row[0, len(prompt) :]
    return float(logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, wanted[:, None]).sum())
