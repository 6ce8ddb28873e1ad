"""Open WebUI's feedback export: thumbs on chat answers and votes in its arena, each with a snapshot of the chat.

A thumb on an answer that has siblings (other models' answers, or regenerated ones) compares it with them: the snapshot
holds their text. Which siblings count is `fields: {siblings: ...}`:

- `unrated` (default): those with the opposite thumb or none, which is how Open WebUI's own leaderboard counts;
- `opposite`: those with the opposite thumb;
- `arena`: none outside the arena.

In the arena every sibling counts. A thumb that compares nothing is a judged answer. A vote that was changed stands in
the export as a later version of one id, and a sibling's own vote elsewhere in the export outweighs what an older
snapshot says of it.

Kept until the end of the file: the rows, on disk; in memory the rows of one chat at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import REASONING, JudgedAnswer, LabelKind, Message, Pair, named
from dpo_assets.feedback.readers import FileReader, Format, Item, Place, ReadOptions, Row, RowFault
from dpo_assets.feedback.readers.base import TOOL_ROLES
from dpo_assets.feedback.readers.conversations import said, spoken, thought_beside, without_empty_systems
from dpo_assets.feedback.readers.modality import UNSUPPORTED, refuse_beside_text
from dpo_assets.feedback.readers.store import GroupedReader, Identity, Stored
from dpo_assets.feedback.readers.values import identifier, number, section, timestamp, version

SIBLINGS = ("unrated", "opposite", "arena")
_FOLDED = re.compile(r'<details\s+type="(\w+)"[^>]*>(.*?)(?:</details>\s*|\Z)', re.DOTALL)
_SUMMARY = re.compile(r"<summary>.*?</summary>", re.DOTALL)
_ROLES = ("system", "user", "assistant")


def open_reader(options: ReadOptions) -> FileReader:
    """A reader of one export.

    Raises:
        ConfigError: when `siblings` is none of SIBLINGS.
    """
    if options.fields.get("siblings", "unrated") not in SIBLINGS:
        raise ConfigError(f"open_webui: `siblings` is one of {', '.join(SIBLINGS)}.")
    return GroupedReader(_identify, _read_chat, options)


def _identify(row: Row) -> Identity:
    meta = row.get("meta")
    chat = identifier(meta.get("chat_id")) if isinstance(meta, Mapping) else None
    if chat is not None and chat.split(":")[0] == "local":
        chat = None  # Every temporary chat has this id, so it joins nothing.
    return Identity(identifier(row.get("id")), version(row.get("updated_at"), row.get("created_at")), chat)


def _read_chat(rows: Sequence[Stored], options: ReadOptions) -> Iterator[tuple[Place, Item]]:
    # One user votes once for a message; in the file's order, so that the later of two votes counts.
    votes = {}
    for stored in rows:
        meta, data = stored.row.get("meta"), stored.row.get("data")
        message = identifier(meta.get("message_id")) if isinstance(meta, Mapping) else None
        if message is not None and isinstance(data, Mapping) and (vote := _vote(data.get("rating"))) is not None:
            votes[message] = vote
    for stored in rows:
        row_id = stored.place.row_id(stored.row.get("id"))
        try:
            for item in _read(stored, row_id, votes, options):
                yield stored.place, item
        except RowFault as fault:
            yield stored.place, RowFault(fault.reason, fault.message, row_id)


def _vote(value: Any) -> int | None:
    vote = number(value)
    return int(vote) if vote in (-1, 0, 1) else None


def _read(stored: Stored, row_id: str, votes: Mapping[str, int], options: ReadOptions) -> Iterator[Item]:
    row, place = stored.row, stored.place
    kind = row.get("type")
    if kind is not None and kind != "rating":
        raise RowFault("no_feedback", f"feedback of type {kind!r} holds no vote")
    data, meta = section(row, "data"), section(row, "meta")
    vote = _vote(data.get("rating"))
    if vote is None:
        raise RowFault("no_feedback", f"`data.rating` is {str(data.get('rating'))[:40]!r}, expected 1 or -1")
    if vote == 0:
        raise RowFault("tie", "the vote is a draw")
    messages, system = _history(row)
    message_id = identifier(meta.get("message_id"))
    message = messages.get(message_id) if message_id is not None else None
    if message_id is None or not isinstance(message, Mapping):
        raise RowFault("no_counterpart", f"message {message_id!r} is not in the snapshot of its chat")
    prompt = system + without_empty_systems(_prompt(message, messages))
    answer = [_message(message)]
    when = timestamp(row.get("updated_at"), row.get("created_at"))
    user = named(identifier(row.get("user_id")))
    arena = meta.get("arena") is True
    label: LabelKind = "arena" if arena else "human_thumb"
    about = _about(row, data, message)
    found = False
    for sibling_id, sibling in _siblings(message_id, message, messages):
        if not arena and not _counts(vote, votes.get(sibling_id, _annotated(sibling)), options):
            continue
        try:
            other = [_message(sibling)]
        except RowFault as fault:
            yield RowFault(fault.reason, fault.message, f"{row_id}:{sibling_id}")
            continue
        chosen, rejected = (answer, other) if vote > 0 else (other, answer)
        found = True
        yield Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=place.source,
            row=f"{row_id}:{sibling_id}",
            line=place.line,
            label_kind=label,
            meta=about | {"sibling_model": sibling.get("model")},
            created_at=when,
            user=user,
        )
    if not found:
        yield JudgedAnswer(prompt, answer, float(vote), place.source, row_id, place.line, label, about, when, user)


def _history(row: Row) -> tuple[Mapping[str, Any], list[Message]]:
    """The messages of the chat by id, and its system prompt where it has one."""
    snapshot = section(row, "snapshot")
    chat = section(snapshot, "chat")
    # The stored chat wraps the one of the browser: {"id", "title", "chat": {"history": ...}}.
    inner = chat["chat"] if isinstance(chat.get("chat"), Mapping) else chat
    messages = section(section(inner, "history"), "messages")
    params = inner.get("params")
    system = params.get("system") if isinstance(params, Mapping) else None
    return messages, without_empty_systems([said("system", system)]) if isinstance(system, str) else []


def _prompt(message: Mapping[str, Any], messages: Mapping[str, Any]) -> list[Message]:
    """The messages before `message`, by their `parentId`."""
    path: list[Message] = []
    seen = set()
    parent_id = identifier(message.get("parentId"))
    while parent_id is not None:
        parent = messages.get(parent_id)
        if not isinstance(parent, Mapping) or parent_id in seen:
            raise RowFault("no_counterpart", f"message {parent_id!r}, which another answers, is not in the snapshot")
        seen.add(parent_id)
        path.append(_message(parent))
        parent_id = identifier(parent.get("parentId"))
    return path[::-1]


def _siblings(
    message_id: str, message: Mapping[str, Any], messages: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The other finished answers to the same message."""
    parent = messages.get(identifier(message.get("parentId")) or "")
    children = parent.get("childrenIds") if isinstance(parent, Mapping) else None
    for child_id in dict.fromkeys(c for c in children if isinstance(c, str)) if isinstance(children, list) else ():
        child = messages.get(child_id)
        if child_id == message_id or not isinstance(child, Mapping) or child.get("role") != "assistant":
            continue
        # An answer that failed or was stopped early was not what the vote was about.
        if child.get("error") or child.get("done") is False or not child.get("content"):
            continue
        yield child_id, child


def _annotated(message: Mapping[str, Any]) -> int | None:
    annotation = message.get("annotation")
    return _vote(annotation.get("rating")) if isinstance(annotation, Mapping) else None


def _counts(vote: int, other: int | None, options: ReadOptions) -> bool:
    rule = options.fields.get("siblings", "unrated")
    return other == -vote if rule == "opposite" else rule == "unrated" and other in (None, -vote)


def _message(message: Mapping[str, Any]) -> Message:
    role, where = message.get("role"), f"message {message.get('id')!r}"
    if isinstance(role, str) and role in TOOL_ROLES:
        raise RowFault(UNSUPPORTED, f"{where} is part of a tool call; only text can be read")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowFault("unknown_role", f"{where} has role {role!r}")
    refuse_beside_text(message, where)
    written, thought = spoken(role, message.get("content"), where), thought_beside(message)
    text, folded = _unfolded(written["content"], where)
    thought = "\n".join(filter(None, (thought, written.get(REASONING), folded)))
    return spoken(role, text, where, thought)


def _unfolded(text: str, where: str) -> tuple[str, str]:
    """A text without the sections that Open WebUI folds away, and the reasoning that was in them.

    It writes what a model did before it answered as `<details type="...">` into the answer (backend, middleware.py).
    """
    thoughts: list[str] = []
    for kind, inner in _FOLDED.findall(text):
        if kind != "reasoning":
            raise RowFault(UNSUPPORTED, f"{where} holds {kind}; only text can be read")
        thoughts.append(_SUMMARY.sub("", inner).strip())
    return (_FOLDED.sub("", text), "\n".join(thoughts)) if thoughts else (text, "")


def _about(row: Row, data: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    details = data.get("details") or row.get("details")  # Some versions write `details` beside `data`.
    return {
        "model": data.get("model_id") or message.get("model"),
        "reason": data.get("reason"),
        "tags": data.get("tags"),
        "rating_of_10": details.get("rating") if isinstance(details, Mapping) else None,
    }


def _fits(row: Row) -> float:
    snapshot, data = row.get("snapshot"), row.get("data")
    if not isinstance(data, Mapping) or "rating" not in data or not isinstance(row.get("meta"), Mapping):
        return 0.0
    return 1.0 if isinstance(snapshot, Mapping) and "chat" in snapshot else 0.6


FORMAT = Format(
    name="open_webui",
    title="Open WebUI thumbs and arena votes",
    example='{"id": "...", "type": "rating", "data": {"rating": 1}, "meta": {...}, "snapshot": {"chat": {...}}}',
    documented="Open WebUI, Evaluation, and its feedback model (backend/open_webui/models/feedbacks.py)",
    fits=_fits,
    open=open_reader,
)
