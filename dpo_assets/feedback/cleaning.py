"""From batches to a dataset: what a pair must satisfy, duplicates, conflicts, fit to the model, the split.

The accounting identity holds at every step: rows in = accepted + quarantined + duplicates.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import (
    PAIR_COLUMNS,
    QUARANTINE_COLUMNS,
    ROLES,
    Message,
    Pair,
    fold,
    pandera_schema,
    polars_schema,
)

if TYPE_CHECKING:
    import polars as pl

# Rows left out by a choice of the recipe or by the model's size. They are quarantined too, but they do not say that
# an export is broken, so the quarantine-rate gate does not count them.
NOT_DAMAGE = frozenset({"synthetic", "no_comparison", "tie", "prompt_too_long", "identical_after_truncation"})


@dataclass(frozen=True)
class Screened:
    """Tables of accepted pairs and quarantined rows, and how many exact duplicates were dropped."""

    pairs: pl.DataFrame
    quarantine: pl.DataFrame
    duplicates: int


def fault_of(pair: Pair) -> tuple[str, str] | None:
    """(reason, message) of the first rule a pair breaks, or None."""
    if not pair.prompt:
        return "empty_prompt", "the prompt has no message"
    for name, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        for message in messages:
            if message["role"] not in ROLES:
                return "unknown_role", f"{name}: role {message['role']!r}; known: {', '.join(ROLES)}"
            if "\x00" in message["content"]:
                return "nul_character", f"{name}: NUL character in the text"
            if not message["content"].strip():
                return f"empty_{name}", f"{name}: a message without text"
    if not pair.chosen or not pair.rejected:
        return "empty_answer", "an answer has no message"
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if problem := _order_fault(pair.prompt, answer):
            return "bad_role_order", f"{name}: {problem}"
    if _folded(pair.chosen) == _folded(pair.rejected):
        return "no_preference", "chosen and rejected are the same text after NFC and white-space folding"
    return None


def _order_fault(prompt: Sequence[Message], answer: Sequence[Message]) -> str | None:
    if prompt[-1]["role"] != "user":
        return f"the prompt ends with a {prompt[-1]['role']} message, expected user"
    if answer[-1]["role"] != "assistant":
        return f"it ends with a {answer[-1]['role']} message, expected assistant"
    turns = [m["role"] for m in [*prompt, *answer]]
    if turns[0] == "system":
        turns = turns[1:]
    expected = ["user" if n % 2 == 0 else "assistant" for n in range(len(turns))]
    if turns != expected:
        return f"roles do not alternate: {' '.join(turns)}"
    return None


def _folded(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(m["role"], fold(m["content"])) for m in messages]


def _flipped_id(record: dict[str, Any]) -> str:
    flipped = [record["prompt"], record["rejected"], record["chosen"]]
    return hashlib.sha256(json.dumps(flipped, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def screen(pairs: pl.DataFrame, quarantine: pl.DataFrame) -> Screened:
    """Applies every rule that needs no tokenizer, then the pandera schema as the contract of what is left."""
    import polars as pl

    kept: dict[str, dict[str, Any]] = {}
    rejected: list[dict[str, Any]] = []
    duplicates = 0
    # In an order of their own: which of two equal pairs stays must not depend on the order of files.
    for record in pairs.sort("source", "line", "row").iter_rows(named=True):
        fault = fault_of(_as_pair(record))
        if fault is not None:
            rejected.append(quarantine_record(record, *fault))
        elif record["pair_id"] in kept:
            duplicates += 1
        else:
            kept[record["pair_id"]] = record
    conflicts = {pair_id for pair_id, record in kept.items() if _flipped_id(record) in kept}
    message = "another row prefers the rejected answer of this one"
    rejected += [quarantine_record(kept[pair_id], "conflict", message) for pair_id in sorted(conflicts)]
    accepted = [record for pair_id, record in kept.items() if pair_id not in conflicts]
    table = pl.DataFrame(accepted, schema=polars_schema(PAIR_COLUMNS))
    table, schema_faults = _apply_schema(table)
    rejected += schema_faults
    more = pl.DataFrame(rejected, schema=polars_schema(QUARANTINE_COLUMNS))
    return Screened(table, pl.concat([quarantine, more]), duplicates)


def _apply_schema(table: pl.DataFrame) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Rows that satisfy the pandera schema, and quarantine rows for those that do not."""
    from pandera.errors import SchemaErrors

    try:
        pandera_schema().validate(table, lazy=True)
        return table, []
    except SchemaErrors as errors:
        cases = errors.failure_cases
        if cases["index"].null_count():
            # A fault of the whole table (a missing column, a wrong type) is a bug of a reader, not of a row.
            raise
        reasons: dict[int, str] = {}
        for case in cases.iter_rows(named=True):
            reasons.setdefault(case["index"], f"{case['column']}: {case['check']}")
    records = table.to_dicts()
    faults = [quarantine_record(records[n], "schema", message) for n, message in sorted(reasons.items())]
    keep = [n for n in range(table.height) if n not in reasons]
    return table[keep], faults


def fit_to_model(
    pairs: pl.DataFrame, tokens: pl.DataFrame, max_length: int
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Joins token ids to pairs and sets aside what the model could not learn from.

    TRL drops a prompt that fills `max_length` silently and trains on pairs that truncation made equal; here both go to
    quarantine, and so does a pair whose rendered prompt is not the beginning of its rendered conversation.
    """
    joined = pairs.join(tokens, on="pair_id", how="left", validate="1:1")
    faults, keep = [], []
    for n, record in enumerate(joined.iter_rows(named=True)):
        room = max_length - len(record["prompt_ids"])
        if record["boundary_fault"]:
            message = "the chat template renders the prompt differently once an answer follows it"
            faults.append(quarantine_record(record, "template_boundary", message))
        elif room < 1:
            message = f"the prompt has {len(record['prompt_ids'])} tokens, max_length is {max_length}"
            faults.append(quarantine_record(record, "prompt_too_long", message))
        elif record["chosen_ids"][:room] == record["rejected_ids"][:room]:
            message = f"chosen and rejected are equal in the {room} tokens that max_length leaves them"
            faults.append(quarantine_record(record, "identical_after_truncation", message))
        else:
            keep.append(n)
    return joined[keep].drop("boundary_fault"), faults


def in_eval_split(group_id: str, fraction: float, seed: int) -> bool:
    """Whether a group is held out. Depends on the group alone, so a group never changes sides as feedback grows."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}:{group_id}".encode()).digest()[:8], "big") / 2**64
    return draw < fraction


def split(pairs: pl.DataFrame, fraction: float, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(train, eval), by group, each in pair_id order so that file order does not matter."""
    import polars as pl

    held_out = [in_eval_split(g, fraction, seed) for g in pairs["group_id"]]
    mask = pl.Series("held_out", held_out, dtype=pl.Boolean)
    ordered = pairs.with_columns(mask).sort("pair_id")
    train = ordered.filter(~pl.col("held_out")).drop("held_out")
    return train, ordered.filter(pl.col("held_out")).drop("held_out")


def quarantine_record(record: dict[str, Any], reason: str, message: str) -> dict[str, Any]:
    """A quarantine row for a pair that was read well but cannot be used."""
    content = {k: record[k] for k in ("prompt", "chosen", "rejected")}
    raw = json.dumps(content, ensure_ascii=False).encode()
    return {
        "reason": reason,
        "message": message,
        "source": record["source"],
        "row": record["row"],
        "line": record["line"],
        "raw": base64.b64encode(raw).decode("ascii"),
    }


def _as_pair(record: dict[str, Any]) -> Pair:
    return Pair(
        prompt=record["prompt"],
        chosen=record["chosen"],
        rejected=record["rejected"],
        source=record["source"],
        row=record["row"],
        line=record["line"],
    )
