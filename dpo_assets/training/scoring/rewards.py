"""The scores of a reward model for rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpo_assets.training.batches.packing import by_rows


@torch.no_grad()
def rewards(model: Any, rows: Sequence[Sequence[int]], budget: int) -> list[float]:
    """The score of every row of token ids, in their order, from forwards of at most `budget` tokens, padding included.

    Where config.json names no padding token the model reads the last token of a row whatever it is, so a row is then
    computed alone.
    """
    pad = model.config.get_text_config().pad_token_id
    widths = [len(row) for row in rows]
    batches = [[n] for n in range(len(rows))] if pad is None else by_rows(range(len(rows)), widths, budget)
    found = [0.0] * len(rows)
    for batch in batches:
        width = max(widths[n] for n in batch)
        ids = torch.tensor([[*rows[n], *[pad or 0] * (width - widths[n])] for n in batch], device=model.device)
        mask = torch.tensor([[1] * widths[n] + [0] * (width - widths[n]) for n in batch], device=model.device)
        scores = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        for n, score in zip(batch, scores, strict=True):
            found[n] = score
    return found
