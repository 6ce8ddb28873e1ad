"""Files behind a URL (`s3://`, `gs://`, `https://`), through fsspec: copied here once, and again when they changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_assets.errors import ConfigError, FeedbackError, InfrastructureError
from dpo_assets.feedback.sources import FileRefused, Limits
from dpo_assets.feedback.sources.files import CHANGED

# What pip installs for a protocol; fsspec's own message names the module.
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
    "adl": "adlfs", "oss": "ossfs", "oci": "ocifs", "webhdfs": "requests", "sftp": "paramiko", "ssh": "paramiko",
    "smb": "smbprotocol", "http": "aiohttp", "https": "aiohttp", "dropbox": "dropboxdrivefs", "r2": "s3fs",
}  # fmt: skip
_BLOCK = 1 << 20
_STAMPS = ("ETag", "etag", "checksum", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created")


class RemoteFile:
    """A file of a URL and where its copy lies."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
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
        name = PurePosixPath(remote).name or "file"
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
        return [[remote, _stamp(filesystem.info(remote))] for remote in found]
    except Exception as error:
        raise _did_not_answer(url, error) from None


def _found(url: str) -> tuple[Any, list[str]]:
    import fsspec

    protocol = url.split("://", 1)[0].lower()
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError:
        package = PACKAGES.get(protocol, "the package that fsspec names for it")
        raise ConfigError(f"feedback source `{url}`: {protocol}:// needs a package: pip install {package}") from None
    except ValueError as error:
        raise ConfigError(f"feedback source `{url}`: {error}") from None
    try:
        filesystem.invalidate_cache()
        found = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
        found = [remote for remote in found if filesystem.isfile(remote)]
    except Exception as error:
        raise _did_not_answer(url, error) from None
    if not found:
        raise FeedbackError(f"feedback source `{url}` matches no file that these credentials may see.")
    return filesystem, found


def _did_not_answer(url: str, error: Exception) -> InfrastructureError:
    return InfrastructureError(f"feedback source `{url}` cannot be read: {type(error).__name__}: {str(error)[:200]}")


def _copy(filesystem: Any, remote: str, local: Path, limits: Limits) -> None:
    """Copies one file, unless the copy is of the same state of it."""
    stamp = _stamp(before := filesystem.info(remote))
    note = local.parent / "source.json"
    if stamp and note.is_file() and local.is_file() and json.loads(note.read_text("utf-8")).get("stamp") == stamp:
        return
    size = before.get("size")
    if isinstance(size, int) and size > limits.file_bytes:
        raise FileRefused("file_too_large", f"{size} bytes, more than {limits.file_bytes}")
    local.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    part = local.with_name(f"{local.name}.part")
    copied = 0
    with filesystem.open(remote, "rb") as source, part.open("wb") as target:
        while block := source.read(_BLOCK):
            copied += len(block)
            if copied > limits.file_bytes:
                raise FileRefused("file_too_large", f"more than {limits.file_bytes} bytes")
            target.write(block)
    filesystem.invalidate_cache()
    after = filesystem.info(remote)
    if _stamp(after) != stamp or (isinstance(after.get("size"), int) and after["size"] != copied):
        part.unlink()
        raise FileRefused("changed_while_read", CHANGED)
    os.replace(part, local)
    note.write_text(json.dumps({"remote": remote, "stamp": stamp}), "utf-8")


def _stamp(info: Mapping[str, Any]) -> str:
    """What tells one state of a file from another; empty where its file system says nothing."""
    said = {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}
    return json.dumps({**said, "size": info.get("size")}, sort_keys=True) if said else ""
