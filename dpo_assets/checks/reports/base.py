"""What every report of a stage is: written into the artefact that is made, read back from the sealed one.

A part that could not be measured says why (`NotMeasured`). A part that is None is of an earlier version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from dpo_assets.artifact import Artifact, read_kept, write_json

FILE = "report.json"


class Report(BaseModel):
    """A report of the worker. Keys of another version are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    def write(self, folder: Path) -> None:
        """Into the artefact that is being made."""
        write_json(folder / FILE, self.model_dump(mode="json"))

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The report of a sealed artefact.

        Raises:
            ConfigError: it is one of an earlier version, which said less.
        """
        return read_kept(artifact, FILE, cls)


class NotMeasured(Report):
    """A part that could not be measured here, with the reason."""

    not_measured: str
