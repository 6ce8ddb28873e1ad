"""What the event log says was materialised, and the artefacts of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import dagster as dg

from dpo_assets.artifact import Artifact, ArtifactTree, is_fingerprint
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.errors import ConfigError

FINGERPRINT = "dpo_assets/fingerprint"  # The entry of a materialisation that names its artefact.
PAGE = 20  # Events that are asked of the event log at a time.


@dataclass(frozen=True)
class Materialisations:
    """Those of a pipeline, as one run sees them: what it made itself, or else the latest."""

    instance: dg.DagsterInstance
    pipeline: Pipeline
    tree: ArtifactTree
    run_id: str

    def artifact(self, node: str) -> Artifact:
        """The verified artefact of this run's materialisation of `node`, or else of the latest.

        Raises:
            ConfigError: when it was never made, is gone or damaged.
        """
        print_, shown = self._fingerprint(node), self.pipeline.shown(node)
        if print_ is None:
            raise ConfigError(f"`{shown}` has not been materialised yet; materialise it first.")
        found = self.tree.find(node, print_)
        if found is None:
            raise ConfigError(f"the artefact of `{shown}` {self.tree.missing(node, print_)}; materialise it again.")
        return found

    def told(self, node: str) -> Artifact | None:
        """The same as its manifest tells it, if it is there: its files are not verified."""
        print_ = self._fingerprint(node)
        return next((told for told in self.tree.listed(node) if told.fingerprint == print_), None)

    def of(self, node: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(run, metadata) of every materialisation that names an artefact, newest first.

        Not of one that somebody reported by hand, as the UI offers: nothing was made for it.
        """
        cursor: str | None = None
        while True:
            page = self.instance.fetch_materializations(self.pipeline.key(node), limit=PAGE, cursor=cursor)
            for record in page.records:
                metadata = record.asset_materialization.metadata if record.asset_materialization is not None else {}
                if FINGERPRINT in metadata and is_fingerprint(str(metadata[FINGERPRINT].value)):
                    yield record.run_id, metadata
            if not page.has_more:
                return
            cursor = page.cursor

    def overtaken_by(self, node: str) -> str | None:
        """The run that made something else of `node` after this run did; None: what this run has is the latest."""
        recent = [(run, str(metadata[FINGERPRINT].value)) for run, metadata in islice(self.of(node), PAGE)]
        mine = next((print_ for run, print_ in recent if run == self.run_id), None)
        if mine is None or recent[0][1] == mine:
            return None
        return recent[0][0]

    def _fingerprint(self, node: str) -> str | None:
        """That of this run's materialisation, or else of the latest; None where there is none."""
        recent = list(islice(self.of(node), PAGE))
        mine = [metadata for run, metadata in recent if run == self.run_id]
        found = mine or [metadata for _, metadata in recent]
        return str(found[0][FINGERPRINT].value) if found else None
