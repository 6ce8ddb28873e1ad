"""Logged inputs and outputs: what tracing tools keep of a model call, and what is too unclear to be one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.readers.logged import answer_of, prompt_of
from dpo_assets.feedback.readers.values import timestamp
from dpo_assets_tests.samples import assistant, system, user


def langchain(kind: str, text: str, **more: Any) -> dict[str, Any]:
    return {"lc": 1, "type": "constructor", "id": ["langchain", "messages", kind], "kwargs": {"content": text, **more}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hi", [user("Hi")]),
        ("{not JSON", [user("{not JSON")]),
        ({"input": "Hi"}, [user("Hi")]),
        ({"role": "user", "content": "Hi"}, [user("Hi")]),
        (
            [{"role": "developer", "content": "Short."}, {"role": "human", "content": "Hi"}],
            [system("Short."), user("Hi")],
        ),
        ({"messages": [{"type": "ai", "content": "Yes?"}, "Hi"]}, [assistant("Yes?"), user("Hi")]),
        (
            {"messages": [[langchain("SystemMessage", "Short."), langchain("HumanMessage", "Hi")]]},
            [system("Short."), user("Hi")],
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], [user("a\nb")]),
    ],
)
def test_a_logged_input_is_a_prompt(value: Any, expected: Any) -> None:
    assert prompt_of(value) == expected
    assert prompt_of(json.dumps(value)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hello", [assistant("Hello")]),
        ({"output": "Hello"}, [assistant("Hello")]),
        ({"role": "assistant", "content": "Hello"}, [assistant("Hello")]),
        ({"choices": [{"message": {"role": "assistant", "content": "Hello"}}, {"message": {}}]}, [assistant("Hello")]),
        ({"generations": [[{"text": "Hello", "message": langchain("AIMessageChunk", "Hello")}]]}, [assistant("Hello")]),
        ({"generations": [[{"text": "Hello"}]]}, [assistant("Hello")]),
        ({"messages": [user("Hi"), assistant("Hello")]}, [assistant("Hello")]),
    ],
)
def test_a_logged_output_is_an_answer(value: Any, expected: Any) -> None:
    assert answer_of(value) == expected
    assert answer_of(json.dumps(value)) == expected


def test_an_answer_in_json_stays_json() -> None:
    for text in ('{"name": "Ada", "born": 1815}', '{"name": "Ada"}', "[1, 2]", '["a"]'):
        assert answer_of(text) == [assistant(text)]


def test_a_key_of_an_object_is_named_by_the_recipe() -> None:
    assert prompt_of({"q": "Hi", "k": 3}, "q") == [user("Hi")]
    assert answer_of('{"a": {"role": "assistant", "content": "Hello"}, "k": 3}', "a") == [assistant("Hello")]


@pytest.mark.parametrize(
    ("reader", "value", "key", "reason", "says"),
    [
        (prompt_of, {"q": "Hi", "k": 3}, None, "wrong_shape", "k, q"),
        (prompt_of, {"q": "Hi"}, "z", "missing_field", "it has: q"),
        (prompt_of, None, None, "missing_text", "not logged"),
        (prompt_of, 7, None, "wrong_shape", "int"),
        (prompt_of, [], None, "wrong_shape", "list"),
        (prompt_of, [{"role": "tool", "content": "x"}], None, "unsupported_modality", "part of a tool call"),
        (prompt_of, [{"role": "user"}], None, "wrong_shape", "it has: role"),
        (prompt_of, [{"role": "user", "content": [{"type": "image_url"}]}], None, "unsupported_modality", "image_url"),
        (answer_of, {"a": 1, "b": "x"}, None, "wrong_shape", "a, b"),
        (answer_of, user("Hi"), None, "wrong_shape", "by the user"),
        (answer_of, {"messages": [user("Hi")]}, None, "wrong_shape", "list"),
        (answer_of, assistant("x") | {"tool_calls": [{}]}, None, "unsupported_modality", "tool_calls"),
        (answer_of, langchain("AIMessage", "x", tool_calls=[{}]), None, "unsupported_modality", "tool_calls"),
        (answer_of, "  ", None, "missing_text", "no text"),
    ],
)
def test_what_is_unclear_is_said(reader: Any, value: Any, key: str | None, reason: str, says: str) -> None:
    with pytest.raises(RowFault) as caught:
        reader(value, key)
    assert (caught.value.reason, says in caught.value.message) == (reason, True), caught.value.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1730000000, "2024-10-27T03:33:20+00:00"),
        ("2024-06-01T10:00:00+02:00", "2024-06-01T08:00:00+00:00"),
        ("2024-05-29 13:46:19.963000", "2024-05-29T13:46:19.963000+00:00"),
        ({"$date": "2025-02-01T12:00:00.000Z"}, "2025-02-01T12:00:00+00:00"),
        ({"$date": {"$numberLong": "1738411200000"}}, "2025-02-01T12:00:00+00:00"),
        ("yesterday", None),
        (10**30, None),
        (True, None),
        ({}, None),
    ],
)
def test_points_in_time_are_utc(value: Any, expected: str | None) -> None:
    assert timestamp(value) == expected
