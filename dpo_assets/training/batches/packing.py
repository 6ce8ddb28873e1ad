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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

PackedBatch = dict[str, Any]


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
    """Index tables of one forward over `groups`. Tensors are int64 on the CPU unless it says otherwise.

    With T stream tokens, R rows (one per completion) of at most W tokens, C completions in the largest group, S slots
    of key/value rows (every row's tokens, one after the other, unpadded), and N scored tokens:
        ids, pos      [T]    tokens and their positions
        predict       [N]    stream index whose hidden state predicts a scored token
        target        [N]    that token
        owner         [N]    row it belongs to; rows are numbered group by group, completion by completion
        lengths       [R]    scored tokens of each row
        groups        (prompt tokens, [tokens of each completion]) of each group
        shape         (R, W)
        logical       tokens of the rows without sharing
    Tables of padded rows, for attention without flash:
        row_src       [R*W]  stream index behind each row slot; slots past a row's end repeat its first token
        home          [T]    row slot that represents a stream token
        shared        list of (stream [s], slot [s]): further slots of prompt tokens, one entry per completion rank
    Tables of unpadded rows, for flash attention. A group's first row asks for its prompt and first completion, each
    further row for its completion alone, so the queries of all rows are the stream itself:
        query_starts, key_starts  [R + 1], int32   where each row's queries and keys begin
        longest       (most queries, most keys of a row)
        kv_source     [S]    stream index behind each slot
        slots         [T, C] slots of each token, -1 where it has fewer than C
    """
    width = max(len(g.prompt) + len(c) for g in groups for c in g.completions)
    copies = max(len(g.completions) for g in groups)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _CONCATENATED}
    shared: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    queries: list[int] = []
    keys: list[int] = []
    base = row = slot = 0
    for group in groups:
        prompt_len = len(group.prompt)
        prompt = np.arange(base, base + prompt_len)
        prompt_slots = np.full((prompt_len, copies), -1)
        parts["ids"].append(np.asarray(group.prompt, dtype=np.int64))
        parts["pos"].append(np.arange(prompt_len))
        parts["slots"].append(prompt_slots)
        start = base + prompt_len
        for rank, completion in enumerate(group.completions):
            length = len(completion)
            tokens = np.asarray(completion, dtype=np.int64)
            own = np.arange(start, start + length)
            cells = row * width + np.arange(prompt_len + length)
            parts["ids"].append(tokens)
            parts["pos"].append(np.arange(prompt_len, prompt_len + length))
            # A cell past the end may hold any token: causal attention never looks right, and its output is dropped.
            parts["row_src"] += [prompt, own, np.full(width - prompt_len - length, base)]
            if rank == 0:
                parts["home"].append(cells[:prompt_len])
            else:
                shared.setdefault(rank, []).append((prompt, cells[:prompt_len]))
            parts["home"].append(cells[prompt_len:])
            parts["kv_source"] += [prompt, own]
            prompt_slots[:, rank] = np.arange(slot, slot + prompt_len)
            own_slots = np.full((length, copies), -1)
            own_slots[:, 0] = np.arange(slot + prompt_len, slot + prompt_len + length)
            parts["slots"].append(own_slots)
            parts["predict"] += [prompt[-1:], own[:-1]]
            parts["target"].append(tokens)
            parts["owner"].append(np.full(length, row))
            queries.append(length + (prompt_len if rank == 0 else 0))
            keys.append(prompt_len + length)
            start += length
            slot += prompt_len + length
            row += 1
        base = start
    batch: PackedBatch = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
    batch["shared"] = [
        [torch.from_numpy(np.concatenate(column)) for column in zip(*entries, strict=True)]
        for _, entries in sorted(shared.items())
    ]
    batch["lengths"] = torch.tensor([len(c) for g in groups for c in g.completions])
    batch["groups"] = [(len(g.prompt), [len(c) for c in g.completions]) for g in groups]
    batch["shape"] = (row, width)
    batch["logical"] = sum(keys)
    batch["longest"] = (max(queries), max(keys))
    for name, lengths in (("query_starts", queries), ("key_starts", keys)):
        batch[name] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return batch


_CONCATENATED = ("ids", "pos", "row_src", "home", "predict", "target", "owner", "kv_source", "slots")
