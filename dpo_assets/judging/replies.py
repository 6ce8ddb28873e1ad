"""A judge's replies, kept: the same question is asked once, also after a run that was killed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.judging.comparing import ASKED_AHEAD, Form, Judge, Message, Reply
from dpo_assets.sqlite_file import prepare_sound


@dataclass
class Remembered:
    """A judge whose replies lie in a SQLite file, by its identity and the whole question, each with a digest.

    A reply that is not what was kept is asked for again, and so is one without log-probabilities where the judge gives
    them by now; a file that is damaged is set aside.

    Attributes:
        asked: questions that the judge itself was asked.
        dropped: replies that were not what had been kept.
        set_aside: where a damaged file went.
    """

    judge: Judge
    path: Path
    asked: int = field(default=0, init=False)
    dropped: int = field(default=0, init=False)
    set_aside: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.set_aside = prepare_sound(self.path, self._create)

    def _create(self) -> None:
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            columns = "question text primary key, reply text, digest text"
            db.execute(f"create table if not exists kept ({columns}) without rowid")
            db.execute("drop table if exists replies")  # Of earlier versions, without digests.

    @property
    def damage(self) -> str:
        """What of the file was lost and is asked for again; empty: nothing."""
        said = [f"the kept replies were damaged and are set aside as {self.set_aside.name}"] if self.set_aside else []
        said += [f"{self.dropped} kept replies were not what had been kept"] if self.dropped else []
        return "; ".join(said)

    @property
    def identity(self) -> str:
        """The judge's, and whether a letter is read by its log-probabilities: the same reply without them is less."""
        if self.form != "letter":
            return self.judge.identity
        return f"{self.judge.identity}, {'with' if self.gives_letters else 'without'} log-probabilities"

    @cached_property
    def gives_letters(self) -> bool:
        """Whether a judge that is asked for a letter gives log-probabilities: asked once a run, by one short question.

        Where it does not answer, what it said the last time.

        Raises:
            InfrastructureError: it does not answer, and never did.
            ConfigError: it cannot be asked like this, and never was.
        """
        ahead: list[Message] = [{"role": "user", "content": ASKED_AHEAD[self.form]}]
        key = self._key(ahead)
        try:
            reply = self.judge.reply(ahead)
        except (InfrastructureError, ConfigError):
            if (before := self._kept(key)) is None:
                raise
            return before.letters is not None
        self._keep(key, reply)
        return reply.letters is not None

    @property
    def form(self) -> Form:
        return self.judge.form

    def reply(self, messages: Sequence[Message]) -> Reply:
        key = self._key(messages)
        known = self._kept(key)
        if known is not None and (self.form != "letter" or known.letters is not None or not self.gives_letters):
            return known
        reply = self.judge.reply(messages)
        self.asked += 1
        self._keep(key, reply)
        return reply

    def _key(self, messages: Sequence[Message]) -> str:
        asked = [self.judge.identity, list(messages), "with letters"]  # Text alone was kept before.
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _kept(self, key: str) -> Reply | None:
        with closing(sqlite3.connect(self.path, timeout=60)) as db:
            known = db.execute("select reply, digest from kept where question = ?", (key,)).fetchone()
        if known is not None and known[1] == _digest(key, known[0]):
            return Reply.loads(known[0])
        self.dropped += known is not None
        return None

    def _keep(self, key: str, reply: Reply) -> None:
        kept = reply.dumps()
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            db.execute("insert or replace into kept values (?, ?, ?)", (key, kept, _digest(key, kept)))


def _digest(key: str, reply: object) -> str:
    return hashlib.sha256(repr((key, reply)).encode()).hexdigest()[:16]
