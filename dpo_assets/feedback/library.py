"""Batches in a store, by content: what was read before is found, also as the beginning of a file that has grown."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpo_assets.artifact import Artifact, ArtifactTree, fingerprint, write_json
from dpo_assets.feedback.ingest import ANSWERS, COUNTS, write_paired
from dpo_assets.feedback.pair import digest
from dpo_assets.feedback.pairing import pair_answers
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.reading import Job, cut, run_jobs, span_sha256, write_refused
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, Span, verify_unchanged

BATCH_KIND, PLAN_KIND, PAIRED_KIND = "raw_batches", "raw_files", "paired_answers"
SPANS = "spans.json"
READ_VERSION = 5  # Of what ingestion makes of a row: another version reads every file again.


@dataclass(frozen=True)
class FileBatches:
    """The batches of one file, and whether it was read in this run."""

    file: FeedbackFile
    batches: list[Artifact]
    new: int

    def row(self) -> dict[str, Any]:
        counts = [batch.json(COUNTS) for batch in self.batches]
        shapes: Counter[str] = Counter()
        flags: Counter[str] = Counter()
        for one in counts:
            shapes.update(one["shapes"])
            flags.update(one["flags"])
        return {
            "file": self.file.name,
            "format": self.file.format,
            "seen": self.file.sniffed,
            "batches": [{"batch": b.fingerprint, "digest": b.digest} for b in self.batches],
            "shapes": dict(sorted(shapes.items())),
            "flags": dict(sorted(flags.items())),
            **{k: sum(one[k] for one in counts) for k in ("rows", "rows_in", "pairs", "answers", "rejected", "lost")},
        }


def read_into(tree: ArtifactTree, file: FeedbackFile, options: ReadOptions) -> FileBatches:
    """The batches of a file: found, or read now. Spans that an earlier, shorter version of it had are found.

    Raises:
        InfrastructureError: a process that read it died. Worth another try.
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
        batches, new = _read_spans(tree, file, options, how)
    except FileRefused as refused:
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
    return FileBatches(file, [batch], int(not reused))


def _planned(tree: ArtifactTree, plan: str) -> list[Artifact] | None:
    """The batches of a file that was read before as it is now, without a look into it."""
    known = tree.find(PLAN_KIND, plan)
    if known is None:
        return None
    found = [tree.find(BATCH_KIND, print_) for print_ in known.json(SPANS)]
    return [batch for batch in found if batch is not None] if all(found) else None


def _read_spans(
    tree: ArtifactTree, file: FeedbackFile, options: ReadOptions, how: Mapping[str, Any]
) -> tuple[list[Artifact], int]:
    spans = cut(file)
    prints = [fingerprint(BATCH_KIND, {**_identity(file, span), **how}, {}) for span in spans]
    found = [tree.find(BATCH_KIND, print_) for print_ in prints]
    missing = [n for n, batch in enumerate(found) if batch is None]
    scratch = tree.root / "_reading" / f"{prints[0]}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        jobs = [Job(file, spans[n], options, scratch / str(n)) for n in missing]
        for job in jobs:
            job.folder.mkdir(parents=True)
        for outcome in run_jobs(jobs):
            if isinstance(outcome, FileRefused):
                raise outcome
        verify_unchanged(file)
        for job, n in zip(jobs, missing, strict=True):
            found[n], _ = tree.find_or_build(BATCH_KIND, prints[n], partial(_move, job.folder), {})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [batch for batch in found if batch is not None], len(missing)


def _identity(file: FeedbackFile, span: Span | None) -> dict[str, Any]:
    """What decides the rows of a batch: of a span its own bytes and rows, not those of the whole file."""
    if span is None:
        return file.identity()
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
