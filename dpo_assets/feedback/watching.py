"""Sources as they look from outside: what each holds by now, without reading a row, so that a change is seen early.

A local file is hashed once for each state of it that its size and time of change tell apart; what was hashed is kept on
a shelf, a file beside the artefacts. A shelf that is lost costs hashing again and nothing else. What lies elsewhere is
asked for what its side says of it: the listing of an object store, the watermark of a table.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.errors import DpoAssetsError
from dpo_assets.feedback.ingest import BatchSize, read_batches
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.sources import CHANGED_WHILE_READ, DEFAULT_LIMITS, FileRefused, Limits
from dpo_assets.feedback.sources.files import digest_of
from dpo_assets.feedback.sources.finding import described, glance, local_files
from dpo_assets.recipe import FeedbackSource, is_url
from dpo_assets.secret_shapes import masked, without_url_secrets

SETTLE_SECONDS = 5.0  # A file that was touched more recently than this may still be written.
LOOK_SECONDS = 20.0  # For what lies elsewhere: a side that does not answer holds up nobody else for longer.
COUNTED_BYTES = 32 * 2**20  # Of one file whose pairs are counted by reading it: some seconds.


class Content(BaseModel):
    """What a source held: equal contents have equal digests. `rows`: of a SQL table; None: not known from outside."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    digest: str
    rows: int | None = None


class _File(BaseModel):
    """A local file in one state: bytes, time of its change, since when it was seen so, and its hash once it settled."""

    size: int
    changed_ns: int
    since: float
    sha256: str = ""

    def same_as(self, status: os.stat_result) -> bool:
        return (self.size, self.changed_ns) == (status.st_size, status.st_mtime_ns)


class Shelf(BaseModel):
    """What was found out of local files: hashes by path, pairs by hash, and (bytes, hash) of what was read last."""

    files: dict[str, _File] = {}
    pairs: dict[str, int] = {}
    read: dict[str, tuple[int, str]] = {}

    @classmethod
    def at(cls, path: Path) -> Shelf:
        """The kept one, or an empty one: what cannot be read is found out again."""
        with suppress(OSError, ValidationError):
            return cls.model_validate_json(path.read_bytes())
        return cls()

    def keep(self, path: Path) -> None:
        """Writes it, whole or not at all, and without what no file of it needs. Of two writers the later one counts."""
        hashes = {file.sha256 for file in self.files.values()} | {sha256 for _, sha256 in self.read.values()}
        kept = self.model_copy(update={"pairs": {one: n for one, n in self.pairs.items() if one in hashes}})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        partial.write_text(kept.model_dump_json(), encoding="utf-8")
        partial.replace(path)

    def was_read(self) -> None:
        """Notes that everything that was seen is read by now."""
        self.read = {path: (file.size, file.sha256) for path, file in self.files.items() if file.sha256}


@dataclass(frozen=True)
class Look:
    """A source as it looks now.

    Args:
        name: of the source, for people.
        content: None where it cannot be told now.
        fault: why not; it is broken.
        busy: a file of it is still being written.
        blind: nothing that its side says would show a change.
        files: path and root of its local files, with the source that says how to read them.
    """

    name: str
    content: Content | None = None
    fault: str = ""
    busy: bool = False
    blind: bool = False
    files: tuple[tuple[Path, Path | None, FeedbackSource], ...] = ()


def watch(
    sources: Sequence[FeedbackSource], shelf: Shelf, now: float, settle_seconds: float = SETTLE_SECONDS
) -> list[Look]:
    """What each source holds. Sources of one name are one; a file that two of them name belongs to the first.

    Args:
        sources: of the recipe, with absolute paths.
        shelf: is brought up to date; without what is no longer there.
        now: seconds since the epoch.
        settle_seconds: how long a file must have been as it is. A time of change in the future says nothing: such a
            file has settled once it was seen so for that long.
    """
    elsewhere = [source for source in sources if not _is_local(source)]
    answers = dict(zip(map(id, elsewhere), _ask(elsewhere), strict=True))
    before, shelf.files = shelf.files, {}
    looks: dict[str, Look] = {}
    for source in sources:
        look = answers.get(id(source)) or _local(source, before, shelf, now, settle_seconds)
        known = looks.get(look.name)
        looks[look.name] = look if known is None else _both(known, look)
    return list(looks.values())


def contents_of(looks: Iterable[Look]) -> dict[str, Content]:
    """By source, of those whose content can be told."""
    return {look.name: look.content for look in looks if look.content is not None}


def new_pairs(
    look: Look,
    read: Content | None,
    shelf: Shelf,
    enough: int,
    options: ReadOptions,
    limits: Limits = DEFAULT_LIMITS,
) -> int | None:
    """How many pairs a changed source has that were not read, as far as `enough`; None where nothing tells.

    Valid pairs are counted: those that ingestion would make, before rules that need other rows. Two judged answers
    count as a pair. Only files that are not as they were read are read here, once in each state; one of more than
    COUNTED_BYTES that has grown is estimated by its size.
    """
    if look.content is not None and look.content.rows is not None:
        return max(0, look.content.rows - (read.rows or 0 if read is not None else 0))
    if not look.files:
        return None
    found = 0
    for path, root, source in look.files:
        file, (size, sha256) = shelf.files.get(str(path)), shelf.read.get(str(path), (0, ""))
        if file is None or file.sha256 in ("", sha256):
            continue
        grown = bool(sha256) and file.size > size and _begins_with(path, root, size, sha256)
        known = shelf.pairs.get(sha256) if grown else 0
        if file.size > COUNTED_BYTES:
            if not grown or not known:
                return None
            found += int(known * (file.size - size) / size)
        else:
            if file.sha256 not in shelf.pairs:
                shelf.pairs[file.sha256] = pairs_in(path, root, source, options, limits)
            found += shelf.pairs[file.sha256] - (known or 0)
        if found >= enough:
            break
    return found


def pairs_in(path: Path, root: Path | None, source: FeedbackSource, options: ReadOptions, limits: Limits) -> int:
    """Valid pairs of a local file, with every two judged answers as one; 0 of a file that is refused."""
    pairs = answers = 0
    with suppress(FileRefused):
        for batch in read_batches(described(path, root, source, limits), options, None, BatchSize(2**12, 2**22)):
            pairs, answers = pairs + len(batch.pairs), answers + len(batch.answers)
    return pairs + answers // 2


def _is_local(source: FeedbackSource) -> bool:
    return source.path is not None and not is_url(source.path)


def _both(first: Look, second: Look) -> Look:
    """Two sources of one name as one."""
    content = None
    if first.content is not None and second.content is not None:
        rows = None if None in (first.content.rows, second.content.rows) else 0
        if rows is not None:
            rows = (first.content.rows or 0) + (second.content.rows or 0)
        content = Content(digest=_digest([first.content.digest, second.content.digest]), rows=rows)
    return Look(
        first.name,
        content,
        first.fault or second.fault,
        first.busy or second.busy,
        first.blind or second.blind,
        first.files + second.files,
    )


def _local(
    source: FeedbackSource, before: Mapping[str, _File], shelf: Shelf, now: float, settle_seconds: float
) -> Look:
    look = Look(source.shown)
    try:
        found = list(local_files(source.pattern()))
    except DpoAssetsError as error:
        return replace(look, fault=str(error))
    files = [(path, root, source) for path, root in found if str(path) not in shelf.files]
    if source.companion is not None:
        found = [*found, (Path(source.companion), None)]
    rows = []
    for path, root in found:
        if (file := shelf.files.get(str(path))) is None:
            file = shelf.files[str(path)] = _seen(path, root, before.get(str(path)), now, settle_seconds)
        rows.append([str(path), file.sha256])
    busy = any(not sha256 for _, sha256 in rows)
    return replace(look, content=None if busy else Content(digest=_digest(rows)), busy=busy, files=tuple(files))


def _seen(path: Path, root: Path | None, known: _File | None, now: float, settle_seconds: float) -> _File:
    """A file as it is now; without a hash while it may still be written."""
    try:
        status = path.stat()
    except OSError:  # A broken link, say: it is refused when it is read.
        return _File(size=-1, changed_ns=-1, since=now, sha256="not there")
    file = _File(size=status.st_size, changed_ns=status.st_mtime_ns, since=now)
    if known is not None and known.same_as(status):
        file = known
    if file.sha256:
        return file
    if max(now - file.since, now - status.st_mtime_ns / 1e9) < settle_seconds:
        return file
    try:
        return file.model_copy(update={"sha256": digest_of(path, root)[0]})
    except FileRefused as refused:
        return file if refused.reason == CHANGED_WHILE_READ else file.model_copy(update={"sha256": refused.reason})


def _begins_with(path: Path, root: Path | None, size: int, sha256: str) -> bool:
    with suppress(FileRefused, OSError):
        return digest_of(path, root, size)[0] == sha256
    return False


def _ask(sources: Sequence[FeedbackSource]) -> list[Look]:
    """What lies elsewhere, all at once, for LOOK_SECONDS at most. A thread that still waits then holds up nobody."""
    looks = [Look(source.shown, fault=f"it did not answer in {LOOK_SECONDS:.0f} seconds") for source in sources]

    def ask(n: int) -> None:
        try:
            rows = glance(sources[n])
        except Exception as error:  # Drivers and file systems have errors of their own; none may stop the others.
            looks[n] = replace(looks[n], fault=masked(without_url_secrets(str(error) or type(error).__name__)))
            return
        count = int(rows[0][1]) if sources[n].sql is not None else None
        content = Content(digest=_digest([list(row) for row in rows]), rows=count)
        looks[n] = Look(sources[n].shown, content, blind=any("" in row for row in rows))

    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(len(sources))]
    for thread in threads:
        thread.start()
    until = time.monotonic() + LOOK_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return list(looks)


def _digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
