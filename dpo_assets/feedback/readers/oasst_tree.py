"""OpenAssistant message trees: ranked replies to one message become pairs (rank 0 is best)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.feedback.pairing import proposed
from dpo_assets.feedback.readers import Format, Place, ReadOptions, RowFault

HIGHEST_RANK = 10_000  # A tree has a handful of replies; a larger number is no rank.
_ROLES = {"prompter": "user", "assistant": "assistant"}


def read(row: Mapping[str, Any], place: Place, options: ReadOptions) -> Iterator[Pair | RowFault]:
    """Every prompter message of the tree with two or more ranked replies; at least one item per tree."""
    root = row.get("prompt")
    tree = place.row_id(row.get("message_tree_id"))
    if not isinstance(root, Mapping):
        yield RowFault("wrong_shape", f"no message tree in `prompt`; the row has: {', '.join(sorted(row))}", tree)
        return
    found = False
    try:
        for item in _comparisons(root, [], tree, place, options):
            found = True
            yield item
    except RowFault as fault:
        yield RowFault(fault.reason, fault.message, tree)
        return
    if not found:
        yield RowFault("no_comparison", "no message of this tree has two ranked replies", tree)


def _comparisons(
    node: Mapping[str, Any], path: list[Message], tree: str, place: Place, options: ReadOptions
) -> Iterator[Pair | RowFault]:
    path = [*path, _message(node)]
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(r, Mapping) for r in replies):
        raise RowFault("wrong_type", "`replies` is not a list of messages")
    if node.get("role") == "prompter":
        # A reply without a rank was not compared with its siblings, so it belongs to no pair.
        ranked = sorted((r for r in replies if _is_rank(r.get("rank"))), key=lambda r: r["rank"])
        for best, worst in _pairs(ranked, options):
            yield _pair(path, best, worst, tree, place, options)
    for reply in replies:
        yield from _comparisons(reply, path, tree, place, options)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= HIGHEST_RANK


def _pairs(ranked: list[Mapping[str, Any]], options: ReadOptions) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    scores = [-float(reply["rank"]) for reply in ranked]
    return [(ranked[a], ranked[b]) for a, b in proposed(scores, options.pairing)]


def _pair(
    path: list[Message],
    best: Mapping[str, Any],
    worst: Mapping[str, Any],
    tree: str,
    place: Place,
    options: ReadOptions,
) -> Pair | RowFault:
    row = f"{best.get('message_id')}>{worst.get('message_id')}"
    if best["rank"] == worst["rank"]:
        return RowFault("tie", f"both replies have rank {best['rank']}", row)
    if worst["rank"] - best["rank"] < options.min_margin:
        return RowFault("tie", f"the ranks {best['rank']} and {worst['rank']} lie less than min_margin apart", row)
    if not options.include_synthetic and (best.get("synthetic") or worst.get("synthetic")):
        return RowFault("synthetic", "one side was written by a machine; keep such pairs with include_synthetic", row)
    return Pair(
        prompt=path,
        chosen=[_message(best)],
        rejected=[_message(worst)],
        source=place.source,
        row=row,
        line=place.line,
        label_kind="human_ranking",
        margin=float(worst["rank"] - best["rank"]),
        meta={"tree": tree},
    )


def _message(node: Mapping[str, Any]) -> Message:
    role, text = node.get("role"), node.get("text")
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise RowFault("wrong_type", f"message {node.get('message_id')!r} lacks a known role or text")
    return {"role": _ROLES[role], "content": text}


FORMAT = Format(
    name="oasst_tree",
    title="OpenAssistant message trees",
    example='{"message_tree_id": "...", "prompt": {"role": "prompter", "replies": [...]}}',
    documented="OpenAssistant documentation, Data schemas, ExportMessageTree",
    fits=lambda row: 1.0 if "message_tree_id" in row and isinstance(row.get("prompt"), Mapping) else 0.0,
    read=read,
)
