"""The recipe: one typed description of a pipeline, shared by YAML, launchpad, command line and worker.

Nothing here knows Dagster or torch. Every cross-field rule says what is wrong and what would pass; how a key that does
not exist is refused is in `section`.
"""

from dpo_assets.recipe.address import holds_more_than_a_place, is_url
from dpo_assets.recipe.feedback import (
    CleaningSection,
    ContentAction,
    FeedbackSection,
    FeedbackSource,
    ReleaseRule,
    SqlSource,
    WindowSection,
)
from dpo_assets.recipe.model import BUILTIN, TEMPLATE_DATE, BaseModelSection, looks_like_hub_id
from dpo_assets.recipe.running import (
    BandOverride,
    ChecksSection,
    EvaluationSection,
    GgufSection,
    GgufType,
    HardwareSection,
    JudgeSection,
    PublishingSection,
    RefreshSection,
    RetentionSection,
    Severity,
    Speedup,
)
from dpo_assets.recipe.scorers import BenchmarkSection, HarnessSection, RewardModelSection
from dpo_assets.recipe.training import (
    ALL_LINEAR,
    EVERY_LINEAR,
    DpoSection,
    FDivergence,
    LoraSection,
    OptimSection,
    SftSection,
)
from dpo_assets.recipe.whole import OVERRIDABLE, Overrides, Recipe, apply_overrides, parse_recipe, resolve_paths

__all__ = [
    "ALL_LINEAR",
    "BUILTIN",
    "EVERY_LINEAR",
    "OVERRIDABLE",
    "TEMPLATE_DATE",
    "BandOverride",
    "BaseModelSection",
    "BenchmarkSection",
    "ChecksSection",
    "CleaningSection",
    "ContentAction",
    "DpoSection",
    "EvaluationSection",
    "FDivergence",
    "FeedbackSection",
    "FeedbackSource",
    "GgufSection",
    "GgufType",
    "HardwareSection",
    "HarnessSection",
    "JudgeSection",
    "LoraSection",
    "OptimSection",
    "Overrides",
    "PublishingSection",
    "Recipe",
    "RefreshSection",
    "ReleaseRule",
    "RetentionSection",
    "RewardModelSection",
    "Severity",
    "SftSection",
    "Speedup",
    "SqlSource",
    "WindowSection",
    "apply_overrides",
    "holds_more_than_a_place",
    "is_url",
    "looks_like_hub_id",
    "parse_recipe",
    "resolve_paths",
]
