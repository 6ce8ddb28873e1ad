"""`raw_preferences`: every feedback file as one content-addressed batch of canonical pairs and rejected rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from pydantic import Field

from dpo_assets.artifact import Artifact, file_sha256, write_json
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import FeedbackError
from dpo_assets.feedback.ingest import (
    EMPTY_FILE,
    FeedbackFile,
    find_files,
    pairs_frame,
    quarantine_frame,
    read_file,
)
from dpo_assets.feedback.pair import PAIR_COLUMNS
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.recipe import FeedbackSource, Recipe
from dpo_assets.report.tables import counts_table, sample_table

BATCH_KIND, INDEX = "raw_batches", "batches.json"


class ReadConfig(dg.Config):
    """What the launchpad may change for one run."""

    paths: list[str] = Field(
        default=[],
        description="Read these files in this run instead of the recipe's sources, in the first one's format.",
    )


def materialise(step: Step) -> Events:
    """Reads what is new; a file that was read before costs a hash."""
    feedback = step.recipe.feedback
    options = ReadOptions(feedback.pairing, feedback.include_synthetic)
    files = find_files(_sources(step))
    batches = [_batch(step, file, options) for file in files]
    rows = [_row(file, batch) for file, (batch, _) in zip(files, batches, strict=True)]
    if all(row["rows_in"] == 0 for row in rows):
        names = ", ".join(str(file.path) for file in files)
        raise FeedbackError(f"{EMPTY_FILE}: no feedback row in {names}; the export is empty or was cut off.")

    def make(folder: Path, _: str) -> None:
        write_json(folder / INDEX, rows)

    index, reused = step.build("raw_preferences", rows, {}, make)
    reasons = _reasons([batch for batch, _ in batches])
    yield from step.result(
        "raw_preferences",
        index,
        reused,
        [accounting(rows)],
        {
            "dagster/row_count": sum(int(row["pairs"]) for row in rows),
            "rows_in": sum(int(row["rows_in"]) for row in rows),
            "rejected": sum(int(row["rejected"]) for row in rows),
            "files_read_now": sum(not found for _, found in batches),
            "files": dg.MetadataValue.md(_files_table(rows)),
            "rejected_by_reason": dg.MetadataValue.md(counts_table("reason", reasons)),
            "sample": dg.MetadataValue.md(sample_table(batches[0][0].path / "pairs.parquet")),
        },
    )


def accounting(rows: Sequence[dict[str, str | int]]) -> Verdict:
    """rows in = pairs + rejected, for every file."""
    wrong = [str(row["file"]) for row in rows if row["rows_in"] != int(row["pairs"]) + int(row["rejected"])]
    total = sum(int(row["rows_in"]) for row in rows)
    return Verdict(
        "every_row_accounted_for",
        "error" if wrong else "pass",
        f"{total} rows in {len(rows)} files",
        "rows in = pairs + rejected, file by file",
        "nothing is lost (docs/design.md, rules)",
        f"report a bug with these files: {', '.join(wrong)}" if wrong else "",
    )


def _sources(step: Step) -> list[FeedbackSource]:
    given: list[str] = step.config.get("paths", [])
    declared = step.recipe.feedback.sources
    return [FeedbackSource(path=path, format=declared[0].format) for path in given] or declared


def _batch(step: Step, file: FeedbackFile, options: ReadOptions) -> tuple[Artifact, bool]:
    identity = {
        "sha256": file_sha256(file.path),
        "name": file.name,
        "format": file.format,
        "pairing": options.pairing,
        "include_synthetic": options.include_synthetic,
    }

    def make(folder: Path, _: str) -> None:
        batch = read_file(file, options)
        if file_sha256(file.path) != identity["sha256"]:
            raise FeedbackError(f"{file.path} changed while it was read; run again once its writer is done.")
        pairs_frame(batch.pairs).write_parquet(folder / "pairs.parquet")
        quarantine_frame(batch.rejected).write_parquet(folder / "quarantine.parquet")
        rejected = [r for r in batch.rejected if r.reason != EMPTY_FILE]
        counts = {"rows_in": batch.rows_in - (len(batch.rejected) - len(rejected)), "pairs": len(batch.pairs)}
        write_json(folder / "counts.json", counts | {"rejected": len(rejected)})

    return step.build(BATCH_KIND, identity, {}, make)


def _row(file: FeedbackFile, batch: Artifact) -> dict[str, str | int]:
    return {"file": file.name, "batch": batch.fingerprint, "digest": batch.digest, **batch.json("counts.json")}


def _reasons(batches: Sequence[Artifact]) -> dict[str, int]:
    import polars as pl

    table = pl.concat([pl.read_parquet(b.path / "quarantine.parquet", columns=["reason"]) for b in batches])
    return dict(table["reason"].value_counts(sort=True).iter_rows())


def _files_table(rows: Sequence[dict[str, str | int]]) -> str:
    lines = ["| file | rows | pairs | rejected | batch |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['file']} | {r['rows_in']} | {r['pairs']} | {r['rejected']} | `{str(r['batch'])[:12]}` |" for r in rows
    ]
    return "\n".join(lines)


def read_config(recipe: Recipe) -> type[dg.Config]:
    return ReadConfig


NODE = Node(
    name="raw_preferences",
    description="Preference pairs as read, one immutable Parquet batch per feedback file; rejected rows are kept.",
    phase="data",
    kinds=frozenset({"parquet", "polars"}),
    body=materialise,
    columns=PAIR_COLUMNS,
    config=read_config,
)
