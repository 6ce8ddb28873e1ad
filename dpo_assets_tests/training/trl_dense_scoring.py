"""A dense stand-in for the kernel that TRL 1.15 scores with. Tests only.

TRL 1.15 computes every log-probability in a Triton kernel and has no other path, so its own DPOTrainer needs a GPU.
The stand-in computes the same five outputs from whole logits, so that TRL's trainer can be run, unchanged otherwise, on
a CPU beside the packed trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import trl.trainer.utils as trl_utils
from torch import Tensor

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class DenseLogProbs:
    """Called as TRL calls its autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> Outputs:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), None for what is not in `outputs`."""
        logits = F.linear(hidden, weight, bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        logps = logits.log_softmax(-1)
        fixed, fixed_logps = logits.detach(), logps.detach()
        return (
            logps.gather(-1, targets[:, None])[:, 0],
            -(logps.exp() * logps).sum(-1) if "entropy" in outputs else None,
            (2 * fixed_logps).logsumexp(-1) if "log_sum_sq_probs" in outputs else None,
            fixed.mean(-1) if "mean_logits" in outputs else None,
            fixed.argmax(-1) == targets if "is_top1" in outputs else None,
        )


@contextmanager
def dense_scoring() -> Iterator[None]:
    """TRL on the stand-in for a while."""
    kernel = trl_utils._ChunkedLogProbFunction
    trl_utils._ChunkedLogProbFunction = DenseLogProbs
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = kernel
