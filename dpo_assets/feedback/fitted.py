"""Batches of pairs that the model can hold: a batch as it was read, by every rule that looks at one pair alone.

A batch comes to the same whatever other batches there are, so it is made once: what a refresh adds to old feedback is
screened and tokenized, and what lies there is taken up. Rules across pairs and the split are `selection`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.artifact import write_json
from dpo_assets.feedback.batches import COUNTS, KEYS, PAIRS, QUARANTINE, ROW_GROUP, PairWriter, keys_frame, write_table
from dpo_assets.feedback.facts import fact_schema, facts_frame
from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    QUARANTINE_COLUMNS,
    TEMPLATE_FAULT,
    TOKEN_COLUMNS,
    polars_schema,
    token_schema,
)
from dpo_assets.feedback.pool import stored
from dpo_assets.feedback.quality import sizes
from dpo_assets.feedback.screening import Screening
from dpo_assets.feedback.splits import fit_to_model
from dpo_assets.recipe import FeedbackSection, ReleaseRule

if TYPE_CHECKING:
    import polars as pl

FITTED_KIND = "fitted_pairs"
FIT_VERSION = 2  # Of what is made of a batch: another version makes every batch again.
KEY_ROWS = 1 << 17  # Rows of a row group: keys are read whole.
UNFIT = "unfit.parquet"  # `quality.sizes` of pairs that were tokenized and do not fit.
OF_A_ROW = frozenset({"template_marks", "personal_data", "secret", "evaluation_overlap"})  # Reasons, among others.


@dataclass(frozen=True)
class RowRules:
    """The rules that look at one pair alone.

    Args:
        feedback: of the recipe.
        marks: special tokens of the base model.
        sets: digests of the evaluation sets.
    """

    feedback: FeedbackSection
    marks: tuple[str, ...]
    sets: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Everything of them that decides what becomes of a batch."""
        return {
            "version": FIT_VERSION,
            "columns": [*fact_schema(), *token_schema()],
            "max_length": self.feedback.max_length,
            "seed": self.feedback.seed,
            "cleaning": self.feedback.cleaning.model_dump(include={"personal_data", "secrets", "template_marks"}),
            "release": [rule.model_dump() for _, rule in self.release],
            "marks": self.marks,
            "sets": self.sets,
        }

    @cached_property
    def release(self) -> list[tuple[int, ReleaseRule]]:
        """Rules of the recipe that release rows from these, with their numbers there."""
        return released_from_rows(self.feedback)

    def screening(self, batch: Path) -> Screening:
        """A batch as it was read, screened by these rules."""
        release = [rule for _, rule in self.release]
        return Screening(stored([batch]), self.feedback.cleaning, release, self.marks, rules="of a row")


def released_from_rows(feedback: FeedbackSection) -> list[tuple[int, ReleaseRule]]:
    """Rules of a recipe that release rows from what looks at one row alone, with their numbers in the recipe."""
    return [(n, rule) for n, rule in enumerate(feedback.release) if rule.reason in OF_A_ROW]


@dataclass(frozen=True)
class Sieved:
    """What is known of a screened batch before it is tokenized: rows, rejected ones, and counts.

    `released` goes by a rule's place among `RowRules.release`: other rules of a recipe may come and go before it while
    the batch stays.
    """

    rows: int
    quarantine: pl.DataFrame
    flagged: dict[str, int]
    released: dict[str, int]

    @classmethod
    def of(cls, screening: Screening, rows: int) -> Sieved:
        """Of a screening whose parts have all been taken."""
        released = {str(n): count for n, count in sorted(screening.released.items())}
        return cls(rows, screening.quarantine(), dict(sorted(screening.counts.items())), released)


def write_fitted(
    folder: Path, parts: Iterable[tuple[pl.DataFrame, pl.DataFrame]], sieved: Sieved, max_length: int, seed: int
) -> None:
    """The tables of a batch: `pairs` with their token ids, `keys` with their facts, `quarantine`, `unfit`, and counts.

    Args:
        parts: screened pairs in the order of their ids, and the token ids of each.
    """
    import polars as pl

    schema = polars_schema((*PAIR_COLUMNS, *TOKEN_COLUMNS))
    none = pl.DataFrame(schema=schema)
    keys = [keys_frame(none).hstack(facts_frame(none, max_length, seed))]
    unfit = [sizes(none, max_length)]
    faults: list[dict[str, Any]] = []
    template: Counter[str] = Counter()
    tokenized = 0
    with PairWriter(folder / PAIRS, schema, ROW_GROUP) as writer:
        for part, ids in parts:
            accepted, rejected = fit_to_model(part, ids.unique("pair_id", maintain_order=True), max_length)
            writer.write(accepted)
            keys.append(keys_frame(accepted).hstack(facts_frame(accepted, max_length, seed)))
            faults += rejected
            rendered = ids.filter(pl.col(TEMPLATE_FAULT).is_null())
            unfit.append(sizes(rendered.join(accepted, on="pair_id", how="anti"), max_length))
            template.update(ids[TEMPLATE_FAULT].drop_nulls().to_list())
            tokenized += ids.height
    write_table(pl.concat(keys), folder / KEYS, KEY_ROWS)
    write_table(pl.concat(unfit), folder / UNFIT)
    quarantine = pl.concat([sieved.quarantine, pl.DataFrame(faults, schema=polars_schema(QUARANTINE_COLUMNS))])
    write_table(quarantine, folder / QUARANTINE)
    counts = {
        "pairs": sieved.rows,
        "tokenized": tokenized,
        "kept": writer.rows,
        "flagged": sieved.flagged,
        "released": sieved.released,
        "template_faults": dict(sorted(template.items())),
    }
    write_json(folder / COUNTS, counts)
