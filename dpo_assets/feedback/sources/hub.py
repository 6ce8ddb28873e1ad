"""Hub datasets at a pinned revision: their data files, downloaded as they are and read like any other file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubAccess:
    """How to reach the Hub. The token is asked for when it is needed, and is never kept."""

    endpoint: str | None = None
    token_variable: str = "HF_TOKEN"
