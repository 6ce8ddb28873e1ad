"""What of a store is kept: a choice from what manifests tell, and the deletion of the rest.

Kept is what somebody needs, what is young, and the last few of every kind, each with all that it goes back to by its
manifest's inputs. The choice knows no Dagster: who needs what is told to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dpo_assets.artifact import MANIFEST, REJECTED, ArtifactTree, remove
from dpo_assets.disk import gib, size_of
from dpo_assets.leftovers import TRASH
from dpo_assets.locks import LOCK, OWNER, if_nobodys
from dpo_assets.recipe import RetentionSection

# Kinds of artefacts that may go, in the order in which they are made from one another. No other kind ever does:
# feedback, datasets with their quarantine and the batches that they chose from, plans, scores and decisions are the
# memory of a pipeline.
MAY_GO = (
    "base_model",
    "reward_model",
    "tokens",
    "sft_checkpoint",
    "training_set",
    "dpo_adapter",
    "merged_model",
    "gguf_model",
    "published_model",
)
LOG, CHECKPOINTS = "retention.jsonl", "checkpoints"
DAY = 86_400.0
_BESIDE = (".gates.json", ".operations.json", LOCK + OWNER)


@dataclass(frozen=True)
class Stored:
    """An artefact as its manifest tells it. `used`: when it was made or last materialised, seconds since 1970."""

    kind: str
    fingerprint: str
    digest: str
    inputs: Mapping[str, str] = field(hash=False)
    size: int
    used: float


@dataclass(frozen=True)
class Needed:
    """That an artefact is needed, and why. `name` is its fingerprint or its digest."""

    kind: str
    name: str
    why: str


@dataclass(frozen=True)
class Choice:
    """What stays and what goes, each with the reason; what goes in an order that leaves nothing without its inputs."""

    kept: Mapping[Stored, str]
    gone: Mapping[Stored, str]


def stored(tree: ArtifactTree) -> list[Stored]:
    """Everything in a pipeline's store, without a look into files."""
    kinds = sorted({path.parent.parent.name for path in tree.root.glob(f"*/*/{MANIFEST}")})
    return [
        Stored(
            kind=kind,
            fingerprint=made.path.name,
            digest=made.digest,
            inputs=made.manifest.inputs,
            size=made.size,
            # The record of its gates is written whenever it is materialised, by whatever Dagster instance.
            used=max(_modified(made.path / MANIFEST), _modified(made.path.with_name(f"{made.path.name}.gates.json"))),
        )
        for kind in kinds
        for made in tree.listed(kind)
    ]


def choose(store: Sequence[Stored], needed: Sequence[Needed], rules: RetentionSection, now: float) -> Choice:
    """What of a store is kept.

    Args:
        needed: what must stay whatever the rules say.
        now: seconds since 1970.
    """
    why: dict[Stored, str] = {}
    roots: list[Stored] = []
    wanted = {(one.kind, one.name): one.why for one in reversed(needed)}
    newer: dict[str, int] = {}
    for one in sorted(store, key=lambda one: (-one.used, one.fingerprint)):
        rank = newer.get(one.kind, 0)
        newer[one.kind] = rank + 1
        if asked := wanted.get((one.kind, one.fingerprint)) or wanted.get((one.kind, one.digest)):
            why[one] = asked
        elif one.kind not in MAY_GO:
            why[one] = "never deleted"
            continue  # It needs nothing: it says itself what it was made from.
        elif rank < rules.keep_models:
            why[one] = f"one of the last {rules.keep_models} of its kind"
        elif now - one.used <= rules.keep_days * DAY:
            why[one] = f"used in the last {rules.keep_days:g} days"
        else:
            continue
        roots.append(one)
    _add_inputs(store, roots, why)
    order = {kind: place for place, kind in enumerate(MAY_GO)}
    going = sorted((one for one in store if one not in why), key=lambda one: (-order[one.kind], one.used))
    return Choice(why, {one: _reason(one, rules, now) for one in going})


def _add_inputs(store: Sequence[Stored], roots: Sequence[Stored], why: dict[Stored, str]) -> None:
    """Adds everything that the roots go back to, through whatever lies between."""
    of_digest: dict[tuple[str, str], list[Stored]] = {}
    for one in store:
        of_digest.setdefault((one.kind, one.digest), []).append(one)
    waiting, walked = list(roots), set(roots)
    while waiting:
        reader = waiting.pop()
        for name in reader.inputs.items():
            for one in of_digest.get(name, ()):
                why.setdefault(one, f"{reader.kind} {reader.fingerprint[:12]} was made from it")
                if one not in walked:
                    walked.add(one)
                    waiting.append(one)


def _reason(one: Stored, rules: RetentionSection, now: float) -> str:
    return (
        f"last used {(now - one.used) / DAY:.0f} days ago (keep_days: {rules.keep_days:g}), not among the last "
        f"{rules.keep_models} of its kind (keep_models), and nothing that is kept goes back to it"
    )


@dataclass(frozen=True)
class Aside:
    """A folder of the store that is no artefact, in whose place it lies (`kind`), its bytes, and why it goes."""

    path: Path
    kind: str
    size: int
    why: str


def old_aside(root: Path, rules: RetentionSection, now: float) -> list[Aside]:
    """What goes by age alone: checkpoints and parts that no try went on from, and models that were found damaged.

    Of damaged feedback and datasets nothing goes.
    """

    def old(when: float) -> bool:
        return now - when > rules.keep_days * DAY

    written = f"no try has written to it for {rules.keep_days:g} days"
    rejected = f"it was damaged, and set aside more than {rules.keep_days:g} days ago"
    return [
        Aside(folder, folder.parent.relative_to(root).as_posix(), size_of(folder), written)
        for folder in sorted((root / CHECKPOINTS).glob("*/*"))
        if folder.is_dir() and old(max(map(_modified, (folder, *folder.rglob("*")))))
    ] + [
        Aside(folder, REJECTED, size_of(folder), rejected)
        for folder in sorted((root / REJECTED).glob("*"))
        if folder.name.rsplit("-", 2)[0] in MAY_GO and old(_modified(folder))
    ]


def frees(root: Path, gone: Sequence[Stored]) -> int:
    """Bytes that are free afterwards: a file with a second name in what is kept takes its room on."""
    links: dict[tuple[int, int], list[int]] = {}
    for one in gone:
        for path in (root / one.kind / one.fingerprint).rglob("*"):
            with suppress(OSError):
                stat = path.lstat()
                if path.is_file():
                    links.setdefault((stat.st_dev, stat.st_ino), [stat.st_nlink, stat.st_size]).append(1)
    return sum(size for count, size, *names in links.values() if len(names) >= count)


def delete(root: Path, gone: Mapping[Stored, str], say: Callable[[str], None]) -> Iterator[Stored]:
    """Deletes what was chosen, one after the other, and yields each that is gone. The caller holds the store alone.

    Each is written down with its size and the reason first, and taken out of the store by one renaming: whoever is
    killed in between leaves an artefact or none, and what lies in the trash then is swept by the next run.
    """
    for one, why in gone.items():
        folder = root / one.kind / one.fingerprint
        with if_nobodys(folder.with_name(one.fingerprint + LOCK)) as free:
            if not free or not folder.is_dir():
                say(f"{one.kind} {one.fingerprint} stays: somebody is writing it")
                continue
            _write_down(root, one.kind, one.fingerprint, one.size, why)
            _take_out(root, folder)
            for ending in _BESIDE:
                remove(folder.with_name(one.fingerprint + ending))
            folder.with_name(one.fingerprint + LOCK).unlink(missing_ok=True)
        say(f"deleted {one.kind} {one.fingerprint} ({gib(one.size)}): {why}")
        yield one


def delete_aside(root: Path, folders: Sequence[Aside], say: Callable[[str], None]) -> int:
    """Deletes them as `delete` does, and returns their bytes."""
    for one in folders:
        _write_down(root, one.kind, one.path.name, one.size, one.why)
        _take_out(root, one.path)
        say(f"deleted {one.kind}/{one.path.name} ({gib(one.size)}): {one.why}")
    return sum(one.size for one in folders)


def _write_down(root: Path, kind: str, name: str, size: int, why: str) -> None:
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "name": name,
        "bytes": size,
        "why": why,
    }
    with (root / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def _take_out(root: Path, folder: Path) -> None:
    trash = root / TRASH
    trash.mkdir(exist_ok=True)
    aside = trash / f"{folder.parent.name}-{folder.name}-{os.urandom(4).hex()}"
    folder.rename(aside)
    remove(aside)
    with suppress(OSError):
        trash.rmdir()


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
