"""Messages and conversations as exports write them, as a pair wants them, or a fault that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_assets.feedback.pair import REASONING, ROLES, Message, as_json
from dpo_assets.feedback.readers import Row, RowFault
from dpo_assets.feedback.readers.base import ROLE_NAMES, TOOL_ROLES
from dpo_assets.feedback.readers.modality import UNSUPPORTED, filled, refuse_beside_text
from dpo_assets.feedback.readers.values import field, listed, mapping, other_type

# Parts that hold what a model thought before it answered.
_THOUGHTS = frozenset({"think", "thinking", "redacted_thinking", "reasoning"})
_TEXTS = frozenset({"text", "input_text", "output_text"})
# The same, as keys of a message: DeepSeek, Qwen and vLLM; OpenRouter and vLLM; Ollama and gpt-oss; LiteLLM.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")


def said(role: str, content: str, thought: str = "") -> Message:
    """One message. `thought` is reasoning that stands apart from its content."""
    return {"role": role, "content": content, REASONING: thought} if thought else {"role": role, "content": content}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def text_of(value: Any, where: str) -> str:
    """Text, or a list of content parts that are all text; a line break stands between parts.

    Raises:
        RowFault: `unsupported_modality` for an image, a file, a tool call; `wrong_type` for what is no content.
    """
    return text_and_thought(value, f"`{where}`")[0]


def text_and_thought(value: Any, where: str) -> tuple[str, str]:
    """What content says, and the reasoning in it: text, or a list of parts; a line break stands between parts.

    Args:
        value: the content.
        where: what it is, as a message says it.

    Raises:
        RowFault: as `text_of`.
    """
    if isinstance(value, str):
        return value, ""
    texts: list[str] = []
    thoughts: list[str] = []
    for n, part in enumerate(listed(value, where.strip("`"), "text or a list of content parts")):
        place = f"{where[:-1]}[{n}]`" if where.endswith("`") else f"{where}[{n}]"
        text, is_thought = _part(part, place)
        (thoughts if is_thought else texts).append(text)
    return "\n".join(texts), "\n".join(filter(None, thoughts))


def _part(value: Any, where: str) -> tuple[str, bool]:
    """The text of a content part, and whether it is reasoning."""
    if isinstance(value, str):
        return value, False
    part = mapping(value, where.strip("`"), "a content part")
    kind = part.get("type")
    # The key is that of Bedrock's Converse API, and of Nova.
    if "reasoningContent" in part or (isinstance(kind, str) and kind in _THOUGHTS):
        return thought_of(part), True
    written = part.get("text", part.get("value") if kind == "text" else None)  # LLaMA-Factory's v1 messages.
    if isinstance(written, Mapping):  # LibreChat's assistants: {"type": "text", "text": {"value": ...}}
        written = written.get("value")
    if (kind is None or (isinstance(kind, str) and kind in _TEXTS)) and isinstance(written, str):
        refuse_beside_text(part, where)
        return written, part.get("thought") is True  # Gemini's parts.
    if kind == "text":
        raise RowFault("wrong_type", f"{where} needs text in `text`; it has: {sorted(part)}")
    kind = kind if isinstance(kind, str) else ", ".join(sorted(k for k, v in part.items() if v is not None))
    raise RowFault(UNSUPPORTED, f"{where} holds {kind or 'nothing'}; only text can be read")


def thought_of(value: Any) -> str:
    """All text of a piece of reasoning, whatever its shape; "" for none. What is no text stands as JSON."""
    if isinstance(value, str):
        return value.strip()
    if not filled(value):
        return ""
    if isinstance(value, Mapping):
        told = [item for name, item in value.items() if name not in ("type", "id", "index", "format", "signature")]
        return "\n".join(filter(None, map(thought_of, told)))
    return "\n".join(filter(None, map(thought_of, value))) if isinstance(value, list) else as_json([value])


def thought_beside(message: Row) -> str:
    """The reasoning that a message has under a key of its own."""
    for name in THOUGHT_KEYS:
        if name in message and (thought := thought_of(message[name])):
            return thought
    return ""


def spoken(role: str, value: Any, where: str, thought: str = "") -> Message:
    """A message of plain text, or of a list of content parts of which only text and reasoning may be there.

    Raises:
        RowFault: `missing_text`, `wrong_type`, `invalid_utf8`, or
            `unsupported_modality` for images, files and tool calls.
    """
    if value is not None and not isinstance(value, str | list):
        raise RowFault("wrong_type", f"{where} is {type(value).__name__}, expected text")
    text, inner = text_and_thought(value, where) if value else ("", "")
    thought = "\n".join(filter(None, (thought, inner)))
    if not text.strip() and role != "system":
        raise RowFault("missing_text", f"{where} holds no text")
    try:
        text.encode("utf-8")
        thought.encode("utf-8")
    except UnicodeEncodeError:
        # JSON inside a string field can hold one although the line itself was valid; it would break Parquet later.
        raise RowFault("invalid_utf8", f"{where} holds a lone surrogate escape, which is not text") from None
    return said(role, text, thought)


def without_empty_systems(conversation: list[Message]) -> list[Message]:
    """The conversation without system messages that say nothing."""
    if all(m["role"] != "system" or m["content"].strip() for m in conversation):
        return conversation
    return [m for m in conversation if m["role"] != "system" or m["content"].strip()]


def message(value: Any, where: str, role: str = "role", content: str = "content") -> Message:
    """One message, whose role and content stand under these keys; reasoning that stands apart comes with it."""
    item = mapping(value, where, f"{{{role}, {content}}}")
    given, inner = item.get(role), item.get(content)
    if not isinstance(given, str):
        raise RowFault("wrong_type", f"`{where}` needs text in `{role}` and `{content}`; it has: {sorted(item)}")
    if given in TOOL_ROLES:
        raise RowFault(UNSUPPORTED, f"`{where}` is part of a tool call; only text can be read")
    refuse_beside_text(item, f"`{where}`")
    if not isinstance(inner, str | list):
        raise RowFault("wrong_type", f"`{where}` needs text in `{role}` and `{content}`; it has: {sorted(item)}")
    text, thought = text_and_thought(inner, f"`{where}.{content}`")
    thought = "\n".join(filter(None, (thought_beside(item), thought)))
    return said(given if given in ROLES else ROLE_NAMES.get(given, given), text, thought)


def messages(value: Any, where: str, role: str = "role", content: str = "content") -> list[Message]:
    """A list of messages, without system messages that say nothing."""
    found: list[Message] = []
    for n, item in enumerate(listed(value, where, "a list of messages")):
        # The usual message first and without a call: a million rows have several each.
        if type(item) is dict and item.get(role) in ROLES and type(item.get(content)) is str and len(item) == 2:
            one: Message = {"role": item[role], "content": item[content]}
        else:
            one = message(item, f"{where}[{n}]", role, content)
        if one["role"] != "system" or one["content"].strip():
            found.append(one)
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
    given = row.get(name)
    if given is None or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return without_empty_systems([said("system", text_of(given, name)), *prompt])


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
