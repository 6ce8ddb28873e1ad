"""`format: auto`: which reader the first rows of a file are for, how sure that is, or why it cannot be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_assets.feedback.readers import Format, RowFault, formats, keys_of
from dpo_assets.feedback.readers.written import opened
from dpo_assets.feedback.sources import FeedbackFile, FileRefused, rows_of

ROWS = 20  # Sound rows that are looked at.
MOST_READ = 1_000  # Rows read to find them.
LEAST = 0.6  # Mean fit below which a format is no answer.
APART = 0.05  # By how much the best has to lead: a format with columns of its own says 1, a general one at most 0.9.
_MOST_KEYS = 3
# Reasons that say that a row was not understood: it is damaged, or of another format.
NOT_UNDERSTOOD = frozenset(
    {
        "wrong_shape", "missing_field", "missing_text", "wrong_type", "unknown_role", "bad_role_order",
        "no_shared_prompt", "invalid_json", "duplicate_key", "not_an_object", "too_deep", "row_too_large",
        "invalid_utf8", "invalid_csv", "wrong_cells", "unclosed_quote", "invalid_number", "reserved_name",
        "reader_failed", "not_used",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Sniffed:
    """A format, how sure it is (0 to 1), and that in words."""

    format: str
    confidence: float
    message: str


def sniff(file: FeedbackFile) -> Sniffed:
    """The format of a file, from its first rows; one that needs a companion says so when it is opened.

    Raises:
        FileRefused: `unknown_format` when none fits, with the keys that were found; `ambiguous_format` when two do,
            with both; whatever the file itself is refused for.
    """
    rows: list[Mapping[str, Any]] = []
    read = 0
    try:
        for row in rows_of(replace(file, sha256="")):
            read += 1
            if not isinstance(row.value, RowFault):
                rows.append(row.value)
            if len(rows) == ROWS or read == MOST_READ:
                break
    except FileRefused:
        if not rows:
            raise
    if not rows:
        raise FileRefused("unknown_format", f"none of its first {read} rows can be read, so nothing tells its format")
    return judge(rows, list(formats().values()))


def looked_at_again(file: FeedbackFile, reasons: Mapping[str, int]) -> str:
    """What is wrong with a file that was read and gave nothing; empty where its format is not to blame.

    Rows that were understood and held no preference, or that are damaged in a file of the right format, are for
    `quarantine_rate`: a small file may hold nothing else.

    Args:
        file: as it was read.
        reasons: its rejected rows by reason, which are all of its rows.
    """
    strange = sum(count for reason, count in reasons.items() if reason in NOT_UNDERSTOOD)
    if 2 * strange < sum(reasons.values()):
        return ""
    told = f"none of its {sum(reasons.values())} rows is of use as `{file.format}`"
    for one in [file, replace(file, columns={})] if file.columns else [file]:
        try:
            sniffed = sniff(one)
        except FileRefused as refused:
            unknown = refused.message
            continue
        mapped = one.columns == file.columns
        if sniffed.format != file.format:
            way = "" if mapped else " without `columns`"
            return f"{told}, and it looks like {sniffed.message}: write `format: {sniffed.format}`{way} for its source"
        if mapped:
            return ""
        unknown = f"without its `columns` `auto` takes it for `{file.format}`"
        break
    return f"{told} ({', '.join(f'{reason} {count}' for reason, count in sorted(reasons.items()))}); {unknown}"


def judge(rows: Sequence[Mapping[str, Any]], known: Sequence[Format]) -> Sniffed:
    """The format that rows are in. See `sniff`."""
    seen = [_as_readers_see_it(row) for row in rows]
    scores = sorted(((_mean_fit(format_, seen), format_.name) for format_ in known), key=lambda one: (-one[0], one[1]))
    fitting = [(fit, name) for fit, name in scores if fit >= LEAST]
    saw = _saw(rows)
    if not fitting:
        near = f"; nearest is `{scores[0][1]}` ({scores[0][0]:.0%})" if scores and scores[0][0] > 0 else ""
        message = f"no format fits {saw}{near}. Name one under `format`, if need be with a column map under `columns`"
        raise FileRefused("unknown_format", message)
    rivals = [(fit, name) for fit, name in fitting if round(fitting[0][0] - fit, 3) <= APART]
    if len(rivals) > 1:
        names = " and ".join(f"`{name}` ({fit:.0%})" for fit, name in rivals)
        raise FileRefused("ambiguous_format", f"{names} both fit {saw}. Write the one that it is under `format`")
    fit, name = fitting[0]
    confidence = round(fit, 2)
    return Sniffed(name, confidence, f"`{name}`, {confidence:.0%} sure, from {saw}")


def _mean_fit(format_: Format, rows: Sequence[Mapping[str, Any]]) -> float:
    total = 0.0
    for row in rows:
        try:
            total += min(1.0, max(0.0, float(format_.fits(row))))
        except Exception:  # A foreign reader's look at a row that it does not know.
            continue
    return total / len(rows)


def _as_readers_see_it(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the messages of its text columns as messages."""
    try:
        return opened(row)[0]
    except RowFault:
        return row


def _saw(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was looked at: how many rows, with which keys."""
    shapes = sorted({keys_of(row) for row in rows})
    keys = "; ".join(shapes[:_MOST_KEYS]) + ("; ..." if len(shapes) > _MOST_KEYS else "")
    return f"{len(rows)} rows with the keys: {keys}" if len(rows) > 1 else f"1 row with the keys: {keys}"
