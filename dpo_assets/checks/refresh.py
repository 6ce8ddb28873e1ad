"""The verdict on what a run trains from: from SFT, or from a release of its own."""

from __future__ import annotations

from dpo_assets.checks.verdict import Verdict
from dpo_assets.planning.plan import TrainingPlan

SOURCE = "arXiv 2605.01130: training on from one's own models amplifies traits, and a new start does not"


def refresh_policy(plan: TrainingPlan) -> Verdict:
    """Training on from a release with new pairs alone warns; with a draw of the others, or from SFT, it passes."""
    refresh = plan.refresh
    alone = refresh.policy == "continue"
    pairs = "all pairs" if refresh.whole else f"{refresh.new} new pairs and {refresh.sampled} earlier ones"
    return Verdict(
        "refresh_policy",
        "warn" if alone else "pass",
        f"{refresh.policy}, generation {refresh.generation}: {pairs}",
        "from SFT on all pairs, or from a release with earlier pairs beside the new ones",
        SOURCE,
        "set refresh.policy to `full`, or to `replay`, which trains on earlier pairs too" if alone else "",
    )
