"""One reader per export format. A reader turns parsed rows into pairs and judged answers, or says why it cannot.

A format is a module with one `FORMAT`, named in READERS, or an entry point of the group `dpo_assets.readers` whose
value is such a Format: that is how another package adds one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import JudgedAnswer, Pair

Row = Mapping[str, Any]
ENTRY_POINTS = "dpo_assets.readers"


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
        fields: names in the row for what a format leaves to its users' configuration (Label Studio, Argilla).
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


class RowByRow:
    """The FileReader of a format whose rows stand for themselves."""

    def __init__(self, read: Read, options: ReadOptions) -> None:
        self._read, self._options = read, options

    def read(self, row: Row, place: Place) -> Iterator[tuple[Place, Item]]:
        for item in self._read(row, place, self._options):
            yield place, item

    def finish(self) -> Iterator[tuple[Place, Item]]:
        yield from ()


@dataclass(frozen=True)
class Format:
    """An export format.

    Args:
        name: what a recipe writes.
        title: the feedback as people call it: "I have ... feedback".
        example: one row of it, as JSON.
        documented: the page that the reader and its tests follow.
        fits: how sure it is that a row is of this format, from 0 to 1; for `format: auto`. Not 1 for keys that others
            have too.
        read: one row to its items, for formats whose rows stand for themselves.
        open: a FileReader for formats that join rows; instead of `read`.
        companion: what the second file is, where one is needed; else empty.
    """

    name: str
    title: str
    example: str
    documented: str
    fits: Callable[[Row], float]
    read: Read | None = None
    open: Callable[[ReadOptions], FileReader] | None = None
    companion: str = ""

    def reader(self, options: ReadOptions) -> FileReader:
        """A reader of one file.

        Raises:
            ConfigError: when the format needs a second file and none is given.
        """
        if self.companion and options.companion is None:
            raise ConfigError(f"format `{self.name}` needs {self.companion}: name the file under `companion`.")
        if self.open is not None:
            return self.open(options)
        assert self.read is not None
        return RowByRow(self.read, options)


# Name -> module of this package. Imported on first use: a pipeline reads one or two of them.
READERS: tuple[str, ...] = (
    "trl",
    "oasst_tree",
    "hh_rlhf",
    "openai",
    "openpipe",
    "vertex",
    "nova",
    "ms_swift",
    "nemo_rl",
    "llama_factory",
    "axolotl",
    "ultrafeedback_raw",
    "ultrafeedback_binarized",
    "ultrafeedback_argilla",
    "distilabel",
    "nectar",
    "helpsteer2",
    "helpsteer3",
    "arena",
    "open_webui",
    "label_studio",
    "argilla",
    "langfuse",
    "langsmith",
    "librechat",
)


@cache
def formats() -> dict[str, Format]:
    """Every format by name: this package's, then those of other packages.

    Raises:
        ConfigError: when another package's format cannot be loaded, or takes a name that is taken.
    """
    found = {}
    for name in READERS:
        found[name] = importlib.import_module(f"dpo_assets.feedback.readers.{name}").FORMAT
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            format_ = entry.load()
        except Exception as error:
            raise ConfigError(f"reader `{entry.name}` ({entry.value}) cannot be loaded: {error}") from error
        if not isinstance(format_, Format) or format_.name in found:
            raise ConfigError(f"reader `{entry.name}` ({entry.value}) is no Format with a name of its own.")
        found[format_.name] = format_
    return found


def format_named(name: str) -> Format:
    """The format that a recipe names.

    Raises:
        ConfigError: with the names that exist.
    """
    known = formats()
    if name not in known:
        raise ConfigError(f"there is no feedback format `{name}`; there are: {', '.join(sorted(known))}")
    return known[name]


def keys_of(row: Row) -> str:
    """The keys of a row, for the message that it has another shape."""
    return ", ".join(sorted(row)) or "no keys"


def has(row: Row, *names: str) -> bool:
    """Whether a row has all of these keys with a value."""
    return all(row.get(name) is not None for name in names)
