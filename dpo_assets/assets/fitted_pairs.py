"""The fitted batches of `dpo_dataset`: those that are there are found, and the others screened and tokenized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.artifact import Artifact, ArtifactTree, fingerprint, read_kept, write_json
from dpo_assets.assets.base_model import in_worker, read_facts
from dpo_assets.assets.lineage import Inputs
from dpo_assets.assets.raw_preferences import batches_of
from dpo_assets.assets.step import Step
from dpo_assets.contract import CHAT_FORMAT, TOKENS, ChatFormatFacts, TokenizeSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import COUNTS, KEYS, PAIR_ID, PAIRS, PairWriter
from dpo_assets.feedback.fitted import FITTED_KIND, RowRules, Sieved, write_fitted
from dpo_assets.feedback.library import scratch_of
from dpo_assets.feedback.pair import token_schema
from dpo_assets.feedback.pool import parts_with_tokens
from dpo_assets.feedback.quality_tokens import Markers, read_markers
from dpo_assets.feedback.splits import unfit_template
from dpo_assets.version import __version__

if TYPE_CHECKING:
    import polars as pl


def fitted_pairs(step: Step, inputs: Inputs, sets: tuple[str, ...]) -> list[Artifact]:
    """Every batch of `raw_preferences`, screened by the rules of a row, tokenized and cut down to what fits the model.

    Args:
        sets: digests of the evaluation sets of the recipe.

    Raises:
        ConfigError: when the chat template fits nearly none of the pairs.
    """
    raw, base = inputs["raw_preferences"], inputs["base_model"]
    rules = RowRules(step.recipe.feedback, read_markers(base.path / "model").texts, sets)
    batches = batches_of(step, raw)
    prints = [fingerprint(FITTED_KIND, rules.identity(), inputs_of(batch, base)) for batch in batches]
    found = {one: made for one in dict.fromkeys(prints) if (made := step.tree.find(FITTED_KIND, one)) is not None}
    missing = {one: batch for one, batch in zip(prints, batches, strict=True) if one not in found}
    if missing:
        found |= _made(step, inputs.only("base_model"), rules, missing)
    fitted = [found[one] for one in prints]  # Two files of one name and content are two batches: no row is lost.
    _refuse_template(step, fitted)
    return fitted


def whole_markers(base: Artifact, fitted: Sequence[Artifact]) -> Markers:
    """What ends an answer, by the model's files and by its chat template, and what no answer may hold."""
    markers = read_markers(base.path / "model")
    formats = (read_kept(one, CHAT_FORMAT, ChatFormatFacts) for one in fitted if (one.path / CHAT_FORMAT).is_file())
    return replace(markers, ends=markers.ends.union(*(one.ends for one in formats)))


def earlier_dataset(tree: ArtifactTree, base: Artifact) -> Artifact | None:
    """The newest dataset of this version for the same model, verified: what it found out of a pair is so still."""
    for told in tree.listed("dpo_dataset"):
        same = told.manifest.inputs.get("base_model") == base.digest
        if same and told.manifest.versions.get("dpo_assets") == __version__:
            return tree.find("dpo_dataset", told.path.name)
    return None


def inputs_of(batch: Artifact, base: Artifact) -> dict[str, str]:
    """What a fitted batch is made from, as its manifest keeps it."""
    return {batch.manifest.kind: batch.digest, "base_model": base.digest}


def _made(step: Step, base: Inputs, rules: RowRules, missing: dict[str, Artifact]) -> dict[str, Artifact]:
    """Screens batches one after the other into one table, has it tokenized, and writes each batch."""
    sieved: dict[str, tuple[Sieved, int]] = {}
    made: dict[str, Artifact] = {}
    with scratch_of(step.tree, next(iter(missing))) as scratch:
        screened = scratch / PAIRS
        with PairWriter(screened) as writer:
            for one, batch in missing.items():
                screening, before = rules.screening(batch.path), writer.rows
                for part, _ in screening.parts():
                    writer.write(part)
                rows = Sieved.of(screening, batch.json(COUNTS)["pairs"])
                sieved[one] = (rows, writer.rows - before)
        tokens = _tokenized(step, base, list(missing), screened, writer.rows)
        start = 0
        for one, (rows, count) in sieved.items():
            parts = parts_with_tokens(screened, tokens.path / TOKENS if tokens else None, start, count)
            build = partial(_write, rules=rules, rows=rows, parts=parts, tokens=tokens)
            made[one], _ = step.tree.find_or_build(FITTED_KIND, one, build, inputs_of(missing[one], base["base_model"]))
            start += count
    return made


def _write(
    folder: Path,
    *,
    rules: RowRules,
    rows: Sieved,
    parts: Iterator[tuple[pl.DataFrame, pl.DataFrame]],
    tokens: Artifact | None,
) -> None:
    write_fitted(folder, parts, rows, rules.feedback.max_length, rules.feedback.seed)
    if tokens is not None:
        write_json(folder / CHAT_FORMAT, tokens.json(CHAT_FORMAT))


def _tokenized(step: Step, base: Inputs, prints: list[str], screened: Path, rows: int) -> Artifact | None:
    """Token ids of the screened pairs, by the worker: the Dagster process loads no tokenizer library.

    They are in the order of the pairs. None where there is no pair. Pairs that were tokenized before are not again.
    """
    if not rows:
        return None

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "tokenize",
            TokenizeSpec(
                kind="tokens",
                output_dir=folder,
                fingerprint=print_,
                inputs=base.digests,
                **in_worker(base["base_model"]),
                threads=step.recipe.hardware.threads,
                pairs=screened,
                vocabulary=read_facts(base["base_model"]).vocabulary,
                known=tuple(_known(step, base["base_model"], screened)),
            ),
        )

    tokens, _ = step.build("tokens", ["pairs of these batches", *token_schema(), CHAT_FORMAT, *prints], base, make)
    return tokens


def _known(step: Step, base: Artifact, screened: Path) -> Iterator[Path]:
    """Tables of fitted batches that hold token ids of these pairs: of a file that was moved, say, or has grown."""
    import polars as pl

    ids = pl.read_parquet(screened, columns=["pair_id"])["pair_id"].str.slice(0, 16)
    wanted = ids.str.to_integer(base=16, dtype=pl.UInt64).unique().to_frame(PAIR_ID[0])
    for told in step.tree.listed(FITTED_KIND):
        if told.manifest.inputs.get("base_model") != base.digest:
            continue
        if told.manifest.versions.get("dpo_assets") != __version__:
            continue
        if _has_any(told, wanted) and (found := step.tree.find(FITTED_KIND, told.path.name)) is not None:
            yield found.path / PAIRS


def _has_any(told: Artifact, wanted: pl.DataFrame) -> bool:
    """Whether a batch, not verified yet, holds some of these pairs; true of one without readable keys: `find` tells."""
    import polars as pl

    try:
        keys = pl.read_parquet(told.path / KEYS, columns=[PAIR_ID[0]])
    except (OSError, pl.exceptions.PolarsError):
        return True
    return not keys.join(wanted, on=PAIR_ID[0], how="semi").is_empty()


def _refuse_template(step: Step, fitted: Sequence[Artifact]) -> None:
    """One message instead of as many quarantined rows as the feedback has.

    Raises:
        ConfigError: when the chat template fits nearly none of the pairs.
    """
    counts = [one.json(COUNTS) for one in fitted]
    faults: dict[str, int] = {}
    for one in counts:
        for fault, count in one["template_faults"].items():
            faults[fault] = faults.get(fault, 0) + count
    if said := unfit_template(faults, sum(one["tokenized"] for one in counts)):
        section = step.recipe.base_model
        template = f"{section.chat_template}" if section.chat_template else f"the chat template of {section.source}"
        raise ConfigError(
            f"{template} does not fit the feedback: {said}. Set base_model.chat_template to a Jinja file that renders "
            "such conversations whole, or base_model.template_arguments if the template has an argument for it."
        )
