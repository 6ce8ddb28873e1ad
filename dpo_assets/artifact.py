"""Immutable artefact directories.

An artefact is written beside its final name, sealed with a manifest (written last) and renamed. Whoever reads one
verifies it first, so a half-written directory is never mistaken for a result. Its digest is the digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dpo_assets.errors import ConfigError, CorruptArtifact
from dpo_assets.hashing import file_sha256, is_file_of
from dpo_assets.locks import LOCK, exclusive
from dpo_assets.version import __version__

ModelT = TypeVar("ModelT", bound=BaseModel)
# A measured number as `write_json` keeps it: null reads back as NaN, which no limit lets pass.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
MANIFEST = "manifest.json"
# Timings differ between runs of equal inputs, so they stay outside the digest; their bytes are still in the manifest.
VOLATILE = "timings.json"
# Nor does how rows lie in files say what they are: a file beside it does, with the digest of each row.
STORED = "stored/"
READING = "_reading"  # What is read of feedback, before anybody knows whether it is kept.
REJECTED, NOTES = "_rejected", "rejected.jsonl"


class FileEntry(BaseModel):
    """One file of an artefact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    size: int


class Manifest(BaseModel):
    """What an artefact is, made from what, by which versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    fingerprint: str
    inputs: dict[str, str]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        """sha256 over (path, sha256, size) of every file that says what the artefact is, in path order."""
        said = (one for one in sorted(self.files.items()) if one[0] != VOLATILE and not one[0].startswith(STORED))
        rows = [[p, e.sha256, e.size] for p, e in said]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A verified artefact directory."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.manifest.files.values())

    def json(self, name: str) -> Any:
        """The parsed content of a JSON file of the artefact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def fingerprint(kind: str, config: Any, inputs: Mapping[str, str]) -> str:
    """Identity of a computation before it is done: kind, package version, relevant config, input digests (32 hex)."""
    payload = {"kind": kind, "package": __version__, "config": config, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(payload, sort_keys=True, default=str).encode()).hexdigest()[:32]


def is_fingerprint(text: str) -> bool:
    """Whether a text has the form of a fingerprint: 32 hexadecimal digits."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def write_json(path: Path, value: Any) -> None:
    """UTF-8 JSON with sorted keys: equal values give equal bytes. NaN and infinities become null (see `Number`)."""
    path.write_text(
        json.dumps(without_nan(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )


def read_object(path: Path, why: str = "") -> dict[str, Any]:
    """A JSON object that another program wrote.

    Args:
        why: what needs it.

    Raises:
        ConfigError: when the file is missing or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing{f': {why}' if why else ''}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def rewrite_json(path: Path, value: Any) -> None:
    """A file of another program with values changed: `Infinity` stays what that program wrote and expects.

    Mamba 2's `time_step_limit` in config.json ends there.
    """
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """The value with None for each float that is NaN or infinite, at any depth: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, list | tuple) else value


def seal(
    directory: Path, *, kind: str, fingerprint: str, inputs: Mapping[str, str], versions: Mapping[str, str] = {}
) -> Artifact:
    """Hashes every file, flushes it to disk and writes the manifest last."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        files[path.relative_to(directory).as_posix()] = FileEntry(sha256=file_sha256(path), size=path.stat().st_size)
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        inputs=dict(inputs),
        versions={"dpo_assets": __version__, **versions},
        files=files,
    )
    partial = directory / (MANIFEST + ".tmp")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(manifest.model_dump_json(indent=1))
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(directory / MANIFEST)
    return Artifact(directory, manifest)


def open_artifact(directory: Path) -> Artifact:
    """The artefact in `directory`, with every file checked against the manifest.

    Raises:
        CorruptArtifact: no manifest, an unreadable one, or a file that is missing, extra or different.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CorruptArtifact(f"{directory}: no {MANIFEST}; the writer did not finish") from None
    except ValidationError as error:
        raise CorruptArtifact(f"{path}: unreadable manifest ({error.error_count()} faults)") from None
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise CorruptArtifact(f"{file}: listed in the manifest, but missing")
        if not _holds(file, entry):
            raise CorruptArtifact(f"{file}: differs from the manifest (size or sha256)")
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {MANIFEST}
    if extra := present - set(manifest.files):
        raise CorruptArtifact(f"{directory}: files that the manifest does not list: {', '.join(sorted(extra))}")
    return Artifact(directory, manifest)


def _holds(file: Path, entry: FileEntry) -> bool:
    """Whether a file is what was sealed."""
    return file.stat().st_size == entry.size and is_file_of(file, entry.sha256)


def read_kept(artifact: Artifact, name: str, model: type[ModelT]) -> ModelT:
    """A JSON file of an artefact, as this version of the package understands it.

    Raises:
        ConfigError: the file is not there or says other things, as in an artefact of an earlier version.
    """
    try:
        return model.model_validate_json((artifact.path / name).read_bytes())
    except (FileNotFoundError, ValidationError):
        raise ConfigError(
            f"{artifact.path / name} is of an earlier version; materialise `{artifact.manifest.kind}` again."
        ) from None


@dataclass(frozen=True)
class ArtifactTree:
    """The artefacts of one pipeline: `root/<kind>/<fingerprint>`.

    `_rejected/` keeps what failed verification, for a person to look at, until retention finds it old; nothing else is
    deleted here but the scratch directories of writers that died.

    Attributes:
        warn: is told of each artefact that was set aside, and why: it will be made again, or is missed; and of whom a
            writer waits for.
        run: what a writer calls itself, for those who wait for it.
    """

    root: Path
    warn: Callable[[str], None] = field(default=lambda _: None, compare=False, repr=False)
    run: str = field(default="", compare=False)

    def directory(self, kind: str, fingerprint: str) -> Path:
        """Where the artefact lies, or would.

        Raises:
            ValueError: when it is no fingerprint: such a path could be a folder of many artefacts.
        """
        if not is_fingerprint(fingerprint):
            raise ValueError(f"`{fingerprint}` is no fingerprint of a `{kind}`")
        return self.root / kind / fingerprint

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """The verified artefact, or None. One that fails verification is moved to `_rejected/` first."""
        directory = self.directory(kind, fingerprint)
        if not directory.is_dir():
            return None
        try:
            return self._open(directory, kind, fingerprint)
        except CorruptArtifact as why:
            self.warn(f"a `{kind}` is damaged and was set aside as {self._set_aside(directory, why)}: {why}")
            return None

    def missing(self, kind: str, fingerprint: str) -> str:
        """Why `find` found nothing: that it was damaged, how, and where it lies now; or that it is not there."""
        with suppress(OSError, ValueError):
            for line in reversed((self.root / NOTES).read_text(encoding="utf-8").splitlines()):
                note = json.loads(line)
                if (note["kind"], note["fingerprint"]) == (kind, fingerprint):
                    return f"was damaged and set aside as {note['aside']}: {note['why']}"
        return f"is missing from {self.root / kind}"

    def listed(self, kind: str) -> Iterator[Artifact]:
        """Every artefact of a kind as its manifest tells it, newest first. Its files are not verified: see `find`."""
        # Not what somebody is still writing: its folder has another name until it is complete.
        made: list[tuple[int, Path]] = []
        for path in (self.root / kind).glob(f"*/{MANIFEST}"):
            if is_fingerprint(path.parent.name):
                with suppress(FileNotFoundError):  # Somebody set it aside since.
                    made.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(made, key=lambda one: one[0], reverse=True):
            with suppress(FileNotFoundError, ValidationError):
                manifest = Manifest.model_validate_json(path.read_bytes())
                yield Artifact(path.parent, manifest)

    def latest(self, kind: str, inputs: Mapping[str, str]) -> Artifact | None:
        """The newest artefact of a kind that this version of the package made from these inputs, verified, or None."""
        for told in self.listed(kind):
            same = told.manifest.inputs == dict(inputs) and told.manifest.versions.get("dpo_assets") == __version__
            if same and (found := self.find(kind, told.path.name)):
                return found
        return None

    def _open(self, directory: Path, kind: str, fingerprint: str) -> Artifact:
        """The verified artefact, which must be the one that was asked for."""
        found = open_artifact(directory)
        if (found.manifest.kind, found.fingerprint) != (kind, fingerprint):
            raise CorruptArtifact(f"{directory}: holds {found.manifest.kind} {found.fingerprint}")
        return found

    def find_or_build(
        self, kind: str, fingerprint: str, build: Callable[[Path], None], inputs: Mapping[str, str]
    ) -> tuple[Artifact, bool]:
        """The artefact, and whether it was reused. `build` fills an empty directory; it may seal it itself.

        Writers of the same artefact wait for each other, and say for whom. The lock is the operating system's, so it
        goes with the process that held it; what is found beside the artefact while holding it belongs to a dead writer
        and is removed.

        Raises:
            CorruptArtifact: when `build` seals it as another one or with other inputs, or changes it afterwards.
        """
        final = self.directory(kind, fingerprint)
        final.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(final.with_name(fingerprint + LOCK), self.run, self.warn):
            if found := self.find(kind, fingerprint):
                return found, True
            for leftover in final.parent.glob(f"{fingerprint}.tmp-*"):
                remove(leftover)
            scratch = final.parent / f"{fingerprint}.tmp-{os.getpid()}"
            scratch.mkdir()
            try:
                build(scratch)
                if not (scratch / MANIFEST).exists():
                    seal(scratch, kind=kind, fingerprint=fingerprint, inputs=inputs)
                made = self._open(scratch, kind, fingerprint).manifest
                if made.inputs != dict(inputs):
                    raise CorruptArtifact(f"{scratch}: its manifest names other inputs than {kind} was made from")
                scratch.rename(final)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            sync_directory(final.parent)
            return Artifact(final, made), False

    def checkpoints(self, kind: str, fingerprint: str) -> Path:
        """Where a stage that makes the artefact keeps its checkpoints, or its parts: not in the folder that goes when
        it fails."""
        return self.root / "checkpoints" / kind / self.directory(kind, fingerprint).name

    def forget_checkpoints(self, kind: str, fingerprint: str) -> None:
        """Removes them; what was set aside as damaged stays. Only for an artefact that is sealed and in its place."""
        shutil.rmtree(self.checkpoints(kind, fingerprint), ignore_errors=True)

    def _set_aside(self, directory: Path, why: CorruptArtifact) -> Path:
        target = self.root / REJECTED / f"{directory.parent.name}-{directory.name}-{os.urandom(4).hex()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(target)
        with suppress(OSError):
            os.utime(target)  # Retention counts its age from here on.
        note = {"kind": directory.parent.name, "fingerprint": directory.name, "aside": str(target), "why": str(why)}
        # On a full disk what is damaged is out of the way without a note.
        with suppress(OSError), (self.root / NOTES).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps(note) + "\n")
        return target


def remove(path: Path) -> None:
    """A file, or a folder with all that it holds, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
