"""What a stage has made so far, part by part, for the try that follows one that was ended.

Stages that compute many things of equal standing (scores, answers, files of weights) need no checkpoint: a part is
known by what it depends on, and one that is there is not made again. Parts lie in a folder of the stage's own, which
goes when its artefact is sealed (`ArtifactTree.forget_checkpoints`) or by age (`retention.old_checkpoints`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_assets.disk import is_full
from dpo_assets.hashing import file_sha256
from dpo_assets.training.packages import versions


class Parts:
    """The parts of one stage.

    Each is kept with its sha256, and renamed to its name when it is whole. One that is not what was kept is removed,
    counted in `dropped` and made again; what cannot be kept (a full disk, a file system without links) counts in
    `failed`, and is made again by the next try.

    Args:
        folder: where they lie; None: nothing is kept.
        identity: what all of them depend on. The versions of all packages are added.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = {"versions": versions(), **identity}
        self.taken, self.dropped, self.failed = 0, 0, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def value(self, make: Callable[[], Any], **facts: Any) -> Any:
        """A value of JSON's types, made or taken.

        Args:
            facts: what it depends on beside the identity.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{self._key(facts)}.json"
        if path.exists():
            kept = _read(path)
            if kept.get("sha256") == _digest(kept.get("value")):
                self.taken += 1
                return kept["value"]
            self._drop(path)
        value = make()
        try:
            _write(path, {"value": value, "sha256": _digest(value)})
        except OSError:
            self.failed += 1
        return value

    def file(self, target: Path, write: Callable[[Path], None], **facts: Any) -> None:
        """A file at `target`, written there or the one that an earlier try wrote.

        It is kept as a second name of the file, which takes no room: `target` is written once and never changed.

        Args:
            facts: what it depends on beside the identity.
        """
        if self.folder is None:
            return write(target)
        kept = self.folder / self._key(facts)
        note = kept.with_suffix(".json")
        if kept.exists() and note.exists():
            if _read(note).get("sha256") == file_sha256(kept):
                with suppress(OSError):  # Where there are as many names as a file may have, it is written again.
                    os.link(kept, target)
                    self.taken += 1
                    return None
            else:
                self._drop(kept, note)
        write(target)
        try:
            sha256 = file_sha256(target)
            kept.unlink(missing_ok=True)
            os.link(target, kept)
            _write(note, {"sha256": sha256})
        except OSError:
            self.failed += 1
        return None

    @contextmanager
    def forgotten_on_a_full_disk(self) -> Iterator[None]:
        """What is kept goes where the disk is full: a try that ends for it leaves nothing that takes room."""
        try:
            yield
        except OSError as error:
            if is_full(error):
                for path in self.folder.iterdir() if self.folder else ():
                    path.unlink(missing_ok=True)
            raise

    @property
    def told(self) -> str:
        """What a log says of them; empty: nothing out of the ordinary."""
        said = [f"{self.taken} parts of an earlier try are taken up"] if self.taken else []
        if self.dropped:
            said.append(f"{self.dropped} of them were not what had been kept, and are made again")
        if self.failed:
            said.append(f"{self.failed} parts could not be kept in {self.folder}: a try after this makes them again")
        return "; ".join(said)

    def _key(self, facts: Mapping[str, Any]) -> str:
        return _digest([self._identity, facts])[:32]

    def _drop(self, *paths: Path) -> None:
        self.dropped += 1
        for path in paths:
            with suppress(OSError):
                path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """What `_write` wrote; empty where nobody can read it any more."""
    with suppress(ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
