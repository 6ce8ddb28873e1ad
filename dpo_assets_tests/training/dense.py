"""Scores the slow and plain way, to hold the packed path against: one row, whole logits, the model's own attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.batches.packing import Group


def row_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Logits [completion tokens, vocabulary] that predict the completion, by the model's own forward."""
    row = torch.tensor([[*prompt, *completion]])
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def row_logps(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-probability of each completion token."""
    logps = row_logits(model, prompt, completion).log_softmax(-1)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def rows_of(groups: Sequence[Group]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every row, in the order of `pack`."""
    return [(list(g.prompt), list(c)) for g in groups for c in g.completions]


def summed_logps(model: Any, groups: Sequence[Group]) -> list[float]:
    """Summed log-probability of every completion."""
    with torch.no_grad():
        return [float(row_logps(model, *row).sum()) for row in rows_of(groups)]
