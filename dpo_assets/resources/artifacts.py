"""Where artefacts live."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import Field

from dpo_assets.artifact import ArtifactTree


class ArtifactStore(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A local folder of immutable artefact directories, one tree per pipeline."""

    root: str | None = Field(
        default=None, description="Folder of all artefacts; default: `dpo_assets` in the Dagster instance's storage."
    )

    def tree(self, instance: dg.DagsterInstance, pipeline: str) -> ArtifactTree:
        """The artefacts of one pipeline."""
        root = Path(self.root) if self.root else Path(instance.storage_directory()) / "dpo_assets"
        return ArtifactTree(root.absolute() / pipeline)
