"""What Dagster watches and does by itself: freshness of what people look at, and declarative automation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import dagster as dg

from dpo_assets.assets.node import Node
from dpo_assets.recipe import Recipe
from dpo_assets.recipe.running import RefreshSection

FRESH = ("dpo_dataset", "published_model")  # What has a freshness policy: feedback arrives, releases leave.
WARN_FROM = 0.75  # Of the time that makes an asset overdue.


def freshness_policy(node: Node, recipe: Recipe) -> dg.FreshnessPolicy | None:
    """How old the node may become; None: nobody asks. A release that a gate holds ages, and shows so here."""
    hours = recipe.refresh.fresh_hours
    if hours is None or node.name not in FRESH:
        return None
    overdue = timedelta(hours=hours)
    return dg.FreshnessPolicy.time_window(fail_window=overdue, warn_window=overdue * WARN_FROM)


def automation_condition(
    node: Node, recipe: Recipe, follows: Sequence[dg.AssetKey] = ()
) -> dg.AutomationCondition[Any] | None:
    """When Dagster materialises the node by itself; None: never. `follows`: assets that hold it up in nothing.

    `eager` follows new content (data versions), not materialisations: an asset that was reused moves nothing. Neither
    goes on behind a blocking check that failed, as Dagster's `eager` and `on_cron` do when they are left alone.
    """
    refresh: RefreshSection = recipe.refresh
    if refresh.automation == "off":
        return None
    behind_gates = dg.AutomationCondition.all_deps_blocking_checks_passed()
    if refresh.automation == "cron":
        on_cron = dg.AutomationCondition.on_cron(refresh.schedule, refresh.time_zone)
        # A day that failed, or has not come yet: what its files hold is read all the same.
        return (on_cron.ignore(dg.AssetSelection.assets(*follows)) if follows else on_cron) & behind_gates
    # By its label: in 1.13 conditions without fields equal each other, and `replace` would take any for this one.
    new_content = dg.AutomationCondition.data_version_changed() & ~dg.AutomationCondition.executed_with_root_target()
    eager = dg.AutomationCondition.eager().replace("newly_updated_without_root", new_content)
    if follows:  # Days that were never read by themselves hold nobody up: what they hold is read all the same.
        missing = dg.AutomationCondition.missing()
        eager = eager.replace("any_deps_missing", missing & ~missing)
    return eager & behind_gates
