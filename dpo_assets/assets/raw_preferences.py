"""`raw_preferences`: every feedback file as content-addressed batches of pairs, judged answers and rejected rows."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from dpo_assets.artifact import Artifact, fingerprint, write_json
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError, FeedbackError
from dpo_assets.feedback.ingest import ANSWERS, COUNTS, EMPTY_FILE, PAIRS, QUARANTINE, write_paired
from dpo_assets.feedback.pair import PAIR_COLUMNS
from dpo_assets.feedback.pairing import pair_answers
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.reading import Job, cut, run_jobs, span_sha256, write_refused
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, Span, files_of, verify_unchanged
from dpo_assets.recipe import FeedbackSource, Recipe
from dpo_assets.report.tables import counts_table, sample_table, table

BATCH_KIND, PLAN_KIND, PAIRED_KIND, INDEX = "raw_batches", "raw_files", "paired_answers", "batches.json"
READ_VERSION = 2  # Of what ingestion makes of a row: another version reads every file again.


class ReadConfig(dg.Config):
    """What the launchpad may change for one run."""

    paths: list[str] = Field(
        default=[],
        description="Read these files in this run instead of the recipe's sources, in the first one's format.",
    )


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


def materialise(step: Step) -> Events:
    """Reads what is new; what was read before costs a hash."""
    if step.only_checks:
        found, reused = step.build("raw_preferences", None, {}, lambda folder, _: None)
        yield from step.result("raw_preferences", found, reused, [accounting(found.json(INDEX))])
        return
    landing = step.tree.root / "landing"
    read = [_read(step, file) for file in files_of(_sources(step), landing)]
    index: dict[str, Any] = {"files": sorted((one.row() for one in read), key=lambda row: row["file"]), "paired": None}
    if all(row["rows_in"] == 0 for row in index["files"]):
        raise FeedbackError(_nothing(read))
    paired = _paired(step, [batch for one in read for batch in one.batches])
    if paired is not None:
        index["paired"] = {"batch": paired.fingerprint, "digest": paired.digest, **paired.json(COUNTS)}

    def make(folder: Path, _: str) -> None:
        write_json(folder / INDEX, index)

    artifact, reused = step.build("raw_preferences", index, {}, make)
    batches = batches_of(step, artifact)
    shown = _metadata(index, batches, [one.new for one in read])
    yield from step.result("raw_preferences", artifact, reused, [accounting(index)], shown)


def batches_of(step: Step, raw: Artifact) -> list[Artifact]:
    """The verified batches of `raw_preferences`, that of paired answers last.

    Raises:
        ConfigError: when one is gone or damaged.
    """
    index = raw.json(INDEX)
    named = [(BATCH_KIND, row["file"], one) for row in index["files"] for one in row["batches"]]
    if index["paired"] is not None:
        named.append((PAIRED_KIND, "paired answers", index["paired"]))
    found = []
    for kind, name, one in named:
        batch = step.tree.find(kind, one["batch"])
        if batch is None or batch.digest != one["digest"]:
            raise ConfigError(f"the batch of {name} is missing or damaged; materialise raw_preferences again.")
        found.append(batch)
    return found


def accounting(index: Mapping[str, Any]) -> Verdict:
    """Every row of every file is a pair, a judged answer or a rejected row; every answer is in a pair, or rejected."""
    files = index["files"]
    wrong = [row["file"] for row in files if row["lost"] or row["rows_in"] != _given(row) or row["rows_in"] < row["rows"]]
    answers, paired = sum(row["answers"] for row in files), index["paired"] or {"used": 0, "rejected": 0}
    if answers != paired["used"] + paired["rejected"]:
        wrong.append("paired answers")
    total = sum(row["rows_in"] for row in files)
    return Verdict(
        "every_row_accounted_for",
        "error" if wrong else "pass",
        f"{total} rows in {len(files)} files",
        "rows in = pairs + judged answers + rejected, file by file; answers = in a pair + rejected",
        "nothing is lost (docs/design.md, rules)",
        f"report a bug with these files: {', '.join(wrong)}" if wrong else "",
    )


def _given(row: Mapping[str, Any]) -> int:
    return int(row["pairs"] + row["answers"] + row["rejected"])


def _sources(step: Step) -> list[FeedbackSource]:
    given: list[str] = step.config.get("paths", [])
    declared = step.recipe.feedback.sources
    return [FeedbackSource(path=path, format=declared[0].format) for path in given] or declared


def _read(step: Step, file: FeedbackFile) -> FileBatches:
    """The batches of a file: found, or read now. Spans that an earlier, shorter version of it had are found."""
    feedback = step.recipe.feedback
    options = ReadOptions(feedback.pairing, feedback.include_synthetic, min_margin=feedback.min_margin)
    how = {
        "pairing": options.pairing,
        "min_margin": options.min_margin,
        "include_synthetic": options.include_synthetic,
        "read": READ_VERSION,
    }
    try:
        if file.refused is not None:
            raise file.refused
        plan = fingerprint(PLAN_KIND, {**file.identity(), **how}, {})
        known = _planned(step, plan)
        if known is not None:
            return FileBatches(file, known, 0)
        batches, new = _read_spans(step, file, options, how)
    except FileRefused as refused:
        return _refused(step, file, refused, how)
    if len(batches) > 1:
        step.tree.find_or_build(
            PLAN_KIND, plan, lambda folder: write_json(folder / INDEX, [b.fingerprint for b in batches]), {}
        )
    return FileBatches(file, batches, new)


def _refused(step: Step, file: FeedbackFile, refused: FileRefused, how: Mapping[str, Any]) -> FileBatches:
    identity = {**file.identity(), **how, "refused": [refused.reason, refused.message]}

    def build(folder: Path) -> None:
        write_refused(file, refused, folder)

    batch, reused = step.tree.find_or_build(BATCH_KIND, fingerprint(BATCH_KIND, identity, {}), build, {})
    return FileBatches(file, [batch], int(not reused))


def _planned(step: Step, plan: str) -> list[Artifact] | None:
    """The batches of a file that was read before as it is now, without a look into it."""
    known = step.tree.find(PLAN_KIND, plan)
    if known is None:
        return None
    found = [step.tree.find(BATCH_KIND, print_) for print_ in known.json(INDEX)]
    return [batch for batch in found if batch is not None] if all(found) else None


def _read_spans(
    step: Step, file: FeedbackFile, options: ReadOptions, how: Mapping[str, Any]
) -> tuple[list[Artifact], int]:
    spans = cut(file)
    prints = [fingerprint(BATCH_KIND, {**_identity(file, span), **how}, {}) for span in spans]
    found = [step.tree.find(BATCH_KIND, print_) for print_ in prints]
    missing = [n for n, batch in enumerate(found) if batch is None]
    scratch = step.tree.root / "_reading" / step.context.run_id
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
            found[n], _ = step.tree.find_or_build(BATCH_KIND, prints[n], partial(_move, job.folder), {})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [batch for batch in found if batch is not None], len(missing)


def _identity(file: FeedbackFile, span: Span | None) -> dict[str, Any]:
    """What decides the rows of a batch: of a span its own bytes, not those of the whole file."""
    if span is None:
        return file.identity()
    return {**file.identity(), "sha256": span_sha256(file, span), "line": span.line}


def _move(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, target / path.name)


def _paired(step: Step, batches: Sequence[Artifact]) -> Artifact | None:
    """The batch of pairs that the recipe's policy makes of all judged answers, or None where there are none."""
    import polars as pl

    with_answers = [batch for batch in batches if batch.json(COUNTS)["answers"]]
    if not with_answers:
        return None
    feedback = step.recipe.feedback
    config = {
        "policy": feedback.pairing,
        "min_margin": feedback.min_margin,
        "answers": sorted(batch.digest for batch in with_answers),
        "read": READ_VERSION,
    }

    def build(folder: Path) -> None:
        answers = pl.concat([pl.read_parquet(batch.path / ANSWERS) for batch in with_answers])
        write_paired(pair_answers(answers, feedback.pairing, feedback.min_margin), folder)

    return step.tree.find_or_build(PAIRED_KIND, fingerprint(PAIRED_KIND, config, {}), build, {})[0]


def _nothing(read: Sequence[FileBatches]) -> str:
    import polars as pl

    names, reasons = [], []
    for one in read:
        rows = pl.read_parquet(one.batches[0].path / QUARANTINE, columns=["reason", "message"])
        reason, message = rows.row(0) if rows.height else (EMPTY_FILE, "")
        names.append(str(one.file.path))
        if reason != EMPTY_FILE:
            reasons.append(f"{one.file.name}: {reason}: {message}")
    why = "; ".join(reasons) or "the export is empty or was cut off."
    return f"{EMPTY_FILE}: no feedback row in {', '.join(names)}; {why}"


def _metadata(index: Mapping[str, Any], batches: Sequence[Artifact], new: Sequence[int]) -> dict[str, Any]:
    files, paired = index["files"], index["paired"]
    made = paired["pairs"] if paired else 0
    drifted = [row for row in files if len(row["shapes"]) > 1]
    shown: dict[str, Any] = {
        "dagster/row_count": sum(row["pairs"] for row in files) + made,
        "rows_in": sum(row["rows_in"] for row in files),
        "rejected": sum(row["rejected"] for row in files),
        "files_read_now": sum(one > 0 for one in new),
        "batches_read_now": sum(new),
        "files": dg.MetadataValue.md(_files_table(files)),
        "rejected_by_reason": dg.MetadataValue.md(counts_table("reason", _reasons(batches))),
        "sample": dg.MetadataValue.md(sample_table(_first_with_pairs(batches) / PAIRS)),
    }
    if paired:
        shown["pairing"] = dg.MetadataValue.md(_pairing_table(paired["policies"]))
    if drifted:
        shown["shapes_of_rows"] = dg.MetadataValue.md(_shapes_table(drifted))
    return shown


def _first_with_pairs(batches: Sequence[Artifact]) -> Path:
    return next((batch.path for batch in batches if batch.json(COUNTS)["pairs"]), batches[0].path)


def _reasons(batches: Sequence[Artifact]) -> dict[str, int]:
    import polars as pl

    rows = pl.concat([pl.read_parquet(batch.path / QUARANTINE, columns=["reason"]) for batch in batches])
    return dict(rows["reason"].value_counts(sort=True).iter_rows())


def _files_table(files: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            row["file"], row["format"] + (f" ({row['seen']})" if row["seen"] else ""), row["rows"], row["pairs"],
            row["answers"], row["rejected"], ", ".join(f"{k} {v}" for k, v in row["flags"].items()) or "-",
            ", ".join(one["batch"][:12] for one in row["batches"][:3]) + (" ..." if len(row["batches"]) > 3 else ""),
        ]
        for row in files
    ]  # fmt: skip
    return table(["file", "format", "rows", "pairs", "judged answers", "rejected", "normalised", "batch"], rows)


def _pairing_table(policies: Mapping[str, Mapping[str, int]]) -> str:
    """What the policy made of each kind of judgement, and what it left."""
    names = sorted({name for counts in policies.values() for name in counts})
    return table(
        ["judged by", *names], [[kind, *(counts.get(n, 0) for n in names)] for kind, counts in policies.items()]
    )


def _shapes_table(files: Sequence[Mapping[str, Any]]) -> str:
    """Files whose rows have different keys: an export whose form changed under way."""
    rows = [[row["file"], keys, count] for row in files for keys, count in sorted(row["shapes"].items())]
    return table(["file", "keys", "rows"], rows)


def read_config(recipe: Recipe) -> type[dg.Config]:
    return ReadConfig


NODE = Node(
    name="raw_preferences",
    description="Preference pairs as read, in immutable Parquet batches; judged answers and rejected rows are kept.",
    phase="data",
    kinds=frozenset({"parquet", "polars"}),
    body=materialise,
    columns=PAIR_COLUMNS,
    config=read_config,
)
