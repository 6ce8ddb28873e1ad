"""What stands in texts that should not be trained on unseen: personal data, keys, marks of chat templates.

Ingestion flags every pair (`flags_of`), whatever the recipe wants done about it: changing that reads no file again.
Patterns run over a column at once, in Rust; only what they hit is looked at again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import as_json
from dpo_assets.secret_shapes import HINT, PATTERNS

if TYPE_CHECKING:
    import polars as pl

EMAIL, CARD, PHONE, SECRET, TEMPLATE = "email", "card", "phone", "secret", "template"
PERSONAL = (EMAIL, CARD, PHONE)
BESIDE = "_beside"  # Behind a kind: it stands in the row's other columns, which are kept and never trained on.
OTHER_TEXTS = ("row", "meta")
RENDERED = ("prompt", "chosen", "rejected", "tools")  # What a chat template renders.

_EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,4}\.[A-Za-z]{2,24}\b")
# From the first digits that issuers have; not the decimals of a number.
_CARD = re.compile(r"(?<![0-9.,])[2-6](?:[ -]?[0-9]){12,18}(?![0-9])")
# With a plus and a country, or three groups as in North America: any other run of digits may be anything.
_PHONE = re.compile(
    r"(?<![0-9A-Za-z+])(?:\+[1-9][0-9]{0,3}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9](?:[ .-]?[0-9]){6,12}"
    r"|(?:\([0-9]{3}\) ?|[0-9]{3}[.-])[0-9]{3}[.-][0-9]{4})(?![0-9])"
)
_SECRETS = re.compile("|".join(f"(?:{p.pattern})" for p in PATTERNS.values()))
# Marks of turns and ends in the chat templates of Llama, Qwen, Mistral, Gemma, Phi, DeepSeek and others.
MISREAD = re.compile("[\ufffd\x80-\x9f]")  # Of bytes that were no UTF-8, or were read as Latin-1 (C1 controls).
TEMPLATE_MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
# The same where a name is common in other texts too (`<s>` strikes text through in HTML): only if the model has it.
AMBIGUOUS_MARKS = ("<s>", "</s>", "<pad>", "<unk>", "<bos>", "<eos>")


def luhn(digits: str) -> bool:
    """Whether the last digit of a card's number is the one that the others ask for (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (1 + place % 2)
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


def _is_card(match: str) -> bool:
    digits = re.sub(r"[^0-9]", "", match)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def personal_data(text: str) -> set[str]:
    """Kinds of PERSONAL that a text seems to hold."""
    found = set()
    if "@" in text and _EMAIL.search(text):
        found.add(EMAIL)
    if any(_is_card(m) for m in _CARD.findall(text)):
        found.add(CARD)
    if _PHONE.search(text):
        found.add(PHONE)
    return found


def redacted(text: str, kinds: Iterable[str]) -> str:
    """The text with what it holds of `kinds` replaced by `[kind]`."""
    kinds = set(kinds)
    if SECRET in kinds:
        text = _SECRETS.sub("[secret]", text)
    if EMAIL in kinds:
        text = _EMAIL.sub("[email]", text)
    if CARD in kinds:
        text = _CARD.sub(lambda m: "[card]" if _is_card(m.group()) else m.group(), text)
    if PHONE in kinds:
        text = _PHONE.sub("[phone]", text)
    return text


def redacted_json(text: str, kinds: Iterable[str]) -> str:
    """JSON with its texts redacted, keys too."""
    kinds = set(kinds)
    return as_json(_texts_changed(json.loads(text), lambda one: redacted(one, kinds)))


def changed_tools(tools: str, change: Callable[[str], str]) -> str:
    """`Pair.tools` with all its texts changed, keys too, in the order that it has."""
    return json.dumps(_texts_changed(json.loads(tools), change), ensure_ascii=False) if tools else ""


def _texts_changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _texts_changed(one, change) for key, one in value.items()}
    return [_texts_changed(one, change) for one in value] if isinstance(value, list) else value


def marks_in(text: str, own: Sequence[str] = ()) -> set[str]:
    """Marks of chat templates in a text: those of any known template, and the special tokens of one model.

    At its end the beginning of a mark counts too: an export that cut a turn in its end mark.
    """
    found = {m for m in TEMPLATE_MARK.findall(text) if m not in AMBIGUOUS_MARKS} | {m for m in own if m in text}
    cut = _cut_mark(text, own)
    return found | {cut} if cut else found


# The end marks of known templates, which exports leave on answers, or cut answers in.
_END_MARKS = (
    "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>",
    "<|return|>", "<|start_header_id|>", "<|end_of_turn|>", "<end_of_turn>", "<start_of_turn>", "[/INST]",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
_LEAST_CUT = 4  # Letters of a mark's beginning: fewer are ordinary text, such as `<|` of a pipe.


def _cut_mark(text: str, own: Sequence[str]) -> str:
    """The beginning of a mark that a text ends with, or nothing."""
    tail = text.rstrip()[-48:]
    for mark in (*_END_MARKS, *own):
        for size in range(len(mark) - 1, _LEAST_CUT - 1, -1):
            if tail.endswith(mark[:size]):
                return mark[:size]
    return ""


_DEEPEST = 10  # Marks inside marks: the inner one is seen once the outer one is none.


def escaped(text: str, own: Sequence[str] = (), *, answer: bool = False) -> str:
    """The text with a space behind the first letter of every such mark: readable, and no longer a mark.

    Marks at the end of an `answer` are taken away: the template puts its own there, and what is left of another would
    be learned as the answer's last words.
    """
    while answer and (mark := next((m for m in sorted(marks_in(text, own)) if text.rstrip().endswith(m)), None)):
        text = text.rstrip().removesuffix(mark).rstrip()
    for _ in range(_DEEPEST):
        for mark in sorted(marks := marks_in(text, own), key=lambda m: (-len(m), m)):
            text = text.replace(mark, f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " ")
        if not marks:
            break
    return text


def unusual_marks(own: Iterable[str]) -> list[str]:
    """Marks of a model that TEMPLATE does not flag: they are not like those of any other model."""
    return [mark for mark in own if mark not in AMBIGUOUS_MARKS and not TEMPLATE_MARK.search(mark)]


# What a Rust pattern hits first, and what decides then. `\b` and look-arounds are left to the second.
_FIRST: dict[str, tuple[str, Callable[[str], bool]]] = {
    EMAIL: (r"[A-Za-z0-9]@[A-Za-z0-9]", lambda text: _EMAIL.search(text) is not None),
    CARD: (r"[2-6](?:[ -]?[0-9]){12}", lambda text: any(_is_card(m) for m in _CARD.findall(text))),
    PHONE: (r"\+[1-9][0-9 .()-]{7}|[0-9]{3}(?:[.-]|\) ?)[0-9]{3}[.-][0-9]{4}", lambda text: bool(_PHONE.search(text))),
    SECRET: (HINT, lambda text: _SECRETS.search(text) is not None),
    TEMPLATE: (
        r"<\||<｜|\[/?[A-Z_]{3,16}|<</?SYS>>|<(?:sta|end)|</?(?:s|bos|eos|pad|unk)>",
        lambda text: bool(marks_in(text)) or any(mark in text for mark in AMBIGUOUS_MARKS),
    ),
}


def flags_of(pairs: pl.DataFrame, columns: Iterable[str] = RENDERED) -> dict[str, set[int]]:
    """By kind, the rows of a table in whose texts it stands."""
    import polars as pl

    found: dict[str, set[int]] = {}
    for column in columns:
        texts = contents_of(pairs[column])
        hits = texts.select("n", "text", *(pl.col("text").str.contains(p).alias(k) for k, (p, _) in _FIRST.items()))
        for kind, (_, decides) in _FIRST.items():
            some = hits.filter(pl.col(kind)).select("n", "text")
            found.setdefault(kind, set()).update(n for n, text in some.iter_rows() if decides(text))
    return found


def flags_beside(pairs: pl.DataFrame) -> dict[str, set[int]]:
    """By kind of personal data and secrets, the rows in whose OTHER_TEXTS it stands."""
    import polars as pl

    found: dict[str, set[int]] = {}
    hits = pairs.select(
        *OTHER_TEXTS,
        *(
            pl.any_horizontal(pl.col(c).str.contains(_FIRST[kind][0]) for c in OTHER_TEXTS).alias(f"has {kind}")
            for kind in (*PERSONAL, SECRET)
        ),
    ).with_row_index("at")
    for kind in (*PERSONAL, SECRET):
        for n, row, meta in hits.filter(pl.col(f"has {kind}")).select("at", *OTHER_TEXTS).iter_rows():
            if redacted(row, [kind]) != row or redacted_json(meta, [kind]) != as_json(json.loads(meta)):
                found.setdefault(f"{kind}{BESIDE}", set()).add(n)
    return found


def contents_of(column: pl.Series) -> pl.DataFrame:
    """(n, text): the texts of a column of conversations, or of tools, with the row that each stands in."""
    import polars as pl

    if column.dtype == pl.String:
        return pl.DataFrame({"text": column}).with_row_index("n").filter(pl.col("text") != "")
    sizes = column.list.len()
    rows = pl.select(
        pl.int_range(column.len(), dtype=pl.UInt32).repeat_by(sizes).explode(empty_as_null=False)
    ).to_series()
    text = column.list.explode(keep_nulls=False, empty_as_null=False).struct.field("content")
    return pl.DataFrame({"n": rows, "text": text})


def rows_with(pairs: pl.DataFrame, marks: Sequence[str]) -> list[int]:
    """Rows of a table of pairs whose texts hold one of `marks`."""
    import polars as pl

    found: set[int] = set()
    for column in RENDERED:
        texts = contents_of(pairs[column])
        found.update(texts.filter(pl.col("text").str.contains_any(list(marks)))["n"])
    return sorted(found)


def with_flags(pairs: pl.DataFrame) -> pl.DataFrame:
    """The table with what was found added to its `flags`."""
    import polars as pl

    added: dict[int, list[str]] = {}
    for kind, rows in (flags_of(pairs) | flags_beside(pairs)).items():
        for n in rows:
            added.setdefault(n, []).append(kind)
    if not added:
        return pairs
    flags: list[Any] = pairs["flags"].to_list()
    for n, kinds in added.items():
        flags[n] = ",".join([*filter(None, flags[n].split(",")), *sorted(kinds)])
    return pairs.with_columns(pl.Series("flags", flags, dtype=pl.String))
