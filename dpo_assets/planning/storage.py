"""What a run will write to the disk, by node, from its plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dpo_assets.planning.plan import TrainingPlan

GIB = 2**30
KEPT_CHECKPOINTS = 3  # The last two, and the one that is being written.
BESIDE = 16 * 2**20  # Bytes of reports, tables, tokenizer files and logs of a run, on top of its weights.


def written(plan: TrainingPlan, base_bytes: int, release: str) -> dict[str, int]:
    """Bytes of what each training node leaves, and of the checkpoints that two of them keep while they run.

    The adapter is kept in fp32, and in a checkpoint with both moments: 4 and 12 of the 18 bytes that a weight of it
    takes in training (`memory.adapter_bytes`). A merged model is as large as its base, and no smaller than 16 bit for
    each parameter: a quantised base is merged in those. A release of it takes no room of its own (`share_file`).

    Args:
        base_bytes: of the base's weights, as they lie on the disk.
        release: what is released, `merged` or `adapter`.
    """
    trained = int(plan.memory_parts.get("adapter and optimizer", 0.0) * GIB)
    adapter, with_moments = trained * 4 // 18, trained * 12 // 18
    return {
        "sft_checkpoint": 0 if plan.sft.strategy == "adopt" else adapter,
        "dpo_adapter": adapter,
        "checkpoints": KEPT_CHECKPOINTS * with_moments,
        "merged_model": max(base_bytes, 2 * plan.parameters),
        "published_model": 2 * adapter if release == "adapter" else 0,
    }


def stage_bytes(stage: str, plan: TrainingPlan, base_bytes: int) -> int:
    """What one stage of the worker writes until it is done; 0: not much."""
    needs = written(plan, base_bytes, "merged")
    trained = {"sft": "sft_checkpoint", "dpo": "dpo_adapter"}
    if stage in trained:
        return needs[trained[stage]] + needs["checkpoints"]
    return needs["merged_model"] if stage == "merge" else 0


def still_to_write(needs: Mapping[str, int], made: Iterable[str]) -> int:
    """Bytes that a run needs where the artefacts of the nodes `made` are there already. Nothing for a run without work.

    Checkpoints of SFT are gone when those of DPO begin, so they count once, as long as one of the two is to be trained.
    """
    there = set(made)
    if {"sft_checkpoint", "dpo_adapter"} <= there:
        there.add("checkpoints")
    left = sum(size for node, size in needs.items() if node not in there)
    return left + BESIDE if left else 0
