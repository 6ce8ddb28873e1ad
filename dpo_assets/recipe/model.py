"""The starting model."""

from __future__ import annotations

from pydantic import Field

from dpo_assets.section import Section

BUILTIN = "builtin:"


class BaseModelSection(Section):
    """The starting model."""

    source: str = Field(
        description="A Hub id (`org/name`), a local folder, or `builtin:stories260k` (a real 260k-parameter model).",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct", "./models/my-base", "builtin:stories260k"],
    )
    revision: str | None = Field(
        default=None,
        description="Commit sha (40 hex digits) of a Hub model. Required for a Hub id: a branch name can move.",
    )
    chat_template: str | None = Field(
        default=None,
        description="Path of a Jinja chat template for a base that has none; it must end each assistant turn with EOS.",
    )
    licence: str | None = Field(
        default=None,
        description="SPDX id of the model's licence, where its model card does not state one.",
    )

    @property
    def is_builtin(self) -> bool:
        return self.source.startswith(BUILTIN)


def looks_like_hub_id(source: str) -> bool:
    """`org/name` without a path prefix. A folder is told apart by `./`, `../`, `/`, `~` or a drive letter."""
    if source.startswith((BUILTIN, ".", "/", "~")) or ":" in source or "\\" in source:
        return False
    return source.count("/") == 1


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision.lower())
