"""The declarative surface: YAML, Python, launchpad, names, and what loading costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

import dpo_assets
from dpo_assets.assets.dpo_plan import override_config
from dpo_assets.assets.graph import NODES, OPTIONAL
from dpo_assets.checks.catalog import CHECKS
from dpo_assets.component import DpoPipeline, build_dpo_defs
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import OVERRIDABLE, apply_overrides, parse_recipe
from dpo_assets_tests.pipelines import PACKAGE, demo_recipe

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "unsloth", "pandera", "polars", "matplotlib")


def dg_project(folder: Path, attributes: dict[str, Any] | str) -> Path:
    """A dg project of one's own with one pipeline in `defs/bot/defs.yaml`."""
    defs = folder / "shop" / "defs" / "bot"
    defs.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n\n[tool.dg.project]\nroot_module = "shop"\n', encoding="utf-8"
    )
    (folder / "shop" / "__init__.py").touch()
    (folder / "shop" / "defs" / "__init__.py").touch()
    (folder / "shop" / "definitions.py").write_text(
        "from pathlib import Path\n\nimport dagster as dg\n\n\n@dg.definitions\ndef defs():\n"
        "    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)\n",
        encoding="utf-8",
    )
    text = attributes if isinstance(attributes, str) else yaml.safe_dump(attributes, sort_keys=False)
    body = "type: dpo_assets.DpoPipeline\n\nattributes:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    (defs / "defs.yaml").write_text(body, encoding="utf-8")
    return folder


def dg_cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Only `folder` is added to the path: the installed package must be enough. A wide terminal keeps lines whole.
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "400", "NO_COLOR": "1"}
    script = "import sys; from dagster_dg_cli.cli import main; sys.argv[0] = 'dg'; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True, env=environment
    )


def test_a_misspelt_key_gives_file_line_and_suggestion(tmp_path: Path) -> None:
    text = yaml.safe_dump({"name": "bot", **demo_recipe()}, sort_keys=False)
    text = text.replace("dpo:\n  learning_rate:", "dpo:\n  learing_rate:")
    project = dg_project(tmp_path, text)
    result = dg_cli(project, "check", "defs")
    said = result.stdout + result.stderr
    lines = (project / "shop/defs/bot/defs.yaml").read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if "learing_rate" in line)
    assert result.returncode != 0
    assert f"defs.yaml:{number}" in said, said
    assert "did you mean `learning_rate`?" in said


def test_a_negative_beta_gives_file_line_and_bound(tmp_path: Path) -> None:
    project = dg_project(tmp_path, {"name": "bot", **demo_recipe(dpo={"beta": -1.0})})
    result = dg_cli(project, "check", "defs")
    said = result.stdout + result.stderr
    lines = (project / "shop/defs/bot/defs.yaml").read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if "beta" in line)
    assert result.returncode != 0
    assert f"defs.yaml:{number}" in said, said
    assert "-1.0 is less than the minimum of 0.0" in said


def test_a_rule_between_sections_names_what_would_pass(tmp_path: Path) -> None:
    project = dg_project(tmp_path, {"name": "bot", **demo_recipe(base_model={"source": "org/model"})})
    result = dg_cli(project, "check", "defs")
    assert result.returncode != 0
    assert "needs `revision`" in result.stdout + result.stderr


def test_yaml_that_is_right_loads_and_lists_its_assets(tmp_path: Path) -> None:
    project = dg_project(tmp_path, {"name": "bot", **demo_recipe()})
    assert dg_cli(project, "check", "yaml").returncode == 0
    result = dg_cli(project, "list", "defs", "--json")
    assert result.returncode == 0, result.stderr
    assert all(f"bot/{node.name}" in result.stdout for node in NODES)


def test_scaffolded_yaml_loads_as_it_is(tmp_path: Path) -> None:
    project = dg_project(tmp_path, {"name": "bot", **demo_recipe()})
    feedback = tmp_path / "shop" / "defs" / "my_bot" / "feedback.jsonl"
    result = dg_cli(project, "scaffold", "defs", "dpo_assets.DpoPipeline", "my_bot", "--feedback", feedback.name)
    assert result.returncode == 0, result.stdout + result.stderr
    written = yaml.safe_load((feedback.parent / "defs.yaml").read_text(encoding="utf-8"))
    assert written["attributes"]["name"] == "my_bot"
    assert written["attributes"]["feedback"]["sources"] == [{"path": "feedback.jsonl", "format": "trl"}]
    checked = dg_cli(project, "check", "defs")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_component_is_listed_for_other_projects(tmp_path: Path) -> None:
    result = dg_cli(dg_project(tmp_path, {"name": "bot", **demo_recipe()}), "list", "components")
    assert "dpo_assets.DpoPipeline" in result.stdout, result.stderr


def test_environment_templates_in_text_fields_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_REPOSITORY", "org/bot")
    attributes = {"name": "bot", **demo_recipe(publishing={"repo_id": "{{ env.BOT_REPOSITORY }}"})}
    component = DpoPipeline.from_attributes_dict(attributes=attributes)
    assert component.pipeline.recipe.publishing.repo_id == "org/bot"


def test_relative_paths_start_at_the_folder_of_the_yaml_file(tmp_path: Path) -> None:
    source = {"path": "mine/*.jsonl", "format": "trl"}
    defs = build_dpo_defs("bot", demo_recipe(feedback={"sources": [source]}), base_dir=tmp_path)
    assert defs.resolve_asset_graph().get_all_asset_keys()
    component = DpoPipeline(
        "bot", dpo_assets.recipe.resolve_paths(parse_recipe(demo_recipe(feedback={"sources": [source]})), tmp_path)
    )
    assert component.pipeline.recipe.feedback.sources[0].path == str(tmp_path / "mine" / "*.jsonl")


def test_two_instances_in_one_location_do_not_collide() -> None:
    merged = dg.Definitions.merge(build_dpo_defs("a_bot", demo_recipe()), build_dpo_defs("b_bot", demo_recipe()))
    dg.Definitions.validate_loadable(merged)
    keys = merged.resolve_asset_graph().get_all_asset_keys()
    assert len(keys) == 2 * len(NODES)
    assert {key.path[0] for key in keys} == {"a_bot", "b_bot"}


def test_job_schedule_and_sensor_exist_and_are_stopped() -> None:
    repository = build_dpo_defs("bot", demo_recipe()).get_repository_def()
    assert repository.has_job("bot_refresh")
    schedule, sensor = repository.get_schedule_def("bot_schedule"), repository.get_sensor_def("bot_new_feedback")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


def test_the_graph_shows_every_read_of_every_asset() -> None:
    graph = build_dpo_defs("bot", demo_recipe()).resolve_asset_graph()
    shown = {
        node.name: {key.path[-1] for key in graph.get(dg.AssetKey(["bot", node.name])).parent_keys} for node in NODES
    }
    assert shown == {node.name: {read.node for read in node.reads} for node in NODES}
    assert shown["eval_scores"] >= {"merged_model", "dpo_dataset", "sft_checkpoint"}


def test_every_asset_says_what_it_is_before_any_run() -> None:
    defs = build_dpo_defs("bot", demo_recipe())
    for spec in defs.resolve_all_asset_specs():
        assert spec.description
        assert spec.group_name.startswith("bot_")
        assert spec.kinds
        assert spec.code_version
    with_columns = {s.key.path[-1] for s in defs.resolve_all_asset_specs() if "dagster/column_schema" in s.metadata}
    assert with_columns == {"raw_preferences", "dpo_dataset", "quarantined_preferences"}


def test_training_assets_share_the_pool_and_no_other_asset_does() -> None:
    repository = build_dpo_defs("bot", demo_recipe(hardware={"pool": "my_gpu"})).get_repository_def()
    pools = {node.name: node.definition.pool for node in repository.get_job("bot_refresh").nodes}
    assert {name for name, pool in pools.items() if pool == "my_gpu"} == {
        f"bot__{name}" for name in ("sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores")
    }


def test_every_check_of_the_catalogue_stands_on_its_asset() -> None:
    scorers = {
        "judge": {"url": "http://localhost:8000/v1", "model": "judge"},
        "reward_model": {"source": "./reward-model"},
        "benchmarks": [{"name": "rb2", "path": "./rb2.parquet"}],
        "harness": {"tasks": ["arc_easy"]},
    }
    every: dict[str, Any] = {"evaluation": scorers, "publishing": {"gguf": {"type": "q8_0"}}}
    found: list[set[tuple[str, str]]] = []
    for sections in ({}, every):
        graph = build_dpo_defs("bot", demo_recipe(**sections)).resolve_asset_graph()
        found.append({(key.asset_key.path[-1], key.name) for key in graph.asset_check_keys})
    always, with_scorers = found
    optional = {node.name for node in OPTIONAL}
    assert with_scorers == {(check.asset, check.name) for check in CHECKS}
    assert with_scorers - always == {(check.asset, check.name) for check in CHECKS if check.asset in optional}


def test_the_launchpad_shows_the_recipes_values_and_converts_back_to_the_same_recipe() -> None:
    recipe = parse_recipe(demo_recipe())
    form = override_config(recipe)().model_dump()
    assert set(form) == set(OVERRIDABLE)
    assert form["dpo"]["learning_rate"] == recipe.dpo.learning_rate
    assert apply_overrides(recipe, form) == recipe


def test_an_override_out_of_its_domain_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"dpo\.schedule"):
        apply_overrides(parse_recipe(demo_recipe()), {"dpo": {"schedule": "zigzag"}})


def test_a_code_version_changes_with_the_sections_that_decide_a_result() -> None:
    def versions(**changes: Any) -> dict[str, str]:
        specs = build_dpo_defs("bot", demo_recipe(**changes)).resolve_all_asset_specs()
        return {spec.key.path[-1]: str(spec.code_version) for spec in specs}

    before = versions()

    def changed_by(**changes: Any) -> set[str]:
        after = versions(**changes)
        return {name for name in before if before[name] != after[name]}

    assert changed_by(dpo={"beta": 0.2}) == {"dpo_plan", "dpo_adapter"}
    assert changed_by(checks={"severity": {"collapse": "warn"}}) == {"dpo_adapter"}
    assert changed_by(evaluation={"min_pairs": 7}) == {"eval_scores", "promotion"}


def test_an_unknown_resource_is_named() -> None:
    with pytest.raises(ConfigError, match="laucher"):
        build_dpo_defs("bot", demo_recipe(), resources={"laucher": dpo_assets.LocalLauncher()})


def test_the_public_surface() -> None:
    assert dir(dpo_assets) == [
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
    assert all(getattr(dpo_assets, name) is not None for name in dir(dpo_assets))


def test_a_subclass_can_change_how_assets_look() -> None:
    class Owned(DpoPipeline):
        def get_asset_spec(self, node: Any) -> dg.AssetSpec:
            return super().get_asset_spec(node).replace_attributes(owners=["team:alignment"])

    specs = Owned("bot", parse_recipe(demo_recipe())).build_defs().resolve_all_asset_specs()
    assert all(list(spec.owners) == ["team:alignment"] for spec in specs)


def test_loading_the_location_imports_no_training_library() -> None:
    script = "import dpo_assets.definitions as d; d.defs.get_repository_def()"
    profile = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script], capture_output=True, text=True, check=True
    ).stderr
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in profile.splitlines() if "|" in line}
    assert "dagster" in loaded
    assert not loaded & set(HEAVY)


def test_this_repositorys_workspace_validates() -> None:
    root = PACKAGE.parent
    if not (root / "workspace.yaml").is_file():
        pytest.skip("the tests run against an installed wheel, which has no workspace.yaml")
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
