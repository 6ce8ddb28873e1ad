"""Files behind a URL (`s3://`, `gs://`, `https://`), through fsspec: copied here once, and again when they changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_assets.errors import ConfigError, InfrastructureError, NoFile
from dpo_assets.feedback.sources import CHANGED_WHILE_READ, FileRefused, Limits
from dpo_assets.feedback.sources.files import CHANGED, digest_of
from dpo_assets.secret_shapes import masked, without_url_secrets

# What pip installs for a protocol; fsspec's own message names the module.
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
    "adl": "adlfs", "oss": "ossfs", "oci": "ocifs", "webhdfs": "requests", "sftp": "paramiko", "ssh": "paramiko",
    "smb": "smbprotocol", "http": "aiohttp", "https": "aiohttp", "dropbox": "dropboxdrivefs", "r2": "s3fs",
}  # fmt: skip
_BLOCK = 1 << 20
_NOT_THERE = (401, 403, 404, 410)  # Statuses of HTTP that another try does not change.
_STAMPS = ("ETag", "etag", "checksum", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")


class RemoteFile:
    """A file of a URL and where its copy lies. `url` is as it may be shown; `place` is what its name is made from."""

    def __init__(self, remote: str, path: Path) -> None:
        self.url, self.place, self.path = without_url_secrets(remote), Path(_without_query(remote)), path
        self.refused: FileRefused | None = None


def fetch(url: str, landing: Path, limits: Limits) -> list[RemoteFile]:
    """Every file that a URL names, copied into `landing`.

    Raises:
        ConfigError: when its file system needs a package, or the URL names no file.
        InfrastructureError: when the other side does not answer.
    """
    filesystem, found = _found(url)
    files = []
    for remote in found:
        folder = landing / "remote" / hashlib.sha256(f"{filesystem.protocol}:{remote}".encode()).hexdigest()[:20]
        name = PurePosixPath(_without_query(remote)).name or "file"
        # Its own name may be anything; only its end says what it is.
        local = folder / f"content{''.join(PurePosixPath(name).suffixes[-2:])}"
        file = RemoteFile(remote, local)
        try:
            _copy(filesystem, remote, local, limits)
        except FileRefused as refused:
            file.refused = refused
        except Exception as error:  # Every file system has errors of its own.
            raise _did_not_answer(url, error) from None
        files.append(file)
    return files


def glance(url: str) -> list[list[str]]:
    """What the files of a URL look like from outside: enough to see that something changed, without reading it."""
    filesystem, found = _found(url)
    try:
        return [[without_url_secrets(remote), _stamp(filesystem.info(remote))] for remote in found]
    except Exception as error:
        raise _did_not_answer(url, error) from None


def _found(url: str) -> tuple[Any, list[str]]:
    import fsspec

    protocol, shown = url.split("://", 1)[0].lower(), without_url_secrets(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError:
        package = PACKAGES.get(protocol, "the package that fsspec names for it")
        raise ConfigError(f"feedback source `{shown}`: {protocol}:// needs a package: pip install {package}") from None
    except ValueError as error:
        raise ConfigError(f"feedback source `{shown}`: {without_url_secrets(str(error))}") from None
    try:
        filesystem.invalidate_cache()
        found = _listed(filesystem, path, "*[" if _is_http(url) else "*?[")
    except Exception as error:
        raise _did_not_answer(url, error) from None
    if not found:
        raise NoFile(f"feedback source `{shown}` matches no file that these credentials may see.")
    return filesystem, found


def _listed(filesystem: Any, path: str, wildcards: str) -> list[str]:
    """The files that a path or pattern names, sorted. What cannot be looked at is an error: nothing drops out."""
    if any(c in path for c in wildcards):
        infos = filesystem.glob(path, detail=True)
    else:
        try:
            infos = {path: filesystem.info(path)}
        except FileNotFoundError as error:
            # fsspec's HTTP says so of whatever went wrong, with the reason as the cause.
            if error.__cause__ is not None and getattr(error.__cause__, "status", None) not in _NOT_THERE:
                raise error.__cause__ from None
            return []
    return sorted(remote for remote, info in infos.items() if info.get("type") != "directory")


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _without_query(remote: str) -> str:
    """The path of a URL, without what only HTTP has behind it."""
    return re.split(r"[?#]", remote, maxsplit=1)[0] if _is_http(remote) else remote


def _did_not_answer(url: str, error: Exception) -> InfrastructureError:
    said = masked(without_url_secrets(str(error)))[:200]  # First hidden, then cut: half a signature is one too.
    return InfrastructureError(
        f"feedback source `{without_url_secrets(url)}` cannot be read: {type(error).__name__}: {said}"
    )


def _copy(filesystem: Any, remote: str, local: Path, limits: Limits) -> None:
    """Copies one file, unless the copy is of the same state of it. Runs that copy the same one wait for each other."""
    from filelock import FileLock

    local.parent.mkdir(parents=True, exist_ok=True)
    note = local.parent / "source.json"
    with FileLock(local.parent / "lock"):
        stamp = _stamp(before := filesystem.info(remote))
        if stamp and _is_copy(local, _noted(note), stamp):
            return
        size = before.get("size")
        if isinstance(size, int) and size > limits.file_bytes:
            raise FileRefused("file_too_large", f"{size} bytes, more than {limits.file_bytes}")
        note.unlink(missing_ok=True)
        part = local.with_name(f"{local.name}.{os.urandom(4).hex()}.part")
        for left in local.parent.glob("*.part"):  # Of a writer that died.
            left.unlink(missing_ok=True)
        try:
            copied, sha256 = _written(filesystem, remote, part, limits)
            filesystem.invalidate_cache()
            after = filesystem.info(remote)
            if _stamp(after) != stamp or (isinstance(after.get("size"), int) and after["size"] != copied):
                raise FileRefused(CHANGED_WHILE_READ, CHANGED)
            os.replace(part, local)
        finally:
            part.unlink(missing_ok=True)
        said = {"remote": without_url_secrets(remote), "stamp": stamp, "sha256": sha256}
        note.write_text(json.dumps(said), "utf-8")


def _written(filesystem: Any, remote: str, part: Path, limits: Limits) -> tuple[int, str]:
    """(bytes, sha256) of what was copied into `part`."""
    copied, digest = 0, hashlib.sha256()
    with filesystem.open(remote, "rb") as source, part.open("wb") as target:
        while block := source.read(_BLOCK):
            copied += len(block)
            if copied > limits.file_bytes:
                raise FileRefused("file_too_large", f"more than {limits.file_bytes} bytes")
            digest.update(block)
            target.write(block)
    return copied, digest.hexdigest()


def _noted(note: Path) -> Mapping[str, Any]:
    """What was noted of a copy; nothing where the writer of the note died."""
    try:
        said = json.loads(note.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_copy(local: Path, noted: Mapping[str, Any], stamp: str) -> bool:
    """Whether a copy is of this state, whole: its bytes are what came over the line."""
    return noted.get("stamp") == stamp and local.is_file() and digest_of(local, None)[0] == noted.get("sha256")


def _stamp(info: Mapping[str, Any]) -> str:
    """What tells one state of a file from another; empty where its file system says nothing."""
    said = {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}
    return json.dumps({**said, "size": info.get("size")}, sort_keys=True) if said else ""
