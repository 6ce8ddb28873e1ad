"""Pairs to one flat stream of tokens: no padding, and a prompt stands once for all its completions.

A group is a prompt with its completions (two for DPO, one for SFT). The stream of a group is `prompt, completion 1,
completion 2, ...`; every token has the position it would have in its own row, so rotary embeddings are those of
ordinary rows. Attention is computed on rows gathered from the stream (attention.py); everything else, the linear
layers above all, runs once per token of the stream.

Prompt sharing in DPO: Wang & Hegde, "Accelerating Direct Preference Optimization with Prefix Sharing",
arXiv 2410.20305. Gathering plain causal rows instead of a block mask keeps the path independent of the attention
kernel, so it works from a CPU and a T4 upwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dpo_assets.training.batches.batch import PackedBatch, PaddedRows, ScoredTokens, UnpaddedRows


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that share it, as token ids.

    Raises:
        ValueError: for a completion without a token. It has no score, and a packed batch would give it its
            neighbour's.
    """

    prompt: Sequence[int]
    completions: tuple[Sequence[int], ...]

    def __post_init__(self) -> None:
        if empty := [n for n, completion in enumerate(self.completions, start=1) if not len(completion)]:
            raise ValueError(
                f"completion {empty[0]} of {len(self.completions)} behind a prompt of {len(self.prompt)} tokens has no "
                "token, so there is nothing to score; leave the pair out, or end answers with a token"
            )

    def truncated(self, max_length: int) -> Group:
        """Each row cut to `max_length` tokens from the start (TRL's keep_start).

        Raises:
            ValueError: when the prompt leaves no room for any completion token.
        """
        room = max_length - len(self.prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(self.prompt)} tokens leaves no room in max_length {max_length}")
        return Group(self.prompt, tuple(c[:room] for c in self.completions))

    def within(self, budget: int) -> list[Group]:
        """The same completions in order, in groups of at most `budget` tokens; one that is longer stands alone."""
        room = budget - len(self.prompt)
        runs = under_budget(self.completions, [len(c) for c in self.completions], room)
        return [Group(self.prompt, tuple(run)) for run in runs]

    @property
    def tokens(self) -> int:
        """Tokens of the group in the stream."""
        return len(self.prompt) + sum(len(c) for c in self.completions)

    @property
    def longest_row(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(len(c) for c in self.completions)


T = TypeVar("T")


def balanced(items: Sequence[T], sizes: Sequence[int], budget: int) -> list[list[T]]:
    """Items in as few runs of at most `budget` as their sum allows, the runs about equally large.

    Longest first onto the smallest run (Graham 1969). Equal runs waste no small last forward. The order within a run is
    that of `items`; an item over the budget stands alone.
    """
    alone = [[items[n]] for n in range(len(items)) if sizes[n] > budget]
    order = sorted((n for n in range(len(items)) if sizes[n] <= budget), key=lambda n: (-sizes[n], n))
    runs = max(1, math.ceil(sum(sizes[n] for n in order) / budget))
    while True:
        loads, members = [0] * runs, [[] for _ in range(runs)]  # type: list[int], list[list[int]]
        for n in order:
            lightest = loads.index(min(loads))
            loads[lightest] += sizes[n]
            members[lightest].append(n)
        if all(load <= budget for load in loads):
            return [[items[n] for n in sorted(run)] for run in members if run] + alone
        runs += 1


def by_width(items: Sequence[T], sizes: Sequence[int], widths: Sequence[int], budget: int) -> list[list[T]]:
    """Runs of at most `budget`, items of like width together: attention on padded rows pays for the widest."""
    order = sorted(range(len(items)), key=lambda n: (-widths[n], n))
    return list(under_budget([items[n] for n in order], [sizes[n] for n in order], budget))


def by_rows(items: Sequence[T], widths: Sequence[int], budget: int, rows: int = 1) -> list[list[T]]:
    """Runs of padded rows, `rows` an item: items of like width together, rows times the widest at most `budget`.

    An item over it stands alone.
    """
    runs: list[list[T]] = []
    widest = 0
    for n in sorted(range(len(items)), key=lambda n: (-widths[n], n)):
        if not runs or rows * (len(runs[-1]) + 1) * widest > budget:
            runs.append([])
            widest = widths[n]
        runs[-1].append(items[n])
    return runs


def under_budget(items: Sequence[T], sizes: Sequence[int], budget: int) -> Iterator[list[T]]:
    """Consecutive runs of items whose sizes sum to at most `budget`; an item over it stands alone."""
    run: list[T] = []
    used = 0
    for item, size in zip(items, sizes, strict=True):
        if run and used + size > budget:
            yield run
            run, used = [], 0
        run.append(item)
        used += size
    if run:
        yield run


def pack(groups: Sequence[Group]) -> PackedBatch:
    """One forward over `groups`, on the CPU. Rows are numbered group by group, completion by completion."""
    rows = list(_rows(groups))
    stream = [part for group in groups for part in (group.prompt, *group.completions)]
    positions = [
        np.arange(start, start + len(ids))
        for group in groups
        for start, ids in [(0, group.prompt), *((len(group.prompt), completion) for completion in group.completions)]
    ]
    tokens = sum(group.tokens for group in groups)
    ids = _joined(np.asarray(part, dtype=np.int64) for part in stream)
    return PackedBatch(
        ids=ids,
        positions=_joined(positions),
        groups=[(len(group.prompt), [len(completion) for completion in group.completions]) for group in groups],
        scored=_scored_tokens(rows, ids),
        padded=_padded_rows(rows, tokens),
        unpadded=_unpadded_rows(rows, tokens, max(len(group.completions) for group in groups)),
    )


@dataclass(frozen=True)
class _Row:
    """A prompt with one of its completions, by their places in the stream.

    Attributes:
        start: where the group begins.
        rank: number of the completion in its group.
    """

    start: int
    rank: int
    prompt: np.ndarray
    own: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.own)


def _rows(groups: Sequence[Group]) -> Iterator[_Row]:
    start = 0
    for group in groups:
        prompt = np.arange(start, start + len(group.prompt))
        own = start + len(prompt)
        for rank, completion in enumerate(group.completions):
            yield _Row(start, rank, prompt, np.arange(own, own + len(completion)))
            own += len(completion)
        start = own


def _scored_tokens(rows: Sequence[_Row], ids: Tensor) -> ScoredTokens:
    lengths = [len(row.own) for row in rows]
    return ScoredTokens(
        predict=_joined(part for row in rows for part in (row.prompt[-1:], row.own[:-1])),
        target=ids[_joined(row.own for row in rows)],
        owner=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)),
        lengths=torch.tensor(lengths),
    )


def _padded_rows(rows: Sequence[_Row], tokens: int) -> PaddedRows:
    width = max(map(len, rows))
    # A slot past the end may hold any token: causal attention never looks right, and its output is dropped.
    source = np.repeat([row.start for row in rows], width).reshape(len(rows), width)
    home = np.empty(tokens, dtype=np.int64)
    shared: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, row in enumerate(rows):
        shares, cells = len(row.prompt), number * width + np.arange(len(row))
        source[number, :shares], source[number, shares : len(row)] = row.prompt, row.own
        if row.rank == 0:
            home[row.prompt] = cells[:shares]
        else:
            shared.setdefault(row.rank, []).append((row.prompt, cells[:shares]))
        home[row.own] = cells[shares:]
    return PaddedRows(
        shape=(len(rows), width),
        source=torch.from_numpy(source.reshape(-1)),
        home=torch.from_numpy(home),
        shared=tuple(
            (_joined(places for places, _ in entries), _joined(slots for _, slots in entries))
            for _, entries in sorted(shared.items())
        ),
    )


def _unpadded_rows(rows: Sequence[_Row], tokens: int, copies: int) -> UnpaddedRows:
    slots = np.full((tokens, copies), -1)
    queries, keys = [len(row.own if row.rank else row) for row in rows], [len(row) for row in rows]
    key_starts = [0, *accumulate(keys)]
    for row, first in zip(rows, key_starts, strict=False):
        shares, own = len(row.prompt), first + np.arange(len(row))
        slots[row.prompt, row.rank], slots[row.own, 0] = own[:shares], own[shares:]
    return UnpaddedRows(
        query_starts=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        key_starts=torch.tensor(key_starts, dtype=torch.int32),
        longest=(max(queries), max(keys)),
        source=_joined(places for row in rows for places in (row.prompt, row.own)),
        slots=torch.from_numpy(slots),
    )


def _joined(parts: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(parts)))
