"""From the recipe's sources to local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.artifact import file_sha256
from dpo_assets.feedback.sources import FeedbackFile, Limits

if TYPE_CHECKING:
    from dpo_assets.feedback.sources.hub import HubAccess
    from dpo_assets.recipe import FeedbackSource


def find(
    sources: Sequence[FeedbackSource], landing: Path | None, hub: HubAccess | None, limits: Limits
) -> list[FeedbackFile]:
    from dpo_assets.feedback.ingest import find_files  # Until the files of this package have it.

    return [
        FeedbackFile(f.path, f.name, f.format, file_sha256(f.path), f.path.stat().st_size) for f in find_files(sources)
    ]
