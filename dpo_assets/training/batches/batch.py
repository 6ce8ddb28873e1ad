"""A packed batch as what its readers take of it: engines, two kinds of attention, and the scorer.

Sizes, wherever they stand: T tokens of the stream, R rows (one per completion, group by group) of at most W tokens, C
completions in the largest group, S slots of key/value rows (every row's tokens, one after the other, unpadded), and N
scored tokens. Tensors are int64 unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

Layout = list[tuple[int, list[int]]]  # (prompt tokens, tokens of each completion) of each group.


@dataclass(frozen=True, eq=False)
class Tensors:
    """A dataclass whose tensors travel together: its own, and those of tuples and of further `Tensors` in it.

    Data loaders and accelerate walk lists, tuples and mappings; of anything else they ask these two methods, and leave
    what lacks them where it is. One is equal to itself alone.
    """

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same with its tensors on `device`."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same with its tensors in page-locked memory, from which a copy to the device need not be waited for."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        def changed(value: Any) -> Any:
            match value:
                case Tensor():
                    return change(value)
                case Tensors():
                    return value._changed(change)
                case tuple():
                    return tuple(changed(entry) for entry in value)
            return value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class ScoredTokens(Tensors):
    """What the scorer reads.

    Attributes:
        predict: [N] place in the stream whose hidden state predicts a scored token.
        target: [N] that token.
        owner: [N] the row that it belongs to.
        lengths: [R] scored tokens of each row.
    """

    predict: Tensor
    target: Tensor
    owner: Tensor
    lengths: Tensor


@dataclass(frozen=True, eq=False)
class PaddedRows(Tensors):
    """What attention without flash reads: each row's W slots, one row after the other.

    Attributes:
        shape: (R, W).
        source: [R*W] place in the stream behind each slot; slots past a row's end repeat its first token.
        home: [T] the slot that stands for a token of the stream.
        shared: (places in the stream [s], slots [s]): further slots of prompt tokens, an entry per completion rank.
    """

    shape: tuple[int, int]
    source: Tensor
    home: Tensor
    shared: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class UnpaddedRows(Tensors):
    """What flash attention reads.

    A group's first row asks for its prompt and first completion, each further row for its completion alone, so the
    queries of all rows are the stream itself.

    Attributes:
        query_starts, key_starts: [R + 1], int32, where each row's queries and keys begin.
        longest: (most queries, most keys of a row).
        source: [S] place in the stream behind each slot.
        slots: [T, C] slots of each token, -1 where it has fewer than C.
    """

    query_starts: Tensor
    key_starts: Tensor
    longest: tuple[int, int]
    source: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch(Tensors):
    """One forward over some groups, as `packing.pack` lays them out.

    Attributes:
        ids, positions: [T] the stream's tokens, and each one's position in its own row.
        groups: the layout of the stream.
    """

    ids: Tensor
    positions: Tensor
    groups: Layout
    scored: ScoredTokens
    padded: PaddedRows
    unpadded: UnpaddedRows

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row, its prompt included."""
        return [prompt + completion for prompt, completions in self.groups for completion in completions]
