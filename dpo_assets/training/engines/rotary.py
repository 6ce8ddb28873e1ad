"""Rotary tables that the longest row of a forward changes for all its rows: which rows may go through together.

Longrope (Ding et al., arXiv 2402.13753) has one table for rows up to a length and another beyond; dynamic NTK scaling
(Transformers' `dynamic`) stretches its table with every longer row, and keeps the longest that it has seen. A row's own
scores are those that it gets by itself, on tables that no row before it has stretched.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_LONGROPE, _DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True)
class Switch:
    """One table that changes.

    Attributes:
        fixed_up_to: tokens of a row up to which it stays what it is (`planning.decoder.Rope.fixed_up_to`).
        by_length: whether every longer row has a table of its own (dynamic NTK), or all of them one (longrope).
    """

    fixed_up_to: int
    by_length: bool

    def table(self, length: int) -> int:
        """The table of a row: the same number, the same table."""
        if length <= self.fixed_up_to:
            return 0
        return length if self.by_length else self.fixed_up_to + 1


@dataclass(frozen=True)
class RotaryTables:
    """All tables of a model that change with the longest row of a forward; empty for most models."""

    switches: frozenset[Switch] = frozenset()

    @classmethod
    def of(cls, lm: Any) -> RotaryTables:
        """As the rotary modules of a Transformers model have them (`modeling_rope_utils.dynamic_rope_update`)."""
        return cls(frozenset(switch for module in lm.modules() for switch in _switches(module)))

    def shared_by(self, length: int) -> Hashable:
        """Rows for which this is equal may go through one forward."""
        return tuple(sorted(switch.table(length) for switch in self.switches))

    def change_before(self, length: int) -> bool:
        """Whether a row that grows to `length` tokens meets another table."""
        return any(switch.table(length) for switch in self.switches)


def fresh_tables(lm: Any) -> None:
    """Before a forward: forgets by how far rows before it have stretched a dynamic table."""
    for module in lm.modules():
        for prefix, kind in _kinds(module):
            if kind == _DYNAMIC:
                own = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, f"{prefix}inv_freq").device)
                module.register_buffer(f"{prefix}inv_freq", own, persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _kinds(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(prefix of its attributes, kind) of each table of a rotary module that changes; several by layer type."""
    kinds = getattr(module, "rope_type", None)
    named = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
    for prefix, kind in named.items():
        if isinstance(kind, str) and hasattr(module, f"{prefix}original_inv_freq"):
            if _DYNAMIC in kind:
                yield prefix, _DYNAMIC
            elif kind == _LONGROPE:
                yield prefix, _LONGROPE


def _switches(module: nn.Module) -> Iterator[Switch]:
    for prefix, kind in _kinds(module):
        if kind == _DYNAMIC:
            yield Switch(int(module.original_max_seq_len), by_length=True)  # type: ignore[arg-type]
        else:
            stated: Any = module.config.rope_parameters  # type: ignore[union-attr]
            stated = stated[prefix[:-1]] if prefix else stated
            yield Switch(int(stated["original_max_position_embeddings"]), by_length=False)
