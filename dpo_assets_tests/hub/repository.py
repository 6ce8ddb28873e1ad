"""What the in-test Hub stores: repositories, their commits and the files in them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

Json = dict[str, Any]
_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)


class HubError(Exception):
    """A refusal: its HTTP status and the X-Error-Code that the client maps to an exception type."""

    def __init__(self, status: int, message: str, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.details = details


@dataclass
class Blob:
    """One stored file: its bytes, and the digests announced for it.

    The digests are fixed when the blob is stored, so that corrupted bytes keep the announcement of good ones.
    """

    data: bytes
    oid: str
    size: int
    lfs: Json | None = None

    @classmethod
    def regular(cls, data: bytes) -> Blob:
        """A file kept in git itself; its id is git's."""
        return cls(data, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data))

    @classmethod
    def large(cls, data: bytes) -> Blob:
        """A file kept in LFS; git only holds a pointer to its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
        pointer = cls.regular(text.encode())
        lfs = {"oid": sha256, "size": len(data), "pointerSize": pointer.size}
        return cls(data, pointer.oid, len(data), lfs)

    @property
    def content_id(self) -> str:
        """What the client compares with its own file: sha256 for LFS, git's id otherwise."""
        return str(self.lfs["oid"]) if self.lfs else self.oid

    def tree_entry(self, path: str) -> Json:
        """The file as the tree and paths-info routes list it."""
        entry: Json = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        return entry | {"lfs": self.lfs} if self.lfs else entry

    def sibling(self, path: str, detailed: bool) -> Json:
        """The file as model_info lists it, where LFS calls its digest ``sha256``."""
        entry: Json = {"rfilename": path}
        if detailed:
            entry |= {"size": self.size, "blobId": self.oid}
            if self.lfs:
                entry["lfs"] = {"sha256": self.lfs["oid"], **self.lfs}
        return entry


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository: every path and its blob."""

    oid: str
    parent: str | None
    summary: str
    date: str
    files: dict[str, Blob]


class Repo:
    """A repository: commits that never change, and branches and tags that point at them."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        # The Hub starts every repository with this file; a publisher must not take it for one of its own.
        self.commit("initial commit", {".gitattributes": Blob.regular(b"*.safetensors filter=lfs -text\n")})

    def commit(self, summary: str, files: dict[str, Blob], branch: str = "main") -> Commit:
        """Make ``files`` the whole content of ``branch``; a test calls it to act as another writer."""
        parent = self.branches.get(branch)
        number = len(self.commits)
        content = sorted((path, blob.content_id) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([self.id, number, parent, summary, content]).encode()).hexdigest()
        # Counted, not read from a clock: the same story gives the same ids and dates.
        date = (_EPOCH + timedelta(seconds=number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(oid, parent, summary, date, dict(files))
        self.commits[oid] = commit
        self.branches[branch] = oid
        return commit

    def resolve(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag or commit id (7 digits or more) names."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and len(revision) >= 7:
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        if oid is None:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return self.commits[oid]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The stored bytes of every file at ``revision``."""
        return {path: blob.data for path, blob in self.resolve(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of ``revision``, newest first."""
        commits = [self.resolve(revision)]
        while parent := commits[-1].parent:
            commits.append(self.commits[parent])
        return commits

    def flip_byte(self, path: str, offset: int = -1, revision: str = "main") -> None:
        """Corrupt one stored byte of a file while its announced digests stay as they were."""
        blob = self.resolve(revision).files[path]
        data = bytearray(blob.data)
        data[offset] ^= 0xFF
        blob.data = bytes(data)
