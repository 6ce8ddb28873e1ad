"""Logged inputs and outputs of model calls (Langfuse observations, LangSmith runs) to conversations.

Tracing tools log what the traced function took and gave back: text, a message list, a chat completion, a LangChain
message, or an object whose keys are the function's own. What cannot be told is asked for, not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo_assets.feedback.pair import Message
from dpo_assets.feedback.readers import RowFault, keys_of
from dpo_assets.feedback.readers.base import TOOL_ROLES
from dpo_assets.feedback.readers.conversations import spoken, thought_beside, without_empty_systems
from dpo_assets.feedback.readers.modality import UNSUPPORTED, refuse_beside_text, refuse_media, tools_text

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "aimessagechunk": "assistant",
}
# Keys that hold the answer where an output is an object with nothing else in it.
_ANSWERS = ("output", "answer", "response", "completion", "text", "content", "result")


def conversation(value: Any, where: str) -> list[Message]:
    """A prompt as an annotation tool shows it: text, which is one user message, or a list of messages."""
    if isinstance(value, list):
        return prompt_of(value)
    return [spoken("user", value, where)]


def prompt_of(value: Any, key: str | None = None) -> list[Message]:
    """The conversation that a logged input holds.

    Args:
        value: text, a message list, `{"messages": [...]}` or an object with one text; any of them as JSON text too.
        key: the key of an object that holds it.

    Raises:
        RowFault: with the keys that were found, where it is not clear which of them is the prompt.
    """
    opened = _opened(value)
    if isinstance(opened, Mapping):
        refuse_media(opened, "input.")
    if isinstance(opened, Mapping) and key is not None:
        opened = _opened(_named(opened, key, "input"))
    if isinstance(opened, Mapping):
        if (messages := _inner_messages(opened)) is not None:
            opened = messages
        elif len(opened) == 1 and isinstance(only := next(iter(opened.values())), str):
            opened = only
        elif "content" not in opened:
            hint = "say which key holds the prompt as `fields: {prompt: ...}`"
            raise RowFault("wrong_shape", f"the input is an object with: {keys_of(opened)}; {hint}")
    if isinstance(opened, str):
        return [spoken("user", opened, "the input")]
    if isinstance(opened, Mapping):
        return [_message(opened, "the input", "user")]
    if isinstance(opened, list) and opened:
        said = [_message(item, f"message {n} of the input", "user") for n, item in enumerate(opened)]
        return without_empty_systems(said)
    raise _unlike(opened, "input")


def tools_in(value: Any) -> str:
    """The tools of a logged input beside its messages, as `Pair.tools` keeps them; "" for none.

    Raises:
        RowFault: `unsupported_modality`, for tools that are no definitions of functions.
    """
    opened = _opened(value)
    given = opened if isinstance(opened, Mapping) else {}
    return tools_text(given.get("tools") or given.get("functions"), "input.tools")


def answer_of(value: Any, key: str | None = None) -> list[Message]:
    """The assistant messages that a logged output holds; of a whole conversation, those after the last user message.

    Text that happens to be JSON of another shape is an answer in JSON, and stays as it is.

    Args:
        value: text, a message, a chat completion, a message list or an object with one text; any of them as JSON text.
        key: the key of an object that holds it.

    Raises:
        RowFault: with the keys that were found, where it is not clear which of them is the answer.
    """
    opened = _opened(value)
    if isinstance(opened, Mapping):
        refuse_media(opened, "output.")
    if isinstance(opened, Mapping) and key is not None:
        opened = _opened(_named(opened, key, "output"))
    if isinstance(opened, Mapping):
        opened = _inside(opened, value)
    if isinstance(opened, str):
        return [spoken("assistant", opened, "the output")]
    if isinstance(opened, Mapping):
        return [_answer(opened, "the output")]
    if isinstance(opened, list) and opened and all(isinstance(item, Mapping) for item in opened):
        start = max((n + 1 for n, item in enumerate(opened) if _role(item, "") == "user"), default=0)
        if start < len(opened):
            return [_answer(item, "a message of the output") for item in opened[start:]]
    if isinstance(value, str) and isinstance(opened, list):
        return [spoken("assistant", value, "the output")]
    raise _unlike(opened, "output")


def _inside(opened: Mapping[str, Any], value: Any) -> Any:
    """What of an output object is the answer: a message, messages, or text."""
    for wrapper in ("choices", "generations"):  # Chat completions; LangChain's LLMResult.
        inner = opened.get(wrapper)
        while isinstance(inner, list) and inner:
            inner = inner[0]
        if isinstance(inner, Mapping):
            return inner.get("message") or inner.get("text")
    if (messages := _inner_messages(opened)) is not None:
        return messages
    if _is_message(opened):
        return opened
    if len(opened) == 1:
        name, only = next(iter(opened.items()))
        if name in _ANSWERS:
            return only
        if isinstance(only, str) and not isinstance(value, str):
            return only
    if isinstance(value, str):
        return value
    hint = "say which key holds the answer as `fields: {answer: ...}`"
    raise RowFault("wrong_shape", f"the output is an object with: {keys_of(opened)}; {hint}")


def _opened(value: Any) -> Any:
    """JSON text as what it says; other text, and everything else, as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _named(opened: Mapping[str, Any], key: str, what: str) -> Any:
    if opened.get(key) is None:
        raise RowFault("missing_field", f"the {what} has no `{key}`; it has: {keys_of(opened)}")
    return opened[key]


def _inner_messages(opened: Mapping[str, Any]) -> list[Any] | None:
    messages = opened.get("messages")
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
        messages = messages[0]  # LangChain logs a batch of conversations, here of one.
    return messages if isinstance(messages, list) and messages else None


def _is_message(value: Mapping[str, Any]) -> bool:
    return ("content" in value and ("role" in value or "type" in value)) or isinstance(value.get("kwargs"), Mapping)


def _role(item: Any, default: str) -> str | None:
    """The role of a message in this project's names; None for one that has no such role."""
    if not isinstance(item, Mapping):
        return None
    given = _told_role(item)
    if given is None:
        return default
    return _ROLES.get(given.lower()) if isinstance(given, str) else None


def _told_role(item: Mapping[str, Any]) -> Any:
    """What a message says of its role."""
    given = item.get("role") or item.get("type")
    if given == "constructor" and isinstance(name := item.get("id"), list) and name and isinstance(name[-1], str):
        return name[-1].removesuffix("Chunk").removesuffix("Message")  # [..., "HumanMessage"]
    return given


def _message(item: Any, where: str, default: str) -> Message:
    if isinstance(item, str):
        return spoken(default, item, where)
    if not isinstance(item, Mapping):
        raise RowFault("wrong_type", f"{where} is {type(item).__name__}, expected a message")
    inner = item["kwargs"] if isinstance(item.get("kwargs"), Mapping) else item
    more = inner["additional_kwargs"] if isinstance(inner.get("additional_kwargs"), Mapping) else {}  # LangChain's.
    for carrier in (inner, more):
        refuse_beside_text(carrier, where)
    role = _role(item, default)
    if role is None:
        told = _told_role(item)
        if isinstance(told, str) and told.lower() in TOOL_ROLES:
            raise RowFault(UNSUPPORTED, f"{where} is part of a tool call; only text can be read")
        raise RowFault("unknown_role", f"{where} has role {told!r}")
    if "content" not in inner:
        raise RowFault("wrong_shape", f"{where} has no `content`; it has: {keys_of(inner)}")
    return spoken(role, inner["content"], where, thought_beside(inner) or thought_beside(more))


def _answer(item: Any, where: str) -> Message:
    message = _message(item, where, "assistant")
    if message["role"] != "assistant":
        raise RowFault("wrong_shape", f"{where} was written by the {message['role']}, expected the assistant")
    return message


def _unlike(value: Any, what: str) -> RowFault:
    if value is None:
        return RowFault("missing_text", f"the {what} was not logged")
    return RowFault("wrong_shape", f"the {what} is {type(value).__name__}, expected text or messages")
