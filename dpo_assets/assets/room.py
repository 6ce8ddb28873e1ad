"""Whether the disk has room for what a run will make, asked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_assets.artifact import Artifact
from dpo_assets.assets.step import Step
from dpo_assets.disk import refuse_too_small
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.storage import still_to_write, written
from dpo_assets.version import __version__

TRAINED = ("sft_checkpoint", "dpo_adapter", "merged_model")  # In the order in which they are made.


def refuse_without_room(step: Step, plan: TrainingPlan, found: Mapping[str, Artifact]) -> int:
    """Bytes that the run will still write, for which there is room.

    Args:
        found: plan, dataset and base of the run.

    Raises:
        DiskFull: there is too little, with what is needed, where, and how much is free.
    """
    base = found["base_model"]
    weights = sum(entry.size for name, entry in base.manifest.files.items() if name.endswith(".safetensors"))
    made = _made(step, found)
    needed = still_to_write(written(plan, weights, step.recipe.publishing.artifact), made)
    refuse_too_small(step.tree.root, needed, "training, merge and release, with their checkpoints,")
    return needed


def _made(step: Step, found: Mapping[str, Artifact]) -> list[str]:
    """The nodes whose artefact for this plan, dataset and base is in the store, as manifests tell it."""
    known = dict(found)
    for node in TRAINED:
        reads = {read.node: read for read in step.lineage.reads(node)}
        for told in step.tree.listed(node):
            inputs = told.manifest.inputs
            same = all(
                reads[name].chosen_by or reads[name].part(known[name]) == digest
                for name, digest in inputs.items()
                if name in reads
            )
            if inputs and same and told.manifest.versions.get("dpo_assets") == __version__:
                known[node] = told
                break
        else:
            break
    return [node for node in TRAINED if node in known]
