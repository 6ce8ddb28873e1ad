"""`dpo_dataset` and `quarantined_preferences`: what training may see, and every row it may not, with the reason.

One step makes both, and records the quarantine first: when a gate stops the dataset, the rows that explain it are
already on the screen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import Artifact, read_kept, write_json
from dpo_assets.assets.base_model import read_facts
from dpo_assets.assets.by_day import BESIDE, ByDay, report_of
from dpo_assets.assets.fitted_pairs import earlier_dataset, fitted_pairs, whole_markers
from dpo_assets.assets.kept_models import bound_by_models
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.raw_preferences import batches_of
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.dataset import KEPT_IN_TRAIN, dataset_verdicts
from dpo_assets.checks.drift import CHECK, drift_of
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import QUARANTINE
from dpo_assets.feedback.dataset import Part, read_split
from dpo_assets.feedback.fitted import FIT_VERSION
from dpo_assets.feedback.pair import PAIR_COLUMNS, QUARANTINE_COLUMNS, TOKEN_COLUMNS
from dpo_assets.feedback.quality import QUALITY_VERSION
from dpo_assets.feedback.selection import Found, Selection
from dpo_assets.feedback.trained import groups_digest
from dpo_assets.hashing import file_sha256
from dpo_assets.planning.plan import DatasetStats
from dpo_assets.recipe import FeedbackSection
from dpo_assets.report.drift import drift_views
from dpo_assets.report.feedback import released_table, source_views, trend_table, window_said
from dpo_assets.report.quality import quality_views
from dpo_assets.report.tables import MOST_ROWS, SHOWN, counts_table, quarantine_table, sample_of


def materialise(step: Step) -> Events:
    """Screens and tokenizes what is new, chooses among all pairs, splits; writes the choice, quarantine and report."""
    inputs = step.inputs()
    raw, base = inputs["raw_preferences"], inputs["base_model"]
    feedback, context_length = step.recipe.feedback, read_facts(base).context
    if feedback.max_length > context_length:
        raise ConfigError(
            f"feedback.max_length is {feedback.max_length}, but {step.recipe.base_model.source} has a context of "
            f"{context_length} tokens; set it to {context_length} or less."
        )
    config = feedback.model_dump(include={"max_length", "eval_fraction", "seed", "cleaning", "release"})
    sets = tuple(file_sha256(path) for path in _sets(feedback))
    config |= {"quality": QUALITY_VERSION, "fitted": FIT_VERSION, "evaluation_sets": sets}
    kept_in_train: frozenset[str] = frozenset()
    fitted: list[Artifact] = []
    if not step.only_checks:
        kept_in_train = bound_by_models(step.tree, feedback.eval_fraction, feedback.seed)
        # Also where the dataset is there already: what it chose from may be damaged, and is then made again.
        fitted = fitted_pairs(step, inputs, sets)
        # A batch that was made again may have other bytes: a dataset that names the old ones could not be read.
        config |= {"batches": [Part.of(one).sha256 for one in fitted]}
    if kept_in_train:
        config |= {"kept_in_train": groups_digest(kept_in_train)}

    days = ByDay.of(feedback, step.bands, fitted)
    config |= days.identity()

    def make(folder: Path, print_: str) -> None:
        found = Found()
        if earlier := earlier_dataset(step.tree, base):
            found = Found.in_dataset(earlier.path, feedback.cleaning.near_duplicate_similarity)
        outside, told, beside = days.look(fitted, feedback, kept_in_train)
        selection = Selection(fitted, feedback, kept_in_train, found, outside)
        batches = batches_of(step, raw)
        selection.write(folder, batches)
        markers = whole_markers(base, fitted)
        write_json(folder / BESIDE, beside)
        write_json(folder / "report.json", {**selection.report(folder, batches, context_length, markers), **told})

    artifact, reused = step.build("dpo_dataset", config, inputs, make)
    report = report_of(artifact)
    kept = report.get("kept_in_train", 0)
    if kept:
        step.context.log.warning(f"{kept} {KEPT_IN_TRAIN}")
    if said := window_said(report):
        step.context.log.info(said)
    views = quality_views(report, step.bands)
    views[CHECK] = drift_views(drift_of(report), step.bands.limit(CHECK))
    rejected = artifact.path / QUARANTINE
    trend = _trend(step, report)
    yield from step.result(
        "quarantined_preferences",
        artifact,
        reused,
        metadata={
            "dagster/row_count": report["quarantined"],
            "by_reason": dg.MetadataValue.md(counts_table("reason", report["reasons"])),
            REASONS: dg.MetadataValue.json(report["reasons"]),
            # Numbers are plotted over runs by the UI.
            **{f"reason/{reason}": count for reason, count in sorted(report["reasons"].items())[:MOST_REASONS]},
            "trend": dg.MetadataValue.md(trend),
            **({"released": dg.MetadataValue.md(released_table(report["released"]))} if report["released"] else {}),
            "sample": dg.MetadataValue.md(quarantine_table(rejected)),
        },
    )
    yield from step.result(
        "dpo_dataset",
        artifact,
        reused,
        [replace(v, shown=views.get(v.check, {})) for v in dataset_verdicts(report, step.recipe, step.bands)],
        {
            "dagster/row_count": report["train_pairs"] + report["eval_pairs"],
            **{k: report[k] for k in ("rows_in", "accepted", "quarantined", "duplicates", "train_pairs", "eval_pairs")},
            **({"kept_in_train": f"{kept} {KEPT_IN_TRAIN}"} if kept else {}),
            **({"window": said, "outside_window": report["outside_window"]} if said else {}),
            "longest_pair_tokens": report["longest_pair"],
            "answers_truncated": report["truncated_answers"],
            "flagged": dg.MetadataValue.md(counts_table("seen in texts", report["flagged"])),
            **{title: dg.MetadataValue.md(text) for title, text in source_views(report["sources"]).items()},
            "sample": dg.MetadataValue.md(sample_of(read_split(artifact.path, "train", SHOWN, first=MOST_ROWS))),
            **{title: dg.MetadataValue.md(text) for view in views.values() for title, text in view.items()},
        },
    )


REASONS, MOST_REASONS, RECENT = "dpo_assets/reasons", 30, 10


def _trend(step: Step, report: Mapping[str, Any]) -> str:
    """Rows in quarantine by reason, in this run and those before it."""
    key = step.pipeline.key("quarantined_preferences")
    records = step.context.instance.fetch_materializations(key, limit=RECENT - 1).records
    runs: list[tuple[str, Mapping[str, int]]] = [("this run", report["reasons"])]
    for record in records:
        event = record.asset_materialization
        value = event.metadata.get(REASONS) if event is not None else None
        if value is not None and isinstance(value.value, Mapping):
            at = datetime.fromtimestamp(record.timestamp, UTC)
            runs.append((f"{at:%Y-%m-%d %H:%M}", value.value))
    return trend_table(runs)


def dataset_stats(dataset: Artifact) -> DatasetStats:
    """What planning needs to know of a dataset.

    Raises:
        ConfigError: it is one of an earlier version, which said less.
    """
    return read_kept(dataset, "report.json", DatasetStats)


def _sets(feedback: FeedbackSection) -> list[Path]:
    paths = [Path(path) for path in feedback.cleaning.evaluation_sets]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"feedback.cleaning.evaluation_sets: no such file: {', '.join(missing)}")
    return paths


QUARANTINE_NODE = Node(
    name="quarantined_preferences",
    description="Every rejected row with reason code, source, line and raw bytes.",
    phase="data",
    kinds=frozenset({"parquet", "polars"}),
    body=materialise,
    reads=(Read("raw_preferences"), Read("base_model")),
    recipe=("feedback",),
    columns=QUARANTINE_COLUMNS,
)
NODE = Node(
    name="dpo_dataset",
    description="Validated, de-duplicated pairs in `train` and `eval` splits; no prompt in both; tokenized.",
    phase="data",
    kinds=frozenset({"parquet", "pandera"}),
    body=materialise,
    reads=(Read("raw_preferences"), Read("base_model")),
    recipe=("feedback",),
    columns=(*PAIR_COLUMNS, *TOKEN_COLUMNS),
)
