"""Tracing tools (Langfuse, LangSmith): scores, corrections and comparisons joined with what they judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_assets.feedback.pair import JudgedAnswer
from dpo_assets_tests.feedback.tool_exports import (
    judged,
    only,
    read,
    read_export,
    reason,
    rows_of,
    sides,
    the,
)
from dpo_assets_tests.samples import assistant, system, user

# Langfuse

EXACT = [system("Be exact."), user("Who wrote the first program?")]
TURING = [assistant("Alan Turing.")]


def test_langfuse_export_becomes_edits_and_judged_answers() -> None:
    items = read_export("langfuse")
    assert reason(only(items[1]))[0] == "superseded"
    edit = only(items[2])
    assert sides(edit) == (EXACT, [assistant("Ada Lovelace wrote the first program, in 1843.")], TURING)
    assert (edit.label_kind, edit.row) == ("edit", "s2")
    thumb = only(items[3])
    assert judged(thumb) == (EXACT, TURING, 1.0)
    assert (thumb.label_kind, thumb.created_at) == ("human_thumb", "2024-05-29T14:00:00+00:00")
    judge = only(items[4])  # A score of the trace: its root observation, plain text.
    assert judged(judge) == ([user("Name a colour.")], [assistant("Blue.")], 1.0)
    assert judge.label_kind == "judge_rating"
    missing = "observation missing is not in the companion file `langfuse_observations.jsonl`"
    assert reason(only(items[5])) == ("no_counterpart", missing)
    assert reason(only(items[6]))[0] == "no_feedback"


def langfuse(**changes: Any) -> dict[str, Any]:
    return rows_of("langfuse")[2] | changes


def test_langfuse_camel_case_of_the_api_reads_the_same() -> None:
    row = {"id": "s1", "traceId": "t1", "observationId": "o1", "name": "helpful", "value": 0, "dataType": "BOOLEAN"}
    row |= {"source": "API", "stringValue": "False", "authorUserId": "someone"}
    item = the("langfuse", row)
    assert judged(item) == (EXACT, TURING, -1.0)
    assert item.user == "someone"


def test_langfuse_numbers_and_categories() -> None:
    number = the("langfuse", langfuse(data_type="NUMERIC", value="0.25"))
    assert (number.score, number.label_kind) == (0.25, "human_rating")
    # Langfuse's own number of a category is its place in a list, and is not used.
    category = langfuse(data_type="CATEGORICAL", value=2, string_value="poor")
    assert the("langfuse", category, **{"choice:poor": "-1"}).score == -1.0
    code, message = reason(the("langfuse", category))
    assert (code, '"choice:poor"' in message) == ("unknown_choice", True)


def test_langfuse_scores_of_several_names_are_not_mixed() -> None:
    rows = [langfuse(), langfuse(id="s9", name="polite")]
    assert [reason(item)[0] for _, item in read("langfuse", rows)] == ["several_questions"] * 2
    first, second = (item for _, item in read("langfuse", rows, question="polite"))
    assert reason(first)[0] == "other_question"
    assert judged(second)[2] == 1.0


def test_langfuse_output_in_json_is_an_answer_in_json(tmp_path: Path) -> None:
    companion = tmp_path / "observations.jsonl"
    observation = {"id": "o1", "trace_id": "t", "input": '{"q": "As JSON?", "k": 3}', "output": '{"a": 1, "b": 2}'}
    companion.write_text(json.dumps(observation) + "\nnot JSON\n")
    code, message = reason(the("langfuse", langfuse(), companion=companion))
    assert (code, "k, q" in message, "fields: {prompt: ...}" in message) == ("wrong_shape", True, True)
    item = the("langfuse", langfuse(), companion=companion, prompt="q")
    assert judged(item) == ([user("As JSON?")], [assistant('{"a": 1, "b": 2}')], 1.0)
    code, message = reason(the("langfuse", langfuse(observation_id="o2"), companion=companion))
    assert (code, "1 of its lines" in message) == ("no_counterpart", True)


@pytest.mark.parametrize(
    ("changes", "expected", "says"),
    [
        ({"data_type": "OTHER"}, "wrong_shape", "the row has: comment, created_at, data_type"),
        ({"value": "maybe", "string_value": None}, "wrong_type", "'maybe'"),
        ({"data_type": "NUMERIC", "value": True}, "wrong_type", "'True'"),
        ({"data_type": "NUMERIC", "value": "high"}, "wrong_type", "'high'"),
        ({"data_type": "NUMERIC", "value": "inf"}, "wrong_type", "'inf'"),
        ({"data_type": "NUMERIC", "value": "1_0"}, "wrong_type", "'1_0'"),
        ({"data_type": "CORRECTION", "string_value": '{"content": "\\ud800"}'}, "invalid_utf8", "surrogate"),
        ({"data_type": "CATEGORICAL", "string_value": None}, "missing_field", "without a category"),
        ({"data_type": "CORRECTION", "string_value": " "}, "missing_text", "CORRECTION without text"),
        ({"observation_id": None, "trace_id": None}, "no_counterpart", "session"),
        ({"observation_id": "root1"}, "wrong_shape", "args, kwargs"),
    ],
)
def test_langfuse_says_what_is_wrong_with_a_score(changes: dict[str, Any], expected: str, says: str) -> None:
    code, message = reason(the("langfuse", langfuse(**changes)))
    assert (code, says in message) == (expected, True), message


# LangSmith

SKY = [user("Why is the sky blue?")]
SEASONS, MOVES = [user("Why are there seasons?")], [assistant("The sun moves.")]


def test_langsmith_export_becomes_pairs_edits_and_judged_answers() -> None:
    items = read_export("langsmith", question="preference")
    assert reason(only(items[1])) == ("other_side", "part of the comparison on line 2")
    pair = only(items[2])
    assert sides(pair) == (SKY, [assistant("Air scatters blue light most.")], [assistant("It reflects the sea.")])
    assert (pair.row, pair.label_kind, pair.margin) == ("e2>e1", "human_pair", 1.0)
    assert pair.user == "ls-1"
    assert reason(only(items[3])) == ("superseded", "line 4 holds a later version of it")
    assert judged(only(items[4])) == (SEASONS, MOVES, 1.0)
    edit = only(items[5])
    assert sides(edit) == (SEASONS, [assistant("Because of the tilt of the axis.")], MOVES)
    assert edit.label_kind == "edit"
    corrected = only(items[6])  # A judge's 0.2 that a person corrected to 1.
    assert judged(corrected) == (SEASONS, MOVES, 1.0)
    assert corrected.label_kind == "human_rating"
    assert reason(only(items[7])) == ("tie", "both runs have the score 0.5")
    assert reason(only(items[8]))[0] == "other_side"
    gone = "run gone is not in the companion file `langsmith_runs.jsonl`"
    assert reason(only(items[9])) == ("no_counterpart", gone)


def langsmith(**changes: Any) -> dict[str, Any]:
    return rows_of("langsmith")[3] | changes


def test_langsmith_group_of_one_run_is_no_comparison() -> None:
    rows = [langsmith(id="x1", feedback_group_id="g"), langsmith(id="x2", feedback_group_id="g", score=0)]
    assert [judged(item)[2] for _, item in read("langsmith", rows)] == [1.0, 0.0]


def test_langsmith_comparison_without_its_other_side_says_so() -> None:
    row = langsmith(comparative_experiment_id="x", feedback_group_id="g")
    assert reason(the("langsmith", row))[0] == "no_comparison"


def test_langsmith_comparison_of_runs_with_different_inputs_is_none() -> None:
    rows = [
        langsmith(id="x1", feedback_group_id="g"),
        langsmith(id="x2", feedback_group_id="g", run_id="run-a", score=0),
    ]
    assert [reason(item)[0] for _, item in read("langsmith", rows)] == ["no_shared_prompt", "other_side"]


def test_langsmith_judges_and_thumbs() -> None:
    assert the("langsmith", langsmith(score=False)).score == -1.0
    assert the("langsmith", langsmith(score=True)).label_kind == "human_thumb"
    judge = the("langsmith", langsmith(feedback_source={"type": "model"}))
    assert (judge.label_kind, judge.user) == ("judge_rating", None)
    category = langsmith(score=None, value="good")
    assert the("langsmith", category, **{"choice:good": "1"}).score == 1.0
    assert reason(the("langsmith", category))[0] == "unknown_choice"


def test_langsmith_feedback_of_several_keys_is_not_mixed() -> None:
    rows = [langsmith(), langsmith(id="x", key="tone")]
    assert [reason(item)[0] for _, item in read("langsmith", rows)] == ["several_questions"] * 2
    assert [isinstance(item, JudgedAnswer) for _, item in read("langsmith", rows, question="tone")] == [False, True]


@pytest.mark.parametrize(
    ("changes", "expected", "says"),
    [
        ({"score": None}, "no_feedback", "the row has: comment"),
        ({"score": "high"}, "wrong_shape", "'high'"),
        ({"run_id": None}, "wrong_shape", "no `run_id`"),
        ({"correction": {"score": "x"}}, "wrong_shape", "'x'"),
        ({"correction": {"a": 1, "b": 2}}, "wrong_shape", "a, b"),
    ],
)
def test_langsmith_says_what_is_wrong_with_feedback(changes: dict[str, Any], expected: str, says: str) -> None:
    code, message = reason(the("langsmith", langsmith(**changes)))
    assert (code, says in message) == (expected, True), message
