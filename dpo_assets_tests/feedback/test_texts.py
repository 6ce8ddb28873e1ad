"""What texts hold beside words: space that is the preference, lost letters, ends of turns, names of people."""

from __future__ import annotations

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import COUNTS, PAIRS, write_batch
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import JudgedAnswer, hashed_user
from dpo_assets.feedback.pairing import pair_answers
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.rules import NOT_DAMAGE
from dpo_assets.feedback.scan import BESIDE, EMAIL, escaped, marks_in, redacted_json
from dpo_assets.feedback.sources import FeedbackFile
from dpo_assets.feedback.tables import answers_frame
from dpo_assets.resources.artifacts import USER_KEY, ArtifactStore
from dpo_assets_tests.feedback.test_bad_rows import accepted, refused, row
from dpo_assets_tests.samples import assistant, user

INDENTED = (
    "def f(x):\n    if x:\n        return 1\n    return 2",
    "def f(x):\n    if x:\n        return 1\n        return 2",
)
LINES = ("- a\n- b\n- c", "- a - b - c")


@pytest.mark.parametrize(("chosen", "rejected"), [INDENTED, LINES, (LINES[1], LINES[0]), ("    return 1", "return 1")])
def test_white_space_can_be_the_preference(tmp_path: Path, chosen: str, rejected: str) -> None:
    pair = accepted(tmp_path, row(chosen=chosen, rejected=rejected))
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (chosen, rejected)
    assert "white_space_alone" in pair["flags"]


def test_pairs_that_differ_in_words_are_not_flagged_as_white_space(tmp_path: Path) -> None:
    assert "white_space_alone" not in accepted(tmp_path, row(chosen="a b c d e", rejected="a b c d  f"))["flags"]


def test_answers_that_were_judged_differently_for_their_white_space_make_a_pair() -> None:
    judged = [
        JudgedAnswer([user("Write f")], [assistant(text)], score, "a.jsonl", str(n), n, "human_thumb")
        for n, (text, score) in enumerate(zip(INDENTED, (1.0, -1.0), strict=True), start=1)
    ]
    [pair] = pair_answers(answers_frame(judged), "best_worst").pairs
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == INDENTED


def test_an_answer_that_was_judged_twice_is_one_answer_whatever_space_follows_it() -> None:
    judged = [
        JudgedAnswer([user("Hi")], [assistant(text)], score, "a.jsonl", str(n), n, "human_rating")
        for n, (text, score) in enumerate([("Yes.", 5.0), ("Yes.\n", 1.0), ("No.", 2.0)], start=1)
    ]
    [pair] = pair_answers(answers_frame(judged), "best_worst").pairs
    assert (pair.chosen[0]["content"].strip(), pair.margin) == ("Yes.", 1.0)


@pytest.mark.parametrize("text", ["caf\ufffd is closed", "it\x92s fine"], ids=["replacement character", "C1 control"])
def test_letters_that_were_lost_or_misread_are_flagged_and_counted(tmp_path: Path, text: str) -> None:
    (tmp_path / "in").mkdir()
    assert "misread_text" in accepted(tmp_path / "in", row(chosen=text))["flags"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(chosen=text)) + "\n" + json.dumps(row()) + "\n", encoding="utf-8")
    (tmp_path / "batch").mkdir()
    counts = write_batch(read_file(FeedbackFile(path, "rows.jsonl", "trl"), ReadOptions()), tmp_path / "batch")
    assert counts["flags"] == {"misread_text": 1}
    assert json.loads((tmp_path / "batch" / COUNTS).read_text(encoding="utf-8")) == counts


# The end of a turn

ENDS = ["<|im_end|>", "<|im_end", "<|im_end|", "<|eot_id|>\n", "<end_of_turn", "[/INST", "<|im_end|><|im_e"]


@pytest.mark.parametrize("end", ENDS)
def test_a_turn_mark_at_an_answers_end_is_found_also_when_it_is_cut(tmp_path: Path, end: str) -> None:
    refused(tmp_path, row(chosen=f"It is good.{end}"), "template_marks")


@pytest.mark.parametrize("end", ENDS)
def test_escaping_leaves_nothing_of_a_turn_mark_at_an_answers_end(tmp_path: Path, end: str) -> None:
    pair = accepted(tmp_path, row(chosen=f"It is good.{end}"), template_marks="escape")
    assert pair["chosen"][0]["content"] == "It is good."


def test_an_answer_that_is_nothing_but_an_end_mark_is_empty(tmp_path: Path) -> None:
    refused(tmp_path, row(chosen="<|im_end|>"), "empty_chosen", template_marks="escape")


@pytest.mark.parametrize("text", ["f <|", "x <|> y", "a <", "see [I", "see [NOTE", "print <|x"])
def test_the_end_of_ordinary_text_is_no_cut_mark(text: str) -> None:
    assert marks_in(text) == set()


@example(["<|im_", "[/INST", "]", "end|>", "end|>"])
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "[/INST", "]", " ", "\n", "word", "<end_of_turn"])))
def test_an_escaped_answer_holds_no_mark_whole_or_cut(parts: list[str]) -> None:
    assert marks_in(escaped("".join(parts), answer=True)) == set()


# People

MAIL = "jane.doe@mail.example.com"


def test_redaction_reaches_the_columns_that_are_only_kept(tmp_path: Path) -> None:
    given_ = row(id=f"{MAIL}-7", note=f"from {MAIL}", nested={"who": [MAIL, 1], MAIL: None}, count=4111111111111111)
    pair = accepted(tmp_path, given_, personal_data="redact")
    assert MAIL not in json.dumps(pair)
    meta = json.loads(pair["meta"])
    assert (meta["note"], meta["nested"]) == ("from [email]", {"who": ["[email]", 1], "[email]": None})
    assert meta["count"] == 4111111111111111


def test_personal_data_beside_the_conversation_is_flagged_and_quarantines_nothing(tmp_path: Path) -> None:
    pair = accepted(tmp_path, row(note=f"from {MAIL}"), personal_data="quarantine")
    assert f"{EMAIL}{BESIDE}" in pair["flags"].split(",")
    assert MAIL in pair["meta"]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(MAIL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=3), _json, max_size=4))
def test_redacted_json_is_json_of_the_same_form_without_what_was_masked(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert MAIL not in redacted_json(text, [EMAIL])
    assert json.loads(redacted_json(text, [])) == value


def ingested_user(folder: Path, key: bytes, who: str = "203.0.113.7") -> tuple[str | None, bytes]:
    """The user of the one pair of a batch, and the bytes of its tables."""
    folder.mkdir()
    path = folder / "arena.jsonl"
    turns = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yes."}]
    side = [*turns[0], *turns[1]]
    other = [*turns[0], {"role": "assistant", "content": "No."}]
    vote = {"question_id": "q", "winner": "model_a", "judge": who, "conversation_a": side, "conversation_b": other}
    path.write_text(json.dumps(vote) + "\n", encoding="utf-8")
    write_batch(read_file(FeedbackFile(path, path.name, "arena"), ReadOptions(user_key=key)), folder)
    return pl.read_parquet(folder / PAIRS)["user"][0], (folder / PAIRS).read_bytes()


def test_a_user_is_kept_as_a_digest_that_trying_does_not_undo(tmp_path: Path) -> None:
    """All addresses of a network, hashed as anyone can, do not hold it; who has the key finds it."""
    key = b"k" * 32
    kept, _ = ingested_user(tmp_path / "a", key)
    tries = {hashlib.sha256(f"user:203.0.113.{n}".encode()).hexdigest()[:16] for n in range(256)}
    assert kept is not None
    assert kept not in tries
    assert kept == hashed_user("203.0.113.7", key)
    assert kept != ingested_user(tmp_path / "b", b"l" * 32)[0]


def test_without_a_key_no_user_is_kept(tmp_path: Path) -> None:
    assert ingested_user(tmp_path / "a", b"")[0] is None


def test_the_key_of_a_store_is_made_once_and_is_its_owners(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without hard links."""

    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    store = ArtifactStore(root=str(tmp_path / "store"))
    with ThreadPoolExecutor(8) as pool:
        keys = {done.result() for done in [pool.submit(store.user_key, instance) for _ in range(8)]}
    assert len(keys) == 1
    path = tmp_path / "store" / USER_KEY
    assert {file.name for file in path.parent.iterdir()} <= {USER_KEY, f"{USER_KEY}.lock"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.isdisjoint({ArtifactStore(root=str(tmp_path / "other")).user_key(instance)})


def test_a_damaged_key_names_its_file_and_is_not_replaced(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    store = ArtifactStore(root=str(tmp_path))
    store.user_key(instance)
    (tmp_path / USER_KEY).write_text("", encoding="ascii")
    with pytest.raises(ConfigError, match=USER_KEY):
        store.user_key(instance)


def test_equal_answers_are_the_only_ones_without_a_preference() -> None:
    assert "no_preference" not in NOT_DAMAGE  # An export whose two answers are one text is broken.
