"""A judge's replies, kept: the same question is asked once, also after a run that was killed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from dpo_assets.judging.comparing import Judge, Message


@dataclass
class Remembered:
    """A judge whose replies lie in a SQLite file, by its identity and the whole question.

    Attributes:
        asked: questions that the judge itself was asked.
    """

    judge: Judge
    path: Path
    asked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            db.execute("create table if not exists replies (question text primary key, reply text) without rowid")

    @property
    def identity(self) -> str:
        return self.judge.identity

    def reply(self, messages: Sequence[Message]) -> str:
        key = hashlib.sha256(json.dumps([self.identity, list(messages)], sort_keys=True).encode()).hexdigest()
        with closing(sqlite3.connect(self.path, timeout=60)) as db:
            known = db.execute("select reply from replies where question = ?", (key,)).fetchone()
        if known is not None:
            return str(known[0])
        reply = self.judge.reply(messages)
        self.asked += 1
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            db.execute("insert or replace into replies values (?, ?)", (key, reply))
        return reply
