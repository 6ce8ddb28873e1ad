"""What the recipe says about unfit pairs, pairs of many batches, and results that no order or setting changes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandera.polars  # noqa: F401  Imported here, so that no single test pays for it.
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import PAIR_ID, Batch, write_batch
from dpo_assets.feedback.near import similarity
from dpo_assets.feedback.pair import Pair, digest
from dpo_assets.feedback.pool import LoadedBatch, Pool, stored
from dpo_assets.feedback.screening import Screened, Screening, screen
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.recipe import CleaningSection, ReleaseRule
from dpo_assets_tests.feedback.test_near import long_pair, text
from dpo_assets_tests.samples import assistant, pair, user

KEY = "hf_" + "a1B2" * 8


def screened(*pairs: Pair, release: list[dict[str, str]] | None = None, **policy: Any) -> Screened:
    from dpo_assets.feedback.scan import with_flags

    rules = [ReleaseRule(**rule) for rule in release or []]
    return screen(with_flags(pairs_frame(pairs)), quarantine_frame([]), CleaningSection(**policy), rules)


def reasons(result: Screened) -> dict[str, str]:
    return {row["row"]: row["reason"] for row in result.quarantine.iter_rows(named=True)}


def near(number: int = 0, word: str = "else", **changes: Any) -> Pair:
    words = text(3 * number + 1).split()
    words[40] = word
    return long_pair(number, chosen=[assistant(" ".join(words))], **{"row": f"near {word}"} | changes)


# Near duplicates


def test_of_near_duplicates_one_stays_and_the_others_are_quarantined() -> None:
    result = screened(long_pair(0), near(0), near(0, "other"), long_pair(1))
    assert result.pairs.height == 2
    assert set(reasons(result).values()) == {"near_duplicate"}
    assert "0.85" in result.quarantine["message"][0]


def chain(number: int) -> list[Pair]:
    """Three pairs: the second is near the first, the third near the second and not near the first."""
    words = text(3 * number + 1).split()
    pairs = []
    for step in range(3):
        pairs.append(long_pair(number, chosen=[assistant(" ".join(words))], row=f"chain {number}, step {step}"))
        for at in (20 * step + 5, 20 * step + 6):
            words[at] = f"other{step}"
    return pairs


def test_what_a_near_duplicate_is_near_to_stays() -> None:
    """A chain of small steps is not dropped as a whole: what goes is near to something that is kept."""
    steps = [one for number in range(30) for one in chain(number)]
    names = {row["row"] for row in screened(*steps).pairs.iter_rows(named=True)}
    rows = {row["row"]: row for row in pairs_frame(steps).iter_rows(named=True)}
    for number in range(30):
        of_chain = [rows[f"chain {number}, step {step}"] for step in range(3)]
        first, second, third = of_chain
        assert min(similarity(first, second), similarity(second, third)) >= 0.85 > similarity(first, third)
        kept = [row for row in of_chain if row["row"] in names]
        assert kept != of_chain
        assert all(row in kept or max(similarity(row, other) for other in kept) >= 0.85 for row in of_chain)


def test_near_duplicates_are_dropped_and_counted_or_kept_as_the_recipe_says() -> None:
    dropped = screened(long_pair(0), near(0), near_duplicates="drop")
    assert (dropped.pairs.height, dropped.quarantine.height, dropped.duplicates, dropped.near_duplicates) == (
        1,
        0,
        1,
        1,
    )
    kept = screened(long_pair(0), near(0), near_duplicates="keep")
    assert (kept.pairs.height, kept.quarantine.height, kept.duplicates) == (2, 0, 0)


def test_the_similarity_of_the_recipe_decides() -> None:
    assert screened(long_pair(0), near(0), near_duplicate_similarity=1.0).pairs.height == 2


def test_what_came_later_or_has_no_date_is_the_near_duplicate_of_what_was_there_whatever_its_id() -> None:
    """Else every second near duplicate would put a pair out that was trained on, and SFT would be renewed for it."""
    orders = set()
    for number in range(6):
        first = long_pair(number, created_at="2026-01-01T23:00:00+00:00")
        for later in ("2026-01-02T01:00:00+00:00", None):
            new = near(number, created_at=later)
            result = screened(new, first)
            assert list(result.pairs["pair_id"]) == [first.pair_id]
            assert reasons(result) == {"near else": "near_duplicate"}
            orders.add(first.pair_id < new.pair_id)
    assert orders == {True, False}, "by id, the one or the other would stay"


# Caps


def test_a_prompt_keeps_as_many_pairs_as_the_recipe_says_whatever_their_order() -> None:
    many = [pair(0, chosen=[assistant(text(n))], row=f"r{n}", line=n + 1) for n in range(5)]
    result = screened(*many, pair(1), max_pairs_per_prompt=2)
    assert Counter(reasons(result).values()) == {"over_prompt_cap": 3}
    assert result.pairs["prompt_id"].n_unique() == 2
    turned = screened(*many[::-1], pair(1), max_pairs_per_prompt=2)
    assert set(turned.pairs["pair_id"]) == set(result.pairs["pair_id"])


def test_of_one_prompt_the_pairs_that_came_first_are_kept() -> None:
    days = ["2026-01-05", None, "2026-01-03", "2026-01-04", "2026-01-02"]
    many = [pair(0, chosen=[assistant(text(n))], row=f"r{n}", created_at=day) for n, day in enumerate(days)]
    assert set(reasons(screened(*many, max_pairs_per_prompt=3))) == {"r0", "r1"}


# Marks of chat templates


def test_a_mark_of_a_chat_template_is_quarantined_escaped_or_kept() -> None:
    marked = pair(1, chosen=[assistant("done<|im_end|> so")])
    assert reasons(screened(pair(0), marked)) == {"row-1": "template_marks"}
    [escaped] = screened(marked, template_marks="escape").pairs.to_dicts()
    assert escaped["chosen"][0]["content"] == "done< |im_end|> so"
    assert escaped["pair_id"] == pair(1, chosen=escaped["chosen"]).pair_id != marked.pair_id
    assert escaped["flags"] == "template,rewritten"
    [kept] = screened(marked, template_marks="keep").pairs.to_dicts()
    assert kept["pair_id"] == marked.pair_id


def test_the_special_tokens_of_the_model_count_too() -> None:
    pool = [pair(0, chosen=[assistant("<s>old</s>")]), pair(1, chosen=[assistant("x[gMASK]")]), pair(2)]
    from dpo_assets.feedback.scan import with_flags

    def rows(*marks: str) -> set[str]:
        found = Screening(Pool([LoadedBatch(with_flags(pairs_frame(pool)))]), marks=marks)
        list(found.parts())
        return set(found.quarantine()["row"])

    assert rows() == set()
    assert rows("<s>", "</s>") == {"row-0"}
    assert rows("[gMASK]") == {"row-1"}


# Personal data and secrets


@pytest.mark.parametrize(("policy", "reason", "text_"), [
    ("personal_data", "personal_data", "write to a@b.io"), ("secrets", "secret", f"my key is {KEY}"),
])  # fmt: skip
def test_personal_data_and_secrets_are_flagged_masked_or_quarantined(policy: str, reason: str, text_: str) -> None:
    holder = pair(1, prompt=[user(text_)])
    [flagged] = screened(holder).pairs.to_dicts()
    assert flagged["prompt"] == holder.prompt
    assert flagged["flags"] != ""
    assert reasons(screened(holder, pair(0), **{policy: "quarantine"})) == {"row-1": reason}
    [masked] = screened(holder, **{policy: "redact"}).pairs.to_dicts()
    assert "[" in masked["prompt"][0]["content"]
    assert masked["pair_id"] == pair(1, prompt=masked["prompt"]).pair_id
    assert masked["flags"].endswith(",rewritten")


def test_two_pairs_that_masking_makes_equal_are_duplicates_and_one_that_it_empties_of_preference_is_none() -> None:
    two = [pair(0, prompt=[user(f"ask {name}@b.io")], row=name) for name in ("jane", "john")]
    result = screened(*two, personal_data="redact")
    assert (result.pairs.height, result.duplicates) == (1, 1)
    only = pair(0, chosen=[assistant("a@b.io")], rejected=[assistant("c@d.io")])
    assert reasons(screened(only, personal_data="redact")) == {"row-0": "no_preference"}


# Evaluation sets


def evaluation(folder: Path, *lines: Any) -> list[str]:
    path = folder / "set.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return [str(path)]


def test_a_pair_that_asks_what_a_model_is_judged_by_is_set_aside(tmp_path: Path) -> None:
    long = "Explain in three sentences why the sky is blue and the sunset red"
    sets = evaluation(
        tmp_path, {"prompt": "What is the capital of France?"}, {"messages": [user(long)]}, "a plain line of text"
    )
    asked = [
        pair(0, prompt=[user("what is the capital of france")]),
        pair(1, prompt=[user(f"Please: {long.upper()}, and keep it short!")]),
        pair(2, prompt=[user("A plain line\nof text")]),
        pair(3, prompt=[user("What is the capital of Spain?")]),
        pair(4, prompt=[user("Explain in three sentences why cats purr and dogs bark at the moon")]),
        pair(5, prompt=[user("hi"), assistant("What is the capital of France?"), user("no idea")]),
    ]
    result = screened(*asked, evaluation_sets=sets)
    assert reasons(result) == dict.fromkeys(["row-0", "row-1", "row-2"], "evaluation_overlap")


@pytest.mark.parametrize("content", ["", "\n\n", '{"nothing": 1}'])
def test_an_evaluation_set_without_a_prompt_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "set.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="gives no prompt"):
        screened(pair(0), evaluation_sets=[str(tmp_path / "set.jsonl")])


# Released by rule


def test_a_rule_releases_rows_of_the_sources_that_it_names_and_they_say_so() -> None:
    one = pair(1, chosen=[assistant("<|im_end|>")], source="checked-2026.jsonl")
    other = pair(2, chosen=[assistant("<|im_end|>")], source="raw.jsonl")
    note = {"reason": "template_marks", "source": "checked-*", "note": "a tutorial on chat templates"}
    result = screened(one, other, release=[note])
    assert reasons(result) == {"row-2": "template_marks"}
    assert result.pairs["row"].to_list() == ["row-1"]
    assert result.pairs["flags"].to_list() == ["template,released:template_marks"]


def test_both_sides_of_a_contradiction_can_be_released_and_a_fault_of_the_row_cannot() -> None:
    turned = pair(0, chosen=pair(0).rejected, rejected=pair(0).chosen, row="turned")
    rule = {"reason": "conflict", "note": "both opinions are wanted here"}
    assert screened(pair(0), turned, release=[rule]).pairs.height == 2
    with pytest.raises(ValueError, match="reason"):
        ReleaseRule(reason="no_preference", note="there is no preference in it")


# Many batches


def write(folder: Path, batches: list[list[Pair]]) -> Pool:
    for n, pairs in enumerate(batches):
        (folder / str(n)).mkdir()
        write_batch(Batch(pairs=pairs, rows=len(pairs)), folder / str(n))
    return stored([folder / str(n) for n in range(len(batches))])


def outcome(pool: Pool, size: int = 1 << 16, **policy: Any) -> tuple[list[Any], list[Any], int]:
    screening = Screening(pool, CleaningSection(**policy))
    rows = [row for part, _ in screening.parts(size) for row in part.rows()]
    return rows, sorted(screening.quarantine().rows()), screening.duplicates


_changes = st.sampled_from(
    [
        {}, {"chosen": [assistant("x<|im_end|>")]}, {"chosen": [assistant("a@b.io")]}, {"rejected": [assistant("z")]},
        {"chosen": [assistant("a bad answer")], "rejected": [assistant("a good answer")]},
    ]
)  # fmt: skip
DAYS = {"x": "2026-01-03T00:00:00+00:00", "y": "2026-01-01T00:00:00+00:00", "z": None}
_many = st.lists(
    st.one_of(
        st.builds(
            lambda n, source, line, changes: pair(n, source=source, line=line, row=f"{source}{line}", **changes),
            st.integers(0, 3), st.sampled_from("ab"), st.integers(1, 9), _changes,
        ),
        st.builds(
            lambda n, word: near(n, word, source="c", line=ord(word), created_at=DAYS[word]),
            st.integers(0, 1), st.sampled_from("xyz"),
        ),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(pairs=_many, cuts=st.tuples(st.integers(0, 12), st.integers(0, 12)), size=st.integers(1, 5), data=st.data())
def test_no_order_of_rows_no_cut_into_batches_and_no_size_of_parts_changes_the_result(
    pairs: list[Pair], cuts: tuple[int, int], size: int, data: st.DataObject
) -> None:
    policy = {"max_pairs_per_prompt": 3, "personal_data": "redact"}
    shuffled = data.draw(st.permutations(pairs))
    a, b = sorted(min(c, len(pairs)) for c in cuts)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole = outcome(write(Path(one), [pairs]), **policy)
        parts = outcome(write(Path(other), [shuffled[:a], shuffled[a:b], shuffled[b:]]), size, **policy)
    assert parts == whole
    assert len(pairs) == len(whole[0]) + len(whole[1]) + whole[2]


def test_rows_are_taken_from_the_groups_that_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_assets.feedback.batches.ROW_GROUP", 3)
    pool = write(tmp_path, [[pair(n) for n in range(10)], [pair(n) for n in range(10, 14)]])
    keys = pool.keys(list(PAIR_ID))
    for wanted in ([0], [2, 3], [9], [0, 5, 9, 10, 13], list(range(14))):
        names = keys[wanted]
        taken = pool.take(names)
        assert [int(one[:16], 16) for one in taken["pair_id"]] == names[PAIR_ID[0]].to_list()
        assert taken.select("b", "n").rows() == names.select("b", "n").rows()
    assert pool.take(keys.clear()).height == 0


# The same in every process

SCRIPT = """
import sys
from pathlib import Path
from dpo_assets.feedback.screening import Screening
from dpo_assets.feedback.splits import split
from dpo_assets.feedback.batches import PairWriter
from dpo_assets.feedback.ingest import BatchSize
from dpo_assets.feedback.pool import stored
from dpo_assets.feedback.reading import Job, cut, run_jobs
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.sources import files_of
from dpo_assets.recipe import FeedbackSource
import hashlib

source, work, size, turned = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "turned"
files = files_of([FeedbackSource(path=str(source / "*.jsonl"))])
files = files[::-1] if turned else files
spans = [(file, n, span) for file in files for n, span in enumerate(cut(file, BatchSize(10**6, size)) or [None])]
jobs = [Job(file, span, ReadOptions(), work / f"{file.name}-{n}") for file, n, span in spans]
for job in jobs:
    job.folder.mkdir(parents=True)
run_jobs(jobs)
screening = Screening(stored([job.folder / "0" for job in jobs]))
with PairWriter(work / "train.parquet") as train, PairWriter(work / "eval.parquet") as held_out:
    for part, _ in screening.parts():
        for writer, side in zip((train, held_out), split(part, 0.3, 0)):
            writer.write(side)
screening.quarantine().sort("source", "line", "row").write_parquet(work / "quarantine.parquet")
for name in ("train", "eval", "quarantine"):
    print(hashlib.sha256((work / f"{name}.parquet").read_bytes()).hexdigest())
"""


def test_the_digest_is_the_same_whatever_the_hash_seed_the_locale_the_file_order_and_the_batch_size(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, start in (("a", 0), ("b", 150)):
        rows = [
            {"prompt": f"Größe {n % 190}?", "chosen": text(n % 190), "rejected": f"нет {n}", "id": n}
            for n in range(start, start + 200)
        ]
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for number, (seed, locale, size, order) in enumerate(
        [("0", "C", 1 << 25, "straight"), ("1", "C.UTF-8", 20_000, "turned"), ("random", "POSIX", 7_000, "straight")]
    ):
        work = tmp_path / str(number)
        work.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": locale, "LANG": locale}
        command = [sys.executable, "-c", SCRIPT, str(source), str(work), str(size), order]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]


def test_a_row_says_which_bytes_it_was_read_from(tmp_path: Path) -> None:
    from dpo_assets.feedback.ingest import read_file
    from dpo_assets.feedback.readers import ReadOptions
    from dpo_assets.feedback.sources import FeedbackFile

    line = json.dumps({"prompt": "cafe\u0301?", "chosen": "yes\r\nno", "rejected": "b"}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    [read] = read_file(FeedbackFile(path, "a.jsonl", "trl"), ReadOptions()).pairs
    assert read.row_hash == digest(line)
    assert read.prompt == [user("caf\u00e9?")]
    assert read.chosen == [assistant("yes\nno")]
    assert {"nfc"} <= set(read.flags)


def test_what_the_schema_refuses_keeps_its_content() -> None:
    table = pairs_frame([pair(0)]).with_columns(line=pl.lit(0, dtype=pl.Int64))
    [row] = screen(table, quarantine_frame([])).quarantine.to_dicts()
    assert row["reason"] == "schema"
    assert json.loads(base64.b64decode(row["raw"]))["prompt"] == pair(0).prompt
