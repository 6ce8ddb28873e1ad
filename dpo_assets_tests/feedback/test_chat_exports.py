"""Chat tools (Open WebUI, LibreChat): thumbs and arena votes as their exports have them."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import JudgedAnswer, Pair
from dpo_assets.feedback.readers import RowFault
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
from dpo_assets_tests.samples import assistant, system, user

# Open WebUI

BREAD = user("How long does bread dough rise?")
HOUR, DEPENDS = assistant("About one hour, until it has doubled."), assistant("It depends.")


def test_open_webui_export_becomes_pairs_and_judged_answers() -> None:
    items = read_export("open_webui")
    assert reason(only(items[1])) == ("superseded", "line 3 holds a later version of it")
    fridge = ([BREAD, HOUR, user("And in the fridge?")], [assistant("Eight to twelve hours.")], 1.0)
    assert judged(only(items[2])) == fridge
    pair = only(items[3])
    assert sides(pair) == ([BREAD], [HOUR], [DEPENDS])
    assert (pair.row, pair.label_kind, pair.user) == ("f1:m3", "human_thumb", "u-7")
    assert pair.created_at == "2024-10-27T03:40:00+00:00"  # When the vote was changed, not when it was first given.
    arena = only(items[4])
    numbers = [system("Answer with a number."), user("Name a prime above 10.")]
    assert sides(arena) == (numbers, [assistant("11")], [assistant("12")])
    assert (arena.row, arena.label_kind) == ("f3:a2", "arena")
    assert reason(only(items[5])) == ("no_counterpart", "message 'gone' is not in the snapshot of its chat")


def test_open_webui_later_version_of_a_vote_counts_whatever_the_order_of_rows() -> None:
    first, _, later, *_ = rows_of("open_webui")
    for rows, line in (([first, later], 2), ([later, first], 1)):
        items = dict(read("open_webui", rows))
        assert sides(items[line]) == ([BREAD], [HOUR], [DEPENDS])
        assert isinstance(fault := items[3 - line], RowFault)
        assert (fault.reason, fault.row) == ("superseded", "f1")


def test_open_webui_sibling_with_the_same_thumb_is_not_compared() -> None:
    row = changed(rows_of("open_webui")[2], "snapshot.chat.chat.history.messages.m3.annotation", {"rating": 1})
    assert judged(the("open_webui", row)) == ([BREAD], [HOUR], 1.0)


def test_open_webui_sibling_s_own_vote_outweighs_an_older_snapshot() -> None:
    row = rows_of("open_webui")[2]
    other = changed(row, "meta.message_id", "m3") | {"id": "f9", "updated_at": 1730000900}
    items = dict(read("open_webui", [row, other]))
    assert judged(items[1]) == ([BREAD], [HOUR], 1.0)
    assert judged(items[2]) == ([BREAD], [DEPENDS], 1.0)


def test_open_webui_temporary_chats_share_an_id_and_nothing_else() -> None:
    row = changed(rows_of("open_webui")[2], "meta.chat_id", "local")
    other = changed(row, "meta.message_id", "m3") | {"id": "f9"}
    assert [isinstance(item, Pair) for _, item in read("open_webui", [row, other])] == [True, True]


def test_open_webui_recipe_says_which_siblings_count() -> None:
    row = rows_of("open_webui")[2]
    opposed = changed(row, "snapshot.chat.chat.history.messages.m3.annotation", {"rating": "-1"})
    assert isinstance(the("open_webui", row, siblings="unrated"), Pair)
    assert isinstance(the("open_webui", row, siblings="opposite"), JudgedAnswer)
    assert isinstance(the("open_webui", opposed, siblings="opposite"), Pair)
    assert isinstance(the("open_webui", opposed, siblings="arena"), JudgedAnswer)
    with pytest.raises(ConfigError, match="unrated, opposite, arena"):
        read("open_webui", [row], siblings="all")


def test_open_webui_stopped_or_failed_sibling_is_not_compared() -> None:
    for change in ({"done": False}, {"error": {"content": "out of memory"}}, {"content": ""}):
        row = rows_of("open_webui")[2]
        row["snapshot"]["chat"]["chat"]["history"]["messages"]["m3"] |= change
        assert isinstance(the("open_webui", row), JudgedAnswer), change


@pytest.mark.parametrize(
    ("path", "value", "expected", "says"),
    [
        ("type", "comment", "no_feedback", "comment"),
        ("data.rating", None, "no_feedback", "None"),
        ("data.rating", 7, "no_feedback", "7"),
        ("data.rating", 0, "tie", "draw"),
        ("data", None, "missing_field", "no `data`; the row has: created_at, data, id, meta, snapshot"),
        ("snapshot", [], "wrong_type", "`snapshot` is list"),
        ("snapshot.chat.chat.history", {}, "missing_field", "no `messages`"),
        ("snapshot.chat.chat.history.messages.m1.role", "tool", "unsupported_modality", "part of a tool call"),
        ("snapshot.chat.chat.history.messages.m1.role", "oracle", "unknown_role", "'oracle'"),
        ("snapshot.chat.chat.history.messages.m1.files", [{"type": "image"}], "unsupported_modality", "`files`"),
        ("snapshot.chat.chat.history.messages.m1.parentId", "m2", "no_counterpart", "'m1'"),
        ("snapshot.chat.chat.history.messages.m2.parentId", "lost", "no_counterpart", "'lost'"),
        ("snapshot.chat.chat.history.messages.m2.content", " ", "missing_text", "m2"),
    ],
)
def test_open_webui_says_what_is_wrong_with_a_row(path: str, value: Any, expected: str, says: str) -> None:
    code, message = reason(the("open_webui", changed(rows_of("open_webui")[2], path, value)))
    assert (code, says in message) == (expected, True), message


# LibreChat


def test_librechat_export_becomes_judged_answers() -> None:
    items = read_export("librechat")
    night = [user("Translate: bonne nuit")]
    assert reason(only(items[1])) == ("no_feedback", "a message without a thumb")
    down = only(items[2])
    assert judged(down) == (night, [assistant("Good day")], -1.0)
    assert (down.label_kind, down.user, down.row) == ("human_thumb", "u42", "a1")
    assert reason(only(items[3]))[0] == "superseded"
    up = only(items[4])  # Its sibling: one prompt. Its reasoning stands apart from the answer.
    assert judged(up) == (night, [assistant("Good night") | {"reasoning_content": "nuit is night"}], 1.0)
    assert (up.meta["tag"], up.created_at) == ("accurate_reliable", "2025-02-01T12:30:00+00:00")
    assert reason(only(items[5]))[0] == "no_feedback"
    assert reason(only(items[6]))[0] == "unfinished"
    assert reason(only(items[7])) == ("excluded_tag", "the thumb is about 'missing_image', not about the text")
    assert reason(only(items[8]))[0] == "no_counterpart"


def test_librechat_recipe_excludes_further_tags() -> None:
    items = dict(read("librechat", rows_of("librechat")[:2], exclude_tags="too_slow, inaccurate"))
    assert reason(items[2])[0] == "excluded_tag"


def test_librechat_conversation_in_any_order_reads_the_same() -> None:
    rows = rows_of("librechat")
    there = {item.row: judged(item) for _, item in read("librechat", rows) if isinstance(item, JudgedAnswer)}
    back = {item.row: judged(item) for _, item in read("librechat", rows[::-1]) if isinstance(item, JudgedAnswer)}
    assert there == back
    assert set(there) == {"a1", "a2"}


@pytest.mark.parametrize(
    ("changes", "expected", "says"),
    [
        ({"feedback": "up"}, "wrong_type", "is str"),
        ({"feedback": {"rating": "fine"}}, "wrong_type", "'fine'"),
        ({"text": ""}, "missing_text", "'a1'"),
        ({"content": [{"type": "tool_call", "tool_call": {}}]}, "unsupported_modality", "holds tool_call"),
        ({"parentMessageId": "a1"}, "no_counterpart", "'a1'"),
        ({"parentMessageId": "00000000-0000-0000-0000-000000000000"}, "no_counterpart", "no message before it"),
    ],
)
def test_librechat_says_what_is_wrong_with_a_message(changes: dict[str, Any], expected: str, says: str) -> None:
    question, answer, *_ = rows_of("librechat")
    code, message = reason(dict(read("librechat", [question, answer | changes]))[2])
    assert (code, says in message) == (expected, True), message


def test_librechat_row_of_another_shape_names_its_keys() -> None:
    assert reason(the("librechat", {"b": 1, "a": 2})) == ("wrong_shape", "no message of LibreChat; the row has: a, b")
