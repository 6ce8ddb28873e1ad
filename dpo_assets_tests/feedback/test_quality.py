"""Measures of a dataset's pairs: what they see, what they let alone, and that no order of rows changes them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.feedback import quality
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import token_schema
from dpo_assets.feedback.quality import distances, lengths, sizes, token_stats, truncation, with_cut_answers
from dpo_assets.feedback.quality_numbers import EXAMPLES, SNIPPET, paired_auc
from dpo_assets.feedback.quality_text import answer_texts, degenerate, loop_share, surface
from dpo_assets.feedback.quality_tokens import TEMPLATE_MARKS, Markers, read_markers
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.screening import screen
from dpo_assets.feedback.sources import files_of
from dpo_assets.feedback.splits import fit_to_model
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.recipe import FeedbackSource
from dpo_assets_tests.pipelines import PACKAGE, STORIES
from dpo_assets_tests.samples import assistant, pair, user

EOS = 2
MARKERS = Markers(frozenset({EOS}), TEMPLATE_MARKS)
IDS = pl.List(pl.Int32)
ids = st.lists(st.integers(0, 5), max_size=12)


def pairs_of(
    answers: list[tuple[list[int], list[int]]], texts: list[tuple[str, str]] | None = None, prompt: int = 3
) -> pl.DataFrame:
    """Accepted pairs with these tokens and texts, each after a prompt of `prompt` tokens."""
    said = texts or [(f"good {n}", f"bad {n}") for n in range(len(answers))]
    table = pairs_frame([pair(n, chosen=[assistant(c)], rejected=[assistant(r)]) for n, (c, r) in enumerate(said)])
    columns = {"prompt_ids": [[9] * prompt] * len(answers)} | {
        f"{side}_ids": [answer[n] for answer in answers] for n, side in enumerate(("chosen", "rejected"))
    }
    return table.hstack(pl.DataFrame(columns, schema=dict.fromkeys(columns, IDS)))


def faults_of(text: str, tokens: list[int] = [5, EOS], markers: Markers = MARKERS, room: int = 50) -> dict[str, Any]:
    """What is wrong with one chosen answer."""
    pairs = with_cut_answers(pairs_of([(tokens, [1, EOS])], [(text, "no")], prompt=1), 1 + room)
    return degenerate(pairs, answer_texts(pairs), markers)


# Distance


def levenshtein(a: list[int], b: list[int]) -> int:
    """Wagner and Fischer's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), st.integers(1, 12))
def test_the_distance_is_levenshteins_over_the_longer_answer_after_the_cut(
    answers: list[tuple[list[int], list[int]]], room: int
) -> None:
    cut = with_cut_answers(pairs_of(answers), 3 + room)
    expected = []
    for chosen, rejected in answers:
        longer = max(len(chosen[:room]), len(rejected[:room]), 1)
        expected.append((levenshtein(chosen[:room], rejected[:room]), longer))
    measured = distances(cut, answer_texts(cut))
    assert measured["median"] == pytest.approx(
        float(np.median([steps / longer for steps, longer in expected])), abs=1e-6
    )
    assert measured["bins"] == {
        str(n): c for n, c in sorted(Counter(min(99, 100 * s // longer) for s, longer in expected).items())
    }


def test_token_ids_of_any_size_are_told_apart() -> None:
    # 0xD800 to 0xDFFF are no letters of a text, and 0 and the largest ids are tokens like any other.
    odd = [0, 10, 0xD800, 0xDFFF, 0xFFFF, 0x10FFFF]
    cut = with_cut_answers(pairs_of([(odd, [*odd[:-1], 7]), (odd, odd)]), 100)
    measured = distances(cut, answer_texts(cut))
    assert measured["bins"] == {"0": 1, str(100 // 6): 1}
    assert measured["shared_prefix"] == pytest.approx((5 / 6 + 1) / 2, abs=1e-6)
    surrogates = with_cut_answers(pairs_of([([0xD800], [0xDFFF])]), 100)
    assert distances(surrogates, answer_texts(surrogates))["bins"] == {"99": 1}


@pytest.mark.parametrize("steps", [7, 14, 28, 29, 55, 57, 58])
def test_a_distance_on_the_edge_of_a_bin_is_counted_in_it(steps: int) -> None:
    # As floats, 0.29 * 100 is a little less than 29.
    cut = with_cut_answers(pairs_of([([1] * 100, [1] * (100 - steps) + [2] * steps)]), 200)
    assert distances(cut, answer_texts(cut))["bins"] == {str(steps): 1}


def test_the_nearest_pairs_are_shown_from_their_first_difference() -> None:
    same = "word " * 100
    texts = [(same + "cat", same + "dog"), ("a" * 500, "b" * 500)]
    cut = with_cut_answers(pairs_of([([1] * 99 + [2], [1] * 99 + [3]), ([1] * 9, [2] * 9)], texts), 1000)
    nearest = distances(cut, answer_texts(cut))["nearest"]
    assert [row["distance"] for row in nearest] == [0.01, 1.0]
    assert nearest[0]["chosen"].endswith("cat")
    assert nearest[0]["rejected"].endswith("dog")
    assert all(len(row[side]) <= SNIPPET for row in nearest for side in ("chosen", "rejected"))


# Length


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12))
def test_the_auc_of_a_difference_is_the_chance_that_it_exceeds_a_swapped_one(values: list[int]) -> None:
    wins = [1.0 if a > -b else 0.5 if a == -b else 0.0 for a in values for b in values]
    found = paired_auc(np.array(values))
    assert found == pytest.approx(sum(wins) / len(wins))
    swapped = paired_auc(-np.array(values))
    assert swapped is not None
    assert found == pytest.approx(1 - swapped)


def test_lengths_are_what_training_sees_and_ties_count_half() -> None:
    pairs = pairs_of([([1] * 8, [1] * 4), ([1] * 4, [2] * 4), ([1] * 90, [2] * 8)])
    measured = lengths(sizes(pairs, 3 + 8), 3 + 8)
    assert (measured["chosen_mean"], measured["rejected_mean"]) == (pytest.approx(20 / 3), pytest.approx(16 / 3))
    assert measured["ratio"] == pytest.approx(1.25)
    assert measured["chosen_longer"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-6)
    # 2^(6/2) = 8 tokens and 2^(4/2) = 4.
    assert measured["grid"] == {"4,4": 1, "6,4": 1, "6,6": 1}


# Truncation


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=8), st.integers(1, 12))
def test_token_statistics_are_those_of_cut_answers(answers: list[tuple[list[int], list[int]]], room: int) -> None:
    stats = token_stats(sizes(pairs_of(answers), 3 + room), 3 + room)
    totals = [3 + len(chosen[:room]) + len(rejected[:room]) for chosen, rejected in answers]
    assert stats["longest_pair"] == max(totals)
    assert stats["mean_pair"] == pytest.approx(sum(totals) / len(totals))
    assert stats["mean_prompt"] == 3
    assert stats["truncated_answers"] == sum(len(side) > room for answer in answers for side in answer)
    assert stats["identical_after_truncation"] == sum(c[:room] == r[:room] for c, r in answers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40), st.integers(4, 60))
def test_the_length_that_is_named_holds_the_share_of_answers_it_says(
    answers: list[tuple[int, int]], max_length: int
) -> None:
    tokens = pairs_of([([1] * a, [2] * b) for a, b in answers])
    sized = sizes(tokens, max_length)
    measured = truncation(sized, sized, max_length, 100)
    for percentile in ("90", "95", "99", "100"):
        room = measured["needed"][percentile] - 3
        lost = sum(n > room for answer in answers for n in answer) / (2 * len(answers))
        assert lost <= 1 - float(percentile) / 100 + 1e-9
    assert measured["share"] == pytest.approx(
        sum(n > max_length - 3 for answer in answers for n in answer) / (2 * len(answers)), abs=1e-6
    )


# Faults of chosen answers

WORDS = tuple("abcdefghijklmnop")


@pytest.mark.parametrize("unit", [1, 2, 5, 17])
@pytest.mark.parametrize("before", [0, 10, 40])
def test_a_loop_is_found_whatever_it_says_and_wherever_it_starts(unit: int, before: int) -> None:
    looped = [f"word{n}" for n in range(unit)] * max(3, 24 // unit)
    said = [f"start{n}" for n in range(before)] + looped
    assert loop_share(" ".join(said)) == pytest.approx(len(looped) / len(said), abs=0.06)


def test_said_twice_is_no_loop_and_said_three_times_is() -> None:
    line = " ".join(WORDS)
    assert loop_share(f"{line} {line}") == 0.0
    assert loop_share(f"{line} {line} {line}") == 1.0


@pytest.mark.parametrize(
    "text",
    ["a" * 2000, "哈" * 100, "I will. " * 20, "abc\n" * 40, "no. " * 200],
    ids=["letter", "ideograph", "sentence", "line", "word"],
)
def test_an_answer_that_only_repeats_itself_is_all_loop(text: str) -> None:
    assert loop_share(text) > 0.9


@pytest.mark.parametrize(
    "text", ["", "yes", "ha ha ha", "|---|---|---|---|---|---|---|---|---|", "- " * 300, "* * *\n" * 50]
)
def test_short_answers_and_rules_of_signs_are_no_loops(text: str) -> None:
    assert loop_share(text) == 0.0


def test_three_times_a_few_words_inside_an_answer_is_no_loop() -> None:
    assert loop_share("yes we can " * 3 + " ".join(WORDS)) == 0.0
    assert loop_share("yes we can " * 4 + " ".join(WORDS)) > 0.0


def test_code_tables_and_lists_of_this_project_are_no_loops() -> None:
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("docs/*.md"), PACKAGE / "checks" / "bands.yaml"]
    assert len(sources) > 100
    assert [path.name for path in sources if loop_share(path.read_text(encoding="utf-8")[:6000]) >= 0.1] == []


@pytest.mark.parametrize("mark", ["<|im_end|>", "[INST]", "<end_of_turn>"])
def test_a_mark_of_a_chat_template_in_an_answer_is_a_fault(mark: str) -> None:
    assert faults_of(f"Yes.{mark} And?")["template"] == 1
    assert faults_of("Yes. [instead] <b>and</b> a|b")["template"] == 0


@pytest.mark.parametrize("text", ["...", "\u200b", "—", "\u200b\n.", "?!"])
def test_an_answer_without_letter_digit_or_symbol_is_blank(text: str) -> None:
    assert faults_of(text)["blank"] == 1


@pytest.mark.parametrize("text", ["4", "好", "👍", "+", "$", "a"])
def test_one_letter_digit_or_symbol_is_an_answer(text: str) -> None:
    found = faults_of(text)
    assert (found["blank"], found["others"]) == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "missing"),
    [([5, EOS], 0), ([5, EOS, 7], 0), ([5, 7], 1), ([5, EOS, 7, 7], 1), ([5] * 60, 0), ([5] * 50, 1), ([], 1)],
    ids=["at the end", "before a line break", "none", "too early", "cut", "not cut, just fits", "empty"],
)
def test_an_answer_that_was_not_cut_must_end(tokens: list[int], missing: int) -> None:
    assert faults_of("fine", tokens)["no_end"] == missing


def test_where_no_end_is_known_none_is_missed_and_the_report_says_so() -> None:
    found = faults_of("fine", [5, 7], Markers(frozenset(), TEMPLATE_MARKS))
    assert (found["no_end"], found["ends_known"]) == (0, False)


def test_an_answer_with_several_faults_counts_once() -> None:
    found = faults_of("no. " * 100 + "<|im_end|>", [5, 7])
    assert (found["no_end"], found["template"], found["others"]) == (1, 1, 1)
    assert found["other_loops"] == {}
    assert sum(found["loops"].values()) == 1


def test_faulty_answers_are_shown_and_never_more_than_a_few_of_a_kind() -> None:
    texts = [("no. " * 50, "x")] * 20 + [("a[INST]", "x")] * 20
    pairs = with_cut_answers(pairs_of([([5, EOS], [1])] * 40, [(f"{c}{n}", r) for n, (c, r) in enumerate(texts)]), 90)
    examples = degenerate(pairs, answer_texts(pairs), MARKERS)["examples"]
    assert Counter(row["fault"] for row in examples) == {"template": EXAMPLES, "loop": EXAMPLES}
    assert all(len(row["chosen"]) <= SNIPPET for row in examples)


def test_only_what_the_assistant_says_is_judged() -> None:
    said = [assistant("one"), user("<|im_end|>"), assistant("two")]
    [row] = answer_texts(pairs_frame([pair(chosen=said)])).to_dicts()
    assert row["chosen_text"] == "one\ntwo"


# Ends and marks of a model folder


def folder(path: Any, **files: Any) -> Markers:
    for name, value in files.items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return read_markers(path)


def test_the_embedded_model_names_its_end_and_its_special_tokens() -> None:
    markers = read_markers(STORIES)
    assert EOS in markers.ends
    assert {"<s>", "</s>", "<unk>", "<|im_end|>"} <= set(markers.texts)


def test_every_end_that_any_file_names_ends_an_answer(tmp_path: Any) -> None:
    decoder = {"7": {"content": "<eos>", "special": True}, "8": {"content": "<turn>", "special": True}}
    markers = folder(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<eos>"}, "added_tokens_decoder": decoder},
        generation_config={"eos_token_id": [7, 106]},
        config={"eos_token_id": 1, "text_config": {"eos_token_id": [2, 7]}, "vision_config": {"eos_token_id": 3}},
    )
    assert markers.ends == {1, 2, 7, 106}
    assert "<turn>" in markers.texts


def test_an_end_that_is_an_ordinary_word_of_the_vocabulary_is_found(tmp_path: Any) -> None:
    markers = folder(tmp_path, tokenizer_config={"eos_token": "</s>"}, tokenizer={"model": {"vocab": {"</s>": 3}}})
    assert markers.ends == {3}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"eos_token_id": "x", "eos_token": 3, "added_tokens_decoder": {"a": 1}}']
)
def test_a_folder_that_names_no_end_has_none(tmp_path: Any, text: str) -> None:
    assert (
        folder(tmp_path, tokenizer_config=text, config=text, generation_config=text, tokenizer=text).ends == frozenset()
    )


# Form


def surface_of(texts: list[tuple[str, str]]) -> Any:
    pairs = with_cut_answers(pairs_of([([5], [6])] * len(texts), texts), 90)
    return surface(pairs, answer_texts(pairs))["auc"]


def test_pairs_that_differ_in_form_are_easy_and_pairs_that_do_not_are_not() -> None:
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS, size=n).tolist())

    sizes = rng.integers(5, 40, size=(200, 2)).tolist()
    assert surface_of([(f"- {text(a)}\n- {text(b)}", text(b)) for a, b in sizes]) > 0.99
    assert abs(surface_of([(text(a), text(b)) for a, b in sizes]) - 0.5) < 0.12


def test_form_is_judged_on_prompts_that_the_regression_has_not_seen() -> None:
    # Labels by chance: scored on the pairs it was fitted on, a regression of twelve features would tell them better.
    rng = np.random.default_rng(1)
    texts = [tuple("".join(rng.choice(list("ab.,1\nA- "), size=20).tolist()) for _ in range(2)) for _ in range(60)]
    assert surface_of([(c, r) for c, r in texts]) < 0.65


def test_too_little_is_not_measured() -> None:
    assert surface_of([]) is None
    assert surface_of([("a", "b")]) is None


# The whole


@pytest.fixture(scope="module")
def oasst() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Real pairs of the embedded sample, with token ids that stand for words."""
    [file] = files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])
    pairs = screen(pairs_frame(read_file(file, ReadOptions("best_worst", False)).pairs), quarantine_frame([])).pairs
    vocabulary: dict[str, int] = {}

    def tokens(messages: list[dict[str, str]]) -> list[int]:
        words = [word for message in messages for word in message["content"].split()]
        return [vocabulary.setdefault(word, len(vocabulary) + 10) for word in words]

    rows = [
        {
            "pair_id": row["pair_id"],
            "prompt_ids": tokens(row["prompt"]),
            "chosen_ids": [*tokens(row["chosen"]), EOS],
            "rejected_ids": [*tokens(row["rejected"]), EOS],
            "template_fault": None,
        }
        for row in pairs.sort("pair_id").iter_rows(named=True)
    ]
    table = pl.DataFrame(rows, schema=token_schema())
    return fit_to_model(pairs, table, 400)[0], table


def measure(accepted: pl.DataFrame, tokens: pl.DataFrame, max_length: int, context: int, markers: Markers) -> Any:
    """All measures of tables in memory."""
    first = accepted.sort("pair_id").head(quality.SAMPLE)
    sized, every = sizes(accepted, max_length), sizes(tokens, max_length)
    return quality.measure(sized, first, every, max_length, context, markers)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_no_order_of_rows_changes_a_measure(oasst: tuple[pl.DataFrame, pl.DataFrame], seed: int) -> None:
    accepted, tokens = oasst
    first = measure(accepted, tokens, 400, 512, MARKERS)
    mixed = measure(accepted.sample(fraction=1, shuffle=True, seed=seed), tokens[::-1], 400, 512, MARKERS)
    assert json.dumps(first, sort_keys=True) == json.dumps(mixed, sort_keys=True)


def test_real_pairs_are_apart_end_and_do_not_loop(oasst: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    measured = measure(*oasst, 400, 512, MARKERS)
    assert measured["distance"]["median"] > 0.8
    assert measured["degenerate"]["others"] == 0
    assert sum(n for share, n in measured["degenerate"]["loops"].items() if int(share) >= 10) == 0
    assert 1.2 < measured["lengths"]["ratio"] < 2
    assert len(json.dumps(measured)) < 20_000


def test_without_pairs_nothing_is_measured_and_nothing_fails(oasst: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    accepted, tokens = oasst
    measured = measure(accepted[:0], tokens[:0], 400, 512, MARKERS)
    assert measured["distance"]["median"] is None
    assert measured["lengths"]["ratio"] is None
    assert measured["truncation"] == {"share": None, "context": 512, "needed": {}}
    assert token_stats(sizes(accepted[:0], 400), 400)["longest_pair"] == 0


def test_of_very_many_pairs_a_sample_is_read_and_lengths_are_of_all(
    oasst: tuple[pl.DataFrame, pl.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "SAMPLE", 30)
    measured = measure(*oasst, 400, 512, MARKERS)
    assert (measured["sample"], measured["pairs"]) == (30, oasst[0].height)
    assert measure(oasst[0].sample(fraction=1, shuffle=True, seed=3), oasst[1], 400, 512, MARKERS) == measured
    assert sum(measured["distance"]["bins"].values()) == 30
    assert sum(measured["lengths"]["grid"].values()) == oasst[0].height
