"""Messages and conversations as exports write them, as a pair wants them, or a fault that says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_assets.feedback.pair import ROLES, Message
from dpo_assets.feedback.readers import Row, RowFault
from dpo_assets.feedback.readers.values import field, listed, mapping, other_type

# What formats call the three roles. A name that is not here stays as it is, and the dataset's rules name it.
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "developer": "system",
}
TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "ipython"})
# Reasoning that a model wrote before its answer is no part of the answer that people judged.
_THOUGHTS = frozenset({"think", "thinking", "redacted_thinking", "reasoning"})
_TEXTS = frozenset({"text", "input_text", "output_text"})


def said(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def text_of(value: Any, where: str) -> str:
    """Text, or a list of content parts that are all text; a line break stands between parts.

    Raises:
        RowFault: `unsupported_modality` for an image, a file, a tool call; `wrong_type` for what is no content.
    """
    if isinstance(value, str):
        return value
    parts = listed(value, where, "text or a list of content parts")
    return "\n".join(_part(part, f"{where}[{n}]") for n, part in enumerate(parts))


def _part(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    kind = mapping(value, where, "a content part").get("type")
    if isinstance(value.get("text"), str) and kind in (None, "text", "input_text", "output_text"):
        text: str = value["text"]
        return text
    if kind == "text":
        raise RowFault("wrong_type", f"`{where}` needs text in `text`; it has: {sorted(value)}")
    kind = kind if isinstance(kind, str) else ", ".join(sorted(k for k, v in value.items() if v is not None))
    raise RowFault("unsupported_modality", f"`{where}` holds {kind or 'nothing'}; only text can be read")


def text(value: Any, where: str) -> str:
    """The text of a message: plain, or a list of content parts of which only text and reasoning may be there.

    Reasoning parts are left out, text parts are joined by line breaks.

    Raises:
        RowFault: `missing_text`, `wrong_type`, `invalid_utf8`, or
            `unsupported_modality` for images, files and tool calls.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = "\n".join(piece for part in value if (piece := _spoken(part, where)) is not None)
    if value is not None and not isinstance(value, str):
        raise RowFault("wrong_type", f"{where} is {type(value).__name__}, expected text")
    if not value or not value.strip():
        raise RowFault("missing_text", f"{where} holds no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON inside a string field can hold one although the line itself was valid; it would break Parquet later.
        raise RowFault("invalid_utf8", f"{where} holds a lone surrogate escape, which is not text") from None
    return value


def _spoken(part: Any, where: str) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowFault("wrong_type", f"{where} holds a part that is {type(part).__name__}")
    kind = part.get("type")
    if isinstance(kind, str) and kind in _THOUGHTS:
        return None
    written = part.get("text")
    if isinstance(written, Mapping):  # LibreChat's assistants: {"type": "text", "text": {"value": ...}}
        written = written.get("value")
    if (kind is None or (isinstance(kind, str) and kind in _TEXTS)) and isinstance(written, str):
        return written
    raise RowFault("unsupported_modality", f"{where} holds a part of type {kind!r}; only text can be learnt here")


def message(value: Any, where: str, role: str = "role", content: str = "content") -> Message:
    """One message, whose role and content stand under these keys."""
    given, said = mapping(value, where, f"{{{role}, {content}}}").get(role), value.get(content)
    if not isinstance(given, str):
        raise RowFault("wrong_type", f"`{where}` needs text in `{role}` and `{content}`; it has: {sorted(value)}")
    if given in TOOL_ROLES or value.get("tool_calls") or value.get("function_call"):
        raise RowFault("unsupported_modality", f"`{where}` is part of a tool call; only text can be read")
    if not isinstance(said, str):
        if not isinstance(said, list):
            raise RowFault("wrong_type", f"`{where}` needs text in `{role}` and `{content}`; it has: {sorted(value)}")
        said = text_of(said, f"{where}.{content}")
    return {"role": given if given in ROLES else ROLE_NAMES.get(given, given), "content": said}


def messages(value: Any, where: str, role: str = "role", content: str = "content") -> list[Message]:
    """A list of messages."""
    found: list[Message] = []
    for n, item in enumerate(listed(value, where, "a list of messages")):
        # The usual message first and without a call: a million rows have several each.
        if type(item) is dict and item.get(role) in ROLES and type(item.get(content)) is str and len(item) == 2:
            found.append({"role": item[role], "content": item[content]})
        else:
            found.append(message(item, f"{where}[{n}]", role, content))
    return found


def turns(value: Any, where: str, speaker: str) -> list[Message]:
    """Plain text as one message of `speaker`, or a list of messages."""
    if isinstance(value, str):
        return [{"role": speaker, "content": value}]
    if not isinstance(value, list):
        raise other_type(value, where, "text or a list of messages")
    return messages(value, where)


def answer_in(row: Row, name: str, role: str = "role", content: str = "content") -> list[Message]:
    """A field that holds an answer: plain text, one message, or a list of them."""
    value = field(row, name)
    if isinstance(value, Mapping):
        return [message(value, name, role, content)]
    return messages(value, name, role, content) if isinstance(value, list) else turns(value, name, "assistant")


def with_system(row: Row, prompt: list[Message], name: str = "system") -> list[Message]:
    """The prompt after the row's system text, where it has one and the prompt does not open with its own."""
    said = row.get(name)
    if said is None or said == "" or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": text_of(said, name)}, *prompt]


def history(row: Row) -> list[Message]:
    """Earlier turns under `history`, each a question and an answer (alpaca's fashion)."""
    found = []
    for n, turn in enumerate(listed(row.get("history") or [], "history")):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowFault("wrong_type", f"`history[{n}]` is not a question and an answer as text")
        found += [user(turn[0]), assistant(turn[1])]
    return found


def last_answer(conversation: list[Message], where: str) -> tuple[list[Message], list[Message]]:
    """A conversation as its prompt and its last message, which must be the assistant's."""
    if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
        raise RowFault("wrong_shape", f"`{where}` does not end with an assistant's answer to something")
    return conversation[:-1], conversation[-1:]


def shared_prefix(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Splits two conversations into their common prompt and the two answers.

    Raises:
        RowFault: when they share nothing, or one is the beginning of the other.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if length == len(chosen) == len(rejected):
        raise RowFault("no_preference", "chosen and rejected are the same conversation")
    if length == 0:
        raise RowFault("no_shared_prompt", "no `prompt`, and chosen and rejected begin with different messages")
    if length == min(len(chosen), len(rejected)):
        raise RowFault("no_shared_prompt", "one conversation is the beginning of the other, so an answer is missing")
    return chosen[:length], chosen[length:], rejected[length:]


def is_whole(conversation: list[Message]) -> bool:
    """Whether it opens like a conversation, so that it holds its prompt too."""
    return bool(conversation) and conversation[0]["role"] in ("system", "user")


def prompt_and_answers(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The three parts, where both answers repeat the prompt (UltraFeedback's fashion) or neither does."""
    if is_whole(chosen) and is_whole(rejected):
        shared, good, bad = shared_prefix(chosen, rejected)
        # The system message may stand in the prompt, in the conversations, or in both.
        system = prompt[:1] if prompt and prompt[0]["role"] == "system" and shared[0]["role"] != "system" else []
        asked = prompt[len(system) :]
        if shared[: len(asked)] == asked or shared[-len(asked) :] == asked:
            return [*system, *shared], good, bad
    return prompt, chosen, rejected
