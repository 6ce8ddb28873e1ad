"""What dry runs looked at. Whoever sees what would be decided, and may choose what to send, has tested all of it.

Of 20 policies without skill that were previewed on the same 300 conversations, the first that passed would be released
in a third of trials. So looks at one set of conversations share the level of the test that uses it up: look k has
`spending.share_of_look(k)` of it, whichever of them is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.checks.evidence.ledger_file import FOLDER
from dpo_assets.errors import ConfigError

NAME = "previews.json"


class Look(BaseModel):
    """A challenger and the conversations that a preview of it looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    challenger: str
    saw: frozenset[str]


class Previews(BaseModel):
    """All looks of a pipeline's dry runs, oldest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    looks: tuple[Look, ...] = ()

    def number(self, challenger: str, fresh: frozenset[str]) -> int:
        """The number, from 1, of the look at these conversations that deciding on a challenger is; 0: no dry run
        looked at any of them. One that was previewed on the same conversations is the same look."""
        same = [one for one in self.looks if one.saw & fresh]
        own = Look(challenger=challenger, saw=fresh)
        if not same:
            return 0
        return (same.index(own) if own in same else len(same)) + 1

    def and_one(self, challenger: str, saw: Iterable[str]) -> Previews:
        """With one look more; the same look again is none."""
        look = Look(challenger=challenger, saw=frozenset(saw))
        return self if look in self.looks else Previews(looks=(*self.looks, look))

    @property
    def text(self) -> str:
        """JSON: equal looks give equal bytes."""
        looks = [{"challenger": one.challenger, "saw": sorted(one.saw)} for one in self.looks]
        return json.dumps({"looks": looks})


@dataclass(frozen=True)
class PreviewsFile:
    """`previews.json` beside the ledger. It is replaced as a whole, by one writer at a time."""

    path: Path

    @classmethod
    def of(cls, store: Path) -> Self:
        """That of a pipeline's folder of artefacts."""
        return cls(store / FOLDER / NAME)

    def read(self) -> Previews:
        """The looks so far; none where no dry run looked at anything.

        Raises:
            ConfigError: the file cannot be read.
        """
        if not self.path.exists():
            return Previews()
        try:
            return Previews.model_validate_json(self.path.read_bytes())
        except ValidationError:
            raise ConfigError(
                f"{self.path} cannot be read; put it back from a backup. Without it looks of dry runs are forgotten, "
                "and what they found is tested as if nobody had looked: delete it only before new feedback is held out"
            ) from None

    def add(self, challenger: str, saw: Iterable[str]) -> Previews:
        """Notes a look, and returns all of them.

        Raises:
            ConfigError: as `read`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            before = self.read()
            after = before.and_one(challenger, saw)
            if after != before:
                partial = self.path.with_suffix(f".json.tmp-{os.getpid()}")
                with partial.open("w", encoding="utf-8") as handle:
                    handle.write(after.text)
                    handle.flush()
                    os.fsync(handle.fileno())
                partial.replace(self.path)
            return after
