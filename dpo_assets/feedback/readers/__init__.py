"""One reader per export format. A reader turns one parsed row into pairs, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_assets.feedback.pair import Pair


@dataclass(frozen=True)
class RowFault(Exception):
    """Why a row, or one comparison inside it, is not a pair."""

    reason: str
    message: str
    row: str = ""


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    source: str
    line: int

    def row_id(self, given: Any) -> str:
        """The row's own id where it has one, its line otherwise."""
        if isinstance(given, int) and not isinstance(given, bool):
            return str(given)
        return given if isinstance(given, str) and given else f"line-{self.line}"


@dataclass(frozen=True)
class ReadOptions:
    """The choices of the recipe that a reader follows."""

    pairing: str
    include_synthetic: bool


Reader = Callable[[Mapping[str, Any], Place, ReadOptions], Iterator[Pair | RowFault]]


def reader_for(format: str) -> Reader:
    """The reader of a format named in the recipe."""
    from dpo_assets.feedback.readers import hh_rlhf, oasst_tree, trl

    readers: dict[str, Reader] = {"trl": trl.read, "oasst_tree": oasst_tree.read, "hh_rlhf": hh_rlhf.read}
    return readers[format]
