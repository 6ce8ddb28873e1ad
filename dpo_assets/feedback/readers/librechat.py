"""LibreChat's messages collection (`mongoexport`): thumbs on answers.

Every rated answer becomes a judged answer with the conversation before it, found by `parentMessageId`. Regenerated
answers have one parent and so one prompt: that is where thumbs are paired. A message without a thumb is named as such;
so are answers that failed or were stopped, and thumbs down whose tag is not about the text (`missing_image`, and what
`fields: {exclude_tags: "a, b"}` adds). A message that was changed is a later version of one `messageId`.

Kept until the end of the file: the messages, on disk; in memory those of one conversation at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_assets.feedback.pair import JudgedAnswer, Message, named
from dpo_assets.feedback.readers import FileReader, Format, Item, Place, ReadOptions, Row, RowFault, keys_of
from dpo_assets.feedback.readers.choices import entries
from dpo_assets.feedback.readers.conversations import spoken
from dpo_assets.feedback.readers.modality import UNSUPPORTED, filled, refuse_beside_text
from dpo_assets.feedback.readers.store import GroupedReader, Identity, Stored
from dpo_assets.feedback.readers.values import identifier, timestamp, version

NO_PARENT = "00000000-0000-0000-0000-000000000000"  # What the first message of a conversation has.
_THUMBS = {"thumbsUp": 1.0, "thumbsDown": -1.0}


def open_reader(options: ReadOptions) -> FileReader:
    """A reader of one export."""
    return GroupedReader(_identify, _read_conversation, options)


def _identify(row: Row) -> Identity:
    written = version(row.get("updatedAt"), row.get("createdAt"))
    return Identity(identifier(row.get("messageId")), written, identifier(row.get("conversationId")))


def _read_conversation(rows: Sequence[Stored], options: ReadOptions) -> Iterator[tuple[Place, Item]]:
    messages = {key: s.row for s in rows if (key := identifier(s.row.get("messageId"))) is not None}
    excluded = {"missing_image", *entries(options, "exclude_tags")}
    for stored in rows:
        row_id = stored.place.row_id(stored.row.get("messageId"))
        try:
            yield stored.place, _item(stored, row_id, messages, excluded)
        except RowFault as fault:
            yield stored.place, RowFault(fault.reason, fault.message, row_id)


def _item(stored: Stored, row_id: str, messages: Mapping[str, Row], excluded: set[str]) -> JudgedAnswer:
    row, place = stored.row, stored.place
    if "messageId" not in row or "isCreatedByUser" not in row:
        raise RowFault("wrong_shape", f"no message of LibreChat; the row has: {keys_of(row)}")
    feedback = row.get("feedback")
    if feedback is None or row["isCreatedByUser"]:
        raise RowFault("no_feedback", "a message without a thumb")
    if not isinstance(feedback, Mapping):
        raise RowFault("wrong_type", f"`feedback` is {type(feedback).__name__}, expected an object")
    rating, tag = feedback.get("rating"), _tag(feedback)
    if not isinstance(rating, str) or rating not in _THUMBS:
        raise RowFault("wrong_type", f"`feedback.rating` is {str(rating)[:40]!r}, expected thumbsUp or thumbsDown")
    if tag in excluded:
        raise RowFault("excluded_tag", f"the thumb is about {tag!r}, not about the text")
    if row.get("error") or row.get("unfinished"):
        raise RowFault("unfinished", "the answer failed or was stopped")
    return JudgedAnswer(
        prompt=_prompt(row, messages),
        answer=[_message(row)],
        score=_THUMBS[rating],
        source=place.source,
        row=row_id,
        line=place.line,
        label_kind="human_thumb",
        meta={"model": row.get("model"), "endpoint": row.get("endpoint"), "tag": tag},
        created_at=timestamp(row.get("updatedAt"), row.get("createdAt")),
        user=named(identifier(row.get("user"))),
    )


def _tag(feedback: Mapping[str, Any]) -> str | None:
    """The tag's key: stored as text, or as the object that the client shows."""
    tag = feedback.get("tag")
    return identifier(tag.get("key") if isinstance(tag, Mapping) else tag)


def _prompt(row: Row, messages: Mapping[str, Row]) -> list[Message]:
    """The messages before `row`, by their `parentMessageId`."""
    path: list[Message] = []
    seen = set()
    parent_id = identifier(row.get("parentMessageId"))
    while parent_id is not None and parent_id != NO_PARENT:
        parent = messages.get(parent_id)
        if parent is None or parent_id in seen:
            raise RowFault(
                "no_counterpart", f"message {parent_id!r}, which another answers, is not in this conversation"
            )
        seen.add(parent_id)
        path.append(_message(parent))
        parent_id = identifier(parent.get("parentMessageId"))
    if not path:
        raise RowFault("no_counterpart", "the answer has no message before it")
    return path[::-1]


def _message(row: Row) -> Message:
    where = f"message {row.get('messageId')!r}"
    refuse_beside_text(row, where)
    if filled(row.get("plugins")):
        raise RowFault(UNSUPPORTED, f"{where} was made with plugins; only text can be read")
    # Newer answers are content parts, and their `text` is empty.
    content = row.get("content") or row.get("text")
    return spoken("user" if row.get("isCreatedByUser") else "assistant", content, where)


def _fits(row: Row) -> float:
    return 1.0 if {"messageId", "conversationId", "parentMessageId", "isCreatedByUser"} <= set(row) else 0.0


FORMAT = Format(
    name="librechat",
    title="LibreChat thumbs",
    example='{"messageId": "...", "parentMessageId": "...", "text": "...", "feedback": {"rating": "thumbsUp"}, ...}',
    documented="LibreChat, message schema (packages/data-schemas message.ts) and feedback.ts of its data provider",
    fits=_fits,
    open=open_reader,
)
