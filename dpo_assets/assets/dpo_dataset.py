"""`dpo_dataset` and `quarantined_preferences`: what training may see, and every row it may not, with the reason.

One step makes both, and records the quarantine first: when a gate stops the dataset, the rows that explain it are
already on the screen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from dpo_assets.artifact import Artifact, fingerprint, write_json
from dpo_assets.assets.base_model import FACTS
from dpo_assets.assets.node import Node
from dpo_assets.assets.raw_preferences import BATCH_KIND, INDEX
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.dataset import dataset_verdicts
from dpo_assets.contract import TokenizeSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.cleaning import NOT_DAMAGE, fit_to_model, screen, split
from dpo_assets.feedback.pair import PAIR_COLUMNS, QUARANTINE_COLUMNS, TOKEN_COLUMNS, polars_schema
from dpo_assets.feedback.quality import QUALITY_VERSION, measure, token_stats
from dpo_assets.feedback.quality_conflicts import contradictions
from dpo_assets.feedback.quality_tokens import read_markers
from dpo_assets.planning.plan import DatasetStats
from dpo_assets.report.quality import quality_views
from dpo_assets.report.tables import counts_table, quarantine_table, sample_table

if TYPE_CHECKING:
    import polars as pl


def materialise(step: Step) -> Events:
    """Screens, tokenizes, splits; writes both tables and their report in one artefact."""
    raw, base = step.upstream("raw_preferences"), step.upstream("base_model")
    feedback, context_length = step.recipe.feedback, base.json(FACTS)["context"]
    if feedback.max_length > context_length:
        raise ConfigError(
            f"feedback.max_length is {feedback.max_length}, but {step.recipe.base_model.source} has a context of "
            f"{context_length} tokens; set it to {context_length} or less."
        )
    config = feedback.model_dump(include={"max_length", "eval_fraction", "seed"}) | {"quality": QUALITY_VERSION}

    def make(folder: Path, print_: str) -> None:
        pairs, quarantine = _read_batches(step, raw)
        rows_in = pairs.height + quarantine.filter(quarantine["line"] > 0).height
        screened = screen(pairs, quarantine)
        tokens = _tokenize(step, base, screened.pairs)
        accepted, faults = fit_to_model(screened.pairs, tokens, feedback.max_length)
        sound = tokens.filter(~tokens["boundary_fault"])
        quality = measure(accepted, sound, feedback.max_length, context_length, read_markers(base.path / "model"))
        measured = {"quality": quality | {"contradictions": contradictions(screened.pairs)}}
        quarantine = _with(screened.quarantine, faults)
        _write(folder, feedback.model_dump(), accepted, quarantine, screened.duplicates, rows_in, measured)

    artifact, reused = step.build("dpo_dataset", config, {"raw_preferences": raw, "base_model": base}, make)
    report = artifact.json("report.json")
    views = quality_views(report, step.bands)
    rejected = artifact.path / "quarantine.parquet"
    yield from step.result(
        "quarantined_preferences",
        artifact,
        reused,
        metadata={
            "dagster/row_count": report["quarantined"],
            "by_reason": dg.MetadataValue.md(counts_table("reason", report["reasons"])),
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
            "longest_pair_tokens": report["longest_pair"],
            "answers_truncated": report["truncated_answers"],
            "sample": dg.MetadataValue.md(sample_table(artifact.path / "train.parquet")),
            **{title: dg.MetadataValue.md(text) for view in views.values() for title, text in view.items()},
        },
    )


def dataset_stats(dataset: Artifact) -> DatasetStats:
    """What planning needs to know of a dataset."""
    return DatasetStats.model_validate(dataset.json("report.json"))


def _read_batches(step: Step, raw: Artifact) -> tuple[pl.DataFrame, pl.DataFrame]:
    import polars as pl

    pairs, quarantine = [], []
    for row in raw.json(INDEX):
        batch = step.tree.find(BATCH_KIND, row["batch"])
        if batch is None or batch.digest != row["digest"]:
            raise ConfigError(f"the batch of {row['file']} is missing or damaged; materialise raw_preferences again.")
        pairs.append(pl.read_parquet(batch.path / "pairs.parquet"))
        quarantine.append(pl.read_parquet(batch.path / "quarantine.parquet"))
    return pl.concat(pairs), pl.concat(quarantine)


def _tokenize(step: Step, base: Artifact, pairs: pl.DataFrame) -> pl.DataFrame:
    """Token ids of the screened pairs, by the worker: the Dagster process loads no tokenizer library."""
    import polars as pl

    inputs = {"base_model": base}
    identity = sorted(pairs["pair_id"])

    def make(folder: Path, print_: str) -> None:
        source = folder.parent / f"{folder.name}.pairs.parquet"
        pairs.write_parquet(source)
        try:
            step.launch(
                "tokenize",
                TokenizeSpec(
                    kind="tokens",
                    output_dir=folder,
                    fingerprint=print_,
                    inputs={"base_model": base.digest},
                    base_model=base.path / "model",
                    threads=step.recipe.hardware.threads,
                    pairs=source,
                    max_length=step.recipe.feedback.max_length,
                ),
            )
        finally:
            source.unlink(missing_ok=True)

    if pairs.is_empty():
        ids = polars_schema(TOKEN_COLUMNS)
        return pl.DataFrame(schema={"pair_id": pl.String, **ids, "boundary_fault": pl.Boolean})
    artifact, _ = step.build("tokens", fingerprint("pairs", identity, {}), inputs, make)
    return pl.read_parquet(artifact.path / "tokens.parquet")


def _with(quarantine: pl.DataFrame, faults: list[dict[str, Any]]) -> pl.DataFrame:
    import polars as pl

    return pl.concat([quarantine, pl.DataFrame(faults, schema=polars_schema(QUARANTINE_COLUMNS))])


def _write(
    folder: Path,
    feedback: Mapping[str, Any],
    accepted: pl.DataFrame,
    quarantine: pl.DataFrame,
    duplicates: int,
    rows_in: int,
    measured: Mapping[str, Any],
) -> None:
    train, held_out = split(accepted, feedback["eval_fraction"], feedback["seed"])
    train.write_parquet(folder / "train.parquet")
    held_out.write_parquet(folder / "eval.parquet")
    # Sorted, so that the artefact does not depend on the order of files.
    quarantine.sort("source", "line", "row", "reason").write_parquet(folder / "quarantine.parquet")
    reasons = dict(quarantine["reason"].value_counts(sort=True).iter_rows())
    write_json(
        folder / "report.json",
        {
            "rows_in": rows_in,
            "accepted": accepted.height,
            "duplicates": duplicates,
            "quarantined": quarantine.filter(quarantine["line"] > 0).height,
            "reasons": dict(sorted(reasons.items())),
            "damaged": sum(count for reason, count in reasons.items() if reason not in NOT_DAMAGE),
            "train_pairs": train.height,
            "eval_pairs": held_out.height,
            "leaked_prompts": len(set(train["prompt_id"]) & set(held_out["prompt_id"])),
            **token_stats(accepted, feedback["max_length"]),
            **measured,
        },
    )


QUARANTINE_NODE = Node(
    name="quarantined_preferences",
    description="Every rejected row with reason code, source, line and raw bytes.",
    phase="data",
    kinds=frozenset({"parquet", "polars"}),
    body=materialise,
    deps=("raw_preferences", "base_model"),
    columns=QUARANTINE_COLUMNS,
)
NODE = Node(
    name="dpo_dataset",
    description="Validated, de-duplicated pairs in `train` and `eval` splits; no prompt in both; tokenized.",
    phase="data",
    kinds=frozenset({"parquet", "pandera"}),
    body=materialise,
    deps=("raw_preferences", "base_model"),
    columns=(*PAIR_COLUMNS, *TOKEN_COLUMNS),
)
