"""What a cell of a table can hold and JSON cannot.

Such a cell judges no row by itself: most stand in columns that no reader asks for. A reader that asks for one finds
neither text nor a number in it, and says so (`readers.values`, `readers.conversations`); in `meta` it stands as its
`str()`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


class Binary(bytes):
    """Bytes that are no UTF-8 text: a uuid, an embedding, a picture, or text in another encoding."""

    def __str__(self) -> str:
        return f"<{len(self)} bytes, sha256 {hashlib.sha256(self).hexdigest()[:16]}>"

    __repr__ = __str__


@dataclass(frozen=True)
class NotFinite:
    """A number that is infinite, by its name."""

    name: str

    def __str__(self) -> str:
        return self.name
