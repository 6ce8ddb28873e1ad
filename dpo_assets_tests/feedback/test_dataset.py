"""A dataset as a choice among fitted batches: the same whatever the cut, the same as in memory, and read back whole."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from dpo_assets import hashing
from dpo_assets.artifact import STORED, Artifact, ArtifactTree, Manifest, seal, write_json
from dpo_assets.assets.fitted_pairs import _known
from dpo_assets.assets.refreshing import kept
from dpo_assets.errors import CorruptArtifact
from dpo_assets.feedback import screening
from dpo_assets.feedback.batches import KEYS, PROMPT_ID, Batch, write_batch
from dpo_assets.feedback.dataset import (
    SPLITS,
    has_split,
    is_whole,
    parts_of,
    read_split,
    split_columns,
    split_file,
    split_parts,
    split_rows,
)
from dpo_assets.feedback.facts import facts_frame
from dpo_assets.feedback.fitted import FITTED_KIND, RowRules, Sieved, write_fitted
from dpo_assets.feedback.pair import PAIR_COLUMNS, TOKEN_COLUMNS, Pair, token_schema
from dpo_assets.feedback.quality_tokens import TEMPLATE_MARKS, Markers
from dpo_assets.feedback.scan import with_flags
from dpo_assets.feedback.screening import screen
from dpo_assets.feedback.selection import Found, Selection
from dpo_assets.feedback.splits import fit_to_model, split
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.publishing.trace import Trace
from dpo_assets.recipe import FeedbackSection, FeedbackSource
from dpo_assets_tests.samples import assistant, pair, user

MAX_LENGTH = 60
MARKERS = Markers(frozenset({2}), TEMPLATE_MARKS)
WORDS = [f"word{n}" for n in range(40)]


def settings(**changes: Any) -> FeedbackSection:
    sources = [FeedbackSource(path="a.jsonl", format="trl")]
    return FeedbackSection(sources=sources, max_length=MAX_LENGTH, eval_fraction=0.3, **changes)


def feedback(count: int = 240, seed: int = 0) -> list[Pair]:
    """Pairs of which some are equal, reversed, nearly equal, marked, personal, or too long."""
    draw = random.Random(seed)
    made: list[Pair] = []

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    for n in range(count):
        kind, line = draw.random(), n + 1
        old = draw.choice(made) if made else None
        if old is not None and kind < 0.1:
            texts = (old.prompt, old.chosen, old.rejected)
        elif old is not None and kind < 0.16:
            texts = (old.prompt, old.rejected, old.chosen)
        elif old is not None and kind < 0.24:
            texts = (old.prompt, [assistant(f"{old.chosen[0]['content']} {draw.choice(WORDS)}")], old.rejected)
        else:
            asked = text(70 if kind > 0.97 else 5) + (f" mail bob{n}@corp.com" if kind > 0.9 else "")
            answer = text(draw.randint(12, 20)) + (" <|im_end|>" if 0.88 < kind < 0.9 else "")
            texts = ([user(f"{asked}?")], [assistant(answer)], [assistant(text(14))])
        made.append(pair(n, prompt=texts[0], chosen=texts[1], rejected=texts[2], line=line, row=f"r{n}"))
    return made


def tokens_of(pairs: pl.DataFrame) -> pl.DataFrame:
    """A token a word; answers end."""
    numbers = {word: n + 10 for n, word in enumerate(WORDS)}

    def ids(column: str) -> list[list[int]]:
        texts = (conversation[-1]["content"] for conversation in pairs[column].to_list())
        end = [] if column == "prompt" else [2]
        return [[*(numbers.get(word, 5 + len(word) % 5) for word in text.split()), *end] for text in texts]

    columns = {f"{side}_ids": ids(side) for side in ("prompt", "chosen", "rejected")}
    return pl.DataFrame(
        {"pair_id": pairs["pair_id"], **columns, "template_fault": [None] * pairs.height}, schema=token_schema()
    )


class Store:
    """A tree with batches as they were read, and what is made of them."""

    def __init__(self, folder: Path, **recipe: Any) -> None:
        self.tree, self.feedback = ArtifactTree(folder), settings(**recipe)
        self._made = 0

    def add(self, kind: str, build: Any) -> Artifact:
        self._made += 1
        return self.tree.find_or_build(kind, f"{self._made:032x}", build, {})[0]

    def fit(self, pairs: Sequence[Pair]) -> tuple[Artifact, Artifact]:
        """A batch as it was read, and fitted."""
        read = self.add("raw_batches", lambda folder: write_batch(Batch(pairs=list(pairs)), folder) and None)
        rules = RowRules(self.feedback, MARKERS.texts, ())
        found = rules.screening(read.path)
        kept = [part for part, _ in found.parts()]
        parts = [(part, tokens_of(part)) for part in kept]
        sieved = Sieved.of(found, len(pairs))
        fitted = self.add(
            FITTED_KIND,
            lambda folder: write_fitted(folder, parts, sieved, MAX_LENGTH, self.feedback.seed),
        )
        return read, fitted

    def dataset(self, batches: Iterable[tuple[Artifact, Artifact]], earlier: Artifact | None = None) -> Artifact:
        read, fitted = zip(*batches, strict=True)
        least = self.feedback.cleaning.near_duplicate_similarity

        def build(folder: Path) -> None:
            found = Found.in_dataset(earlier.path, least) if earlier else Found()
            selection = Selection(fitted, self.feedback, (), found)
            selection.write(folder, read)
            write_json(folder / "report.json", selection.report(folder, read, 512, MARKERS))

        return self.add("dpo_dataset", build)


def cut(pairs: Sequence[Pair], at: Sequence[int]) -> list[Sequence[Pair]]:
    ends = [0, *at, len(pairs)]
    return [pairs[a:b] for a, b in pairwise(ends)]


def test_how_feedback_was_cut_into_batches_changes_nothing_of_a_dataset(tmp_path: Path) -> None:
    pairs = feedback()
    made = []
    for name, spans in {
        "whole": [pairs],
        "three": cut(pairs, [50, 51]),
        "back": cut(pairs, [20, 90, 200])[::-1],
    }.items():
        store = Store(tmp_path / name)
        made.append(store.dataset(store.fit(span) for span in spans))
    assert len({one.digest for one in made}) == 1
    assert len({tuple((one.path / f"{STORED}places.parquet").read_bytes()) for one in made}) == 3
    for side in SPLITS:
        first, *others = (read_split(one.path, side) for one in made)
        assert first.height > 30
        assert all(first.equals(other) for other in others)


def test_it_holds_what_the_rules_leave_of_the_pairs_in_memory(tmp_path: Path) -> None:
    """No prompt is too long: of such a pair and its like, in memory a rule across rows speaks first."""
    pairs = [one for one in feedback(300, seed=1) if len(one.prompt[0]["content"].split()) < 40]
    store = Store(tmp_path)
    made = store.dataset(store.fit(span) for span in cut(pairs, [100, 170]))
    screened = screen(with_flags(pairs_frame(pairs)), quarantine_frame([]), store.feedback.cleaning)
    accepted, unfit = fit_to_model(screened.pairs, tokens_of(screened.pairs), MAX_LENGTH)
    for side, expected in zip(("train", "eval"), split(accepted, 0.3, 0), strict=True):
        found = read_split(made.path, side)  # type: ignore[arg-type]
        assert found["pair_id"].to_list() == expected["pair_id"].to_list()
        assert found.drop("flags").equals(expected.drop("flags").select(found.drop("flags").columns))
    report = made.json("report.json")
    assert (report["duplicates"], report["rows_in"]) == (screened.duplicates, len(pairs))
    rejected = pl.read_parquet(made.path / "quarantine.parquet")
    assert sorted(rejected["reason"]) == sorted([*screened.quarantine["reason"], *(row["reason"] for row in unfit)])
    told = [*screened.quarantine.iter_rows(), *(tuple(row.values()) for row in unfit)]
    assert sorted(rejected.iter_rows()) == sorted(told)
    assert report["rows_in"] == report["accepted"] + report["quarantined"] + report["duplicates"]


def test_a_batch_that_came_twice_is_counted_twice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    batch = store.fit(feedback())
    once, twice = (store.dataset([batch] * times).json("report.json") for times in (1, 2))
    assert twice["rows_in"] == 2 * once["rows_in"]
    for report in (once, twice):
        assert report["rows_in"] == report["accepted"] + report["quarantined"] + report["duplicates"]
    assert twice["accepted"] == once["accepted"]


def test_what_an_earlier_dataset_found_out_is_taken_up_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []
    measure = screening.similarity
    monkeypatch.setattr(screening, "similarity", lambda *given: compared.append(given) or measure(*given))
    pairs = feedback(400, seed=2)
    store = Store(tmp_path)
    old, new = store.fit(pairs[:390]), store.fit(pairs[390:])
    earlier = store.dataset([old])
    first = len(compared)
    fresh = store.dataset([old, new])
    whole = len(compared) - first
    taken_up = store.dataset([old, new], earlier)
    again = len(compared) - first - whole
    assert taken_up.digest == fresh.digest
    for name in (f"{STORED}compared.parquet", f"{STORED}refused.parquet"):
        assert (taken_up.path / name).read_bytes() == (fresh.path / name).read_bytes()
    assert first > 20
    assert again <= whole - first + 5


def test_another_least_similarity_takes_nothing_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    batch = store.fit(feedback(200, seed=3))
    earlier = store.dataset([batch])
    assert Found.in_dataset(earlier.path, 0.85).compared is not None
    found = Found.in_dataset(earlier.path, 0.5).compared
    assert found is not None
    assert found.is_empty()


def test_a_change_of_any_column_or_token_is_another_dataset(tmp_path: Path) -> None:
    pairs = pairs_frame([pair(0), pair(1)])
    table = pairs.join(tokens_of(pairs).drop("template_fault"), on="pair_id")
    before = facts_frame(table, MAX_LENGTH, 0).select("content_a", "content_b")
    for column in (*PAIR_COLUMNS, *TOKEN_COLUMNS):
        changed: Any = {
            "string": pl.concat_str(pl.col(column.name).fill_null(""), pl.lit("x")),
            "integer": pl.col(column.name) + 1,
            "number": pl.col(column.name).fill_null(0.0) + 1.0,
            "messages": pl.col(column.name).list.concat(pl.col("rejected")),
            "tokens": pl.col(column.name).list.eval(pl.element() + 1),
        }[column.kind]
        if column.name == "meta":
            changed = pl.lit('{"other": 1}')
        after = facts_frame(table.with_columns(changed.alias(column.name)), MAX_LENGTH, 0)
        assert not (after.select("content_a", "content_b") == before).to_numpy().any(), column.name


def test_a_token_that_moves_to_the_next_column_is_another_content() -> None:
    pairs = pairs_frame([pair(0)])
    ids = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1], [2], [3, 4])]
    columns = [column.name for column in TOKEN_COLUMNS]
    tables = [
        pairs.with_columns(pl.Series(c, [i], dtype=pl.List(pl.Int32)) for c, i in zip(columns, one, strict=True))
        for one in ids
    ]
    assert len({facts_frame(table, MAX_LENGTH, 0)["content_a"].item() for table in tables}) == 3


def test_columns_and_the_first_pairs_of_a_split_are_read_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.dataset(store.fit(span) for span in cut(feedback(), [100]))
    for side in SPLITS:
        whole = read_split(made.path, side)
        assert whole.columns == split_columns(made.path, side)
        assert split_rows(made.path, side) == whole.height
        assert has_split(made.path, side)
        some = read_split(made.path, side, ["row", "prompt_ids"], first=7)
        assert some.equals(whole.head(7).select("row", "prompt_ids"))
        for first in (None, 25):
            parts = list(split_parts(made.path, side, first=first, size=10))
            assert max(part.height for part in parts) == 10
            assert pl.concat(parts).equals(whole if first is None else whole.head(first))
        with split_file(made.path, side, ["pair_id", "chosen_ids"], tmp_path / "not" / "yet") as table:
            assert pl.read_parquet(table).equals(whole.select("pair_id", "chosen_ids"))
            assert pq.read_metadata(table).row_group(0).num_rows == whole.height
        assert not table.exists()
        whole.write_parquet(tmp_path / f"{side}.parquet")
        assert read_split(tmp_path, side).equals(whole)
        by_hand = list(split_parts(tmp_path, side, ["row", "pair_id"], first=25, size=10))
        assert [part.height for part in by_hand] == [0, 10, 10, 5]
        assert pl.concat(by_hand).equals(whole.head(25).select("row", "pair_id"))
        (tmp_path / f"{side}.parquet").unlink()
    assert not has_split(tmp_path, "train")
    assert split_rows(tmp_path, "train") == 0


def test_a_released_pair_says_so_in_its_flags(tmp_path: Path) -> None:
    release = [{"reason": "conflict", "source": "*", "note": "looked through"}]
    store = Store(tmp_path, release=release)
    made = store.dataset(store.fit(span) for span in cut(feedback(), [100]))
    flags = pl.concat([read_split(made.path, side)["flags"] for side in SPLITS])
    released = flags.str.contains("(?:^|,)released:conflict$").sum()
    assert released == made.json("report.json")["released"][0]["rows"] > 5
    assert not flags.str.starts_with(",").any()


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_batch_that_is_gone_or_damaged_is_named_and_never_read(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    made = store.dataset([store.fit(feedback())])
    [part] = parts_of(made.path)
    path = part.folder(made.path) / "pairs.parquet"
    if damage == "gone":
        path.unlink()
    else:
        other = pl.read_parquet(path).with_columns(chosen_ids=pl.col("rejected_ids"))
        path.unlink()
        other.write_parquet(path)
    with pytest.raises(CorruptArtifact, match=str(path)):
        read_split(made.path, "train")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\r"])
def test_a_mark_in_a_text_that_some_take_for_a_line_end_ends_no_row(mark: str) -> None:
    pairs = pairs_frame([pair(0, chosen=[assistant(f"one{mark}two")]), pair(1)])
    table = pairs.join(tokens_of(pairs).drop("template_fault"), on="pair_id")
    both, alone = (facts_frame(rows, MAX_LENGTH, 0) for rows in (table, table.tail(1)))
    assert both["content_a"].n_unique() == 2
    assert both.tail(1).equals(alone)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_dataset_with_a_damaged_batch_counts_as_gone_wherever_an_earlier_one_is_asked_for(
    tmp_path: Path, damage: str
) -> None:
    store = Store(tmp_path)
    made = store.dataset([store.fit(feedback())])
    adapter = store.tree.find_or_build("dpo_adapter", "a" * 32, lambda _: None, {"dpo_dataset": made.digest})[0]
    inputs = {"dpo_adapter": adapter.digest, "dpo_dataset": made.digest}
    store.tree.find_or_build("published_model", "b" * 32, lambda _: None, inputs)
    [whole] = Trace.of(store.tree.root).releases
    assert (kept(store.tree, "dpo_dataset", made.digest), whole.gone) == (made, ())
    [part] = parts_of(made.path)
    path = part.folder(made.path) / "pairs.parquet"
    table = pl.read_parquet(path)
    path.unlink()
    if damage == "changed":
        table.write_parquet(path, row_group_size=7)
    assert kept(store.tree, "dpo_dataset", made.digest) is None
    [release] = Trace.of(store.tree.root).releases
    assert release.gone == (made.digest,)
    assert release.rows.is_empty()
    assert Trace.of(store.tree.root).withdrawn(release.name, inputs) is None
    with pytest.raises(CorruptArtifact, match=str(path)):
        split_columns(made.path, "train")
    with pytest.raises(CorruptArtifact, match=str(path)):
        next(split_parts(made.path, "train"))


def test_a_dataset_of_batches_that_were_made_again_with_other_bytes_takes_the_place_of_the_old_one(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    read, fitted = store.fit(feedback())
    old = store.dataset([(read, fitted)])
    pairs = pl.read_parquet(fitted.path / "pairs.parquet")
    for path in (fitted.path / "pairs.parquet", fitted.path / "manifest.json"):
        path.unlink()
    pairs.write_parquet(fitted.path / "pairs.parquet", row_group_size=7)
    again = seal(fitted.path, kind=FITTED_KIND, fingerprint=fitted.fingerprint, inputs={})
    new = store.dataset([(read, again)])
    assert new.digest == old.digest
    assert (is_whole(new.path), is_whole(old.path)) == (True, False)
    store.tree.find_or_build("published_model", "b" * 32, lambda _: None, {"dpo_dataset": old.digest})
    assert kept(store.tree, "dpo_dataset", old.digest) == new
    [release] = Trace.of(store.tree.root).releases
    assert release.datasets == {old.digest: new}


def test_a_batch_is_read_itself_before_it_is_called_damaged_by_a_digest_that_was_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    made = store.dataset([store.fit(feedback())])
    monkeypatch.setattr(hashing, "known_sha256", lambda _: "0" * 64)  # As of a record that another step wrote.
    assert is_whole(made.path)
    assert read_split(made.path, "train").height


def test_rows_that_a_rule_released_count_for_it_wherever_it_stands_in_the_recipe_by_now(tmp_path: Path) -> None:
    of_row, across = (
        {"reason": reason, "source": "*", "note": "looked through"} for reason in ("template_marks", "conflict")
    )
    store = Store(tmp_path, release=[across, of_row])
    batch = store.fit(feedback())
    before = store.dataset([batch]).json("report.json")["released"]
    store.feedback = settings(release=[of_row, across])  # The batch is the same one: it was made by `of_row` alone.
    after = store.dataset([batch]).json("report.json")["released"]
    assert {one["reason"]: one["rows"] for one in after} == {one["reason"]: one["rows"] for one in before}
    assert min(one["rows"] for one in after) > 0
    assert after[0]["rows"] != after[1]["rows"]


def test_one_text_on_both_sides_is_a_leak_whatever_the_ids_say(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked = [user("Who is asked on both sides?")]
    answers = [[assistant(" ".join(WORDS[n : n + 9]))] for n in range(20)]
    read, fitted = store.fit([pair(n, prompt=asked, chosen=answers[n], rejected=answers[-1]) for n in range(12)])
    assert store.dataset([(read, fitted)]).json("report.json")["leaked_prompts"] == 0
    keys = pl.read_parquet(fitted.path / KEYS)
    number = pl.int_range(pl.len(), dtype=pl.UInt64)
    told = dict.fromkeys(("together", *PROMPT_ID), number)
    told |= {"draw": number % 2 * (2**63), "group_id": pl.format("g{}", number)}
    keys.with_columns(**told).write_parquet(fitted.path / KEYS)
    assert store.dataset([(read, fitted)]).json("report.json")["leaked_prompts"] == 1


@pytest.mark.parametrize("damage", ["gone", "cut off", "no table"])
def test_a_damaged_batch_whose_token_ids_could_be_taken_up_is_set_aside_and_stops_nothing(
    tmp_path: Path, damage: str
) -> None:
    store = Store(tmp_path)
    (read, damaged), (_, whole) = store.fit(feedback(20)), store.fit(feedback(20))
    for one in (damaged, whole):
        manifest = Manifest.model_validate_json((one.path / "manifest.json").read_bytes())
        told = manifest.model_copy(update={"inputs": {"base_model": read.digest}})
        (one.path / "manifest.json").write_text(told.model_dump_json())
    path = damaged.path / KEYS
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage == "cut off" else b"not a table")
    found = _known(SimpleNamespace(tree=store.tree), read, read.path / "pairs.parquet")  # type: ignore[arg-type]
    assert list(found) == [whole.path / "pairs.parquet"]
    assert not damaged.path.exists()
