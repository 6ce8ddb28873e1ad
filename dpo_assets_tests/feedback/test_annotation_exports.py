"""Annotation tools (Label Studio, Argilla): comparisons, rankings, ratings and choices as their exports have them."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_assets.feedback.pair import Pair
from dpo_assets_tests.feedback.tool_exports import (
    changed,
    judged,
    only,
    read,
    read_export,
    reason,
    rows_of,
    sides,
    the,
)
from dpo_assets_tests.samples import assistant, user

# Label Studio


def test_label_studio_export_becomes_pairs_and_judged_answers() -> None:
    items = read_export("label_studio")
    block, cheese = assistant("A building block of protons."), assistant("A kind of cheese.")
    pair = only(items[1])
    assert sides(pair) == ([user("What is a quark?")], [block], [cheese])
    assert (pair.margin, pair.user, pair.row) == (1.0, "4", "1")
    assert pair.created_at == "2024-03-01T10:00:10+00:00"
    voted = only(items[2])  # Annotator 4 changed to right, 5 says right, 6 says left.
    assert sides(voted) == ([user("What is quark, in a kitchen?")], [cheese], [block])
    assert (voted.margin, voted.user, voted.meta["annotators"]) == (pytest.approx(2 / 3), None, 3)
    assert reason(only(items[3])) == ("cancelled", "every annotation was cancelled")
    assert reason(only(items[4])) == ("tie", "left and right have equally many votes (1)")
    rated = only(items[5])
    assert judged(rated) == ([user("Say hello.")], [assistant("Good morning!")], 4.5)
    assert rated.label_kind == "human_rating"
    # The sides are named by the Pairwise tag's toName, the annotator is an object.
    bigger = only(items[6])
    assert sides(bigger) == ([user("Which is bigger?")], [assistant("Nine")], [assistant("Seven")])
    assert bigger.user == "9"


def test_label_studio_cancelled_annotation_beside_a_valid_one_is_left_out() -> None:
    task = rows_of("label_studio")[3]
    pair = the("label_studio", changed(task, "annotations.0.was_cancelled", True))
    assert pair.chosen == [assistant("A kind of cheese.")]
    assert pair.meta["annotators"] == 1


def test_label_studio_sides_and_prompt_are_named_by_the_recipe() -> None:
    task = rows_of("label_studio")[0] | {"data": {"q": "Why?", "one": "A", "two": "B"}}
    code, message = reason(the("label_studio", task))
    assert (code, "one, q, two" in message, "fields: {prompt: ...}" in message) == ("missing_field", True, True)
    assert sides(the("label_studio", task, prompt="q", left="two", right="one"))[1:] == (
        [assistant("B")],
        [assistant("A")],
    )
    code, message = reason(the("label_studio", task, prompt="q", left="three", right="one"))
    assert (code, "`three`" in message, "one, q, two" in message) == ("missing_field", True, True)


def test_label_studio_choices_mean_what_the_recipe_says() -> None:
    task = rows_of("label_studio")[0]

    def choose(choice: str, **fields: str) -> Any:
        result = [{"type": "choices", "from_name": "better", "to_name": "dialogue", "value": {"choices": [choice]}}]
        return the("label_studio", changed(task, "annotations.0.result", result), **fields)

    assert choose("answer2").chosen == [assistant("A kind of cheese.")]
    assert choose("Left").chosen == [assistant("A building block of protons.")]
    assert choose("B is better", **{"choice:B is better": "right"}).chosen == [assistant("A kind of cheese.")]
    assert reason(choose("Same", **{"choice:Same": "tie"}))[0] == "tie"
    assert judged(choose("good", answer="answer1", **{"choice:good": "1"}))[2] == 1.0
    code, message = reason(choose("good", answer="answer1"))
    assert (code, '"choice:good"' in message) == ("unknown_choice", True)


def test_label_studio_asks_which_of_several_questions_counts() -> None:
    task = rows_of("label_studio")[4]
    style = {"type": "rating", "from_name": "style", "to_name": "response", "value": {"rating": 1}}
    task["annotations"][0]["result"].append(style)
    code, message = reason(the("label_studio", task))
    assert (code, "quality, style" in message) == ("several_questions", True)
    assert the("label_studio", task, question="style").score == 1.0
    assert the("label_studio", task, question="quality").score == 4.5
    assert reason(the("label_studio", task, question="tone")) == (
        "no_feedback",
        "no annotation holds a comparison, rating or choice of `tone`",
    )


@pytest.mark.parametrize(
    ("path", "value", "expected", "says"),
    [
        ("annotations", None, "wrong_shape", "the task has: annotations, cancelled_annotations, created_at"),
        ("annotations", [], "no_feedback", "no annotation"),
        ("annotations", ["x"], "wrong_type", "not an annotation"),
        ("data", "x", "wrong_type", "`data` is str"),
        ("data.answer2", None, "missing_text", "`data.answer2`"),
        ("data.prompt", "  ", "missing_text", "`data.prompt`"),
        ("annotations.0.result", [], "no_feedback", "no annotation holds"),
        ("annotations.0.result.0.value", {"selected": "up"}, "wrong_shape", "'up'"),
    ],
)
def test_label_studio_says_what_is_wrong_with_a_task(path: str, value: Any, expected: str, says: str) -> None:
    code, message = reason(the("label_studio", changed(rows_of("label_studio")[0], path, value)))
    assert (code, says in message) == (expected, True), message


# Argilla


def test_argilla_export_becomes_pairs_flat_and_nested() -> None:
    items = read_export("argilla")
    oslo, norway = assistant("Oslo"), assistant("Norway")
    pair = only(items[1])
    assert sides(pair) == ([user("Capital of Norway?")], [oslo], [norway])
    assert (pair.margin, pair.label_kind, pair.user) == (2.0, "human_ranking", "8c1")
    assert pair.row == "r1:response_1>response_3"
    # Two submitted rankings (the draft is left out): mean ranks 1, 2.5 and 2.5.
    averaged = only(items[2])
    assert sides(averaged)[1:] == ([oslo], [norway])
    assert (averaged.margin, averaged.user, averaged.meta["annotators"]) == (1.5, None, 2)
    assert reason(only(items[3])) == ("unsubmitted", "no submitted response to `ranking`")
    nested = only(items[4])  # The server's shape {value, rank}, in another order.
    assert sides(nested) == ([user("Capital of Peru?")], [assistant("Lima")], [assistant("Cusco")])
    code, message = reason(only(items[5]))
    assert (code, "unstated_status" in message) == ("unsubmitted", True)


def test_argilla_status_that_is_not_stated_counts_only_when_the_recipe_says_so() -> None:
    pair = the("argilla", rows_of("argilla")[4], unstated_status="submitted")
    assert sides(pair)[1:] == ([assistant("Santiago")], [assistant("Lima")])


def test_argilla_ranking_follows_the_recipe_s_pairing_and_reports_ties() -> None:
    items = [item for _, item in read("argilla", [rows_of("argilla")[1]], pairing="adjacent")]
    assert sides(items[0])[1:] == ([assistant("Oslo")], [assistant("Bergen")])
    assert reason(items[1]) == ("tie", "response_2 and response_3 have rank 2.5")
    every = [item for _, item in read("argilla", [rows_of("argilla")[0]], pairing="all_above_margin")]
    assert [item.row for item in every if isinstance(item, Pair)] == [
        "r1:response_1>response_2",
        "r1:response_1>response_3",
        "r1:response_2>response_3",
    ]


def test_argilla_last_response_of_a_user_counts() -> None:
    row = rows_of("argilla")[0]
    row["ranking.responses"].append(["response_3", "response_2", "response_1"])
    row["ranking.responses.users"].append("8c1")
    row["ranking.responses.status"].append("submitted")
    assert the("argilla", row).chosen == [assistant("Norway")]


def labelled(*labels: Any, question: str = "better") -> dict[str, Any]:
    row = {name: value for name, value in rows_of("argilla")[0].items() if not name.startswith("ranking.")}
    row |= {
        f"{question}.responses": list(labels),
        f"{question}.responses.users": [f"u{n}" for n, _ in enumerate(labels)],
    }
    return row | {f"{question}.responses.status": ["submitted"] * len(labels)}


def test_argilla_label_names_the_winner_among_the_candidates() -> None:
    compared = {"candidates": "response_1, response_2"}
    pair = the("argilla", labelled("response_2", "response_2", "response_1"), **compared)
    assert sides(pair)[1:] == ([assistant("Bergen")], [assistant("Oslo")])
    assert (pair.margin, pair.label_kind) == (pytest.approx(2 / 3), "human_pair")
    assert reason(the("argilla", labelled("response_1", "response_2"), **compared))[0] == "tie"
    assert the("argilla", labelled("first"), **compared, **{"choice:first": "response_1"}).chosen == [assistant("Oslo")]
    code, message = reason(the("argilla", labelled("response_2")))
    assert (code, "candidates" in message) == ("unknown_choice", True)


def test_argilla_rating_judges_the_answer() -> None:
    item = the("argilla", labelled(4, 5), answer="response_1")
    assert judged(item) == ([user("Capital of Norway?")], [assistant("Oslo")], 4.5)
    assert reason(the("argilla", labelled(4)))[0] == "missing_field"
    liked = {"answer": "response_1", "choice:yes": "1", "choice:no": "-1"}
    assert judged(the("argilla", labelled("no"), **liked))[2] == -1.0


def test_argilla_corrected_text_becomes_an_edit() -> None:
    pair = the("argilla", labelled("Oslo, since 1814.", question="fix"), edit="fix", answer="response_1")
    assert sides(pair)[1:] == ([assistant("Oslo, since 1814.")], [assistant("Oslo")])
    assert pair.label_kind == "edit"


@pytest.mark.parametrize(
    ("path", "value", "expected", "says"),
    [
        ("ranking.responses", [["response_1", "nowhere"]], "unknown_choice", '"choice:nowhere"'),
        ("ranking.responses", [["response_1", "response_1"]], "wrong_shape", "no ranking"),
        ("ranking.responses", [["response_1"]], "no_comparison", "fewer than two"),
        ("ranking.responses", "response_1", "wrong_type", "is str"),
        ("ranking.responses", [["response_1", "response_2"]] * 2, "wrong_shape", "of one length"),
        ("ranking.responses", None, "no_feedback", "no response"),
        ("other.responses", ["x"], "several_questions", "other, ranking"),
        ("response_1", None, "missing_text", "`response_1`"),
    ],
)
def test_argilla_says_what_is_wrong_with_a_record(path: str, value: Any, expected: str, says: str) -> None:
    code, message = reason(the("argilla", rows_of("argilla")[0] | {path: value}))
    assert (code, says in message) == (expected, True), message


def test_argilla_row_of_another_shape_names_its_keys() -> None:
    assert reason(the("argilla", {"id": "x", "prompt": "a", "answer": "b"})) == (
        "wrong_shape",
        "no `responses` and no `<question>.responses`; the record has: answer, id, prompt",
    )
