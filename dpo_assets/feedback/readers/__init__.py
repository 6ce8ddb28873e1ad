"""One reader per export format. A reader turns parsed rows into pairs and judged answers, or says why it cannot.

A format is a module with one `FORMAT`, named in READERS, or an entry point of the group `dpo_assets.readers` whose
value is such a Format: that is how another package adds one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.readers.base import (
    FileReader,
    Item,
    Place,
    Read,
    ReadOptions,
    Row,
    RowFault,
    has,
    keys_of,
)
from dpo_assets.feedback.readers.modality import refuse_media, with_tools, without_tools
from dpo_assets.feedback.readers.values import timestamp
from dpo_assets.feedback.readers.written import opened

__all__ = [
    "MESSAGES_FROM_TEXT", "READERS", "FileReader", "Format", "Item", "Place", "Read", "ReadOptions", "Row", "RowByRow",
    "RowFault", "format_named", "formats", "has", "keys_of",
]  # fmt: skip

ENTRY_POINTS = "dpo_assets.readers"
MESSAGES_FROM_TEXT = "messages_from_text"  # The flag of what was opened.


class RowByRow:
    """The FileReader of a format whose rows stand for themselves.

    What every row may have, whatever its format, is settled here: messages in text columns are opened, a column of
    tools becomes the `tools` of what the row holds, a column `created_at` its date where the format has no other, and a
    row with pictures or sound is refused.
    """

    def __init__(self, read: Read, options: ReadOptions) -> None:
        self._read, self._options = read, options

    def read(self, row: Row, place: Place) -> Iterator[tuple[Place, Item]]:
        """Yields the row's items. Never raises for what is in the row, as far as the format's own `read` does not."""
        try:
            row, was_text = opened(row)
            row, tools = without_tools(row)
            refuse_media(row)
        except RowFault as fault:
            yield place, RowFault(fault.reason, fault.message, place.row_id(row.get("id")))
            return
        items = self._read(row, place, self._options)
        when = timestamp(row.get("created_at"))
        for item in with_tools(items, tools) if tools else items:
            if when is not None and not isinstance(item, RowFault) and item.created_at is None:
                item = replace(item, created_at=when)
            if was_text and not isinstance(item, RowFault):
                item = replace(item, flags=(*item.flags, MESSAGES_FROM_TEXT))
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
