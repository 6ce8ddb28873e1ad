"""Local files: which ones a pattern names, and opening them without following a way out of their folder."""

from __future__ import annotations

from dpo_assets.artifact import file_sha256
from dpo_assets.feedback.sources import FeedbackFile, FileRefused


def verify(file: FeedbackFile) -> None:
    if file.sha256 and file_sha256(file.path) != file.sha256:
        raise FileRefused("changed_while_read", "the file changed while it was read; run again once its writer is done")
