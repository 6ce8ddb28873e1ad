"""The recipe as a whole: its rules between sections, overrides of one run, and paths."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError, model_validator

from dpo_assets.errors import ConfigError
from dpo_assets.recipe.address import is_url
from dpo_assets.recipe.feedback import FeedbackSection, FeedbackSource
from dpo_assets.recipe.model import BUILTIN, BaseModelSection, looks_like_hub_id, refuse_unpinned
from dpo_assets.recipe.running import (
    ChecksSection,
    EvaluationSection,
    HardwareSection,
    PublishingSection,
    RefreshSection,
    RetentionSection,
)
from dpo_assets.recipe.training import DpoSection, LoraSection, SftSection
from dpo_assets.section import Section, describe_validation_error


class Recipe(Section):
    """Everything that decides what a pipeline produces."""

    base_model: BaseModelSection
    feedback: FeedbackSection
    lora: LoraSection = LoraSection()
    sft: SftSection = SftSection()
    dpo: DpoSection = DpoSection()
    evaluation: EvaluationSection = EvaluationSection()
    checks: ChecksSection = ChecksSection()
    publishing: PublishingSection = PublishingSection()
    refresh: RefreshSection = RefreshSection()
    retention: RetentionSection = RetentionSection()
    hardware: HardwareSection = HardwareSection()

    @model_validator(mode="after")
    def _rules_between_sections(self) -> Recipe:
        refuse_unpinned("base_model", self.base_model.source, self.base_model.revision)
        if self.lora.target_parameters and self.dpo.reference_strategy == "merged" and self.dpo.reference == "sft":
            raise ValueError(
                "dpo.reference_strategy `merged` joins two adapters into one, which those of lora.target_parameters "
                "cannot be; use `cached`, which measures against the same reference."
            )
        if self.refresh.policy != "full":
            self._can_go_on_from_a_release()
        if self.hardware.device == "cpu" and self.hardware.precision not in ("auto", "fp32"):
            raise ValueError(
                f"hardware.precision `{self.hardware.precision}` needs a GPU; with `device: cpu` use `fp32` or `auto`."
            )
        return self

    def _can_go_on_from_a_release(self) -> None:
        if self.dpo.trainer == "trl":
            raise ValueError(
                f"refresh.policy `{self.refresh.policy}` goes on from a release, measured against SFT; `dpo.trainer: "
                "trl` is measured against its start. Use `packed`, or `refresh.policy: full`."
            )
        if self.dpo.reference_strategy == "merged":
            raise ValueError(
                f"refresh.policy `{self.refresh.policy}` goes on with a release's adapter, for which "
                "dpo.reference_strategy `merged` has no place: SFT is part of its base. Use `cached`."
            )

    @property
    def secret_variables(self) -> frozenset[str]:
        """Environment variables that it names as the place of a secret."""
        named = [s.sql.url_env for s in self.feedback.sources if s.sql is not None and s.sql.url_env]
        named += [self.refresh.alert_url_env] if self.refresh.alert_url_env else []
        return frozenset([*named, *([self.evaluation.judge.key_variable] if self.evaluation.judge else [])])


def _absolute_source(
    source: FeedbackSource, pattern: Callable[[str], str], file: Callable[[str], str]
) -> FeedbackSource:
    """A source with absolute paths. `pattern` makes one that may hold wildcards absolute, `file` one that does not."""
    changes: dict[str, Any] = {}
    if source.path is not None and not is_url(source.path):
        changes["path"] = pattern(source.path.removeprefix("file://"))
    if source.companion is not None:
        changes["companion"] = file(source.companion)
    if source.sql is not None and source.sql.database is not None:
        changes["sql"] = source.sql.model_copy(update={"database": file(source.sql.database)})
    return source.model_copy(update=changes)


# The sections that the launchpad may override for one run, in the order a reader meets them.
OVERRIDABLE: tuple[str, ...] = ("lora", "sft", "dpo")

Overrides = Annotated[Mapping[str, Mapping[str, Any]], "section -> field -> value"]


def apply_overrides(recipe: Recipe, overrides: Overrides) -> Recipe:
    """The recipe of one run: the declared one with `overrides` laid over it, validated as a whole.

    Raises:
        ConfigError: when a section may not be overridden, or a value is out of its domain.
    """
    values = recipe.model_dump()
    for section, fields in overrides.items():
        if section not in OVERRIDABLE:
            raise ConfigError(f"section `{section}` cannot be overridden per run; these can: {', '.join(OVERRIDABLE)}")
        values[section] |= fields
    return parse_recipe(values)


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        ConfigError: with one line per fault: where, what is wrong, and a suggestion.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from None


def resolve_paths(recipe: Recipe, base_dir: Path) -> Recipe:
    """The same recipe with relative folders and files made absolute, against the folder of the YAML file."""

    def absolute(path: str, folder: Path = base_dir) -> str:
        return path if path.startswith(BUILTIN) else str((folder / Path(path).expanduser()).absolute())

    model = recipe.base_model
    changes: dict[str, Any] = {}
    if not looks_like_hub_id(model.source):
        changes["source"] = absolute(model.source)
    if model.chat_template is not None:
        changes["chat_template"] = absolute(model.chat_template)
    probe = recipe.checks.capability_probe
    checks = recipe.checks.model_copy(update={"capability_probe": probe and absolute(probe)})
    publishing = recipe.publishing
    if publishing.gguf is not None and publishing.gguf.converter is not None:
        gguf = publishing.gguf.model_copy(update={"converter": absolute(publishing.gguf.converter)})
        publishing = publishing.model_copy(update={"gguf": gguf})
    # The folder is a name, not a pattern: brackets in it must not be read as one.
    folder = Path(glob.escape(str(base_dir)))
    evaluation = recipe.evaluation.model_copy(update=_absolute_scorers(recipe.evaluation, absolute))
    sources = [_absolute_source(s, lambda path: absolute(path, folder), absolute) for s in recipe.feedback.sources]
    sets = [absolute(path) for path in recipe.feedback.cleaning.evaluation_sets]
    cleaning = recipe.feedback.cleaning.model_copy(update={"evaluation_sets": sets})
    return recipe.model_copy(
        update={
            "base_model": model.model_copy(update=changes),
            "feedback": recipe.feedback.model_copy(update={"sources": sources, "cleaning": cleaning}),
            "checks": checks,
            "publishing": publishing,
            "evaluation": evaluation,
        }
    )


def _absolute_scorers(evaluation: EvaluationSection, file: Callable[[str], str]) -> dict[str, Any]:
    """What else scores the policy, with absolute paths."""
    changes: dict[str, Any] = {"corpus": evaluation.corpus and file(evaluation.corpus)}
    if (model := evaluation.reward_model) is not None and not looks_like_hub_id(model.source):
        changes["reward_model"] = model.model_copy(update={"source": file(model.source)})
    if (harness := evaluation.harness) is not None and harness.include_path is not None:
        changes["harness"] = harness.model_copy(update={"include_path": file(harness.include_path)})
    changes["benchmarks"] = [one.model_copy(update={"path": file(one.path)}) for one in evaluation.benchmarks]
    return changes
