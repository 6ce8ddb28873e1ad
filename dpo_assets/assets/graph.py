"""The graph: every node once, in the order a reader meets it."""

from __future__ import annotations

from dpo_assets.assets import (
    base_model,
    benchmark_scores,
    dpo_adapter,
    dpo_dataset,
    dpo_plan,
    eval_scores,
    feedback_by_day,
    gguf_model,
    harness_scores,
    judged_answers,
    merged_model,
    promotion,
    published_model,
    raw_preferences,
    reward_model_scores,
    sft_checkpoint,
)
from dpo_assets.assets.lineage import Lineage
from dpo_assets.assets.node import Node
from dpo_assets.recipe import Recipe

NODES: tuple[Node, ...] = (
    base_model.NODE,
    raw_preferences.NODE,
    dpo_dataset.QUARANTINE_NODE,
    dpo_dataset.NODE,
    dpo_plan.NODE,
    sft_checkpoint.NODE,
    dpo_adapter.NODE,
    merged_model.NODE,
    eval_scores.NODE,
    promotion.NODE,
    published_model.NODE,
)
DECIDING = 2  # Of these, the last ones, which may read what a recipe asks for.
# Of pipelines whose recipe asks for them.
OPTIONAL: tuple[Node, ...] = (
    feedback_by_day.NODE,
    judged_answers.NODE,
    reward_model_scores.NODE,
    benchmark_scores.NODE,
    harness_scores.NODE,
    gguf_model.NODE,
)
LINEAGE = Lineage({node.name: node.reads for node in (*NODES, *OPTIONAL)})


def nodes_of(recipe: Recipe) -> tuple[Node, ...]:
    """The nodes of a pipeline, each behind what it reads."""
    wanted = (node for node in OPTIONAL if node.wanted(recipe))
    return tuple(node.of(recipe) for node in (*NODES[:-DECIDING], *wanted, *NODES[-DECIDING:]))


def lineage_of(recipe: Recipe) -> Lineage:
    """Which node of a pipeline reads which."""
    return Lineage({node.name: node.reads for node in nodes_of(recipe)})


def steps(recipe: Recipe) -> list[tuple[Node, ...]]:
    """Nodes that one op makes together: those with the same body."""
    together: dict[int, list[Node]] = {}
    for node in nodes_of(recipe):
        together.setdefault(id(node.body), []).append(node)
    return [tuple(nodes) for nodes in together.values()]
