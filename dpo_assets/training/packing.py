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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

PackedBatch = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that share it, as token ids."""

    prompt: Sequence[int]
    completions: tuple[Sequence[int], ...]

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
    """Index tables of one forward over `groups`. All tensors are int64 on the CPU.

    With T stream tokens, R rows (one per completion) of at most W tokens, and N scored tokens:
        ids, pos      [T]    tokens and their positions
        row_src       [R*W]  stream index behind each row slot; slots past a row's end repeat its first token
        home          [T]    row slot that represents a stream token
        shared        list of (stream [S], slot [S]): further slots of prompt tokens, one entry per completion rank
        predict       [N]    stream index whose hidden state predicts a scored token
        target        [N]    that token
        owner         [N]    row it belongs to; rows are numbered group by group, completion by completion
        shape         (R, W)
        logical       tokens of the rows without sharing
    """
    width = max(len(g.prompt) + len(c) for g in groups for c in g.completions)
    parts: dict[str, list[torch.Tensor]] = {
        k: [] for k in ("ids", "pos", "row_src", "predict", "target", "owner", "home")
    }
    shared: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    base, row, logical = 0, 0, 0
    for group in groups:
        prompt_len = len(group.prompt)
        prompt = torch.arange(base, base + prompt_len)
        parts["ids"].append(torch.tensor(group.prompt, dtype=torch.long))
        parts["pos"].append(torch.arange(prompt_len))
        start = base + prompt_len
        for rank, completion in enumerate(group.completions):
            length = len(completion)
            own = torch.arange(start, start + length)
            slots = row * width + torch.arange(prompt_len + length)
            parts["ids"].append(torch.tensor(completion, dtype=torch.long))
            parts["pos"].append(torch.arange(prompt_len, prompt_len + length))
            # A slot past the end may hold any token: causal attention never looks right, and its output is dropped.
            filler = prompt[:1].expand(width - prompt_len - length)
            parts["row_src"] += [prompt, own, filler]
            if rank == 0:
                parts["home"].append(slots[:prompt_len])
            else:
                shared.setdefault(rank, []).append((prompt, slots[:prompt_len]))
            parts["home"].append(slots[prompt_len:])
            parts["predict"] += [prompt[-1:], own[:-1]]
            parts["target"].append(torch.tensor(completion, dtype=torch.long))
            parts["owner"].append(torch.full((length,), row))
            start += length
            row += 1
            logical += prompt_len + length
        base = start
    batch: PackedBatch = {name: torch.cat(tensors) for name, tensors in parts.items()}
    batch["shared"] = [
        [torch.cat([stream for stream, _ in entries]), torch.cat([slot for _, slot in entries])]
        for _, entries in sorted(shared.items())
    ]
    batch["shape"] = (row, width)
    batch["logical"] = logical
    return batch
