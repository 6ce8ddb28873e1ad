"""From answers that were judged one by one to pairs: which answer is held against which.

A group is what one judgement scale can compare: the answers to one prompt, judged in one way (thumbs with thumbs,
ratings with ratings), in all files that are read together: exports of thumbs come daily or hourly, and the two sides of
a pair often in different files. An answer that was judged more than once counts once, with the mean of its scores.

| policy | pairs of a group |
|---|---|
| `best_worst` | the best answer against the worst |
| `adjacent` | each answer against the next in score |
| `all_above_margin` | every two answers whose scores lie apart |

Under every policy a pair needs scores that differ by more than 0 and at least `min_margin`. Which of several equally
good answers is taken depends on their content, never on the order of rows or files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from dpo_assets.feedback.pair import Pair, Rejected
from dpo_assets.feedback.turns import one_answer

if TYPE_CHECKING:
    import polars as pl

Policy = Literal["best_worst", "adjacent", "all_above_margin"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

UNPAIRED, TIE, NOT_COMPARED = "unpaired", "tie", "not_compared"


def proposed(scores: Sequence[float], policy: str) -> list[tuple[int, int]]:
    """(better, worse) places of `scores` that a policy holds against each other, ties included.

    Equal scores are taken in their order.

    Raises:
        ValueError: for a policy that does not exist.
    """
    order = sorted(range(len(scores)), key=lambda n: -scores[n])
    if policy == "best_worst":
        # Of several answers that share the lowest score the first, as of those that share the highest.
        return [(order[0], min(order[1:], key=lambda n: scores[n]))] if len(order) > 1 else []
    if policy == "adjacent":
        return list(pairwise(order))
    if policy == "all_above_margin":
        return list(combinations(order, 2))
    raise ValueError(f"there is no pairing policy `{policy}`; there are: {', '.join(POLICIES)}")


def comparisons(scores: Sequence[float], policy: str, min_margin: float = 0.0) -> list[tuple[int, int]]:
    """Those of `proposed` whose scores differ, and by `min_margin` or more."""
    found = proposed(scores, policy)
    return [(a, b) for a, b in found if scores[a] > scores[b] and scores[a] - scores[b] >= min_margin]


@dataclass(frozen=True)
class Paired:
    """What a policy made of judged answers. `counts` is for people: made, used and left, by label kind."""

    pairs: list[Pair]
    rejected: list[Rejected]
    counts: dict[str, dict[str, int]]


def pair_answers(answers: pl.DataFrame, policy: str, min_margin: float = 0.0) -> Paired:
    """Pairs of a table of judged answers; every answer that is in none, with the reason.

    Args:
        answers: see `tables.answers_frame`.
        policy: one of POLICIES.
        min_margin: the least difference of scores.
    """
    ordered = answers.sort("prompt_id", "label_kind", "answer_id", "source", "line", "row", "score")
    pairs: list[Pair] = []
    rejected: list[Rejected] = []
    counts: dict[str, Counter[str]] = {}
    rows = ordered.iter_rows(named=True)
    for (_, kind), group in groupby(rows, key=lambda row: (row["prompt_id"], row["label_kind"])):
        count = counts.setdefault(kind, Counter())
        made, left = _pairs_of_group(list(group), policy, min_margin, count)
        pairs += made
        rejected += left
        count["pairs"] += len(made)
        count.update(f"left: {row.reason}" for row in left)
    return Paired(pairs, rejected, {kind: dict(sorted(count.items())) for kind, count in sorted(counts.items())})


def _pairs_of_group(
    group: list[dict[str, Any]], policy: str, min_margin: float, count: Counter[str]
) -> tuple[list[Pair], list[Rejected]]:
    judged = [list(rows) for _, rows in groupby(group, key=lambda row: row["answer_id"])]
    scores = [sum(row["score"] for row in rows) / len(rows) for rows in judged]
    chosen = comparisons(scores, policy, min_margin)
    used = {n for one in chosen for n in one}
    count.update({"answers": len(group), "prompts": 1, "used": sum(len(judged[n]) for n in used)})
    made = [_pair(judged[a], judged[b], scores[a] - scores[b], policy) for a, b in chosen]
    left = [row for n, rows in enumerate(judged) if n not in used for row in rows]
    reason, message = _why_left(scores, bool(chosen), policy, min_margin)
    return made, [Rejected(reason, message, row["source"], row["row"], row["line"], row["raw"]) for row in left]


def _why_left(scores: Sequence[float], some: bool, policy: str, min_margin: float) -> tuple[str, str]:
    if len(scores) == 1:
        return UNPAIRED, "no other answer to this prompt was judged in the same way"
    if len(set(scores)) == 1:
        return TIE, f"all {len(scores)} answers to this prompt have the score {scores[0]:g}"
    if some:
        return NOT_COMPARED, f"the policy {policy} makes its pairs of other answers to this prompt"
    return TIE, f"no two answers to this prompt lie {min_margin:g} apart"


def _pair(better: list[dict[str, Any]], worse: list[dict[str, Any]], margin: float, policy: str) -> Pair:
    one, other = better[0], worse[0]
    users = {row["user"] for row in (*better, *worse)}
    dates = [row["created_at"] for row in (*better, *worse) if row["created_at"]]
    pair = Pair(
        prompt=one["prompt"],
        chosen=one["answer"],
        rejected=other["answer"],
        source=one["source"],
        row=f"{one['row']}>{other['row']}",
        line=one["line"],
        label_kind=one["label_kind"],
        margin=margin,
        meta={
            "pairing": policy,
            "chosen": json.loads(one["meta"]),
            "rejected": json.loads(other["meta"]),
            "rejected_from": f"{other['source']}:{other['line']}",
        },
        created_at=max(dates, default=None),
        user=users.pop() if len(users) == 1 else None,
        tools=one["tools"],
        flags=tuple(sorted(set(_flags(better)) | set(_flags(worse)))),
    )
    return one_answer(pair)


def _flags(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield from filter(None, row["flags"].split(","))
