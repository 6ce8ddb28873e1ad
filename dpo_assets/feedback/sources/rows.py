"""The rows of a file: container, then row by row a value with its columns mapped and its text normalised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_assets.feedback.lines import parse_line, read_lines
from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FeedbackFile, Limits, SourceRow, Span

Parse = Callable[[bytes], Mapping[str, Any]]


class Rows:
    """The rows of one file. `flags` counts what was normalised, complete once the iteration has ended."""

    def __init__(self, file: FeedbackFile, span: Span | None, parse: Parse | None, limits: Limits) -> None:
        self.flags: Counter[str] = Counter()
        self._file, self._span, self._parse, self._limits = file, span, parse or parse_line, limits

    def __iter__(self) -> Iterator[SourceRow]:
        for number, raw in read_lines(self._file.path):
            try:
                value: Mapping[str, Any] | RowFault = self._parse(raw)
            except RowFault as fault:
                value = fault
            yield SourceRow(number, raw, value)


def cut(file: FeedbackFile, size: int, limits: Limits) -> list[Span] | None:
    return None
