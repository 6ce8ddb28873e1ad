"""Preferences that contradict each other: of one prompt, an answer beats another and, over any path, loses to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import fold
from dpo_assets.feedback.quality_numbers import EXAMPLES, SNIPPET, place

if TYPE_CHECKING:
    import polars as pl

_ENDS = " .,;:!?…\"'“”‘’*_`"  # No sign of a number or of code: -1 is not 1, and C++ is not C.
Edge = tuple[str, str]


def contradictions(judged: pl.DataFrame, texts: Callable[[pl.DataFrame], pl.DataFrame]) -> dict[str, Any]:
    """Counts of pairs that stand in a circle of preferences, and a few of them.

    Exact reversals are in quarantine already (reason `conflict`); these are the others: reversals between answers
    that differ only in case, white space, outer punctuation or emphasis, and circles of three answers or more. Only
    prompts with two pairs or more can show one; `compared` counts those prompts' pairs.

    Args:
        judged: a row a pair, in the order of ids: what tells its prompt (`prompt_a`, `prompt_b`) and its answers
            (`alike_chosen`, `alike_rejected`) from others, and whatever names it.
        texts: the pairs of a few of these rows.
    """
    import polars as pl

    prompt = ["prompt_a", "prompt_b"]
    several = judged.filter(pl.len().over(prompt) > 1)
    found = in_circle(several)
    shown = texts(found.head(EXAMPLES)).sort("pair_id")
    return {
        "compared": several.height,
        "pairs": found.height,
        "examples": [
            {
                "row": place(row),
                **{side: row[side][-1]["content"][:SNIPPET] for side in ("chosen", "rejected")},
            }
            for row in shown.iter_rows(named=True)
        ],
    }


def contradictions_in(pairs: pl.DataFrame) -> dict[str, Any]:
    """`contradictions` of a table of pairs in memory."""
    import polars as pl

    sides = {f"alike_{side}": [alike(answer) for answer in pairs[side].to_list()] for side in ("chosen", "rejected")}
    made = pairs.with_row_index("row_number").select(
        "row_number", "pair_id", prompt_a=pl.col("prompt_id").rank("dense"), prompt_b=0
    )
    judged = made.with_columns(pl.Series(name, values, dtype=pl.UInt64) for name, values in sides.items())
    return contradictions(judged.sort("pair_id"), lambda rows: pairs[rows["row_number"].to_list()])


def in_circle(judged: pl.DataFrame) -> pl.DataFrame:
    """The rows that stand in a circle with others of their prompt, in their order.

    An answer that only wins or only loses stands in none: such pairs are taken out first, again and again, for all
    prompts at once, and hardly any are left to walk through.
    """
    import polars as pl

    prompt = ["prompt_a", "prompt_b"]
    left = judged.filter(pl.col("alike_chosen") != pl.col("alike_rejected")).with_row_index("at")
    before = -1
    while left.height != before:
        before = left.height
        for winner, loser in (("alike_chosen", "alike_rejected"), ("alike_rejected", "alike_chosen")):
            left = left.join(
                left.select(*prompt, loser), left_on=[*prompt, winner], right_on=[*prompt, loser], how="semi"
            )
    rows: list[int] = []
    edges: defaultdict[tuple[int, int], list[tuple[int, Edge]]] = defaultdict(list)
    for a, b, at, chosen, rejected in left.select(*prompt, "at", "alike_chosen", "alike_rejected").iter_rows():
        edges[a, b].append((at, (str(chosen), str(rejected))))
    for some in edges.values():
        circle = in_circles(edge for _, edge in some)
        rows += [at for at, edge in some if edge in circle]
    return left.filter(pl.col("at").is_in(sorted(rows))).sort("at").drop("at")


def alike(answer: Iterable[dict[str, str]]) -> int:
    """A number for what an answer says, whatever its case, white space, outer punctuation and emphasis."""
    said = "\n".join(fold(message["content"]).casefold().strip(_ENDS) for message in answer)
    return int.from_bytes(blake2b(said.encode(), digest_size=8).digest(), "big")


def in_circles(edges: Iterable[Edge]) -> set[Edge]:
    """The edges "first beats second" that lie in a circle. An edge from an answer to itself says nothing, and is none.

    An edge lies in a circle if both its ends are in one strongly connected component (Kosaraju's algorithm).
    """
    forward: defaultdict[str, list[str]] = defaultdict(list)
    backward: defaultdict[str, list[str]] = defaultdict(list)
    known = {edge for edge in edges if edge[0] != edge[1]}
    for winner, loser in sorted(known):
        forward[winner].append(loser)
        backward[loser].append(winner)
    component: dict[str, int] = {}
    for number, start in enumerate(reversed(_finished(forward, sorted({end for edge in known for end in edge})))):
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node not in component:
                component[node] = number
                waiting += backward[node]
    return {edge for edge in known if component[edge[0]] == component[edge[1]]}


def _finished(graph: defaultdict[str, list[str]], nodes: list[str]) -> list[str]:
    """Nodes in the order in which a depth-first walk leaves them. Without recursion: a chain may be long."""
    seen: set[str] = set()
    order: list[str] = []
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(after, False) for after in graph[node] if after not in seen]
    return order
