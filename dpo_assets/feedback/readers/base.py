"""What a reader is given, and what it gives back: rows, places, options, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpo_assets.feedback.pair import JudgedAnswer, Pair

Row = Mapping[str, Any]

# What formats call the three roles. A name that is not here stays as it is, and the dataset's rules name it.
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "developer": "system",
}
TOOL_ROLES = frozenset(
    {"tool", "tool_call", "tool_calls", "tool_response", "function", "function_call", "observation", "ipython"}
)


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
    """The choices of the recipe that a reader follows.

    Args:
        pairing: a policy of `feedback.pairing`, for a row that holds a ranking of its own.
        min_margin: the least difference of ranks or scores that makes a pair.
        user_key: key of `hashed_user`; without one no user is kept.
        include_synthetic: keep pairs with a machine-written side, where a format says so.
        fields: names in the row for what a format leaves to its users' configuration (Label Studio, Argilla), and what
            is to be done with reasoning that stands apart and with a prompt that answers repeat (`turns.settled_pair`).
        companion: a second file that a format joins with (the observations of Langfuse, the runs of LangSmith).
    """

    pairing: str = "best_worst"
    include_synthetic: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    companion: Path | None = None
    min_margin: float = 0.0
    user_key: bytes = field(default=b"", repr=False)


Item = Pair | JudgedAnswer | RowFault
Read = Callable[[Row, Place, ReadOptions], Iterator[Item]]


class FileReader(Protocol):
    """Reads the rows of one file. Every row leads to at least one item, at once or in `finish`."""

    def read(self, row: Row, place: Place) -> Iterator[tuple[Place, Item]]: ...

    def finish(self) -> Iterator[tuple[Place, Item]]:
        """What only the end of the file decides, each with the place of the row that it stands for."""
        ...


def keys_of(row: Row) -> str:
    """The keys of a row, for the message that it has another shape."""
    return ", ".join(sorted(row)) or "no keys"


def has(row: Row, *names: str) -> bool:
    """Whether a row has all of these keys with a value."""
    return all(row.get(name) is not None for name in names)
