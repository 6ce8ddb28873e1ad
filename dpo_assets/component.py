"""`DpoPipeline`: one YAML block to the assets, checks, job, schedule and sensor of a pipeline."""
# No `from __future__ import annotations` here: Dagster reads the annotation of an op's `context` as a class.

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import dagster as dg
from pydantic import BaseModel, Field

from dpo_assets.assets.graph import lineage_of, nodes_of, steps
from dpo_assets.assets.node import Node, column_schema
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.retention import retention_job
from dpo_assets.assets.rollback import rollback_job
from dpo_assets.assets.step import Events, Step, guarded
from dpo_assets.automation import (
    alerts_sensor,
    automation_condition,
    freshness_policy,
    new_feedback_sensor,
    refresh_job,
    refresh_schedule,
    to_webhook,
)
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.catalog import checks_of, severity_of, validate_severities
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.readers import READERS, format_named
from dpo_assets.feedback.sources import AUTO
from dpo_assets.publishing.secrets import name_secrets
from dpo_assets.recipe import Recipe, parse_recipe, resolve_paths
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.gpu import GpuResource
from dpo_assets.resources.hub import HubResource
from dpo_assets.resources.launcher import LocalLauncher
from dpo_assets.scaffolder import DpoPipelineScaffolder
from dpo_assets.templates import Place, ResolveFaults, SetVariables, Templated, resolve
from dpo_assets.version import __version__

NAME_PATTERN = r"^[a-z][a-z0-9_]{0,50}$"
RESOURCES = ("artifacts", "gpu", "hub", "launcher")


class NamedRecipe(Recipe):
    """A recipe and the name of its instance."""

    name: str = Field(
        pattern=NAME_PATTERN, description="Prefix of every asset, job, schedule and sensor: lower case, digits, `_`."
    )


class DpoPipelineAttributes(Templated, NamedRecipe):
    """What `defs.yaml` holds under `attributes`: a named recipe, in which any value may be a template."""


@dg.scaffold_with(DpoPipelineScaffolder)
class DpoPipeline(dg.Component, dg.Resolvable):
    """Preference feedback to an aligned, evaluated and published language model, by SFT and DPO.

    Subclass it to change how an asset looks or runs:

    .. code-block:: python

        class OwnedPipeline(DpoPipeline):
            def get_asset_spec(self, node: Node) -> dg.AssetSpec:
                return super().get_asset_spec(node).replace_attributes(owners=["team:alignment"])

            def execute(self, step: Step, nodes: tuple[Node, ...]) -> Events:
                step.context.log.info("starting")
                yield from super().execute(step, nodes)
    """

    def __init__(
        self, name: str, recipe: Recipe, resources: Mapping[str, dg.ConfigurableResource[Any]] | None = None
    ) -> None:
        unknown = set(resources or {}) - set(RESOURCES)
        if unknown:
            raise ConfigError(
                f"no resource is called {', '.join(sorted(unknown))}; these can be given: {', '.join(RESOURCES)}"
            )
        validate_severities(recipe.checks.severity)
        default_bands().with_overrides(recipe.checks.bands)
        for source in recipe.feedback.sources:
            if source.format not in (AUTO, *READERS):  # Only a name of another package's is looked for among all.
                format_named(source.format)
        name_secrets(*recipe.secret_variables)
        self.pipeline = Pipeline(name, recipe)
        self.resources = {**self._default_resources(), **(resources or {})}

    @classmethod
    def model(cls) -> type[BaseModel]:
        return DpoPipelineAttributes

    @classmethod
    def get_spec(cls) -> dg.ComponentTypeSpec:
        return dg.ComponentTypeSpec(
            description="Preference feedback to an aligned, evaluated and published language model, by SFT and DPO.",
            tags=["dpo", "fine-tuning", "llm"],
        )

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> Self:
        """From YAML, with templates rendered in Dagster's scope.

        Raises:
            ConfigError: one line per fault, with its place in the file.
        """
        written = {name: getattr(model, name) for name in model.model_fields_set}
        try:
            named = resolve(NamedRecipe, written, {**context.scope, "env": SetVariables(os.environ)})
        except ResolveFaults as error:
            raise ConfigError("\n".join(_told(context, *fault) for fault in error.faults.items())) from None
        path = dg.ComponentLoadContext.from_resolution_context(context).path
        recipe = parse_recipe(named.model_dump(exclude={"name"}))
        return cls(named.name, resolve_paths(recipe, path if path.is_dir() else path.parent))

    def build_defs(self, context: dg.ComponentLoadContext | None = None) -> dg.Definitions:
        """All definitions of the instance. Every name in them starts with the instance's name."""
        job = refresh_job(self.pipeline)
        schedule = refresh_schedule(self.pipeline, job)  # First: it says what is wrong with a cron expression.
        return dg.Definitions(
            assets=[self._assets(nodes) for nodes in steps(self.pipeline.recipe)],
            jobs=[job, rollback_job(self.pipeline), retention_job(self.pipeline)],
            schedules=[schedule],
            sensors=[new_feedback_sensor(self.pipeline, job), alerts_sensor(self.pipeline, self.alert)],
            resources={self.pipeline.resource_key(name): resource for name, resource in self.resources.items()},
        )

    def get_asset_spec(self, node: Node) -> dg.AssetSpec:
        """How one asset looks. Override it to add owners, tags or another group."""
        metadata: dict[str, Any] = dict(node.metadata)
        if node.columns:
            metadata["dagster/column_schema"] = column_schema(node.columns)
        return dg.AssetSpec(
            key=self.pipeline.key(node.name),
            deps=self._before(node),
            description=node.description,
            group_name=f"{self.pipeline.name}_{node.phase}",
            kinds=set(node.kinds),
            metadata=metadata,
            code_version=self._code_version(node),
            freshness_policy=freshness_policy(node, self.pipeline.recipe),
            automation_condition=automation_condition(
                node, self.pipeline.recipe, [self.pipeline.key(name) for name in self._followed(node)]
            ),
        )

    def execute(self, step: Step, nodes: tuple[Node, ...]) -> Events:
        """Runs one op, which makes `nodes`. Override it to wrap what happens; it must yield what it gets."""
        yield from guarded(step, nodes[-1].name, nodes[-1].body(step))

    def alert(self, context: dg.SensorEvaluationContext, text: str) -> None:
        """Hands on a text of the alerts sensor. Override it to send it another way; what it raises is tried again."""
        variable = self.pipeline.recipe.refresh.alert_url_env
        if variable is None:
            context.log.warning(text)
        else:
            to_webhook(variable)(context, text)

    def _assets(self, nodes: tuple[Node, ...]) -> dg.AssetsDefinition:
        recipe, main = self.pipeline.recipe, nodes[-1]
        lineage = lineage_of(recipe)
        declare = dg.multi_asset(
            name=f"{self.pipeline.name}__{main.name}",
            specs=[self.get_asset_spec(node) for node in nodes],
            check_specs=[
                dg.AssetCheckSpec(
                    check.name,
                    asset=self.pipeline.key(node.name),
                    description=check.description,
                    blocking=severity_of(check.name, recipe.checks.severity) != "warn",
                )
                for node in nodes
                for check in checks_of(node.name)
            ],
            required_resource_keys={self.pipeline.resource_key(name) for name in RESOURCES},
            pool=recipe.hardware.pool if main.trains else None,
            partitions_def=main.partitions(recipe),
            can_subset=True,  # So that a check can be executed by itself: nothing is trained for it.
        )
        if main.config is None:

            def plain(context: dg.AssetExecutionContext) -> Any:
                yield from self.execute(Step(context, self.pipeline, main.name, lineage), nodes)

            return declare(plain)
        form: Any = main.config(recipe)

        def configured(context: dg.AssetExecutionContext, config: form) -> Any:  # type: ignore[valid-type]
            yield from self.execute(Step(context, self.pipeline, main.name, lineage, config.model_dump()), nodes)

        return declare(configured)

    def _before(self, node: Node) -> list[dg.AssetDep]:
        """What comes before a node in the graph; of a partitioned one all partitions."""
        recipe = self.pipeline.recipe
        there = {one.name: one.partitions(recipe) is not None for one in nodes_of(recipe)}
        names = [*(read.node for read in node.reads), *self._followed(node)]
        return [
            dg.AssetDep(self.pipeline.key(name), partition_mapping=dg.AllPartitionMapping() if there[name] else None)
            for name in names
        ]

    def _followed(self, node: Node) -> list[str]:
        """What the node follows, of what the pipeline has."""
        there = {one.name for one in nodes_of(self.pipeline.recipe)}
        return [name for name in node.follows if name in there]

    def _code_version(self, node: Node) -> str:
        config = _parts_of(self.pipeline.recipe.model_dump(mode="json"), node.recipe)
        return f"{__version__}+{hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]}"

    def _default_resources(self) -> dict[str, dg.ConfigurableResource[Any]]:
        recipe = self.pipeline.recipe
        return {
            "artifacts": ArtifactStore(),
            "gpu": GpuResource(device=recipe.hardware.device, memory_gib=recipe.hardware.memory_gib),
            "hub": HubResource(endpoint=recipe.publishing.endpoint),
            "launcher": LocalLauncher(),
        }


def _parts_of(recipe: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Sections by their names, and fields by `section.field`."""
    parts = {name: name.partition(".") for name in names}
    return {name: recipe[section][field] if field else recipe[section] for name, (section, _, field) in parts.items()}


def build_dpo_defs(
    name: str,
    recipe: Recipe | Mapping[str, Any],
    *,
    base_dir: Path | str | None = None,
    resources: Mapping[str, dg.ConfigurableResource[Any]] | None = None,
) -> dg.Definitions:
    """The definitions of one pipeline from Python: what a `defs.yaml` gives, without YAML.

    Args:
        name: prefix of every asset, job, schedule and sensor.
        recipe: a Recipe, or its fields as plain values.
        base_dir: folder that relative paths start from; default: the working directory.
        resources: replacements for `artifacts`, `gpu`, `hub` or `launcher`.

    Raises:
        ConfigError: one line per fault of the recipe.
    """
    checked = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
    return DpoPipeline(name, resolve_paths(checked, Path(base_dir or Path.cwd())), resources).build_defs()


def _told(context: dg.ResolutionContext, place: Place, message: str) -> str:
    """A fault with its place, in the form in which Dagster tells those that it finds itself."""
    path = [*context.path, *place]
    name = ".".join(map(str, path))
    if context.source_position_tree is None:
        return f"`{name}`\n  {message}"
    position, _ = context.source_position_tree.lookup_closest_and_path(path, None)
    return f"`{name} at {position}`\n  {message}"
