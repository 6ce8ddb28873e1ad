"""Batches in a store, by content: what was read before is found, also as the beginning of a file that has grown."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpo_assets.artifact import READING, Artifact, ArtifactTree, fingerprint, write_json
from dpo_assets.errors import InfrastructureError
from dpo_assets.feedback.batches import ANSWERS, COUNTS, QUARANTINE, write_paired
from dpo_assets.feedback.pair import digest
from dpo_assets.feedback.pairing import pair_answers
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.reading import Job, cut, run_jobs, span_sha256, write_refused
from dpo_assets.feedback.sniff import looked_at_again
from dpo_assets.feedback.sources import EMPTY_EXPORT, FeedbackFile, FileRefused, Span, verify_unchanged
from dpo_assets.locks import LOCK, exclusive

BATCH_KIND, PLAN_KIND, PAIRED_KIND = "raw_batches", "raw_files", "paired_answers"
SPANS = "spans.json"
READ_VERSION = 8  # Of what ingestion makes of a row: another version reads every file again.


@dataclass(frozen=True)
class FileBatches:
    """The batches of one file, how many of them were read in this run, and why it was refused, if it was."""

    file: FeedbackFile
    batches: list[Artifact]
    new: int
    refused: FileRefused | None = None

    def row(self) -> dict[str, Any]:
        """What `raw_preferences` keeps of the file. `unread`: why nothing of it may be, or is, of use. `empty`: it is a
        whole export without a row, which drops nothing."""
        counts = [batch.json(COUNTS) for batch in self.batches]
        shapes: Counter[str] = Counter()
        flags: Counter[str] = Counter()
        for one in counts:
            shapes.update(one["shapes"])
            flags.update(one["flags"])
        return {
            "file": self.file.name,
            "unread": self._unread(counts),
            "empty": self._is_empty(),
            "format": self.file.format,
            "seen": self.file.sniffed,
            "batches": [{"batch": b.fingerprint, "digest": b.digest} for b in self.batches],
            "shapes": dict(sorted(shapes.items())),
            "flags": dict(sorted(flags.items())),
            **{k: sum(one[k] for one in counts) for k in ("rows", "lines", "rows_in", "pairs", "answers", "rejected")},
        }

    def _is_empty(self) -> bool:
        return self.refused is not None and self.refused.reason == EMPTY_EXPORT

    def _unread(self, counts: Sequence[Mapping[str, int]]) -> str:
        import polars as pl

        if self._is_empty():
            return ""
        if self.refused is not None:
            return f"{self.refused.reason}: {self.refused.message}"
        if any(one["pairs"] or one["answers"] for one in counts):
            return ""
        rows = pl.concat([pl.read_parquet(batch.path / QUARANTINE, columns=["reason"]) for batch in self.batches])
        return looked_at_again(self.file, dict(rows["reason"].value_counts().iter_rows()))


def read_into(tree: ArtifactTree, file: FeedbackFile, options: ReadOptions) -> FileBatches:
    """The batches of a file: found, or read now. Spans that an earlier, shorter version of it had are found.

    Raises:
        InfrastructureError: it is being written, or a process that read it died. Worth another try.
    """
    how = {
        "pairing": options.pairing,
        "min_margin": options.min_margin,
        "include_synthetic": options.include_synthetic,
        "users": digest(options.user_key),
        "read": READ_VERSION,
    }
    try:
        if file.refused is not None:
            raise file.refused
        plan = fingerprint(PLAN_KIND, {**file.identity(), **how}, {})
        known = _planned(tree, plan)
        if known is not None:
            return FileBatches(file, known, 0)
        spans = cut(file)
        if spans is None:
            batches, new = _read_pass(tree, file, options, how)
        else:
            batches, new = _read_spans(tree, file, spans, options, how)
    except FileRefused as refused:
        if refused.passes:
            raise InfrastructureError(f"feedback file {file.name}: {refused.message}") from None
        return _refused(tree, file, refused, how)
    if len(batches) > 1:
        tree.find_or_build(
            PLAN_KIND, plan, lambda folder: write_json(folder / SPANS, [b.fingerprint for b in batches]), {}
        )
    return FileBatches(file, batches, new)


def _refused(tree: ArtifactTree, file: FeedbackFile, refused: FileRefused, how: Mapping[str, Any]) -> FileBatches:
    identity = {**file.identity(), **how, "refused": [refused.reason, refused.message]}

    def build(folder: Path) -> None:
        write_refused(file, refused, folder)

    batch, reused = tree.find_or_build(BATCH_KIND, fingerprint(BATCH_KIND, identity, {}), build, {})
    return FileBatches(file, [batch], int(not reused), refused)


def _planned(tree: ArtifactTree, plan: str) -> list[Artifact] | None:
    """The batches of a file that was read before as it is now, without a look into it."""
    known = tree.find(PLAN_KIND, plan)
    if known is None:
        return None
    found = [tree.find(BATCH_KIND, print_) for print_ in known.json(SPANS)]
    return [batch for batch in found if batch is not None] if all(found) else None


def _read_pass(
    tree: ArtifactTree, file: FeedbackFile, options: ReadOptions, how: Mapping[str, Any]
) -> tuple[list[Artifact], int]:
    """The batches of a file that is read in one pass. How many there are is known at its end."""

    def print_(part: int, of: int) -> str:
        return fingerprint(BATCH_KIND, {**file.identity(), **how, "part": part, "of": of}, {})

    with scratch_of(tree, print_(0, 1)) as scratch:
        # Several are found by their plan; for one there is none.
        if (only := tree.find(BATCH_KIND, print_(0, 1))) is not None:
            return [only], 0
        [(counts, folder)] = _read(file, [Job(file, None, options, scratch / "0")])
        return [_kept(tree, print_(n, len(counts)), folder / str(n)) for n in range(len(counts))], len(counts)


def _read_spans(
    tree: ArtifactTree, file: FeedbackFile, spans: Sequence[Span], options: ReadOptions, how: Mapping[str, Any]
) -> tuple[list[Artifact], int]:
    prints = [fingerprint(BATCH_KIND, {**_identity(file, span), **how}, {}) for span in spans]
    with scratch_of(tree, prints[0]) as scratch:
        found = {n: batch for n, one in enumerate(prints) if (batch := tree.find(BATCH_KIND, one)) is not None}
        missing = [n for n in range(len(spans)) if n not in found]
        read = _read(file, [Job(file, spans[n], options, scratch / str(n)) for n in missing])
        for n, (_, folder) in zip(missing, read, strict=True):
            found[n] = _kept(tree, prints[n], folder / "0")
    return [found[n] for n in range(len(spans))], len(missing)


@contextmanager
def scratch_of(tree: ArtifactTree, name: str) -> Iterator[Path]:
    """An empty folder for what is not yet known to be kept.

    Who reads the same file meanwhile waits, also on another machine, where a process may have the same number. The lock
    goes with the process that held it; what is found in the folder is of one that died.
    """
    scratch = tree.root / READING / name
    scratch.parent.mkdir(parents=True, exist_ok=True)
    lock = scratch.with_name(name + LOCK)
    with exclusive(lock, tree.run, tree.warn):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            lock.unlink(missing_ok=True)  # Held while it goes: whoever waits for it makes a new one.


def _read(file: FeedbackFile, jobs: Sequence[Job]) -> list[tuple[list[dict[str, Any]], Path]]:
    """The counts of the batches of each job, and the folder that holds them.

    Raises:
        FileRefused: no batch may be used, also where the file is no longer the one that was found.
    """
    for job in jobs:
        job.folder.mkdir(parents=True)
    read = []
    for job, outcome in zip(jobs, run_jobs(jobs), strict=True):
        if isinstance(outcome, FileRefused):
            raise outcome
        read.append((outcome, job.folder))
    verify_unchanged(file)
    return read


def _kept(tree: ArtifactTree, print_: str, folder: Path) -> Artifact:
    return tree.find_or_build(BATCH_KIND, print_, partial(_move, folder), {})[0]


def _identity(file: FeedbackFile, span: Span) -> dict[str, Any]:
    """What decides the rows of a span: its own bytes and rows, not those of the whole file."""
    superseded = [number for number in file.superseded if span.line <= number < span.end]
    return {**file.identity(), "sha256": span_sha256(file, span), "line": span.line, "superseded": superseded}


def _move(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, target / path.name)


def pair_into(tree: ArtifactTree, batches: Sequence[Artifact], options: ReadOptions) -> Artifact | None:
    """The batch of pairs that the recipe's policy makes of all judged answers, or None where there are none."""
    import polars as pl

    with_answers = [batch for batch in batches if batch.json(COUNTS)["answers"]]
    if not with_answers:
        return None
    config = {
        "policy": options.pairing,
        "min_margin": options.min_margin,
        "answers": sorted(batch.digest for batch in with_answers),
        "read": READ_VERSION,
    }

    def build(folder: Path) -> None:
        answers = pl.concat([pl.read_parquet(batch.path / ANSWERS) for batch in with_answers])
        write_paired(pair_answers(answers, options.pairing, options.min_margin), folder)

    return tree.find_or_build(PAIRED_KIND, fingerprint(PAIRED_KIND, config, {}), build, {})[0]
