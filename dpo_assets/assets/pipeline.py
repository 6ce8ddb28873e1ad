"""What all assets of an instance share."""

from __future__ import annotations

from dataclasses import dataclass

import dagster as dg

from dpo_assets.recipe import Recipe


@dataclass(frozen=True)
class Pipeline:
    """Every name derives from `name`, so instances never collide."""

    name: str
    recipe: Recipe

    def key(self, node: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, node])

    def shown(self, node: str) -> str:
        """The asset of a node as the UI names it."""
        return self.key(node).to_user_string()

    def resource_key(self, resource: str) -> str:
        return f"{self.name}_{resource}"
