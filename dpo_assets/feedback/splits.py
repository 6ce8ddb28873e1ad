"""From sound pairs to train and eval: what the model can hold, and which side a pair is on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import TEMPLATE_FAULT
from dpo_assets.feedback.rules import (
    NO_EMBEDDING,
    TEMPLATE_BOUNDARY,
    TEMPLATE_DROPS_TEXT,
    TEMPLATE_FAULTS,
    TEMPLATE_REFUSED,
    UNSUPPORTED_MODALITY,
)
from dpo_assets.feedback.tables import quarantine_record

if TYPE_CHECKING:
    import polars as pl


UNFIT_SHARE = 0.9  # Of all pairs: a template that fails so many fits none of the data.
MOST_KINDS = 3


def fit_to_model(
    pairs: pl.DataFrame, tokens: pl.DataFrame, max_length: int
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Joins token ids to pairs and sets aside what the model could not learn from.

    TRL drops a prompt that fills `max_length` silently and trains on pairs that truncation made equal; here both go to
    quarantine, and so does a pair that the chat template refuses, whose prompt it renders differently once an answer
    follows, or of which it leaves out what people saw or judged.
    """
    import polars as pl

    joined = pairs.join(tokens, on="pair_id", how="left", validate="m:1", maintain_order="left")
    size = pl.col("prompt_ids").list.len().cast(pl.Int64)
    room = (max_length - size).clip(lower_bound=0)
    cut = [pl.col(f"{side}_ids").list.head(room) for side in ("chosen", "rejected")]
    judged = joined.with_columns(
        pl.when(pl.col(TEMPLATE_FAULT).is_not_null())
        .then(pl.col(TEMPLATE_FAULT).str.splitn(":", 2).struct.field("field_0"))
        .when(size >= max_length)
        .then(pl.lit("prompt_too_long"))
        .when(cut[0] == cut[1])
        .then(pl.lit("identical_after_truncation"))
        .alias("reason")
    )
    faults = []
    for record in judged.filter(pl.col("reason").is_not_null()).iter_rows(named=True):
        length = len(record["prompt_ids"])
        same = (
            "have the same tokens"
            if record["chosen_ids"] == record["rejected_ids"]
            else (f"are equal in the {max_length - length} tokens that max_length leaves them")
        )
        messages = {
            "prompt_too_long": f"the prompt has {length} tokens, max_length is {max_length}",
            "identical_after_truncation": f"chosen and rejected {same}",
        }
        reason = record["reason"]
        message = messages.get(reason) or _described(reason, _said(record[TEMPLATE_FAULT]))
        faults.append(quarantine_record(record, reason, message))
    return judged.filter(pl.col("reason").is_null()).drop(TEMPLATE_FAULT, "reason"), faults


def _described(reason: str, said: str) -> str:
    """What a fault that the worker found is to a person."""
    return {
        TEMPLATE_REFUSED: f"the chat template refuses the conversation: {said}",
        TEMPLATE_BOUNDARY: "the chat template renders the prompt differently once an answer follows it",
        TEMPLATE_DROPS_TEXT: f"the chat template leaves out text {said}, so nothing would be learnt of it",
        UNSUPPORTED_MODALITY: said,
        NO_EMBEDDING: f"the text holds `{said}`, for which the model's embedding has no row",
    }[reason]


def unfit_template(faults: Mapping[str, int], pairs: int) -> str | None:
    """What the chat template does to nearly all pairs, or None: then it is the template that must change, not the data.

    Args:
        faults: how many pairs have each `template_fault`.
        pairs: that were rendered.
    """
    found = {fault: count for fault, count in faults.items() if fault.partition(":")[0] in TEMPLATE_FAULTS}
    total = sum(found.values())
    if not total or total < UNFIT_SHARE * pairs:
        return None
    most = sorted(found.items(), key=lambda one: (-one[1], one[0]))[:MOST_KINDS]
    kinds = [f"{_described(fault.partition(':')[0], _said(fault))} ({count})" for fault, count in most]
    return f"{total} of {pairs} pairs cannot be rendered: {'; '.join(kinds)}"


def _said(template_fault: str | None) -> str:
    return (template_fault or "").partition(": ")[2]


def draw_of(group_id: str, seed: int) -> int:
    """What is drawn for a group: a whole number below 2**64. Depends on the group alone, so a group stays as feedback
    grows."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group_id}".encode()).digest()[:8], "big")


def in_eval_split(group_id: str, fraction: float, seed: int) -> bool:
    """Whether a group is drawn to be held out."""
    return draw_of(group_id, seed) / 2**64 < fraction


def held_out(drawn: pl.Series, together: pl.Series) -> pl.Series:
    """Which pairs are held out: those of which all that stand together were drawn to be.

    Args:
        drawn: whether a pair's group was drawn to be held out, and may be.
        together: pairs with equal values stay on one side.
    """
    import polars as pl

    table = pl.DataFrame({"drawn": drawn, "together": together})
    return table.select(pl.col("drawn").all().over("together")).to_series()


def sides(facts: pl.DataFrame, fraction: float, kept_in_train: Collection[str] = ()) -> pl.Series:
    """Which pairs are held out, by their `draw`, `group_id` and `together`. Groups of `kept_in_train` never are."""
    import polars as pl

    # As `in_eval_split` draws: a division by a power of two is exact.
    drawn = facts["draw"].cast(pl.Float64) / 2.0**64 < fraction
    if kept_in_train:
        drawn = drawn & ~facts["group_id"].is_in(list(kept_in_train))
    return held_out(drawn, facts["together"]).alias("held_out")


def split(
    pairs: pl.DataFrame, fraction: float, seed: int, kept_in_train: Collection[str] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(train, eval), by group, each in pair_id order so that file order does not matter.

    Groups of `kept_in_train` are trained on whatever is drawn for them. A group is that of the text as it was read:
    where cleaning made openings of several groups equal, they are held out only if all of them are.
    """
    import polars as pl

    drawn = [in_eval_split(g, fraction, seed) and g not in kept_in_train for g in pairs["group_id"]]
    mask = held_out(pl.Series(drawn, dtype=pl.Boolean), pairs.select(together()).to_series())
    ordered = pairs.with_columns(mask.alias("held_out")).sort("pair_id")
    train = ordered.filter(~pl.col("held_out")).drop("held_out")
    return train, ordered.filter(pl.col("held_out")).drop("held_out")


def shared_prompts(one: pl.DataFrame, other: pl.DataFrame) -> int:
    """Opening messages that stand in both tables, after white-space folding.

    Compared are the texts themselves: a fault of the ids that the split keeps together would not show in the ids.
    """
    shared: pl.DataFrame = _openings(one).join(_openings(other), on="opening", how="semi")
    return int(shared.height)


def _openings(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.select(opening=_opening()).unique()


def together() -> pl.Expr:
    """What the pairs of one side share: their opening message; the group of a pair without one."""
    import polars as pl

    return pl.coalesce(_opening(), pl.col("group_id")).alias("together")


def _opening() -> pl.Expr:
    """The first message of the user, with or without a system message before it, white space folded."""
    import polars as pl

    asked = pl.element().filter(pl.element().struct.field("role") == "user").struct.field("content")
    return pl.col("prompt").list.eval(asked).list.first().str.replace_all(r"\s+", " ").str.strip_chars()
