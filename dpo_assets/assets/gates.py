"""Gates: the outcomes of an artefact's checks, kept beside it, and which of them hold it back. It knows no Dagster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_assets.artifact import Artifact, write_json
from dpo_assets.checks.catalog import checks_of, severity_of
from dpo_assets.checks.verdict import Level, Verdict
from dpo_assets.recipe import Severity


def keep_levels(artifact: Artifact, verdicts: Sequence[Verdict]) -> None:
    """Whole or not at all: a run that ends in mid-write must leave no open gate."""
    path = _record(artifact)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    write_json(partial, {verdict.check: verdict.level for verdict in verdicts})
    partial.replace(path)


def kept_levels(artifact: Artifact) -> dict[str, Level] | None:
    """The outcomes of an artefact's checks, as they were judged last; None where no record can be read."""
    try:
        levels: dict[str, Level] = json.loads(_record(artifact).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return levels


def closed_gates(artifact: Artifact, severities: Mapping[str, Severity]) -> list[str]:
    """The checks that hold an artefact back. One is held too where no record of its checks can be read."""
    if all(severity_of(check.name, severities) == "warn" for check in checks_of(artifact.manifest.kind)):
        return []
    if (levels := kept_levels(artifact)) is None:
        return ["its checks, of which no record can be read (execute them again)"]
    return sorted(name for name, level in levels.items() if level == "error")


def _record(artifact: Artifact) -> Path:
    return artifact.path.parent / f"{artifact.path.name}.gates.json"
