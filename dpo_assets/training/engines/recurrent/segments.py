"""The stretches of a packed batch that a state runs along: each prompt once, then each answer from its prompt's state.

The stream is `prompt, answer 1, answer 2, ...` for each group. A recurrence takes all prompts first and all answers
then, each answer beginning with the state that its prompt left behind; a causal convolution needs of the prompt its
last few tokens alone. So a shared prompt is computed once here too (for trees of agents: "Tree Training",
arXiv 2511.00413).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from dpo_assets.training.batches.batch import Layout, PackedBatch

# By the lead: every layer of a forward needs the same tables, for as long as its batch lives.
_MADE: WeakKeyDictionary[PackedBatch, dict[int, Segments]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Move:
    """y = x[index], zero at `blank`, and x[from] added at `to` for each pair of `more`, in which no `to` is twice."""

    index: Tensor
    blank: Tensor | None
    more: tuple[tuple[Tensor, Tensor], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        y = x.index_select(0, self.index)
        if self.blank is not None:
            y[self.blank] = 0
        for to, source in self.more:
            y[to] += x.index_select(0, source)
        return y


@dataclass(frozen=True)
class Copies:
    """Places filled from a stream: its forward gathers, and so does its backward, which is deterministic therefore."""

    there: _Move
    back: _Move

    @classmethod
    def of(cls, source: np.ndarray, length: int, device: torch.device) -> Copies:
        """Each place a copy of stream token `source` of `length` tokens; -1 is a place of zeros."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def move(index: np.ndarray, more: tuple[tuple[Tensor, Tensor], ...] = ()) -> _Move:
            blank = np.flatnonzero(index < 0)
            return _Move(tensor(np.maximum(index, 0)), tensor(blank) if len(blank) else None, more)

        filled = np.flatnonzero(source >= 0)
        places = filled[np.argsort(source[filled], kind="stable")]
        tokens = source[places]
        rank = np.arange(len(tokens)) - np.searchsorted(tokens, tokens)
        first = np.full(length, -1)
        first[tokens[rank == 0]] = places[rank == 0]
        more = tuple(
            (tensor(tokens[rank == n]), tensor(places[rank == n])) for n in range(1, int(rank.max(initial=0)) + 1)
        )
        return cls(move(source), move(first, more))

    @property
    def undone(self) -> Copies:
        """The way back, of copies of which no token has two."""
        return Copies(self.back, self.there)

    def __call__(self, stream: Tensor) -> Tensor:
        """Stream [length, ...] to places [S, ...]."""
        places: Tensor = _Copy.apply(stream, self)
        return places


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return copies.there(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.back(grads[0]), None


@dataclass(frozen=True)
class Stage:
    """Sequences that run side by side, unpadded one after the other.

    Attributes:
        starts: [n + 1], int32, where each begins; `starts_cpu` the same on the CPU, so that no kernel waits to know.
        origin: [n], which sequence of the stage before leaves the state that each begins with; None: with zeros.
        shape: sequences, places of the longest.
        padded: copies into rows [n * longest], zeros past a row's end.
    """

    starts: Tensor
    starts_cpu: Tensor
    shape: tuple[int, int]
    origin: Tensor | None
    padded: Copies

    @classmethod
    def of(cls, lengths: list[int], origin: list[int] | None, device: torch.device) -> Stage:
        starts = np.array([0, *accumulate(lengths)])
        rows, longest = len(lengths), max(lengths)
        column = np.arange(longest)
        table = np.where(column < np.array(lengths)[:, None], starts[:-1, None] + column, -1).ravel()
        cpu = torch.from_numpy(starts.astype(np.int32))
        return cls(
            cpu.to(device),
            cpu,
            (rows, longest),
            None if origin is None else torch.tensor(origin, device=device),
            Copies.of(table, int(starts[-1]), device),
        )

    @property
    def places(self) -> int:
        return int(self.starts_cpu[-1])


@dataclass(frozen=True)
class Segments:
    """Tables of one batch: places, stage after stage and sequence after sequence, each led by the tokens before it.

    A sequence's first `lead` places are what a convolution sees of the tokens before it, zeros where there are none.
    The convolution's outputs there are of no use; a state passes them unchanged, because `own` has zeros there.

    Attributes:
        led: copies the stream into all places.
        own: copies it into those that are the sequences' own, zeros into the leads.
    """

    stages: tuple[Stage, ...]
    led: Copies
    own: Copies

    @property
    def streamed(self) -> Copies:
        """Copies what stands in the sequences' own places back into the stream."""
        return self.own.undone

    @classmethod
    def of(cls, batch: PackedBatch, lead: int) -> Segments:
        """A batch's tables; made once for it."""
        made = _MADE.setdefault(batch, {})
        if lead not in made:
            made[lead] = cls._made(batch.groups, lead, batch.ids.device)
        return made[lead]

    @classmethod
    def _made(cls, groups: Layout, lead: int, device: torch.device) -> Segments:
        firsts = [0, *accumulate(prompt + sum(answers) for prompt, answers in groups)]
        before = np.full(lead, -1)
        alone, prompts, answers = [], [], []  # type: list[np.ndarray], list[np.ndarray], list[np.ndarray]
        origin: list[int] = []
        for number, (prompt, lengths) in enumerate(groups):
            shared = np.arange(firsts[number], firsts[number] + prompt)
            start = firsts[number] + prompt
            prompts.append(np.concatenate([before, shared]))
            alone.append(np.concatenate([before, shared, np.arange(start, start + lengths[0])]))
            for length in lengths:
                led = np.concatenate([before, shared])[len(shared) :]
                answers.append(np.concatenate([led, np.arange(start, start + length)]))
                origin.append(number)
                start += length
        if all(len(lengths) == 1 for _, lengths in groups):
            stages: list[tuple[list[np.ndarray], list[int] | None]] = [(alone, None)]  # Nothing to share.
        else:
            stages = [(prompts, None), (answers, origin)]
        sequences = list(chain.from_iterable(sequences for sequences, _ in stages))
        led = np.concatenate(sequences)
        own = np.concatenate([np.concatenate([before, sequence[lead:]]) for sequence in sequences])
        return cls(
            tuple(Stage.of([len(s) for s in sequences], origin, device) for sequences, origin in stages),
            Copies.of(led, firsts[-1], device),
            Copies.of(own, firsts[-1], device),
        )
