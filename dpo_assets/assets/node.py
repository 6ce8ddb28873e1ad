"""How a node of the graph is declared: a table row, and a body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import dagster as dg

from dpo_assets.assets.lineage import Read
from dpo_assets.assets.step import Events, Step
from dpo_assets.feedback.pair import Column
from dpo_assets.recipe import Recipe

Phase = Literal["data", "training", "release"]


@dataclass(frozen=True)
class Node:
    """One asset. Nodes with the same body are materialised together by it.

    `reads` is all that the body may ask for, what its artefact's manifest records, and what Dagster's graph shows;
    `also` what it reads beside, where a recipe asks for that. `follows` names nodes that come before it in the graph,
    and whose artefacts it does not ask for. `recipe` names the sections, or fields (`section.field`), that decide its
    result: its code version covers them. `wanted` says whether a pipeline has it, and `partitions` its partitions.
    """

    name: str
    description: str
    phase: Phase
    kinds: frozenset[str]
    body: Callable[[Step], Events]
    reads: tuple[Read, ...] = ()
    recipe: tuple[str, ...] = ()
    columns: Sequence[Column] = ()
    trains: bool = False
    config: Callable[[Recipe], type[dg.Config]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    partitions: Callable[[Recipe], dg.PartitionsDefinition[str] | None] = lambda recipe: None
    follows: tuple[str, ...] = ()
    also: Callable[[Recipe], tuple[Read, ...]] = lambda recipe: ()

    def of(self, recipe: Recipe) -> Node:
        """As a pipeline of that recipe has it."""
        return replace(self, reads=(*self.reads, *self.also(recipe)))


def column_schema(columns: Sequence[Column]) -> dg.TableSchema:
    """The Columns tab, filled before any run, from the table that also makes the pandera schema."""
    kinds = {
        "messages": "list<struct<role, content>>",
        "number": "float64",
        "integer": "int64",
        "tokens": "list<int32>",
    }
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=c.name,
                type=kinds.get(c.kind, c.kind),
                description=c.description,
                constraints=dg.TableColumnConstraints(nullable=c.nullable, unique=c.unique, other=list(c.rules)),
            )
            for c in columns
        ]
    )
