"""Scores of rows of logits. N scored tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_assets.training.engines.fused.ops import backend
from dpo_assets.training.engines.fused.ops.backend import in_triton

HEAD_BLOCK = 2048


@dataclass(frozen=True)
class LogitScores:
    """Of each row of logits [N]: log-probability of the target, entropy, mean logit, whether the target is the top."""

    logps: Tensor
    entropy: Tensor
    mean: Tensor
    top1: Tensor


def score_logits(logits: Tensor, target: Tensor, grad: Tensor | None) -> LogitScores:
    """Scores fp32 logits [N, V], or fp64 ones of a model in fp64.

    `grad` [N, V], where given, becomes onehot(target) - softmax(logits).

    Softmax in one pass with running maxima: Milakov & Gimelshein, arXiv 1805.02867.
    """
    if in_triton(logits):
        scores = [torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3)]
        top1 = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
        into = logits if grad is None else grad
        backend.kernels.score_logits[(len(logits),)](
            logits, target, *scores, top1, into, logits.stride(0), into.stride(0),
            VOCABULARY=logits.shape[1], WITH_GRAD=grad is not None, BLOCK=HEAD_BLOCK, num_warps=8,
        )  # fmt: skip
        logps, entropy, mean = scores
        return LogitScores(logps, entropy, mean, top1)
    # Not `log_softmax`, which on a CPU adds up a vocabulary one by one in fp32: of 49,152 logits that is 7e-6 nats off
    # in one direction, 2e-3 over an answer of 250 tokens (benchmarks/RESULTS.md). `sum` adds pairwise.
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1).double()
    normaliser = total.log()
    logps = shifted.gather(1, target[:, None])[:, 0] - normaliser
    entropy = normaliser - shifted.mul_(weights).sum(-1) / total
    if grad is not None:
        grad.copy_(weights.mul_((-1 / total).to(weights.dtype)[:, None]))
        grad.scatter_add_(1, target[:, None], torch.ones_like(grad[:, :1]))
    dtype = logits.dtype
    return LogitScores(logps.to(dtype), entropy.to(dtype), logits.mean(-1), logits.argmax(-1) == target)
