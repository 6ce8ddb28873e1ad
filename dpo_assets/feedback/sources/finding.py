"""From the recipe's sources to local files: found, fetched or extracted, hashed, and refused where it shows at once."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.errors import ConfigError, FeedbackError, NoFile
from dpo_assets.feedback.readers import format_named
from dpo_assets.feedback.sources import AUTO, FeedbackFile, FileRefused, Limits
from dpo_assets.feedback.sources.files import (
    digest_of,
    distinct_names,
    matches,
    numbered,
    open_inside,
    refuse_links_from_outside,
    shown,
)
from dpo_assets.feedback.sources.rows import opened
from dpo_assets.recipe import BUILTIN, FeedbackSource, is_url
from dpo_assets.recipe.dated import from_the_day_on

if TYPE_CHECKING:
    from dpo_assets.feedback.sources.hub import HubAccess

BUILTIN_FEEDBACK = {"oasst": "data/oasst/oasst_en_100_tree.jsonl"}


@dataclass(frozen=True)
class _Found:
    """A local file of a source.

    `name` is empty where it follows from the paths of all files: from `named`, where the file lies elsewhere than here.
    """

    path: Path
    root: Path | None
    name: str = ""
    named: Path | None = None
    refused: FileRefused | None = None
    facts: tuple[tuple[str, str], ...] = ()
    superseded: tuple[int, ...] = ()
    sha256: str = ""  # Of what was written into `landing`, where that is known.


def find(
    sources: Sequence[FeedbackSource],
    landing: Path | None,
    hub: HubAccess | None,
    limits: Limits,
    day: date | None = None,
) -> list[FeedbackFile]:
    """See `sources.files_of`."""
    for source in sources:
        if source.format != AUTO:
            format_named(source.format)
    found: dict[Path, tuple[_Found, FeedbackSource]] = {}
    for source in sources:
        looked = _of_source(source, landing, hub, limits) if day is None else _of_day(source, landing, limits, day)
        for file in looked:
            _, first = found.setdefault(file.path, (file, source))
            # One that names a single file before a pattern makes an exception of it.
            if glob.has_magic(first.pattern()) and _way_of_reading(first) != _way_of_reading(source):
                raise ConfigError(
                    f"feedback sources `{first.shown}` and `{source.shown}` both name {shown(file.path.name)} and read "
                    "it in two ways (format, columns, fields or companion): let only one of them name it, or put one "
                    "that names this file alone before them."
                )
    unnamed = {path: file.named or path for path, (file, _) in found.items() if not file.name}
    names = dict(zip(unnamed, distinct_names(list(unnamed.values())), strict=True))
    # Two queries of one database have one name, and so have two revisions of a dataset.
    told = numbered([names.get(path, file.name) for path, (file, _) in found.items()])
    return [_described(*one, name, limits) for one, name in zip(found.values(), told, strict=True)]


def _way_of_reading(source: FeedbackSource) -> tuple[object, ...]:
    return source.format, source.columns, source.json_columns, source.fields, source.companion


def glance(source: FeedbackSource) -> list[tuple[str, ...]]:
    """What a source that lies elsewhere looks like from outside: nothing is read, fetched or extracted.

    A row for each file (URL, and what its side says of its state), or one for a table (name, rows, highest watermark)
    or a dataset (name, revision, files).

    Raises:
        ConfigError, InfrastructureError: like `find`.
    """
    if source.sql is not None:
        from dpo_assets.feedback.sources import sql

        return [(source.shown, *sql.glance(source.sql))]
    if source.hub is not None:
        return [(source.shown, str(source.revision), *source.files)]  # A pinned revision does not change.
    from dpo_assets.feedback.sources import remote

    return [tuple(row) for row in remote.glance(source.pattern())]


def local_files(path: str) -> Iterator[tuple[Path, Path | None]]:
    """(file, the folder that it may not lie outside of) of everything that a local path, or pattern, names.

    Raises:
        FeedbackError: it names nothing.
    """
    for found in _local(path):
        yield found.path, found.root


def described(path: Path, root: Path | None, source: FeedbackSource, limits: Limits) -> FeedbackFile:
    """One local file of a source, ready to be read or refused; named by its own name alone."""
    return _described(_Found(path, root), source, shown(path.name), limits)


def _of_source(
    source: FeedbackSource, landing: Path | None, access: HubAccess | None, limits: Limits
) -> Iterator[_Found]:
    if source.path is not None and not is_url(source.path):
        yield from _named_by_day(source, _local(source.pattern()))
        return
    if landing is None:
        raise ConfigError(f"feedback source `{source.shown}` needs a folder to keep what it fetches in.")
    if source.sql is not None:
        from dpo_assets.feedback.sources import sql

        parts = sql.extracts(source.sql, landing)
        if not parts:
            raise FeedbackError(f"feedback source `{source.shown}` has no row.")
        for part in parts:
            between = (("watermark from", part.since), ("watermark to", part.until), ("rows", str(part.rows)))
            name = shown(f"{source.shown}#{part.number}")
            yield _Found(part.path, landing, name, facts=between, superseded=part.superseded, sha256=part.sha256)
    elif source.hub is not None:
        from dpo_assets.feedback.sources import hub

        for path, inside in hub.fetch(source.hub, str(source.revision), source.files, landing, access):
            yield _Found(path, landing, shown(f"{source.hub}/{inside}"), facts=(("revision", str(source.revision)),))
    else:
        yield from _named_by_day(source, _remote(source.pattern(), landing, limits))


def _of_day(source: FeedbackSource, landing: Path | None, limits: Limits, day: date) -> Iterator[_Found]:
    """The files of one day, of which there may be none."""
    if not source.is_dated:
        return
    path = source.pattern(day)
    if is_url(path) and landing is None:
        raise ConfigError(f"feedback source `{source.shown}` needs a folder to keep what it fetches in.")
    with suppress(NoFile):
        yield from _named_by_day(source, _remote(path, landing, limits) if is_url(path) and landing else _local(path))


def _named_by_day(source: FeedbackSource, files: Iterable[_Found]) -> Iterator[_Found]:
    """Files of a dated source have names that begin with their day: a name that hangs on what else there is would
    change when the next day comes, and its rows would be read again."""
    for file in files:
        if source.is_dated:
            end = from_the_day_on(str(source.path), (file.named or file.path).as_posix())
            file = replace(file, name=shown(end))
        yield file


def _remote(url: str, landing: Path, limits: Limits) -> Iterator[_Found]:
    from dpo_assets.feedback.sources import remote

    for file in remote.fetch(url, landing, limits):
        yield _Found(file.path, landing, "", file.place, file.refused, (("url", file.url),))


def _local(path: str) -> Iterator[_Found]:
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        if name not in BUILTIN_FEEDBACK:
            raise FeedbackError(f"there is no `{path}`; built in are: {', '.join(BUILTIN_FEEDBACK)}")
        yield _Found(Path(str(files("dpo_assets") / BUILTIN_FEEDBACK[name])), None)
        return
    root, paths = matches(path)
    for found in paths:
        yield _Found(found, root)


def _described(found: _Found, source: FeedbackSource, name: str, limits: Limits) -> FeedbackFile:
    file = FeedbackFile(
        path=found.path,
        name=name,
        format=source.format,
        root=found.root,
        origin=source.shown,
        columns=source.columns,
        json_columns=tuple(source.json_columns),
        fields=source.fields,
        companion=Path(source.companion) if source.companion else None,
        facts=dict(found.facts),
        superseded=found.superseded,
        limits=limits,
        refused=found.refused,
    )
    if file.refused is None:
        for look in (_hashed, partial(_as_written, found.sha256), _opened, _with_companion, _with_format):
            try:
                file = look(file, limits)
            except FileRefused as refused:
                return replace(file, refused=refused)
    return file


def _hashed(file: FeedbackFile, limits: Limits) -> FeedbackFile:
    sha256, size = digest_of(file.path, file.root)
    return replace(file, sha256=sha256, size=size)


def _as_written(sha256: str, file: FeedbackFile, limits: Limits) -> FeedbackFile:
    """Refuses what became of a copy that this package wrote itself, and that holds other bytes by now."""
    if sha256 not in ("", file.sha256):
        message = f"its copy was damaged since it was written: remove {file.path.parent}, and all of it is read again"
        raise FileRefused("damaged_copy", message)
    return file


def _opened(file: FeedbackFile, limits: Limits) -> FeedbackFile:
    """Refuses what its size, its names and its first bytes give away."""
    if file.size == 0:
        raise FileRefused("empty_file", "it holds no byte")
    refuse_links_from_outside(file.path, file.root)
    with open_inside(file.path, file.root) as handle:
        opened(handle, file.path.name, limits, Counter())
    return file


def _with_companion(file: FeedbackFile, limits: Limits) -> FeedbackFile:
    if file.companion is None:
        return file
    if not file.companion.is_file():
        raise ConfigError(f"feedback source `{file.origin}`: there is no companion file {file.companion}")
    try:
        return replace(file, companion_sha256=digest_of(file.companion, file.companion.parent)[0])
    except FileRefused as refused:
        message = f"its companion {shown(file.companion.name)}: {refused.message}"
        raise FileRefused(refused.reason, message) from None


def _with_format(file: FeedbackFile, limits: Limits) -> FeedbackFile:
    if file.format != AUTO:
        return file
    from dpo_assets.feedback.sniff import sniff

    sniffed = sniff(file)
    return replace(file, format=sniffed.format, sniffed=sniffed.message)
