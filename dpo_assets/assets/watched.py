"""What the feedback sources hold, as `raw_preferences` notes it when it reads them and the sensor asks before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import dagster as dg
from pydantic import TypeAdapter, ValidationError

from dpo_assets.artifact import ArtifactTree
from dpo_assets.feedback.watching import SETTLE_SECONDS, Content, Look, Shelf, watch
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import FeedbackSource

CONTENT = "dpo_assets/content"  # Metadata of a materialisation: what its sources held when it read them.
RECENT = 20  # Materialisations among which the last one that read the recipe's sources is looked for.
_CONTENTS = TypeAdapter(dict[str, Content])


def shelf_of(tree: ArtifactTree) -> Path:
    """The file of what was found out of a pipeline's feedback files."""
    return tree.root / "watched.json"


def look_at(sources: Sequence[FeedbackSource], shelf: Shelf, settle_seconds: float = SETTLE_SECONDS) -> list[Look]:
    """See `watch`; names and faults are fit for the event log."""
    looks = watch(sources, shelf, time.time(), settle_seconds)
    return [replace(look, name=scrub(look.name), fault=scrub(look.fault)) for look in looks]


def contents_entry(contents: Mapping[str, Content]) -> dg.JsonMetadataValue:
    """The metadata entry CONTENT."""
    return dg.MetadataValue.json(_CONTENTS.dump_python(dict(contents), mode="json"))


def last_read(instance: dg.DagsterInstance, key: dg.AssetKey) -> dict[str, Content]:
    """What the sources held when the newest materialisation read them; empty where none noted it."""
    for record in instance.fetch_materializations(key, limit=RECENT).records:
        metadata = record.asset_materialization.metadata if record.asset_materialization is not None else {}
        if CONTENT in metadata:
            try:
                return _CONTENTS.validate_python(metadata[CONTENT].value)
            except ValidationError:  # Of another version.
                return {}
    return {}
