"""From fitted batches to a dataset: which pairs are in it, on which side, and what is to be told of them.

Everything here works on keys and facts (`facts`). Texts are read of the pairs that are shown, and of those that a rule
across pairs refuses or compares for the first time: what an earlier dataset found out is taken up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.artifact import STORED
from dpo_assets.feedback.batches import COUNTS, PAIR_ID, PROMPT_ID, QUARANTINE, write_table
from dpo_assets.feedback.dataset import ROWS, SPLITS, Part, Split, sides_of, split_parts, write_rows
from dpo_assets.feedback.facts import fact_schema
from dpo_assets.feedback.fitted import UNFIT, released_from_rows
from dpo_assets.feedback.near import Compared
from dpo_assets.feedback.pair import PAIR_COLUMNS, QUARANTINE_COLUMNS, TOKEN_COLUMNS, polars_schema
from dpo_assets.feedback.pool import stored
from dpo_assets.feedback.quality import SAMPLE, measure, token_stats
from dpo_assets.feedback.quality_conflicts import contradictions
from dpo_assets.feedback.quality_sources import source_report
from dpo_assets.feedback.quality_tokens import Markers
from dpo_assets.feedback.rules import NOT_DAMAGE
from dpo_assets.feedback.scan import RENDERED
from dpo_assets.feedback.screening import Screening
from dpo_assets.feedback.splits import sides, together
from dpo_assets.feedback.tables import quarantine_record
from dpo_assets.recipe import FeedbackSection

if TYPE_CHECKING:
    import polars as pl

    from dpo_assets.artifact import Artifact

COMPARED, REFUSED = f"{STORED}compared.parquet", f"{STORED}refused.parquet"
ROW_OF_FILE = ("source", "row", "line")


@dataclass(frozen=True)
class Found:
    """What an earlier dataset found out about pairs, by their ids, which are their content.

    Args:
        compared: whether two pairs are near duplicates (`near.compared_schema`).
        refused: what lies in quarantine of a pair that a rule across pairs refused.
    """

    compared: pl.DataFrame | None = None
    refused: pl.DataFrame | None = None

    @classmethod
    def in_dataset(cls, dataset: Path, least: float) -> Found:
        """Of the dataset in a folder; `least` is the similarity of near duplicates now."""
        import polars as pl

        if not ((dataset / COMPARED).is_file() and (dataset / REFUSED).is_file()):
            return cls()
        compared = pl.read_parquet(dataset / COMPARED).filter(pl.col("least") == least).drop("least")
        return cls(compared, pl.read_parquet(dataset / REFUSED))


class Selection:
    """The pairs of a dataset.

    Args:
        fitted: its batches. Nothing depends on their order or size.
        feedback: of the recipe.
        kept_in_train: groups that must not be held out.
        earlier: what is known.
        left_out: pairs that are passed over as if they were not there, by `b` and `n`.
    """

    def __init__(
        self,
        fitted: Sequence[Artifact],
        feedback: FeedbackSection,
        kept_in_train: Collection[str] = (),
        earlier: Found = Found(),
        left_out: pl.DataFrame | None = None,
    ) -> None:
        self._fitted, self._feedback, self._kept_in_train, self._earlier = fitted, feedback, kept_in_train, earlier
        self._pool = stored([one.path for one in fitted])
        self._screening = Screening(
            self._pool,
            feedback.cleaning,
            feedback.release,
            rules="across rows",
            compared=Compared(earlier.compared),
            left_out=left_out,
        )
        self._counts = [one.json(COUNTS) for one in fitted]

    @cached_property
    def facts(self) -> pl.DataFrame:
        """A row a pair, in the order of ids: its place, id, prompt, source, facts, side (`held_out`) and `note`."""
        kept = self._screening.kept
        facts = self._pool.of(kept, [*PROMPT_ID, "source", *fact_schema()])
        made = kept.hstack(facts).with_columns(sides(facts, self._feedback.eval_fraction, self._kept_in_train))
        return made.join(self._screening.notes, on=["b", "n"], how="left", maintain_order="left")

    def write(self, folder: Path, read: Sequence[Artifact]) -> None:
        """The rows of the dataset, its quarantine, and what the next one need not find out again.

        Args:
            read: the batches as they were read, with the rows that were rejected then.
        """
        import polars as pl

        write_rows(folder, self.facts, map(Part.of, self._fitted))
        refused, records = self._refused()
        rejected = [pl.read_parquet(one.path / QUARANTINE) for one in (*read, *self._fitted)]
        quarantine = pl.concat([*rejected, records])
        # Sorted, so that the artefact does not depend on the order of files.
        quarantine.sort("source", "line", "row", "reason", "raw").write_parquet(folder / QUARANTINE)
        write_table(refused, folder / REFUSED)
        least = pl.lit(self._feedback.cleaning.near_duplicate_similarity, dtype=pl.Float64)
        write_table(self._screening.compared.table().with_columns(least=least), folder / COMPARED)

    def _refused(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """(id and content of the pairs that a rule across pairs refused, their rows of the quarantine)."""
        import polars as pl

        hits = self._screening.hits
        hits = hits.hstack(self._pool.of(hits, ROW_OF_FILE))
        schema = pl.Schema({**dict.fromkeys(PAIR_ID, pl.UInt64()), "raw": pl.String()})
        known = pl.DataFrame(schema=schema) if self._earlier.refused is None else self._earlier.refused
        fresh = hits.join(known, on=PAIR_ID, how="anti").unique(PAIR_ID)
        taken = self._pool.take(fresh, [*RENDERED, *ROW_OF_FILE]).join(fresh, on=["b", "n"], how="left")
        raw = [(r[PAIR_ID[0]], r[PAIR_ID[1]], quarantine_record(r, "", "")["raw"]) for r in taken.iter_rows(named=True)]
        known = pl.concat([known, pl.DataFrame(raw, schema=schema, orient="row")])
        refused = known.join(hits, on=PAIR_ID, how="semi").sort(PAIR_ID)
        records = hits.join(refused, on=PAIR_ID, how="left")
        return refused, records.select(list(polars_schema(QUARANTINE_COLUMNS)))

    def report(self, folder: Path, read: Sequence[Artifact], context: int, markers: Markers) -> dict[str, Any]:
        """The report of a dataset that was written: what lies on disk counts, not what was to be written.

        Args:
            context: tokens that the model can read.
        """
        import polars as pl

        written = pl.read_parquet(folder / QUARANTINE, columns=["reason", "line"])
        reasons = dict(written["reason"].value_counts(sort=True).iter_rows())
        counted = [one.json(COUNTS) for one in read]
        rejected = sum(one["rejected"] for one in counted)
        flagged: Counter[str] = Counter(self._screening.counts)
        released: Counter[int] = Counter(self._screening.released)
        of_rows = released_from_rows(self._feedback)
        for one in self._counts:
            flagged.update(one["flagged"])
            released.update({of_rows[int(n)][0]: count for n, count in one["released"].items()})
        facts, max_length = self.facts, self._feedback.max_length
        written_sides = sides_of(folder)
        if written_sides.pop("twice"):
            raise RuntimeError("two rows of the dataset have one id")
        return {
            "rows_in": sum(one["pairs"] for one in counted) + rejected,
            "duplicates": self._screening.duplicates,
            "near_duplicates_dropped": self._screening.near_dropped,
            "quarantined": written.filter(pl.col("line") > 0).height,
            "reasons": dict(sorted(reasons.items())),
            "damaged": sum(count for reason, count in reasons.items() if reason not in NOT_DAMAGE),
            **written_sides,
            "kept_in_train": facts.filter(pl.col("group_id").is_in(list(self._kept_in_train))).height,
            "leaked_prompts": self._leaked(folder),
            "flagged": dict(sorted(flagged.items())),
            "released": [{**rule.model_dump(), "rows": released[n]} for n, rule in enumerate(self._feedback.release)],
            **token_stats(facts, max_length),
            "quality": self._quality(max_length, context, markers),
            "sources": source_report(facts),
        }

    def _leaked(self, folder: Path) -> int:
        """Prompts that stand on both sides of what was written: by the texts of their openings as the tables hold them,
        and by the ids that ingestion and the split went by. The most that one of these finds.
        """
        import polars as pl

        names = (["together"], ["group_id"], PROMPT_ID)
        rows = self.facts.drop("held_out").hstack(pl.read_parquet(folder / ROWS, columns=["held_out"]))
        train, held = (rows.filter(pl.col("held_out") == (split == "eval")) for split in SPLITS)
        counts = [train.select(name).unique().join(held, on=name, how="semi").height for name in names]
        shared = _openings(folder, "train").join(_openings(folder, "eval"), on="opening", how="semi")
        return int(max(*counts, shared.height))

    def _quality(self, max_length: int, context: int, markers: Markers) -> dict[str, Any]:
        import polars as pl

        facts = self.facts
        columns = [column.name for column in (*PAIR_COLUMNS, *TOKEN_COLUMNS)]
        sized = [*(f"{side}_tokens" for side in ("prompt", "chosen", "rejected")), "same_cut"]
        unfit = [pl.read_parquet(one.path / UNFIT) for one in self._fitted]
        first = self._pool.take(facts.head(SAMPLE), columns).drop("b", "n")
        tokenized = pl.concat([self._pool.keys(sized).select(sized), *unfit])
        measured = measure(facts.select(sized), first, tokenized, max_length, context, markers)

        def texts(rows: pl.DataFrame) -> pl.DataFrame:
            return self._pool.take(rows, ["pair_id", "chosen", "rejected", "source", "line"])

        return measured | {"contradictions": contradictions(facts, texts)}


def _openings(dataset: Path, side: Split) -> pl.DataFrame:
    """A number for each text that an opening of a split is, part by part of its tables."""
    import polars as pl

    parts = split_parts(dataset, side, ["prompt", "group_id"])
    return pl.concat([part.select(opening=together().hash()).unique() for part in parts]).unique()
