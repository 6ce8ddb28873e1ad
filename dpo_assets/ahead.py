"""Making the next item while the one before is in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")


def ahead(items: Iterable[ItemT]) -> Iterator[ItemT]:
    """The same items in the same order, each made by a thread while the one before is in use.

    Worth it where making or using an item works outside of Python: in Arrow, Polars or a tokenizer. At most two items
    exist at a time. What making an item raises is raised where that item would have come.
    """
    source = iter(items)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, source, _END)
        while (item := future.result()) is not _END:
            future = pool.submit(next, source, _END)
            yield item  # type: ignore[misc]


_END = object()
