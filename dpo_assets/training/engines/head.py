"""The language-model head: log-probabilities of the scored tokens, a chunk of logits at a time.

The gradient of a token's log-probability with respect to its hidden state does not depend on the loss above it: the
loss only scales it. So it is computed while the chunk's logits are there, and the backward pass is a multiplication: no
logits are computed a second time, and never all of them at once. (Liger's fused losses, arXiv 2410.10989, use the same
linearity for a cross-entropy.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.planning.memory import head_chunk
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.fused import ops


@dataclass(frozen=True)
class TokenScores:
    """Per scored token [N]: log-probability (with gradient), and entropy, mean logit, greedy match (without)."""

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    top1: Tensor


@dataclass(frozen=True)
class Head:
    """A frozen head: logits = softcap(scale * (h W^T + bias))."""

    weight: Tensor  # [V, hidden]
    bias: Tensor | None
    scale: float
    softcap: float

    @classmethod
    def of(cls, lm: Any) -> Head:
        """The head of a Transformers model, with the factor and soft cap that some architectures have."""
        text = lm.config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere
        scale /= float(getattr(text, "logits_scaling", None) or 1.0)  # Granite
        scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
        softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)  # Gemma
        output = lm.get_output_embeddings()
        return cls(output.weight.detach(), getattr(output, "bias", None), scale, softcap)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """fp32 logits [n, V] of hidden states [n, hidden]; fp64 ones of fp64."""
        ops.matmul_fp32(hidden, self.weight.T, out=out)
        if self.bias is not None:
            out += self.bias
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def hidden_slope(self, slope: Tensor, logits: Tensor, out: Tensor) -> None:
        """Gradient of the hidden states [n, hidden] from that of the logits [n, V]."""
        if self.softcap:
            slope *= 1 - (logits / self.softcap) ** 2
        if self.scale != 1.0:
            slope *= self.scale
        torch.mm(slope, self.weight, out=out)


class ScoredHead(torch.autograd.Function):
    """(hidden [N, h], head, target [N], chunk) -> logps, entropy, mean logit, greedy match, each [N].

    Only the log-probabilities have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, target: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight = head.weight
        ctx.dtype = hidden.dtype
        hidden = hidden.to(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = min(chunk, len(hidden))
        kept = torch.promote_types(weight.dtype, torch.float32)
        logits = torch.empty(rows, len(weight), dtype=kept, device=hidden.device)
        slopes = None if grad_hidden is None else torch.empty_like(logits, dtype=weight.dtype)
        parts = []
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], target[start : start + chunk]
            n = len(part)
            head.logits(part, out=logits[:n])
            parts.append(ops.score_logits(logits[:n], wanted, None if slopes is None else slopes[:n]))
            if slopes is not None and grad_hidden is not None:
                head.hidden_slope(slopes[:n], logits[:n], out=grad_hidden[start : start + n])
        ctx.grad_hidden = grad_hidden
        logps, entropy, mean, top1 = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("logps", "entropy", "mean", "top1")
        )
        ctx.mark_non_differentiable(entropy, mean, top1)
        return logps, entropy, mean, top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        out = ctx.grad_hidden.mul_(grads[0][:, None]).to(ctx.dtype)
        del ctx.grad_hidden
        return out, None, None, None


def score_hidden(hidden: Tensor, head: Head, batch: PackedBatch) -> TokenScores:
    """Scores of a packed batch's tokens from the hidden states [N, h] that predict them."""
    chunk = head_chunk(len(batch.ids), "cuda" if hidden.is_cuda else "cpu")
    return TokenScores(*ScoredHead.apply(hidden, head, batch.scored.target, chunk))
