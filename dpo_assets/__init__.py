"""dpo_assets: a declarative Dagster plugin from human feedback to an aligned, evaluated, published language model.

Names are loaded on first use: the worker imports this package too, and must not import Dagster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpo_assets.version import __version__

if TYPE_CHECKING:
    from dpo_assets.component import DpoPipeline, build_dpo_defs
    from dpo_assets.recipe import Recipe
    from dpo_assets.resources.artifacts import ArtifactStore
    from dpo_assets.resources.gpu import GpuResource
    from dpo_assets.resources.hub import HubResource
    from dpo_assets.resources.launcher import LocalLauncher, TrainingLauncher

_HOMES = {
    "DpoPipeline": "dpo_assets.component",
    "build_dpo_defs": "dpo_assets.component",
    "Recipe": "dpo_assets.recipe",
    "ArtifactStore": "dpo_assets.resources.artifacts",
    "GpuResource": "dpo_assets.resources.gpu",
    "HubResource": "dpo_assets.resources.hub",
    "LocalLauncher": "dpo_assets.resources.launcher",
    "TrainingLauncher": "dpo_assets.resources.launcher",
}

__all__ = [
    "ArtifactStore",
    "DpoPipeline",
    "GpuResource",
    "HubResource",
    "LocalLauncher",
    "Recipe",
    "TrainingLauncher",
    "__version__",
    "build_dpo_defs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
