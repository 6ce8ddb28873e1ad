"""What one commit would do to a repository: whose each file is, and the operations that send a release."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_assets.hashing import known_sha256
from dpo_assets.publishing.errors import PublishRefused
from dpo_assets.untrusted import in_code

PROVENANCE = "provenance.json"
MADE_BY: Literal["dpo_assets"] = "dpo_assets"
# The Hub keeps larger files in LFS, by sha256; a smaller one has git's id of a blob where it does not.
LARGEST_IN_GIT = 10 * 2**20
HUB_OWNED = frozenset({".gitattributes"})
SHOWN = 5  # Files that a refusal names.

Action = Literal["add", "update", "replace", "unchanged", "delete"]


class FileRecord(BaseModel):
    """One file of a release: `sha256` and `size` in bytes; `git_blob` is git's id of it, empty above 10 MiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    size: int
    git_blob: str = ""

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        size = path.stat().st_size
        return cls(
            sha256=known_sha256(path),
            size=size,
            git_blob=_git_blob(path.read_bytes()) if size <= LARGEST_IN_GIT else "",
        )


def _git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class ReleaseRecord(BaseModel):
    """What provenance.json of a release tells the next one: which files are this package's to replace or delete."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    made_by: Literal["dpo_assets"]
    pipeline: str = ""  # Empty: of a version that did not say.
    ledger: str = ""  # Digest of the decision in its pipeline's ledger; empty: of a version without one.
    files: dict[str, FileRecord]

    @classmethod
    def read(cls, text: bytes | None) -> ReleaseRecord | None:
        """The record, or None where a file of this name is not there or is somebody else's."""
        if text is None:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


@dataclass(frozen=True)
class HeldFile:
    """A file of a commit as the Hub's metadata tells it: the sha256 of one in LFS, git's id of any other."""

    size: int
    sha256: str = ""
    git_blob: str = ""

    def holds(self, file: FileRecord) -> bool:
        """Whether its content is that file's, by size and digest."""
        same = self.sha256 == file.sha256 if self.sha256 else self.git_blob == file.git_blob
        return same and self.size == file.size and bool(self.sha256 or self.git_blob)


@dataclass(frozen=True)
class Head:
    """A repository at its newest commit.

    `earlier`: the record of the release of this pipeline that lies there, None where there is none. `made_by_hub`:
    files that the Hub itself puts into a new repository. `other_pipeline`: the one whose release lies there instead.
    """

    commit: str
    private: bool
    files: Mapping[str, HeldFile]
    earlier: ReleaseRecord | None = None
    made_by_hub: frozenset[str] = HUB_OWNED
    other_pipeline: str = ""

    def is_released(self, path: str) -> bool:
        """Whether a file is as an earlier release left it. One that somebody changed since is theirs."""
        if self.earlier is None:
            return False
        if path == PROVENANCE:  # It holds the list, and so is not on it.
            return True
        listed = self.earlier.files.get(path)
        return listed is not None and self.files[path].holds(listed)


@dataclass(frozen=True)
class Operation:
    """One line of a plan. `replace`: a file of others, in a repository that the recipe adopts. `size` in bytes."""

    action: Action
    path: str
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class ReleasePlan:
    """What a commit on `head` does, file by file; `kept` are files of others, which it does not touch.

    `head`: None where there is no repository yet, or where it was not asked (`asked`); `note` says why.
    """

    head: str | None
    operations: tuple[Operation, ...]
    kept: tuple[str, ...] = ()
    note: str = ""
    asked: bool = True

    @property
    def changes(self) -> tuple[Operation, ...]:
        """The operations that are sent; without any, there is no commit."""
        return tuple(o for o in self.operations if o.action != "unchanged")


def first_release(files: Mapping[str, FileRecord], note: str) -> ReleasePlan:
    """The plan for a repository that holds nothing yet."""
    return ReleasePlan(None, tuple(Operation("add", p, f.size, f.sha256) for p, f in files.items()), note=note)


def plan_release(files: Mapping[str, FileRecord], head: Head, repo_id: str, adopt: str | None) -> ReleasePlan:
    """The operations that make the release of `files` out of what lies at a head.

    Replaced and deleted is only what an earlier release listed and nobody changed since. In a repository that the
    recipe adopts, a file of others is replaced where the release needs its name, and is never deleted.

    Raises:
        PublishRefused: the repository, or a name that the release needs, is somebody else's, and is not adopted.
    """
    refuse_foreign(head, repo_id, adopt)
    operations, taken = [], []
    for path, file in files.items():
        action = _action(path, file, head)
        if action == "replace":
            taken.append(path)
        operations.append(Operation(action, path, file.size, file.sha256))
    if taken and adopt != repo_id:
        raise PublishRefused(
            f"{_some(taken)} of {repo_id} {'is' if len(taken) == 1 else 'are'} not as a release left it: somebody "
            "added or changed it, and the release needs that name. Nothing was sent. Move it away on the Hub, or let "
            f"the release replace it with publishing.adopt: {repo_id}"
        )
    stale = [p for p in (head.earlier.files if head.earlier else {}) if p in head.files and p not in files]
    deleted = sorted(path for path in stale if head.is_released(path))
    operations += [Operation("delete", path, head.files[path].size) for path in deleted]
    kept = sorted(set(head.files) - set(files) - set(deleted) - HUB_OWNED)
    return ReleasePlan(head.commit, tuple(operations), tuple(kept))


def _action(path: str, file: FileRecord, head: Head) -> Action:
    held = head.files.get(path)
    if held is None:
        return "add"
    if held.holds(file):
        return "unchanged"
    return "update" if head.is_released(path) or path in head.made_by_hub else "replace"


def refuse_foreign(head: Head, repo_id: str, adopt: str | None) -> None:
    """Refuses a repository that holds no release of this package, but files of others.

    Raises:
        PublishRefused: with how to adopt it.
    """
    others = sorted(set(head.files) - head.made_by_hub)
    if head.earlier is None and others and adopt != repo_id:
        if head.other_pipeline:
            raise PublishRefused(
                f"{repo_id} holds a release of another pipeline, `{head.other_pipeline}`. Nothing was sent. Name "
                f"another publishing.repo_id; or, where this one takes its place, publishing.adopt: {repo_id}, which "
                "keeps its files but for those whose names the release needs"
            )
        early = "; the provenance.json there lists no files, as that of early versions" if PROVENANCE in others else ""
        raise PublishRefused(
            f"{repo_id} holds files that no release of dpo_assets lists ({_some(others)}{early}). Nothing was sent. "
            f"Name another publishing.repo_id; or adopt the repository with publishing.adopt: {repo_id}, which keeps "
            "its files and replaces those whose names the release needs"
        )


def refuse_public(head: Head, repo_id: str, private: bool) -> None:
    """Refuses a public repository for a release that is to be private. It is never made private unasked: that would
    take it away from whoever uses it.

    Raises:
        PublishRefused: with both ways out.
    """
    if private and not head.private:
        raise PublishRefused(
            f"{repo_id} is public, and publishing.private is true. Nothing was sent. Make the repository private in "
            "its settings on the Hub, or set publishing.private: false"
        )


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(map(in_code, paths[:SHOWN])) + more
