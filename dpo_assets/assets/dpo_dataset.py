"""`dpo_dataset` and `quarantined_preferences`: what training may see, and every row it may not, with the reason.

One step makes both, and records the quarantine first: when a gate stops the dataset, the rows that explain it are
already on the screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import Artifact, fingerprint, read_kept, write_json
from dpo_assets.assets.base_model import in_worker, read_facts
from dpo_assets.assets.by_day import ByDay
from dpo_assets.assets.kept_models import bound_by_models
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.raw_preferences import batches_of
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.dataset import KEPT_IN_TRAIN, dataset_verdicts
from dpo_assets.checks.drift import CHECK, drift_of
from dpo_assets.contract import CHAT_FORMAT, TOKENS, ChatFormatFacts, TokenizeSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import COUNTS, QUARANTINE, PairWriter
from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    QUARANTINE_COLUMNS,
    TEMPLATE_FAULT,
    TOKEN_COLUMNS,
    polars_schema,
    token_schema,
)
from dpo_assets.feedback.pool import Pool, parts_with_tokens, stored
from dpo_assets.feedback.quality import QUALITY_VERSION, measure, token_stats
from dpo_assets.feedback.quality_conflicts import contradictions
from dpo_assets.feedback.quality_sources import source_report
from dpo_assets.feedback.quality_tokens import Markers, read_markers
from dpo_assets.feedback.rules import NOT_DAMAGE
from dpo_assets.feedback.screening import Screening
from dpo_assets.feedback.splits import fit_to_model, shared_prompts, split, unfit_template
from dpo_assets.feedback.trained import groups_digest
from dpo_assets.hashing import file_sha256
from dpo_assets.planning.plan import DatasetStats
from dpo_assets.recipe import FeedbackSection, Recipe
from dpo_assets.report.drift import drift_views
from dpo_assets.report.feedback import released_table, source_views, trend_table, window_said
from dpo_assets.report.quality import quality_views
from dpo_assets.report.tables import counts_table, quarantine_table, sample_table


def materialise(step: Step) -> Events:
    """Screens, tokenizes, splits; writes both tables and their report in one artefact."""
    inputs = step.inputs()
    raw, base = inputs["raw_preferences"], inputs["base_model"]
    feedback, context_length = step.recipe.feedback, read_facts(base).context
    if feedback.max_length > context_length:
        raise ConfigError(
            f"feedback.max_length is {feedback.max_length}, but {step.recipe.base_model.source} has a context of "
            f"{context_length} tokens; set it to {context_length} or less."
        )
    config = feedback.model_dump(include={"max_length", "eval_fraction", "seed", "cleaning", "release"})
    config |= {"quality": QUALITY_VERSION, "evaluation_sets": [file_sha256(path) for path in _sets(feedback)]}
    kept_in_train: frozenset[str] = frozenset()
    if not step.only_checks:
        kept_in_train = bound_by_models(step.tree, feedback.eval_fraction, feedback.seed)
    if kept_in_train:
        config |= {"kept_in_train": groups_digest(kept_in_train)}

    def pool() -> Pool:
        return stored([batch.path for batch in batches_of(step, raw)])

    days = ByDay.of(feedback, step.bands, pool)
    config |= days.identity()

    def make(folder: Path, print_: str) -> None:
        batches = batches_of(step, raw)
        markers = read_markers(base.path / "model")
        read = pool()
        outside, told = days.look(read, feedback, kept_in_train)
        screening = Screening(read, feedback.cleaning, feedback.release, markers.texts, outside)
        screened = folder.parent / f"{folder.name}.screened.parquet"
        try:
            with PairWriter(screened) as writer:
                for part, _ in screening.parts():
                    writer.write(part)
            tokens = _tokenize(step, inputs.only("base_model"), screened)
            if tokens is not None:
                _refuse_template(step, tokens)
                ends = read_kept(tokens, CHAT_FORMAT, ChatFormatFacts).ends
                markers = replace(markers, ends=markers.ends.union(ends))
            table = tokens.path / TOKENS if tokens is not None else None
            model = (context_length, markers)
            _write(folder, step.recipe, batches, screening, screened, table, model, kept_in_train, told)
        finally:
            screened.unlink(missing_ok=True)

    artifact, reused = step.build("dpo_dataset", config, inputs, make)
    report = artifact.json("report.json")
    kept = report.get("kept_in_train", 0)
    if kept:
        step.context.log.warning(f"{kept} {KEPT_IN_TRAIN}")
    if said := window_said(report):
        step.context.log.info(said)
    views = quality_views(report, step.bands)
    views[CHECK] = drift_views(drift_of(report), step.bands.limit(CHECK))
    rejected = artifact.path / "quarantine.parquet"
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
            "sample": dg.MetadataValue.md(sample_table(artifact.path / "train.parquet")),
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


def _refuse_template(step: Step, tokens: Artifact) -> None:
    """One message instead of as many quarantined rows as the feedback has.

    Raises:
        ConfigError: when the chat template fits nearly none of the pairs.
    """
    import polars as pl

    faults = pl.read_parquet(tokens.path / TOKENS, columns=[TEMPLATE_FAULT])[TEMPLATE_FAULT]
    if said := unfit_template(faults):
        section = step.recipe.base_model
        template = f"{section.chat_template}" if section.chat_template else f"the chat template of {section.source}"
        raise ConfigError(
            f"{template} does not fit the feedback: {said}. Set base_model.chat_template to a Jinja file that renders "
            "such conversations whole, or base_model.template_arguments if the template has an argument for it."
        )


def _tokenize(step: Step, inputs: Inputs, screened: Path) -> Artifact | None:
    """Token ids of the screened pairs, by the worker: the Dagster process loads no tokenizer library.

    They are in the order of the pairs. None where there is no pair. Pairs that were tokenized before are not again.
    """
    import polars as pl

    identity = pl.read_parquet(screened, columns=["pair_id"])["pair_id"].to_list()
    if not identity:
        return None

    def make(folder: Path, print_: str) -> None:
        earlier = step.latest("tokens", inputs)
        step.launch(
            "tokenize",
            TokenizeSpec(
                kind="tokens",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                **in_worker(inputs["base_model"]),
                threads=step.recipe.hardware.threads,
                pairs=screened,
                vocabulary=read_facts(inputs["base_model"]).vocabulary,
                known=earlier.path / TOKENS if earlier else None,
            ),
        )

    columns = [*token_schema(), CHAT_FORMAT]
    tokens, _ = step.build("tokens", fingerprint("pairs in this order", [*columns, *identity], {}), inputs, make)
    return tokens


def _write(
    folder: Path,
    recipe: Recipe,
    batches: Sequence[Artifact],
    screening: Screening,
    screened: Path,
    tokens: Path | None,
    model: tuple[int, Markers],
    kept_in_train: frozenset[str],
    dated: Mapping[str, Any],
) -> None:
    """Both splits, part by part, the quarantine, and the report, which takes up what `dated` says of days."""
    import polars as pl

    feedback = recipe.feedback
    faults: list[dict[str, Any]] = []
    schema = polars_schema((*PAIR_COLUMNS, *TOKEN_COLUMNS))
    with PairWriter(folder / "train.parquet", schema) as train, PairWriter(folder / "eval.parquet", schema) as held_out:
        for part, ids in parts_with_tokens(screened, tokens):
            accepted, unfit = fit_to_model(part, ids, feedback.max_length)
            faults += unfit
            for writer, side in zip(
                (train, held_out),
                split(accepted, feedback.eval_fraction, feedback.seed, kept_in_train),
                strict=True,
            ):
                writer.write(side)
    read = [pl.read_parquet(batch.path / QUARANTINE) for batch in batches]
    unfit_rows = pl.DataFrame(faults, schema=polars_schema(QUARANTINE_COLUMNS))
    quarantine = pl.concat([*read, screening.quarantine(), unfit_rows])
    # Sorted, so that the artefact does not depend on the order of files.
    quarantine.sort("source", "line", "row", "reason", "raw").write_parquet(folder / "quarantine.parquet")
    # From here on what lies on disk counts, not what was to be written.
    written = pl.read_parquet(folder / "quarantine.parquet", columns=["reason", "line"])
    reasons = dict(written["reason"].value_counts(sort=True).iter_rows())
    rows = written.filter(pl.col("line") > 0).height
    counted = [batch.json(COUNTS) for batch in batches]
    rejected = sum(one["rejected"] for one in counted)
    sides = [pl.read_parquet(folder / name) for name in ("train.parquet", "eval.parquet")]
    accepted = pl.concat(sides)
    whole = pl.read_parquet(tokens) if tokens is not None else pl.DataFrame(schema=token_schema())
    context, markers = model
    quality = measure(accepted, whole.filter(pl.col(TEMPLATE_FAULT).is_null()), feedback.max_length, context, markers)
    write_json(
        folder / "report.json",
        {
            "rows_in": sum(one["pairs"] for one in counted) + rejected,
            "accepted": accepted.height,
            "duplicates": screening.duplicates,
            "near_duplicates_dropped": screening.near_dropped,
            "quarantined": rows,
            **dated,
            "reasons": dict(sorted(reasons.items())),
            "damaged": sum(count for reason, count in reasons.items() if reason not in NOT_DAMAGE),
            "train_pairs": train.rows,
            "eval_pairs": held_out.rows,
            "kept_in_train": accepted.filter(pl.col("group_id").is_in(list(kept_in_train))).height,
            "leaked_prompts": shared_prompts(*sides),
            "flagged": dict(sorted(screening.counts.items())),
            "released": [
                {**rule.model_dump(), "rows": screening.released[n]} for n, rule in enumerate(feedback.release)
            ],
            **token_stats(accepted, feedback.max_length),
            "quality": quality | {"contradictions": contradictions(pl.read_parquet(screened))},
            "sources": source_report(accepted),
        },
    )


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
