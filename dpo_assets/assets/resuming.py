"""A training stage that goes on from its checkpoints, as its asset tells it."""

from __future__ import annotations

from typing import Any

from dpo_assets.artifact import VOLATILE, Artifact


def resume_record(artifact: Artifact) -> dict[str, int]:
    """How often a training stage went on from a checkpoint and what that cost, for its materialisation."""
    if not (artifact.path / VOLATILE).is_file():
        return {}
    said: dict[str, Any] = artifact.json(VOLATILE)
    names = ("times_resumed", "steps_done_twice", "checkpoints_failed")
    return {name: int(said[name]) for name in names if name in said}
