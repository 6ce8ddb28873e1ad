"""Templates in a `defs.yaml`: every field and type, and text that stays text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.component import DpoPipeline, DpoPipelineAttributes
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import Recipe, parse_recipe
from dpo_assets.templates import PROSE, SetVariables, TemplateFault, rendered, resolve
from dpo_assets_tests.pipelines import demo_recipe
from dpo_assets_tests.test_component import dg_cli, dg_project

ZEROS = "0" * 40


def loaded(**changes: Any) -> Recipe:
    """The recipe of a component from attributes as a YAML file holds them."""
    return DpoPipeline.from_attributes_dict(attributes={"name": "bot", **demo_recipe(**changes)}).pipeline.recipe


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(**changes)
    return str(caught.value)


@pytest.mark.parametrize("text", [ZEROS, "None", "123", "1e9", "true", "[1, 2]", "{'a': 1}", "007", "0x10", "a\n"])
def test_text_that_looks_like_another_value_stays_text(text: str) -> None:
    bands = {"learning_rate_band": {"numbers": {"error_above": 3e-4}, "reason": f"{text:<10}"}}
    source = {"path": "x.jsonl", "format": "trl", "columns": {"prompt": text, "chosen": "a", "rejected": "b"}}
    recipe = loaded(base_model={"licence": text}, checks={"bands": bands}, feedback={"sources": [source]})
    assert recipe.base_model.licence == text
    assert recipe.checks.bands["learning_rate_band"].reason == f"{text:<10}"
    assert recipe.feedback.sources[0].columns["prompt"] == text


@pytest.mark.parametrize("text", [ZEROS, "None", "123", "1e9", "true", "[1, 2]"])
def test_text_from_the_environment_stays_text_where_the_field_takes_text(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVEN", text)
    assert loaded(base_model={"licence": "{{ env.GIVEN }}"}).base_model.licence == text
    assert loaded(base_model={"licence": "x-{{ env.GIVEN }}"}).base_model.licence == f"x-{text}"


def test_a_template_works_for_every_type_of_field(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = {
        "DRY": "false", "RATE": "3e-6", "BATCH": "8", "DEVICE": "cpu", "REPO": "org/bot", "SPEEDUPS": "[compile]",
        "MEMORY": "", "WEIGHTS": "[1, 0.2]", "SHA": ZEROS, "TOP": "3e-4",
    }  # fmt: skip
    for name, value in given_.items():
        monkeypatch.setenv(name, value)
    recipe = loaded(
        base_model={"source": "org/model", "revision": "{{ env.SHA }}"},
        publishing={"repo_id": "{{ env.REPO }}", "dry_run": "{{ env.DRY }}"},
        dpo={"learning_rate": "{{ env.RATE }}", "batch_size": "{{ env.BATCH }}", "loss": ["sigmoid", "sft"],
             "loss_weights": "{{ env.WEIGHTS }}"},
        hardware={"device": "{{ env.DEVICE }}", "speedups": "{{ env.SPEEDUPS }}", "memory_gib": "{{ env.MEMORY }}"},
        checks={"bands": {"learning_rate_band": {"numbers": {"error_above": "{{ env.TOP }}"}, "reason": "our sweeps"}}},
        feedback={"sources": [{"hub": "{{ env.REPO }}", "revision": "{{ env.SHA }}", "format": "{{ 'trl' }}"}]},
    )  # fmt: skip
    assert recipe.base_model.revision == ZEROS
    assert (recipe.publishing.repo_id, recipe.publishing.dry_run) == ("org/bot", False)
    assert (recipe.dpo.learning_rate, recipe.dpo.batch_size, recipe.dpo.loss_weights) == (3e-6, 8, [1.0, 0.2])
    assert (recipe.hardware.device, recipe.hardware.speedups, recipe.hardware.memory_gib) == ("cpu", ["compile"], None)
    assert recipe.checks.bands["learning_rate_band"].numbers == {"error_above": 3e-4}
    assert (recipe.feedback.sources[0].hub, recipe.feedback.sources[0].revision) == ("org/bot", ZEROS)


def test_every_field_of_the_recipe_accepts_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of a whole recipe, one by one, from the environment: the recipe is the one that was written."""
    written: dict[str, Any] = {"name": "bot", **parse_recipe(demo_recipe()).model_dump(mode="json")}
    expected = DpoPipeline.from_attributes_dict(attributes=written).pipeline.recipe
    monkeypatch.setenv("NAME", "bot")
    assert DpoPipeline.from_attributes_dict(attributes=written | {"name": "{{ env.NAME }}"}).pipeline.name == "bot"
    for section, fields in written.items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            monkeypatch.setenv("GIVEN", value if isinstance(value, str) else yaml.safe_dump(value))
            if value is None:
                continue  # A text field without a value takes any text, so none stands for it.
            changed = written | {section: fields | {field: "{{ env.GIVEN }}"}}
            assert DpoPipeline.from_attributes_dict(attributes=changed).pipeline.recipe == expected, (section, field)


@pytest.mark.parametrize("template", ["{{ env.NOT_SET }}", "a-{{ env.NOT_SET }}", "{{ env('NOT_SET') }}"])
@pytest.mark.parametrize("place", [("publishing", "repo_id"), ("dpo", "learning_rate"), ("sft", "strategy")])
def test_an_unset_variable_is_an_error_with_its_name(template: str, place: tuple[str, str]) -> None:
    section, field = place
    said = refusal(**{section: {field: template}})
    assert "the environment variable NOT_SET is not set" in said
    assert f"attributes.{section}.{field}" in said


@pytest.mark.parametrize("template", ["{{ env.NOT_SET | default('org/bot') }}", "{{ env('NOT_SET', 'org/bot') }}"])
def test_a_default_stands_in_for_an_unset_variable(template: str) -> None:
    assert loaded(publishing={"repo_id": template}).publishing.repo_id == "org/bot"


@pytest.mark.parametrize(
    "text", ["our {{ bos }} sweeps say so", "sets of {{ a, b }", "{% of all runs", "use {{ and }}"]
)
def test_braces_in_prose_stay(text: str) -> None:
    bands = {"learning_rate_band": {"numbers": {"error_above": 3e-4}, "reason": text}}
    assert loaded(checks={"bands": bands}).checks.bands["learning_rate_band"].reason == text
    note = {"reason": "conflict", "source": "*", "note": text}
    assert loaded(feedback={"release": [note]}).feedback.release[0].note == text


def test_a_template_in_prose_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKET", "ML-12")
    bands = {"learning_rate_band": {"numbers": {"error_above": 3e-4}, "reason": "decided in {{ env.TICKET }}"}}
    assert loaded(checks={"bands": bands}).checks.bands["learning_rate_band"].reason == "decided in ML-12"


def test_the_fields_of_prose_exist() -> None:
    schema = str(Recipe.model_json_schema())
    assert all(f"'{name}'" in schema for name in PROSE)


def test_a_name_that_templates_do_not_know_is_told_outside_prose() -> None:
    said = refusal(publishing={"repo_id": "{{ evn.REPO }}"})
    assert "templates know no `evn`" in said
    assert "`env`" in said


def test_a_value_that_does_not_fit_names_the_template_and_keeps_the_value_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RATE", "hunter2-secret")
    said = refusal(dpo={"learning_rate": "{{ env.RATE }}"})
    assert "attributes.dpo.learning_rate" in said
    assert "{{ env.RATE }}" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(("given", "value"), [("false", False), ("4", 4), ("plain", "plain"), ("[1]", [1])])
def test_an_argument_of_any_kind_is_what_yaml_reads(given: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text, `false` would switch thinking on: Jinja takes any text for true."""
    monkeypatch.setenv("THINKING", given)
    recipe = loaded(base_model={"template_arguments": {"enable_thinking": "{{ env.THINKING }}"}})
    assert recipe.base_model.template_arguments == {"enable_thinking": value}


def test_what_is_wrong_with_a_text_is_said_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "007")
    with pytest.raises(ConfigError, match="should match pattern"):
        DpoPipeline.from_attributes_dict(attributes={"name": "{{ env.NAME }}", **demo_recipe()})


def test_a_template_as_a_key_is_refused_and_not_kept_as_text() -> None:
    source = {"path": "x.jsonl", "format": "trl", "columns": {"{{ env.COLUMN }}": "q"}}
    assert "a key is no template" in refusal(feedback={"sources": [source]})


def test_a_rule_between_fields_holds_for_rendered_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY", "false")
    assert "`dry_run: false` needs `repo_id`" in refusal(publishing={"dry_run": "{{ env.DRY }}"})


def test_values_beside_a_template_are_judged_without_rendering_it() -> None:
    attributes = {"name": "bot", **demo_recipe(publishing={"repo_id": "{{ env.NOT_SET }}"}, dpo={"beta": -1.0})}
    with pytest.raises(ValueError, match=r"dpo\.beta\n.*greater than or equal to 0"):
        DpoPipelineAttributes.model_validate(attributes)


def test_dg_check_accepts_templates_and_tells_file_and_line_of_those_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RATE", raising=False)
    attributes = demo_recipe(dpo={"learning_rate": "{{ env.RATE }}"}, hardware={"device": "{{ env.DEVICE }}"})
    project = dg_project(tmp_path, {"name": "bot", **attributes})
    checked = dg_cli(project, "check", "yaml", "--no-validate-requirements")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    monkeypatch.setenv("DEVICE", "cpu")
    result = dg_cli(project, "check", "defs")
    said = result.stdout + result.stderr
    lines = (project / "shop/defs/bot/defs.yaml").read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if "env.RATE" in line)
    assert result.returncode != 0
    assert f"attributes.dpo.learning_rate at {project / 'shop/defs/bot/defs.yaml'}:{number}" in said, said
    assert "the environment variable RATE is not set" in said


class _Probe(dg.Model):
    text: str


@given(st.text().filter(lambda text: "{{" not in text and "{%" not in text))
def test_text_without_a_template_is_never_touched(text: str) -> None:
    assert resolve(_Probe, {"text": text}, {}).text == text


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_the_text_of_a_variable_arrives_as_it_is(value: str) -> None:
    scope = {"env": SetVariables({"X": value})}
    assert resolve(_Probe, {"text": "{{ env.X }}"}, scope).text == value
    assert resolve(_Probe, {"text": "a{{ env.X }}b"}, scope).text == f"a{value}b"


def test_a_lone_expression_keeps_its_type_and_a_fault_in_it_is_told() -> None:
    scope = {"sizes": [1, 2], "env": SetVariables(os.environ)}
    assert rendered("{{ sizes }}", scope) == [1, 2]
    assert rendered("{{ sizes | length }}", scope) == 2
    assert rendered("{{ '{{' }}", scope) == "{{"
    with pytest.raises(TemplateFault, match="by zero"):
        rendered("{{ 1 // 0 }}", scope)
