"""`raw_preferences`: every feedback file as content-addressed batches of pairs, judged answers and rejected rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from dpo_assets.artifact import Artifact, write_json
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.assets.watched import CONTENT, contents_entry, look_at, shelf_of
from dpo_assets.checks.ingest import Volumes, ingest_verdicts, volumes
from dpo_assets.checks.judged_text import judged_text_kept
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError, FeedbackError
from dpo_assets.feedback.accounting import held, held_paired
from dpo_assets.feedback.batches import COUNTS, INDEX, PAIRS, QUARANTINE
from dpo_assets.feedback.ingest import EMPTY, EMPTY_FILE
from dpo_assets.feedback.library import BATCH_KIND, PAIRED_KIND, FileBatches, pair_into, read_into
from dpo_assets.feedback.pair import PAIR_COLUMNS
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.sources import Limits, files_of
from dpo_assets.feedback.watching import Shelf, contents_of
from dpo_assets.recipe import FeedbackSource, Recipe
from dpo_assets.report.tables import counts_table, sample_table, table
from dpo_assets.section import describe_validation_error

VOLUMES = "dpo_assets/volumes"  # What each source gave, for the next materialisation.
PATHS = "paths of the launchpad"
PAIRED = ""  # No file has that name.


class ReadConfig(dg.Config):
    """What the launchpad may change for one run."""

    paths: list[str] = Field(
        default=[],
        description="Read these files in this run instead of the recipe's sources, in the first one's format.",
    )


def materialise(step: Step) -> Events:
    """Reads what is new; what was read before costs a hash."""
    history = step.history("raw_preferences", VOLUMES)
    if step.only_checks:
        found, reused = step.build("raw_preferences", None, step.inputs(), lambda folder, _: None)
        given, _ = next(history, (None, False))
        yield from step.result("raw_preferences", found, reused, _verdicts(step, found, given, history))
        return
    landing = step.tree.root / "landing"
    feedback = step.recipe.feedback
    options = read_options(step.recipe, step.user_key)
    # Before it is read: what changes meanwhile is then new to the sensor, and not taken for read.
    shelf = Shelf.at(shelf_of(step.tree))
    contents = contents_of(look_at(feedback.sources, shelf, settle_seconds=0.0)) if not step.config.get("paths") else {}
    files = files_of(_sources(step), landing, hub=step.hub.api, limits=Limits.of(feedback))
    read = [read_into(step.tree, file, options) for file in files]
    index: dict[str, Any] = {
        "found": sorted(file.name for file in files),
        "files": sorted((one.row() for one in read), key=lambda row: row["file"]),
        "paired": None,
    }
    if all(row["rows_in"] == 0 for row in index["files"]):
        raise FeedbackError(_nothing(read))
    paired = pair_into(step.tree, [batch for one in read for batch in one.batches], options)
    if paired is not None:
        index["paired"] = {"batch": paired.fingerprint, "digest": paired.digest, **paired.json(COUNTS)}

    def make(folder: Path, _: str) -> None:
        write_json(folder / INDEX, index)

    artifact, reused = step.build("raw_preferences", index, step.inputs(), make)
    shown = _metadata(index, batches_of(step, artifact), [one.new for one in read])
    given = None
    if not step.config.get("paths"):
        given = volumes(
            (one.file.origin, one.file.name, sum(b.json(COUNTS)["rows"] for b in one.batches)) for one in read
        )
        shown[VOLUMES], shown[CONTENT] = given, contents_entry(contents)
        shelf.was_read()
        shelf.keep(shelf_of(step.tree))
    yield from step.result("raw_preferences", artifact, reused, _verdicts(step, artifact, given, history), shown)


def read_options(recipe: Recipe, user_key: bytes = b"") -> ReadOptions:
    """How readers read; without a key no user is kept."""
    feedback = recipe.feedback
    return ReadOptions(feedback.pairing, feedback.include_synthetic, min_margin=feedback.min_margin, user_key=user_key)


def _verdicts(
    step: Step, raw: Artifact, given: Volumes | None, history: Iterator[tuple[Volumes | None, bool]]
) -> list[Verdict]:
    """The checks of what was read, held against the tables as they lie on disk, and against earlier volumes.

    What a gate holds is no measure: a run that was stopped for its fall would let the next one pass.

    Args:
        given: what each source gave; None where files of the launchpad were read in place of the sources. Those are
            neither held against an earlier volume, nor a measure for a later one.
    """
    index = raw.json(INDEX)
    if "found" not in index:
        raise ConfigError("this `raw_preferences` is of an earlier version; materialise it again.")
    batches = {name: [batch.path for batch in found] for name, found in _batches(step, raw).items()}
    paired = batches.pop(PAIRED, [])
    before = None
    if given is not None:
        before = next((volume for volume, is_held in history if volume is not None and not is_held), None)
    verdicts = ingest_verdicts(
        index,
        {file: held(folders, file) for file, folders in batches.items()},
        held_paired([folder for folders in batches.values() for folder in folders], paired[0]) if paired else None,
        given if given is not None else volumes((PATHS, row["file"], row["rows"]) for row in index["files"]),
        before,
        step.recipe.feedback,
    )
    return [*verdicts, judged_text_kept(index, step.bands)]


def batches_of(step: Step, raw: Artifact) -> list[Artifact]:
    """The verified batches of `raw_preferences`, that of paired answers last.

    Raises:
        ConfigError: when one is gone or damaged.
    """
    return [batch for batches in _batches(step, raw).values() for batch in batches]


def _batches(step: Step, raw: Artifact) -> dict[str, list[Artifact]]:
    """The batches by file, and under PAIRED that of paired answers, where there is one."""
    index = raw.json(INDEX)
    found = {
        row["file"]: [_batch(step, BATCH_KIND, row["file"], one) for one in row["batches"]] for row in index["files"]
    }
    if index["paired"] is not None:
        found[PAIRED] = [_batch(step, PAIRED_KIND, "paired answers", index["paired"])]
    return found


def _batch(step: Step, kind: str, name: str, said: Mapping[str, Any]) -> Artifact:
    batch = step.tree.find(kind, said["batch"])
    if batch is None or batch.digest != said["digest"]:
        raise ConfigError(f"the batch of {name} is missing or damaged; materialise raw_preferences again.")
    return batch


def _sources(step: Step) -> list[FeedbackSource]:
    given: list[str] = step.config.get("paths", [])
    declared = step.recipe.feedback.sources
    try:
        return [FeedbackSource(path=path, format=declared[0].format) for path in given] or declared
    except ValidationError as error:
        raise ConfigError(f"{PATHS}: {describe_validation_error(error)}") from None


def _nothing(read: Sequence[FileBatches]) -> str:
    import polars as pl

    names, reasons = [], []
    for one in read:
        rows = pl.read_parquet(one.batches[0].path / QUARANTINE, columns=["reason", "message"])
        reason, message = rows.row(0) if rows.height else (EMPTY_FILE, "")
        names.append(str(one.file.path))
        if reason not in EMPTY:
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
    return table(["file", "format", "rows", "pairs", "judged answers", "rejected", "seen or changed", "batch"], rows)


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
    recipe=("feedback",),
    follows=("feedback_by_day",),
    columns=PAIR_COLUMNS,
    config=read_config,
)
