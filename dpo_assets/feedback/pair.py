"""The canonical preference pair, and the one table that describes its columns.

A pair is a conversation: `prompt`, `chosen` and `rejected` are lists of messages with explicit roles, never rendered
text (a rendered prompt gets its BOS twice). The same table feeds the Parquet schema, the pandera schema and the
Columns tab, so that what the UI promises before the first run is what is checked in every run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from json.encoder import encode_basestring as _quoted
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_args

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl


REASONING: Literal["reasoning_content"] = "reasoning_content"


class Message(TypedDict):
    """One turn. `role` is system, user or assistant.

    `reasoning_content` is what a model thought, where a row keeps it apart from what was said. Only readers give it:
    `turns.settled_pair` says what becomes of it, and no table has it.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]


LabelKind = Literal["human_pair", "human_ranking", "human_rating", "human_thumb", "edit", "judge_rating", "arena"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Pair:
    """One preference: after `prompt`, `chosen` was preferred to `rejected`."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source: str
    row: str
    line: int
    label_kind: LabelKind = "human_pair"
    margin: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    created_at: str | None = None  # ISO 8601, UTC.
    user: str | None = None  # Who judged: `named` by the reader; ingestion keeps `hashed_user` of it.
    flags: tuple[str, ...] = ()  # What ingestion saw or changed in the text.
    row_hash: str | None = None  # `digest` of the row's bytes as they were read, before anything was changed.
    tools: str = ""  # The tools that the prompt offers: see `modality.tools_text`.

    @property
    def pair_id(self) -> str:
        """sha256 of the three conversations and the tools, 32 hex digits: equal content, equal id, from anywhere."""
        return conversations_id(self.prompt, self.chosen, self.rejected, tools=self.tools)

    @property
    def prompt_id(self) -> str:
        """Digest of the prompt after NFC and white-space folding, and of its tools: prompts that ask the same thing."""
        return prompt_ids(self.prompt, self.tools)[0]

    @property
    def group_id(self) -> str:
        """What a split keeps together: everything that opens with the same user message.

        One OpenAssistant tree is one group, and no prompt can land in both splits, whatever file it came from.
        """
        return prompt_ids(self.prompt)[1]


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer with a verdict of its own: a thumb, a rating or a rank. Pairing it with others is a policy's work."""

    prompt: list[Message]
    answer: list[Message]
    score: float  # Higher is better: a thumb is 1 or -1, a rank r is -r.
    source: str
    row: str
    line: int
    label_kind: LabelKind
    meta: dict[str, Any] = field(default_factory=dict)
    created_at: str | None = None
    user: str | None = None
    flags: tuple[str, ...] = ()
    raw: bytes = b""  # The row as read: an answer that pairs with none is quarantined with it.
    tools: str = ""  # As of a Pair.


@dataclass(frozen=True)
class Rejected:
    """A row that is not a pair, with all that is needed to mend it at its source."""

    reason: str
    message: str
    source: str
    row: str
    line: int
    raw: bytes


def named(user: str | int | None) -> str | None:
    """Who judged, as a source names them. None for nobody."""
    return None if user is None or user == "" else str(user)


def hashed_user(user: str | None, key: bytes) -> str | None:
    """16 hex digits for a user: enough to count by, nothing to read. None for nobody, and without a key.

    HMAC-SHA256 (RFC 2104): an address or a number is found again by trying all of them only by who has the key.
    """
    return hmac.new(key, user.encode("utf-8", "surrogatepass"), "sha256").hexdigest()[:16] if user and key else None


def said(text: str) -> str:
    """What a text says: NFC, without white space at its end. All other white space may be the preference: the
    indentation of code, the lines of a list."""
    return (text if text.isascii() else unicodedata.normalize("NFC", text)).rstrip()


def fold(text: str) -> str:
    """NFC, white space folded to single spaces, ends stripped. Never NFKC: that changes code and mathematics."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def digest(data: bytes) -> str:
    """The first 32 hex digits of sha256."""
    return hashlib.sha256(data).hexdigest()[:32]


def conversations_id(*conversations: Sequence[Message], tools: str = "") -> str:
    """Digest of message lists, as of their JSON with sorted keys, and of the tools where there are any.

    The JSON is put together by hand: a million pairs are hashed twice, and `json.dumps` would take most of that time.
    """
    return _id(*map(_messages_json, conversations), tools=tools)


def pair_and_flipped_id(pair: Pair) -> tuple[str, str]:
    """The pair's id, and that of the same pair with its answers exchanged."""
    prompt, chosen, rejected = map(_messages_json, (pair.prompt, pair.chosen, pair.rejected))
    return _id(prompt, chosen, rejected, tools=pair.tools), _id(prompt, rejected, chosen, tools=pair.tools)


def _id(*parts: str, tools: str) -> str:
    return digest(f"[{', '.join((*parts, tools) if tools else parts)}]".encode())


def _messages_json(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        [m] = messages
        return f'[{{"content": {_quoted(m["content"])}, "role": {_quoted(m["role"])}}}]'
    inner = [f'{{"content": {_quoted(m["content"])}, "role": {_quoted(m["role"])}}}' for m in messages]
    return f"[{', '.join(inner)}]"


def answer_id(answer: Sequence[Message]) -> str:
    """Digest of what an answer says; answers with the same one are one answer."""
    return conversations_id([{"role": m["role"], "content": said(m["content"])} for m in answer])


def prompt_ids(prompt: Sequence[Message], tools: str = "") -> tuple[str, str]:
    """(`prompt_id`, `group_id`) of a prompt. A group's prompts may offer different tools."""
    folded = [(m["role"], fold(m["content"])) for m in prompt]
    opening = next((text for role, text in folded if role == "user"), "")
    turns = [f"[{_quoted(role)}, {_quoted(text)}]" for role, text in folded]
    return _id(*turns, tools=tools), _id(_quoted(opening), tools="")


@dataclass(frozen=True)
class Column:
    """One column of the dataset, as people see it and as it is checked."""

    name: str
    kind: Literal["string", "messages", "number", "integer", "tokens"]
    description: str
    nullable: bool = False
    unique: bool = False
    rules: tuple[str, ...] = ()


TOOLS = "tools"  # Tool definitions that a prompt came with, as JSON; empty: none. Tables of earlier versions lack it.
PAIR_COLUMNS: tuple[Column, ...] = (
    Column("pair_id", "string", "Digest of prompt, chosen and rejected.", unique=True, rules=("32 hex digits",)),
    Column("prompt", "messages", "Conversation before the answers.", rules=("ends with a user message",)),
    Column("chosen", "messages", "The preferred answer.", rules=("ends with an assistant message",)),
    Column("rejected", "messages", "The other answer.", rules=("ends with an assistant message",)),
    Column(TOOLS, "string", "Tools that the prompt offers, as JSON of a list of function definitions; empty: none."),
    Column("prompt_id", "string", "Digest of the prompt after NFC and white-space folding.", rules=("32 hex digits",)),
    Column("group_id", "string", "What the split keeps together: same opening message.", rules=("32 hex digits",)),
    Column("source", "string", "File the pair came from."),
    Column("row", "string", "Id of the row in that file."),
    Column("line", "integer", "Line in that file, from 1.", rules=("at least 1",)),
    Column("label_kind", "string", "How the preference was given.", rules=(" or ".join(LABEL_KINDS),)),
    Column("margin", "number", "Strength of the preference, where the source has one.", nullable=True),
    Column("created_at", "string", "When the preference was given, ISO 8601 in UTC.", nullable=True),
    Column("user", "string", "Digest of who gave it.", nullable=True),
    Column("meta", "string", "What else the source said, as JSON."),
    Column("flags", "string", "What was seen or changed in the text, comma-separated; empty: nothing."),
    Column("row_hash", "string", "Digest of the row's bytes as read.", nullable=True, rules=("32 hex digits",)),
)

TOKEN_COLUMNS: tuple[Column, ...] = (
    Column("prompt_ids", "tokens", "Prompt rendered by the chat template, as token ids."),
    Column("chosen_ids", "tokens", "Chosen answer as token ids, not truncated."),
    Column("rejected_ids", "tokens", "Rejected answer as token ids, not truncated."),
)

TEMPLATE_FAULT = "template_fault"  # Beside the token ids: why a pair cannot be rendered, or null.

QUARANTINE_COLUMNS: tuple[Column, ...] = (
    Column("reason", "string", "Machine-readable reason code."),
    Column("message", "string", "What is wrong with this row."),
    Column("source", "string", "File the row came from."),
    Column("row", "string", "Id of the row in that file."),
    Column("line", "integer", "Line in that file, from 1; 0 for a whole file."),
    Column("raw", "string", "The row's bytes as read, base64."),
)


@cache
def polars_schema(columns: tuple[Column, ...]) -> pl.Schema:
    """The Parquet types of `columns`."""
    import polars as pl

    message = pl.Struct({"role": pl.String, "content": pl.String})
    types: dict[str, pl.DataType] = {
        "string": pl.String(),
        "messages": pl.List(message),
        "number": pl.Float64(),
        "integer": pl.Int64(),
        "tokens": pl.List(pl.Int32()),
    }
    return pl.Schema({c.name: types[c.kind] for c in columns})


@cache
def token_schema() -> pl.Schema:
    """What the worker's stage `tokenize` writes of each pair; `template_fault` is `reason` or `reason: message`."""
    import polars as pl

    return pl.Schema({"pair_id": pl.String(), **polars_schema(TOKEN_COLUMNS), TEMPLATE_FAULT: pl.String()})


@cache
def pandera_schema(alone: bool = False) -> pa.DataFrameSchema:
    """The contract of accepted pairs. Built on first use: importing pandera costs more than a code location may.

    Args:
        alone: of each pair by itself: equal ones are for a rule of their own.
    """
    import pandera.polars as pa
    import polars as pl

    def last_role(role: str) -> pa.Check:
        return pa.Check(
            lambda data: data.lazyframe.select(pl.col(data.key).list.last().struct.field("role").eq(role)),
            name=f"ends with {'a user' if role == 'user' else 'an assistant'} message",
        )

    def no_blank_content() -> pa.Check:
        content = pl.element().struct.field("content").str.strip_chars().str.len_chars() > 0
        return pa.Check(
            lambda data: data.lazyframe.select(pl.col(data.key).list.eval(content).list.all()),
            name="no blank message",
        )

    checks: dict[str, list[pa.Check]] = {
        "prompt": [last_role("user"), no_blank_content()],
        "chosen": [last_role("assistant"), no_blank_content()],
        "rejected": [last_role("assistant"), no_blank_content()],
        "line": [pa.Check.ge(1, name="at least 1")],
        "label_kind": [pa.Check.isin(LABEL_KINDS, name=" or ".join(LABEL_KINDS))],
    }
    for name in ("pair_id", "prompt_id", "group_id", "row_hash"):
        checks[name] = [pa.Check.str_matches(r"^[0-9a-f]{32}$", name="32 hex digits")]
    types = polars_schema(PAIR_COLUMNS)
    return pa.DataFrameSchema(
        {
            c.name: pa.Column(types[c.name], checks.get(c.name, []), nullable=c.nullable, unique=c.unique and not alone)
            for c in PAIR_COLUMNS
        },
        strict=True,
    )


def as_json(value: Any) -> str:
    """JSON with sorted keys; what JSON does not know becomes text."""
    return _ENCODER.encode(value) if value else "{}"


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
