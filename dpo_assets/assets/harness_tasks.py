"""The tasks of lm-evaluation-harness: known by what decides a reuse, and looked up before anything is trained."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from dpo_assets.artifact import Artifact
from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.lineage import Inputs
from dpo_assets.assets.step import Step
from dpo_assets.contract import TasksSpec
from dpo_assets.hashing import file_sha256
from dpo_assets.recipe import HarnessSection


def look_up_tasks(step: Step, base: Artifact) -> None:
    """Before anything is trained: whether the worker's lm-eval knows the tasks, and has their datasets.

    Raises:
        ConfigError: it is not installed, knows a task not, or finds no dataset for one.
    """
    settings = step.recipe.evaluation.harness
    if settings is None or step.only_checks:
        return
    inputs = Inputs.of("harness_scores", {"base_model": base})

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "tasks",
            TasksSpec(
                kind="harness_tasks",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                threads=step.recipe.hardware.threads,
                **in_worker(base),
                **settings.model_dump(include={"tasks", "include_path"}),
            ),
        )

    step.build("harness_tasks", harness_identity(settings), inputs, make)


def harness_identity(settings: HarnessSection) -> Mapping[str, object]:
    """What decides a reuse: the tasks, by the content of their folder, and the version of lm-eval.

    Not what running them leaves there (`__pycache__`), nor what an editor or Git keeps (names with a dot in front), nor
    data outside of the folder: what was asked of it is told by the documents' hashes.
    """
    folder = Path(settings.include_path) if settings.include_path else None
    files = (
        sorted(path for path in folder.rglob("*") if _counts(path.relative_to(folder)) and path.is_file())
        if folder
        else []
    )
    return {
        **settings.model_dump(include={"tasks", "limit", "num_fewshot", "apply_chat_template"}),
        "files": [[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files if folder],
        "paired": "perplexities too, by content",  # By number alone before.
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def _counts(path: Path) -> bool:
    return not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
