"""From batches to sound pairs: what other rows, the recipe and the schema say about a pair.

Everything but the texts of a part of the pairs stays on disk: rules across rows work on keys (`ingest.keys_frame`), and
texts are read where a rule names rows, and once more, part by part, for the result. The accounting identity holds at
every step: rows in = accepted + quarantined + duplicates.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_assets.ahead import ahead
from dpo_assets.feedback.batches import FLIPPED_ID, PAIR_ID, PROMPT_ID
from dpo_assets.feedback.cleaner import Cleaner
from dpo_assets.feedback.facts import day_of
from dpo_assets.feedback.near import BAND_COLUMNS, Compared, candidates, similarity
from dpo_assets.feedback.overlap import EvaluationSets, read_prompts
from dpo_assets.feedback.pair import PAIR_COLUMNS, QUARANTINE_COLUMNS, Pair, pandera_schema, polars_schema
from dpo_assets.feedback.pool import PART, LoadedBatch, Pool
from dpo_assets.feedback.rules import pair_fault
from dpo_assets.feedback.scan import (
    BESIDE,
    PERSONAL,
    RENDERED,
    SECRET,
    TEMPLATE,
    rows_with,
    unusual_marks,
)
from dpo_assets.feedback.tables import quarantine_record, with_new_content
from dpo_assets.recipe import CleaningSection, ReleaseRule

if TYPE_CHECKING:
    import polars as pl

DEFAULT_CLEANING = CleaningSection()
COMPARED_AT_ONCE = 20_000  # Candidates for near duplicates whose texts are held at once.


@dataclass(frozen=True)
class Screened:
    """Tables of accepted pairs and quarantined rows, and how many duplicates were dropped."""

    pairs: pl.DataFrame
    quarantine: pl.DataFrame
    duplicates: int
    near_duplicates: int = 0  # Of them, those that are not equal.


def screen(
    pairs: pl.DataFrame,
    quarantine: pl.DataFrame,
    policy: CleaningSection = DEFAULT_CLEANING,
    release: Sequence[ReleaseRule] = (),
) -> Screened:
    """Every rule that needs no tokenizer, for pairs in memory, whether ingestion has seen them or not."""
    import polars as pl

    faults, sound = [], []
    for n, record in enumerate(pairs.iter_rows(named=True)):
        if fault := pair_fault(_as_pair(record)):
            faults.append(quarantine_record(record, *fault))
        else:
            sound.append(n)
    screening = Screening(Pool([LoadedBatch(pairs[sound])]), policy, release)
    kept = [part for part, _ in screening.parts()]
    table = pl.concat(kept) if kept else pl.DataFrame(schema=polars_schema(PAIR_COLUMNS))
    more = pl.DataFrame(faults, schema=polars_schema(QUARANTINE_COLUMNS))
    table = table.sort("source", "line", "row")
    return Screened(
        table, pl.concat([quarantine, more, screening.quarantine()]), screening.duplicates, screening.near_dropped
    )


@dataclass
class Screening:
    """Screens the pairs of a pool. What it finds does not depend on the order of batches, nor on their size.

    Args:
        pool: pairs that satisfy `rules.pair_fault`.
        policy: of the recipe.
        release: of the recipe.
        marks: special tokens of the base model.
        rules: those that look at one row alone, or those that hold rows against each other, which then stand for
            themselves: a row that is refused for itself is held against none.
        compared: what is known of pairs that were held against each other before; is added to.
        left_out: pairs that are passed over as if they were not there, by `b` and `n`.
    """

    pool: Pool
    policy: CleaningSection = DEFAULT_CLEANING
    release: Sequence[ReleaseRule] = ()
    marks: Sequence[str] = ()
    rules: Literal["all", "of a row", "across rows"] = "all"
    compared: Compared = field(default_factory=Compared)
    left_out: pl.DataFrame | None = None
    duplicates: int = 0
    near_dropped: int = 0
    released: Counter[int] = field(default_factory=Counter)  # Rows by number of the rule.
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._faults: list[dict[str, Any]] = []  # Quarantine rows.
        self._hits: list[pl.DataFrame] = []  # Pairs that are to become quarantine rows, by number of their reason.
        self._reasons: list[tuple[str, str]] = []
        self._flags: dict[tuple[int, int], list[str]] = {}  # To be added to a pair's flags.
        self._live = self._screened()

    def _screened(self) -> pl.DataFrame:
        live = self.pool.keys([*PAIR_ID, *FLIPPED_ID, *PROMPT_ID])
        if self.left_out is not None:
            live = live.join(self.left_out, on=["b", "n"], how="anti", maintain_order="left")
        if self.rules == "of a row":
            return self._overlap(self._content(live)).drop(FLIPPED_ID, PROMPT_ID)
        if self.rules == "all":
            live = self._content(live)
        live = self._duplicates(live)
        live = self._conflicts(live).drop(FLIPPED_ID)
        if self.rules == "all":
            live = self._overlap(live)
        live = self._near_duplicates(live)
        return self._cap(live).drop(PROMPT_ID)

    @property
    def kept(self) -> pl.DataFrame:
        """`b`, `n` and PAIR_ID of the pairs that no rule refused, in the order of their ids."""
        return self._live.sort(*PAIR_ID)

    @property
    def hits(self) -> pl.DataFrame:
        """`b`, `n`, PAIR_ID, `reason` and `message` of those that one did."""
        import polars as pl

        schema = {"b": pl.UInt32, "n": pl.UInt32, **dict.fromkeys(PAIR_ID, pl.UInt64)}
        named = [
            hits.drop("fault").with_columns(reason=pl.lit(reason), message=pl.lit(message))
            for hits, (reason, message) in zip(self._hits, self._reasons, strict=True)
        ]
        return pl.concat([pl.DataFrame(schema={**schema, "reason": pl.String, "message": pl.String}), *named])

    @property
    def notes(self) -> pl.DataFrame:
        """`b`, `n` and `note` of the pairs that a rule of the recipe releases: what their flags have to say."""
        import polars as pl

        rows = [(b, n, ",".join(flags)) for (b, n), flags in sorted(self._flags.items())]
        return pl.DataFrame(rows, schema={"b": pl.UInt32, "n": pl.UInt32, "note": pl.String}, orient="row")

    # One row's content

    def _content(self, live: pl.DataFrame) -> pl.DataFrame:
        """Template marks, personal data and secrets, by the flags that ingestion set."""
        import polars as pl

        policy = self.policy
        flagged = self.pool.keys(["flags"]).filter(pl.col("flags") != "")
        for kind in (*PERSONAL, SECRET):
            self.counts[kind] = flagged.filter(_has_flag(kind)).height
            self.counts[f"{kind}{BESIDE}"] = flagged.filter(_has_flag(f"{kind}{BESIDE}")).height
        for kinds, action, reason in (
            (PERSONAL, policy.personal_data, "personal_data"),
            ((SECRET,), policy.secrets, "secret"),
        ):
            if action == "quarantine":
                hit = flagged.filter(pl.any_horizontal(_has_flag(kind) for kind in kinds))
                hit = live.join(hit, on=["b", "n"], how="semi")
                live = self._reject(live, hit, reason, f"the text seems to hold: {' or '.join(kinds)}")
        masked = [
            *(PERSONAL if policy.personal_data == "redact" else ()),
            *([SECRET] if policy.secrets == "redact" else []),
        ]
        return self._rewritten(live, flagged, masked)

    def _rewritten(self, live: pl.DataFrame, flagged: pl.DataFrame, masked: Sequence[str]) -> pl.DataFrame:
        """Pairs whose texts are masked or escaped become a batch of their own, in place of what they were."""
        import polars as pl

        kinds = [*masked, *([TEMPLATE] if self.policy.template_marks != "keep" else [])]
        if not kinds:
            return live
        beside = [f"{kind}{BESIDE}" for kind in masked]
        flagged = flagged.filter(pl.any_horizontal(_has_flag(kind) for kind in (*kinds, *beside)))
        flagged = live.select("b", "n").join(flagged, on=["b", "n"], how="semi")
        unusual = unusual_marks(self.marks) if TEMPLATE in kinds else []
        if unusual:
            more = [self._rows_with(live.select("b", "n").slice(n, PART), unusual) for n in range(0, live.height, PART)]
            flagged = pl.concat([flagged, *more]).unique(["b", "n"]).sort("b", "n")
        cleaner = Cleaner(masked, self.policy.template_marks, self.marks)
        changed: list[dict[str, Any]] = []
        gone: list[tuple[int, int]] = []
        marked: list[tuple[int, int]] = []
        for start in range(0, flagged.height, PART):
            for record in self.pool.take(flagged.slice(start, PART)).iter_rows(named=True):
                name = (record.pop("b"), record.pop("n"))
                flags = record["flags"].split(",")
                now, found = cleaner.texts(record, flags)
                if found and self.policy.template_marks == "quarantine":
                    marked.append(name)
                if now != {c: record[c] for c in now}:
                    changed.append(record | now)
                    gone.append(name)
        self.counts["rewritten"] = len(changed)
        before = live
        if marked:
            hit = live.join(_names(marked), on=["b", "n"], how="semi")
            live = self._reject(
                live, hit, "template_marks", "the text holds marks of a chat template, which end a turn"
            )
        if not changed:
            return live
        kept = live.join(_names(gone), on=["b", "n"], how="anti")
        still = {(b, n) for b, n in live.select("b", "n").iter_rows()} if marked else None
        fresh = [r for r, name in zip(changed, gone, strict=True) if still is None or name in still]
        rows, again = [], []
        for record in with_new_content(fresh):
            fault = pair_fault(_as_pair(record))
            if fault:
                again.append(quarantine_record(record, *fault))
            else:
                rows.append(record | {"flags": ",".join([*filter(None, record["flags"].split(",")), "rewritten"])})
        self._faults += again
        batch = LoadedBatch(pl.DataFrame(rows, schema=polars_schema(PAIR_COLUMNS)))
        self.pool.batches.append(batch)
        number = len(self.pool.batches) - 1
        columns = [c for c in before.columns if c not in ("b", "n")]
        keys = batch.keys(columns).with_row_index("n").with_columns(pl.lit(number, dtype=pl.UInt32).alias("b"))
        return pl.concat([kept, keys.select(kept.columns)])

    def _rows_with(self, names: pl.DataFrame, marks: Sequence[str]) -> pl.DataFrame:
        part = self.pool.take(names, RENDERED)
        return names.join(part[rows_with(part, marks)].select("b", "n"), on=["b", "n"], how="semi")

    # Rows among each other

    def _duplicates(self, live: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        several = live.filter(pl.struct(PAIR_ID).is_duplicated()).select("b", "n", *PAIR_ID)
        if several.is_empty():
            return live
        places = self.pool.keys(["source", "line", "row"]).join(several, on=["b", "n"], how="inner")
        # In an order of their own: which of two equal pairs stays must not depend on the order of files.
        places = places.sort("source", "line", "row", "b", "n")
        stay = places.unique(PAIR_ID, keep="first", maintain_order=True)
        self.duplicates += places.height - stay.height
        return live.join(places.join(stay, on=["b", "n"], how="anti"), on=["b", "n"], how="anti")

    def _conflicts(self, live: pl.DataFrame) -> pl.DataFrame:
        hit = live.join(live.select(FLIPPED_ID), left_on=PAIR_ID, right_on=FLIPPED_ID, how="semi")
        return self._reject(live, hit, "conflict", "another row prefers the rejected answer of this one")

    def _overlap(self, live: pl.DataFrame) -> pl.DataFrame:
        """Pairs that ask what models are judged by."""
        import polars as pl

        if not self.policy.evaluation_sets:
            return live
        sets = EvaluationSets(read_prompts(Path(path) for path in self.policy.evaluation_sets))
        found: list[pl.DataFrame] = []
        for start in range(0, live.height, PART):
            names = live.sort("b", "n").slice(start, PART).select("b", "n")
            part = self.pool.take(names, ["prompt"])
            found.append(part[sets.overlapping(part["prompt"])].select("b", "n"))
        hit = live.join(pl.concat(found), on=["b", "n"], how="semi") if found else live.clear()
        return self._reject(live, hit, "evaluation_overlap", "an evaluation set asks this prompt")

    def _near_duplicates(self, live: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        if self.policy.near_duplicates == "keep" or live.height < 2:
            return live
        # The place in this order: a near duplicate of an earlier pair is the one that goes.
        rank = self._dated(live).select(pl.arg_sort_by("day", *PAIR_ID, nulls_last=True).arg_sort()).to_series()
        names = live.select("b", "n")
        pairs = candidates((self.pool.of(names, [column])[column] for column in BAND_COLUMNS), rank)
        least = self.policy.near_duplicate_similarity
        ids = live.select(PAIR_ID)
        known = self.compared.of(ids[pairs["n"]], ids[pairs["other"]])
        near: dict[int, int] = {}
        for start in range(0, pairs.height, COMPARED_AT_ONCE):
            block = pairs.slice(start, COMPARED_AT_ONCE).with_columns(known.slice(start, COMPARED_AT_ONCE))
            fresh = block.filter(pl.col("near").is_null())
            texts = self._texts(names, pl.concat([fresh["n"], fresh["other"]]).unique())
            for n, other, is_near in block.iter_rows():
                # What a near duplicate is near to must stay: a chain of small steps is not dropped as a whole.
                if n in near or other in near:
                    continue
                if is_near is None:
                    one, two = texts[n], texts[other]
                    is_near = one["tools"] == two["tools"] and similarity(one, two, least) >= least
                    self.compared.add(ids.row(n), ids.row(other), is_near)
                if is_near:
                    near[n] = other
        if not near:
            return live
        hit = live[sorted(near)]
        self.counts["near_duplicates"] = hit.height
        if self.policy.near_duplicates == "drop":
            self.duplicates += hit.height
            self.near_dropped = hit.height
            return live.join(hit, on=["b", "n"], how="anti")
        message = f"prompt and both answers say nearly what another pair says (similarity {least:g} or more)"
        return self._reject(live, hit, "near_duplicate", message)

    def _dated(self, live: pl.DataFrame) -> pl.DataFrame:
        """With the `day` of each pair. What comes later must not put out what was trained on, whatever its id; of pairs
        of one day, and of those without one, which come last, the order is that of ids."""
        if self.rules == "across rows":
            return live.hstack(self.pool.of(live.select("b", "n"), ["day"]))
        taken = self.pool.take(live.select("b", "n"), ["created_at"]).select("b", "n", day=day_of())
        return live.join(taken, on=["b", "n"], how="left", maintain_order="left")

    def _texts(self, names: pl.DataFrame, rows: pl.Series) -> dict[int, dict[str, Any]]:
        """The texts of some rows of `names`."""
        wanted = names.with_row_index("g")[rows]
        taken = self.pool.take(wanted, RENDERED).join(wanted, on=["b", "n"], how="left")
        return {row["g"]: row for row in taken.select("g", *RENDERED).iter_rows(named=True)}

    def _cap(self, live: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        most = self.policy.max_pairs_per_prompt
        if not most:
            return live
        dated = self._dated(live).sort("day", *PAIR_ID, nulls_last=True).drop("day")
        hit = dated.filter(pl.int_range(pl.len()).over(PROMPT_ID) >= most)
        return self._reject(live, hit, "over_prompt_cap", f"{most} other pairs of this prompt were kept")

    # Results

    def _reject(self, live: pl.DataFrame, hit: pl.DataFrame, reason: str, message: str) -> pl.DataFrame:
        """`live` without the rows of `hit`, which are quarantined unless a rule of the recipe releases them."""
        import polars as pl

        if hit.is_empty():
            return live
        rules = [(n, rule) for n, rule in enumerate(self.release) if rule.reason == reason]
        if rules:
            hit = hit.join(self.pool.keys(["source"]), on=["b", "n"], how="left")
            free: dict[str, int] = {}
            for source in hit["source"].unique().sort():
                rule = next((n for n, rule in rules if fnmatch.fnmatchcase(source, rule.source)), None)
                if rule is not None:
                    free[source] = rule
            out = hit.filter(pl.col("source").is_in(list(free)))
            for b, n, source in out.select("b", "n", "source").iter_rows():
                self.released[free[source]] += 1
                self._flags.setdefault((b, n), []).append(f"released:{reason}")
            hit = hit.filter(~pl.col("source").is_in(list(free)))
        # Their texts are read with those of the accepted pairs: every text is read once for the result.
        self._hits.append(hit.select("b", "n", *PAIR_ID, fault=pl.lit(len(self._reasons), dtype=pl.UInt32)))
        self._reasons.append((reason, message))
        return live.join(hit.select("b", "n"), on=["b", "n"], how="anti")

    def parts(self, size: int = PART) -> Iterator[tuple[pl.DataFrame, int]]:
        """(accepted pairs in the order of their ids, how many the schema refused), `size` rows at a time."""
        import polars as pl

        live = self._live.select("b", "n", *PAIR_ID, fault=pl.lit(None, dtype=pl.UInt32))
        for part in ahead(self.pool.parts(pl.concat([live, *self._hits]), size)):
            out = part.filter(pl.col("fault").is_not_null())
            for record in out.iter_rows(named=True):
                self._faults.append(quarantine_record(record, *self._reasons[record["fault"]]))
            accepted = part.filter(pl.col("fault").is_null()).drop("fault")
            table, faults = _apply_schema(self._with_flags(accepted), alone=self.rules == "of a row")
            self._faults += faults
            yield table, len(faults)

    def _with_flags(self, part: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        names, part = part.select("b", "n"), part.drop("b", "n")
        if not self._flags:
            return part
        flags = [
            ",".join([*filter(None, old.split(",")), *self._flags.get(name, ())])
            for name, old in zip(names.iter_rows(), part["flags"], strict=True)
        ]
        return part.with_columns(pl.Series("flags", flags, dtype=pl.String))

    def quarantine(self) -> pl.DataFrame:
        """What was refused; complete once `parts` has been exhausted."""
        import polars as pl

        return pl.DataFrame(self._faults, schema=polars_schema(QUARANTINE_COLUMNS))


def _has_flag(kind: str) -> pl.Expr:
    import polars as pl

    return pl.col("flags").str.contains(f"(?:^|,){kind}(?:,|$)")


def _names(names: Iterable[tuple[int, int]]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(list(names), schema={"b": pl.UInt32, "n": pl.UInt32}, orient="row")


def _apply_schema(table: pl.DataFrame, alone: bool = False) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Rows that satisfy the pandera schema, and quarantine rows for those that do not."""
    from pandera.errors import SchemaErrors

    try:
        pandera_schema(alone).validate(table, lazy=True)
        return table, []
    except SchemaErrors as errors:
        cases = errors.failure_cases
        if cases["index"].null_count():
            # A fault of the whole table (a missing column, a wrong type) is a bug of a reader, not of a row.
            raise
        reasons: dict[int, str] = {}
        for case in cases.iter_rows(named=True):
            reasons.setdefault(case["index"], f"{case['column']}: {case['check']}")
    records = table[sorted(reasons)].to_dicts()
    faults = [
        quarantine_record(record, "schema", message)
        for record, (_, message) in zip(records, sorted(reasons.items()), strict=True)
    ]
    keep = [n for n in range(table.height) if n not in reasons]
    return table[keep], faults


def _as_pair(record: dict[str, Any]) -> Pair:
    return Pair(
        prompt=record["prompt"],
        chosen=record["chosen"],
        rejected=record["rejected"],
        source=record["source"],
        row=record["row"],
        line=record["line"],
        tools=record["tools"],
    )
