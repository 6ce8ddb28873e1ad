"""A store as a first run of very many rows leaves it, made in a minute: see `benchmarks.million`.

A few thousand rows are read, screened and tokenized as always. The feedback file has them again and again, each with a
number of its own before the prompt, and so have the batches of the store, with ids drawn at random in place of digests.
One pair in 100 has the id of another, one in 500 that of another turned round, and one in 100 a hash of near
duplicates in common with another.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from benchmarks.ingest import write_rows
from dpo_assets.artifact import Artifact, ArtifactTree, fingerprint, write_json
from dpo_assets.assets.fitted_pairs import inputs_of
from dpo_assets.assets.raw_preferences import read_options
from dpo_assets.contract import CHAT_FORMAT, TOKENS, ChatFormatFacts, TokenizeSpec
from dpo_assets.feedback import library
from dpo_assets.feedback.batches import ANSWERS, COUNTS, KEYS, PAIRS, QUARANTINE, PairWriter, write_table
from dpo_assets.feedback.fitted import FITTED_KIND, KEY_ROWS, UNFIT, RowRules, Sieved, write_fitted
from dpo_assets.feedback.near import BAND_COLUMNS
from dpo_assets.feedback.pair import PAIR_COLUMNS, TOKEN_COLUMNS, polars_schema
from dpo_assets.feedback.pool import parts_with_tokens
from dpo_assets.feedback.quality_tokens import read_markers
from dpo_assets.feedback.reading import Job
from dpo_assets.feedback.sources import files_of
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.training.stages import tokenize

TEMPLATE = 4000  # Rows that are read.
NAME = "many"
SIDES = ("prompt", "chosen", "rejected")
IDS = ("pair", "flipped", "prompt")
_draw = np.random.default_rng(7)


class Seeds:
    """Batches of any size, made of one that was read and fitted."""

    def __init__(self, read: Path, fitted: Path) -> None:
        self._read, self._fitted = read, fitted
        self._pairs, self._keys = pl.read_parquet(fitted / PAIRS), pl.read_parquet(fitted / KEYS)
        self._earlier = np.zeros((0, 2), dtype=np.uint64)  # Ids of pairs of earlier batches.
        self._bands = np.zeros(0, dtype=np.uint64)
        self.size = self._pairs.height

    def batch(self, first: int, count: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """(pairs, keys) of rows `first` to `first + count` of the feedback file, in the order of their ids."""
        which = np.arange(first, first + count) % self.size
        ids = {name: _draw.integers(0, 2**64, (count, 2), dtype=np.uint64) for name in (*IDS, "group", "content")}
        bands = _draw.integers(0, 2**64, (len(BAND_COLUMNS), count), dtype=np.uint64)
        if len(self._earlier):
            some = _draw.random(count)
            other = self._earlier[_draw.integers(0, len(self._earlier), count)]
            ids["pair"] = np.where((some < 0.01)[:, None], other, ids["pair"])
            ids["flipped"] = np.where(((some > 0.01) & (some < 0.012))[:, None], other, ids["flipped"])
            shared = self._bands[_draw.integers(0, len(self._bands), count)]
            bands[0] = np.where((some > 0.5) & (some < 0.51), shared, bands[0])
        self._earlier, self._bands = ids["pair"].copy(), bands[0].copy()
        order = np.lexsort((ids["pair"][:, 1], ids["pair"][:, 0]))
        ids, bands, which = {name: values[order] for name, values in ids.items()}, bands[:, order], which[order]
        numbers = pl.Series("line", np.arange(first, first + count)[order] + 1)
        rows = pl.Series("row", [f"row-{n - 1}" for n in numbers])
        place = [numbers.cast(pl.Int64), rows, pl.Series("source", ["old.jsonl"] * count)]
        asked = pl.col("prompt").list.first().struct.field("content")
        pairs = self._pairs[which].with_columns(*place).with_columns(
            pl.Series(f"{name}_id", hexed(ids[name])) for name in ("pair", "prompt", "group")
        ).with_columns(
            prompt=pl.concat_list(pl.struct(role=pl.lit("user"), content=pl.format("{} {}", "line", asked)))
        )  # fmt: skip
        halves = {f"{name}_{half}": ids[name][:, n] for name in (*IDS, "content") for n, half in enumerate("ab")}
        columns = halves | dict(zip(BAND_COLUMNS, bands, strict=True))
        drawn = _draw.integers(0, 2**64, (2, count), dtype=np.uint64)
        columns |= {"draw": drawn[0], "together": drawn[1]}
        keys = self._keys[which].with_columns(*place, pl.Series("group_id", hexed(ids["group"])))
        keys = keys.with_columns(pl.Series(name, values) for name, values in columns.items())
        return pairs, keys.select(self._keys.columns)

    def write_read(self, folder: Path, pairs: pl.DataFrame, keys: pl.DataFrame) -> dict[str, Any]:
        """The batch as it would have been read."""
        table = pairs.select([column.name for column in PAIR_COLUMNS])
        with PairWriter(folder / PAIRS, table.schema, 1024) as writer:
            writer.write(table)
        write_table(keys.select(pl.read_parquet_schema(self._read / KEYS).keys()), folder / KEYS)
        for name in (ANSWERS, QUARANTINE):
            write_table(pl.read_parquet(self._read / name).clear(), folder / name)
        count = pairs.height
        counts = {
            **json.loads((self._read / COUNTS).read_text(encoding="utf-8")), "rows": count, "lines": count,
            "rows_in": count, "pairs": count, "answers": 0, "rejected": 0, "shapes": {}, "flags": {},
        }  # fmt: skip
        write_json(folder / COUNTS, counts)
        return counts

    def write_fitted(self, folder: Path, pairs: pl.DataFrame, keys: pl.DataFrame) -> None:
        """The batch as it would have been fitted."""
        with PairWriter(folder / PAIRS, polars_schema((*PAIR_COLUMNS, *TOKEN_COLUMNS)), 1024) as writer:
            writer.write(pairs)
        write_table(keys, folder / KEYS, KEY_ROWS)
        for name in (UNFIT, QUARANTINE):
            write_table(pl.read_parquet(self._fitted / name).clear(), folder / name)
        counts = json.loads((self._fitted / COUNTS).read_text(encoding="utf-8"))
        count = pairs.height
        write_json(folder / COUNTS, counts | {"pairs": count, "tokenized": count, "kept": count, "flagged": {}})
        write_json(folder / CHAT_FORMAT, json.loads((self._fitted / CHAT_FORMAT).read_text(encoding="utf-8")))


def hexed(ids: np.ndarray[Any, np.dtype[np.uint64]]) -> list[str]:
    """32 hex digits for each row of two numbers."""
    text = ids.astype(">u8").tobytes().hex()
    return [text[n : n + 32] for n in range(0, len(text), 32)]


def write_feedback(path: Path, pairs: pl.DataFrame, rows: int) -> None:
    """The rows of a feedback file: those of the template, each with its number before the prompt."""
    lines = [
        json.dumps({side: row[side][-1]["content"] for side in SIDES}, ensure_ascii=False)
        for row in pairs.select(SIDES).iter_rows(named=True)
    ]
    with path.open("w", encoding="utf-8") as handle:
        for start in range(0, rows, 1 << 14):
            some = range(start, min(rows, start + (1 << 14)))
            handle.writelines(
                lines[n % len(lines)].replace('{"prompt": "', f'{{"id": "row-{n}", "prompt": "{n + 1} ', 1) + "\n"
                for n in some
            )


def seed(home: Path, rows: int) -> None:
    """Fills a Dagster home with a store in which so many rows of `feedback/old.jsonl` are read and fitted."""
    os.environ["DAGSTER_HOME"] = str(home)
    recipe = parse_recipe(json.loads((home / "recipe.json").read_text(encoding="utf-8")))
    with dg.DagsterInstance.get() as instance:
        from dpo_assets_tests.pipelines import materialize

        plain = json.loads((home / "recipe.json").read_text(encoding="utf-8"))
        materialize(plain, instance, ["base_model"], name=NAME)
        store = ArtifactStore()
        tree = store.tree(instance, NAME)
        options = read_options(recipe, store.user_key(instance))
    [base] = tree.listed("base_model")
    rules = RowRules(recipe.feedback, read_markers(base.path / "model").texts, ())
    scratch = home / "scratch"
    seeds = template(scratch, base, rules, options)
    path = home / "feedback" / "old.jsonl"
    write_feedback(path, pl.read_parquet(scratch / "fitted" / PAIRS), rows)
    fitted: dict[Path, tuple[pl.DataFrame, pl.DataFrame]] = {}

    def jobs_done(jobs: Sequence[Job]) -> Any:
        for job in jobs:
            span = job.span
            first, count = (span.line - 1, span.end - span.line) if span else (0, rows)
            if span and span.stop == path.stat().st_size:
                count = rows - first
            pairs, keys = seeds.batch(first, count)
            (job.folder / "0").mkdir()
            yield [seeds.write_read(job.folder / "0", pairs, keys)]
            made = job.folder.parent.parent / f"seed-{first}"
            made.mkdir()
            seeds.write_fitted(made, pairs, keys)
            fitted[made] = (pairs[:0], keys[:0])

    vars(library)["run_jobs"] = jobs_done
    [file] = files_of(recipe.feedback.sources)
    batches = library.read_into(tree, file, options).batches
    for batch, made in zip(batches, fitted, strict=True):
        keep(tree, batch, base, rules, made)


def keep(tree: ArtifactTree, batch: Artifact, base: Artifact, rules: RowRules, made: Path) -> None:
    """Puts a fitted batch where the pipeline looks for it."""
    inputs = inputs_of(batch, base)

    def build(folder: Path) -> None:
        for path in made.iterdir():
            path.rename(folder / path.name)
        made.rmdir()

    tree.find_or_build(FITTED_KIND, fingerprint(FITTED_KIND, rules.identity(), inputs), build, inputs)


def template(scratch: Path, base: Artifact, rules: RowRules, options: Any) -> Seeds:
    """A batch that was read, screened and tokenized as the pipeline does it."""
    scratch.mkdir()
    write_rows(scratch / "rows.jsonl", TEMPLATE)
    [file] = files_of([rules.feedback.sources[0].model_copy(update={"path": str(scratch / "rows.jsonl")})])
    tree = ArtifactTree(scratch / "tree")
    [batch] = library.read_into(tree, file, options).batches
    screening = rules.screening(batch.path)
    with PairWriter(scratch / "pairs.parquet") as writer:
        for part, _ in screening.parts():
            writer.write(part.unique("pair_id", maintain_order=True))
    out = scratch / "tokens"
    out.mkdir()
    spec = TokenizeSpec(
        output_dir=out, fingerprint="f" * 32, inputs={}, base_model=base.path / "model", pairs=scratch / "pairs.parquet"
    )
    tokenize.run(spec, Quiet())  # type: ignore[arg-type]
    sieved = Sieved.of(screening, TEMPLATE)
    (scratch / "fitted").mkdir()
    parts = parts_with_tokens(scratch / "pairs.parquet", out / TOKENS)
    write_fitted(scratch / "fitted", parts, sieved, rules.feedback.max_length, rules.feedback.seed)
    facts = ChatFormatFacts.model_validate_json((out / CHAT_FORMAT).read_bytes())
    write_json(scratch / "fitted" / CHAT_FORMAT, facts.model_dump(mode="json"))
    return Seeds(batch.path, scratch / "fitted")


class Quiet:
    """A reporter that reports nothing."""

    def log(self, message: str) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    given = parser.parse_args()
    seed(given.home, given.rows)


if __name__ == "__main__":
    main()
