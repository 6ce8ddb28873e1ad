"""Preferences that contradict each other: of one prompt, an answer beats another and, over any path, loses to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dpo_assets.feedback.pair import fold
from dpo_assets.feedback.quality_numbers import EXAMPLES, SNIPPET, place

if TYPE_CHECKING:
    import polars as pl

_ENDS = " .,;:!?…\"'“”‘’*_`"  # No sign of a number or of code: -1 is not 1, and C++ is not C.
Edge = tuple[str, str]


def contradictions(pairs: pl.DataFrame) -> dict[str, Any]:
    """Counts of screened pairs that stand in a circle of preferences, and a few of them.

    Exact reversals are in quarantine already (reason `conflict`); these are the others: reversals between answers
    that differ only in case, white space, outer punctuation or emphasis, and circles of three answers or more. Only
    prompts with two pairs or more can show one; `compared` counts those prompts' pairs.
    """
    import polars as pl

    several = pairs.filter(pl.len().over("prompt_id") > 1).sort("pair_id")
    prompts: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in several.select("prompt_id", "chosen", "rejected", "source", "line").iter_rows(named=True):
        prompts[row["prompt_id"]].append(row)
    found: list[dict[str, Any]] = []
    for rows in prompts.values():
        edges = [(_alike(row["chosen"]), _alike(row["rejected"])) for row in rows]
        circle = in_circles(edges)
        found += [row for row, edge in zip(rows, edges, strict=True) if edge in circle]
    return {
        "compared": several.height,
        "pairs": len(found),
        "examples": [
            {
                "row": place(row),
                **{side: row[side][-1]["content"][:SNIPPET] for side in ("chosen", "rejected")},
            }
            for row in found[:EXAMPLES]
        ],
    }


def _alike(answer: Iterable[dict[str, str]]) -> str:
    return "\n".join(fold(message["content"]).casefold().strip(_ENDS) for message in answer)


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
