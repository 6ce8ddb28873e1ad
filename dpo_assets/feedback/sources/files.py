"""Local files: which ones a pattern names, what they are called, and opening them without a way out of their folder."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Sequence
from io import BufferedReader, FileIO
from pathlib import Path

from dpo_assets.errors import FeedbackError, NoFile
from dpo_assets.feedback.sources import CHANGED_WHILE_READ, FeedbackFile, FileRefused
from dpo_assets.secret_shapes import without_url_secrets

DATA_NAME = re.compile(r"\.(jsonl|ndjson|json|csv|tsv)(\.(gz|zst))?$|\.(parquet|pq)$", re.IGNORECASE)
_APPENDED = re.compile(r"\.(jsonl|ndjson)$", re.IGNORECASE)
LONGEST_NAME = 120  # Of a name as people see it; the end of a longer one is kept.
LINKS_LOOKED_THROUGH = 20_000  # Files in a folder among which the other names of a file are looked for.
_CHUNK, _BUFFER = 1 << 20, 1 << 16
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def matches(pattern: str) -> tuple[Path, list[Path]]:
    """The folder that a path or pattern starts from, and what it names there, sorted.

    Folders are none of it, but for those that are called like a file of feedback and of which nothing is found: a tool
    that writes in parts makes one of a file, and it must not drop out.

    Raises:
        FeedbackError: when that is nothing, or a folder on the way may not be listed.
    """
    root, said = _fixed_part(pattern), without_url_secrets(pattern)  # A URL with a slip in it is taken for a path.
    if ".." in Path(pattern).parts[len(root.parts) :]:
        raise FeedbackError(f"feedback source `{said}` climbs out of its folder by `..` behind a wildcard.")
    literal = Path(os.path.abspath(pattern))
    if os.path.lexists(literal) and not literal.is_dir():  # Also a name that holds brackets, like those of patterns.
        return literal.parent, [literal]
    found = {Path(os.path.abspath(p)) for p in glob.glob(pattern, recursive=True)}
    if closed := _closed_folders(pattern):
        raise FeedbackError(
            f"feedback source `{said}` leads through folders that may not be listed: {', '.join(closed)}"
        )
    paths = sorted(p for p in found if not p.is_dir())
    passed = {parent for path in paths for parent in path.parents}
    if glob.has_magic(pattern):
        paths += [p for p in found - passed if p.is_dir() and DATA_NAME.search(p.name)]
    if paths:
        return root.resolve(), sorted(paths)
    if literal.is_dir():
        raise FeedbackError(
            f"feedback source `{said}` matches no file: it is a folder; name its files, as `{said}/*.jsonl`."
        )
    raise NoFile(f"feedback source `{said}` matches no file; relative paths start at the folder of the YAML file.")


def _closed_folders(pattern: str) -> list[str]:
    """Folders that a pattern leads through and that may not be listed. `glob` passes them over without a word."""
    above = os.path.dirname(pattern)
    if not glob.has_magic(above):
        return []
    folders = [path for path in glob.glob(above, recursive=True) if os.path.isdir(path)]
    return sorted(shown(path) for path in folders if not os.access(path, os.R_OK | os.X_OK))


def _fixed_part(pattern: str) -> Path:
    """The folders of a pattern before its first wildcard."""
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part) and glob.escape(_unescape(part)) != part:
            break
        fixed.append(_unescape(part))
    return Path(*fixed)


def _unescape(part: str) -> str:
    """What `glob.escape` made of a name, undone."""
    for character in "?*[":
        part = part.replace(f"[{character}]", character)
    return part


def shown(name: str) -> str:
    """A file's name for people and logs: NFC, control characters escaped, not endless."""
    composed = unicodedata.normalize("NFC", name)
    # Lone surrogates stand for bytes of a name that are no text; they are not printable either.
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in composed)
    if len(printable) <= LONGEST_NAME:
        return printable
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{digest}...{printable[-LONGEST_NAME:]}"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart: they must not depend on where the project lies.

    Two names that are one text in NFC stay apart by a digest of their bytes.
    """
    names = [shown(path.name) for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        if max(counts.values()) == 1:
            return names
        names = [
            shown("/".join(path.parts[-depth:])) if counts[name] > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    counts = Counter(names)
    names = [
        f"{name} ({hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]})" if counts[name] > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    return numbered(names)  # What is left has one path in two file systems.


def numbered(names: Sequence[str]) -> list[str]:
    """The names, of which a second one that is equal is told apart by its number."""
    return [f"{name} #{names[:n].count(name) + 1}" if name in names[:n] else name for n, name in enumerate(names)]


def open_inside(path: Path, root: Path | None) -> BufferedReader:
    """A regular file inside `root`, opened for reading.

    Links are followed only as far as they stay inside: the real path is walked folder by folder, each opened without
    following links, so that one that is put there meanwhile is refused too.

    Raises:
        FileRefused: `outside_folder`, `not_a_regular_file` or `unreadable`.
    """
    try:
        if root is None or not hasattr(os, "O_NOFOLLOW"):
            _only_inside(path, root)
            _only_regular(os.stat(path))
            return BufferedReader(FileIO(path, "rb"), _BUFFER)
        return _walk(_only_inside(path, root), root.resolve())
    except FileRefused:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileRefused("unreadable", f"it cannot be opened: {reason}") from None


def _only_inside(path: Path, root: Path | None) -> Path:
    real = Path(os.path.realpath(path))
    if root is not None and not real.is_relative_to(root.resolve()):
        raise FileRefused(
            "outside_folder",
            f"it is a link that leads out of {shown(str(root))}; name the real file as a source of its own",
        )
    return real


def _walk(real: Path, root: Path) -> BufferedReader:
    *folders, name = real.relative_to(root).parts
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = deeper
        _only_regular(os.stat(name, dir_fd=at, follow_symlinks=False))  # Opening a device could already do something.
        handle = os.open(name, _OPEN, dir_fd=at)
    finally:
        os.close(at)
    try:
        _only_regular(os.fstat(handle))
        return BufferedReader(FileIO(handle, "rb"), _BUFFER)
    except BaseException:
        os.close(handle)
        raise


def _only_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        way = "; name the files in it, as `.../*`" if stat.S_ISDIR(status.st_mode) else ""
        raise FileRefused("not_a_regular_file", f"it is {kind}, not a file{way}")


def refuse_links_from_outside(path: Path, root: Path | None) -> None:
    """Refuses a file that has another name outside `root` (a hard link): who may change it is not known.

    Raises:
        FileRefused: `hard_link`.
    """
    status = os.stat(path)
    if root is None or os.name == "nt" or status.st_nlink == 1:
        return
    wanted, found, seen = (status.st_dev, status.st_ino), 0, 0
    for folder, _, names in os.walk(root):
        for name in names:
            seen += 1
            try:
                other = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            found += (other.st_dev, other.st_ino) == wanted
        if found >= status.st_nlink or seen > LINKS_LOOKED_THROUGH:
            break
    if found < status.st_nlink:
        message = f"it has {status.st_nlink} names (hard links), and only {found} of them in its folder; copy it there"
        raise FileRefused("hard_link", message)


def is_appended(name: str) -> bool:
    """Whether a file of this name may be one that is always appended to, and is read as it was when it was found."""
    return _APPENDED.search(name) is not None


def digest_of(path: Path, root: Path | None, first: int | None = None) -> tuple[str, int]:
    """(sha256, size) of a file's bytes, of one and the same content.

    Of plain JSONL that is appended to at this moment it is the content that there was, to the end of its last line.

    Args:
        path: of the file.
        root: see `open_inside`.
        first: only so many bytes, whatever stands behind them.

    Raises:
        FileRefused: see `open_inside`; `changed_while_read` when it is written at this moment.
    """
    digest, size = hashlib.sha256(), 0
    with open_inside(path, root) as handle:
        before = os.fstat(handle.fileno())
        wanted = before.st_size if first is None else first
        while chunk := handle.read(min(_CHUNK, wanted - size)):
            digest.update(chunk)
            size += len(chunk)
        after = os.fstat(handle.fileno())
        if first is not None or (size == wanted and _stamp(before) == _stamp(after)):
            return digest.hexdigest(), size
        lines = _end_of_lines(handle, wanted) if _has_grown(before, after) and is_appended(path.name) else 0
    if not lines:
        raise FileRefused(CHANGED_WHILE_READ, CHANGED)
    return digest_of(path, root, lines)


def _has_grown(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino) and after.st_size > before.st_size


def _end_of_lines(handle: BufferedReader, size: int) -> int:
    """Where the last line ends in the first `size` bytes; 0 where none does."""
    at = size
    while at > 0:
        start = max(0, at - _CHUNK)
        handle.seek(start)
        if (found := handle.read(at - start).rfind(b"\n")) >= 0:
            return start + found + 1
        at = start
    return 0


CHANGED = (
    "it changed while it was read; run again once its writer is done, and where it never is, rotate the file or copy "
    "it and read the copy"
)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def verify(file: FeedbackFile) -> None:
    """See `sources.verify_unchanged`."""
    first = file.size if is_appended(file.path.name) else None
    if file.sha256 and digest_of(file.path, file.root, first) != (file.sha256, file.size):
        raise FileRefused(CHANGED_WHILE_READ, CHANGED)
    if file.companion is not None and digest_of(file.companion, file.companion.parent)[0] != file.companion_sha256:
        raise FileRefused(CHANGED_WHILE_READ, f"its companion {shown(file.companion.name)} changed while it was read")
