"""The model's own forward on padded rows: slower than packed batches, and it serves every causal model.

Nothing is shared and nothing is gathered: a row is a prompt with one answer, padded on the right, with its attention
mask; positions, masks and states are the model's own affair. What a causal model computes for a token does not depend
on what follows it, padding included.

Rows share the rotary tables of a forward, so rows that have other tables by themselves never meet in one (`rotary`).

A forward costs its rows times the widest of them. Where a batch costs more than the token budget its rows go through
in several runs, and a run is computed again in the backward pass, so that no more than one run's activations are held
(Chen et al., arXiv 1604.06174). The collator makes batches that need only one (`packing.by_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.packing import by_rows
from dpo_assets.training.engines.base import OwnLayersEngine
from dpo_assets.training.engines.head import TokenScores
from dpo_assets.training.engines.rotary import RotaryTables, fresh_tables
from dpo_assets.training.models.structure import decoder_of


@dataclass(frozen=True)
class _Run:
    """Some rows of a packed batch. n of its scored tokens are theirs.

    Attributes:
        ids, mask: [rows, width] token ids, and 1 where a token is the row's own.
        row, place: [n] where the tokens stand that predict scored ones.
        scored: [n] which of the batch's scored tokens they are.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    place: Tensor
    scored: Tensor


def runs_of(batch: PackedBatch, budget: int, tables: RotaryTables | None = None) -> Iterator[_Run]:
    """The rows of a packed batch in runs whose rows times width are at most `budget`; a row over it stands alone.

    Args:
        tables: of a model whose rotary tables change with the longest row: a run's rows all have the same.
    """
    device, lengths = batch.ids.device, batch.row_lengths
    scored = [answer for _, answers in batch.groups for answer in answers]
    firsts = [sum(scored[:row]) for row in range(len(scored))]
    rows = batch.ids.index_select(0, batch.padded.source).view(batch.padded.shape)
    places = batch.positions.index_select(0, batch.scored.predict)
    alike: dict[Hashable, list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault(tables.shared_by(length) if tables else None, []).append(row)
    runs = (run for some in alike.values() for run in by_rows(some, [lengths[row] for row in some], budget))
    for run in runs:
        width = max(lengths[row] for row in run)
        counts = torch.tensor([scored[row] for row in run])
        which = torch.cat([torch.arange(firsts[row], firsts[row] + scored[row]) for row in run]).to(device)
        ends = torch.tensor([lengths[row] for row in run], device=device)
        yield _Run(
            ids=rows.index_select(0, torch.tensor(run, device=device))[:, :width],
            mask=(torch.arange(width, device=device) < ends[:, None]).long(),
            row=torch.arange(len(run)).repeat_interleave(counts).to(device),
            place=places.index_select(0, which),
            scored=which,
        )


class RowsEngine(OwnLayersEngine):
    """The model's own decoder on padded rows, under this project's head.

    Args:
        budget: tokens of one run, padding included.
    """

    name = "rows"
    padded = True

    def __init__(self, lm: Any, budget: int, *, compiled: bool = False) -> None:
        super().__init__(lm, compiled=compiled)
        self._budget, self._tables = budget, RotaryTables.of(lm)

    @property
    def pads_attention(self) -> bool:
        return True

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        decoder = decoder_of(self._lm)
        assert decoder is not None

        def states(run: _Run) -> tuple[Tensor, ...]:
            found = decoder(input_ids=run.ids, attention_mask=run.mask, use_cache=False).last_hidden_state
            return (found[run.row, run.place],)

        return self._in_runs(states, batch, autocast)[0]

    def _in_runs(
        self,
        compute: Callable[[_Run], tuple[Tensor, ...]],
        batch: PackedBatch,
        autocast: AbstractContextManager[Any] | None,
    ) -> tuple[Tensor, ...]:
        """What `compute` makes of the scored tokens of every run [n, ...], in the batch's order [N, ...]."""
        runs = list(runs_of(batch, self._budget, self._tables))
        again = torch.is_grad_enabled() and len(runs) > 1

        def computed(run: _Run) -> tuple[Tensor, ...]:
            if self._tables.switches:
                fresh_tables(self._lm)  # Also where a run is computed again.
            return compute(run)

        with autocast or nullcontext():
            parts = [checkpoint(computed, run, use_reentrant=False) if again else computed(run) for run in runs]
        order = torch.argsort(torch.cat([run.scored for run in runs]))
        return tuple(torch.cat(column).index_select(0, order) for column in zip(*parts, strict=True))


class OwnLogitsEngine(RowsEngine):
    """The whole forward of the model with eager attention and its own head: what nothing else here can say."""

    name = "rows, own logits"
    attention = "eager"

    def scores(self, lm: Any, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> TokenScores:
        def scored(run: _Run) -> tuple[Tensor, ...]:
            logits = lm(input_ids=run.ids, attention_mask=run.mask, use_cache=False).logits[run.row, run.place].float()
            target = batch.scored.target.index_select(0, run.scored)
            logps = logits.log_softmax(-1)
            fixed, fixed_logps = logits.detach(), logps.detach()
            return (
                logps.gather(1, target[:, None])[:, 0],
                -(fixed_logps.exp() * fixed_logps).sum(-1),
                fixed.mean(-1),
                fixed.argmax(-1) == target,
            )

        return TokenScores(*self._in_runs(scored, batch, autocast))


def why_not_rows(lm: Any) -> str:
    """Why this project's head cannot be put on a model's hidden states; empty when it can."""
    if decoder_of(lm) is None:
        return f"{type(lm).__name__} does not say which of its modules is the decoder"
    return "" if lm.get_output_embeddings() is not None else f"{type(lm).__name__} has no output embeddings"
