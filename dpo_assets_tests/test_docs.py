"""The documents say what the code does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any, get_args

import dagster as dg
import pytest
import yaml
from dagster.components.testing.utils import create_defs_folder_sandbox

from dpo_assets.assets.graph import NODES
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.catalog import CHECKS, validate_severities
from dpo_assets.cli import main
from dpo_assets.component import DpoPipeline, build_dpo_defs
from dpo_assets.feedback.pairing import POLICIES
from dpo_assets.feedback.readers import READERS, formats
from dpo_assets.planning import offers
from dpo_assets.planning.families import FAMILIES
from dpo_assets.planning.support import TESTS
from dpo_assets.recipe import (
    CleaningSection,
    DpoSection,
    FeedbackSource,
    HardwareSection,
    Recipe,
    ReleaseRule,
    parse_recipe,
)
from dpo_assets.report.formats import updated, yaml_line
from dpo_assets.resources.artifacts import TEMPORARY_HOME
from dpo_assets_tests.pipelines import PACKAGE, demo_recipe
from dpo_assets_tests.test_component import dg_cli, dg_project

ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(DOCS.glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_every_test_that_is_named_for_a_fault_exists() -> None:
    text = text_of(DOCS / "reliability.md")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 60
    missing = []
    for file, name in named:
        path = PACKAGE.parent / "dpo_assets_tests" / file
        if not path.is_file() or f"def {name}(" not in text_of(path):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_every_check_and_every_band_stands_in_the_document() -> None:
    text, bands = text_of(DOCS / "checks.md"), default_bands()
    assert [
        c.name for c in CHECKS if f"`{c.name}` | {'yes' if c.blocking else 'warns'} | {c.description}" not in text
    ] == []
    assert [
        b.source
        for b in bands.learning_rates
        if f"| {b.ok_low:g} | {b.reference:g} | {b.ok_high:g} | {b.error_above:g} | {b.source} |" not in text
    ] == []
    assert [
        n
        for n, b in bands.betas.items()
        if f"| {n} | {b.error_below:g} | {b.ok_low:g} to {b.ok_high:g} | {b.usual:g} | {b.weak_below:g} | {b.source} |"
        not in text
    ] == []
    dose = bands.limit("training_dose")
    assert f"Warn above {dose.warn:g}. Error above {dose.error:g}" in text


def test_every_check_has_a_section_or_a_row_that_says_what_to_do() -> None:
    text = text_of(DOCS / "checks.md")
    headings = " ".join(line for line in text.splitlines() if line.startswith("## "))
    rest = [
        row.split(" | ") for row in text.partition("## The rest")[2].partition("## ")[0].splitlines() if row[:1] == "|"
    ]
    told = {name for row in rest if len(row) == 4 for name in re.findall(r"`(\w+)`", row[0])}
    assert [check.name for check in CHECKS if f"`{check.name}`" not in headings and check.name not in told] == []


def test_every_asset_stands_in_the_design_and_in_the_readme() -> None:
    for document in (DOCS / "design.md", README):
        assert [node.name for node in NODES if node.name not in text_of(document)] == []


def test_the_design_tells_what_every_asset_reads() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of(DOCS / "design.md").splitlines()]
    told = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows if len(row) == 3}
    assert {name: told[name] for name in (node.name for node in NODES)} == {
        node.name: {read.node for read in node.reads} for node in NODES
    }


def test_every_format_stands_in_the_feedback_page_with_a_line_that_is_a_valid_source() -> None:
    text = text_of(DOCS / "feedback.md")
    assert updated(text) == text, "run: python -m dpo_assets.report.formats"
    for name in READERS:
        [source] = yaml.safe_load(yaml_line(formats()[name]))
        assert FeedbackSource(**source).format == name
        assert f"`{name}`" in text_of(README)


def test_every_policy_every_cleaning_setting_and_every_reason_stands_in_the_feedback_page() -> None:
    text = text_of(DOCS / "feedback.md")
    assert [policy for policy in POLICIES if f"`{policy}`" not in text] == []
    assert [name for name in CleaningSection.model_fields if f"`{name}:" not in text] == []
    assert [
        reason for reason in get_args(ReleaseRule.model_fields["reason"].annotation) if f"`{reason}`" not in text
    ] == []


def test_the_notice_names_what_is_shipped() -> None:
    notice = text_of(ROOT / "NOTICE")
    for folder in sorted((PACKAGE / "data").iterdir()):
        assert f"{folder.name}/" in notice


def test_the_plan_in_the_readme_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "installed_here", lambda: offers.BUILT_IN)  # Whatever this environment has.
    [(arguments, printed)] = re.findall(r"^\$ dpo-assets plan (.*)\n((?s:.*?))^```", text_of(README), re.MULTILINE)
    assert main(["plan", *arguments.split()]) == 0
    # Word by word: where lines break depends on the terminal.
    assert printed.split() == capsys.readouterr().out.split()


def test_the_page_of_models_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--markdown"]) == 0
    assert capsys.readouterr().out == text_of(DOCS / "models.md")


def test_the_command_names_every_family_and_why_an_engine_does_not_compute_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["models"]) == 0
    printed = "".join(capsys.readouterr().out.split())  # Where cells break depends on the terminal.
    assert [family for family in FAMILIES if family not in printed] == []
    assert "learntpositions" in printed.replace("│", "")


@pytest.mark.parametrize("test", sorted(set(TESTS.values())))
def test_the_page_of_models_names_tests_that_there_are(test: str) -> None:
    file, _, function = test.partition("::")
    assert f"def {function}(" in text_of(ROOT / file)


@pytest.mark.parametrize(
    ("section", "field"),
    [(HardwareSection, "precision"), (HardwareSection, "kernels"), (DpoSection, "reference_strategy")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_readme_and_the_design_name_every_choice(section: Any, field: str) -> None:
    choices = get_args(section.model_fields[field].annotation)
    assert [choice for choice in choices if f"`{choice}`" not in text_of(README)] == []
    if field != "precision":
        assert [choice for choice in choices if f"`{choice}`" not in text_of(DOCS / "design.md")] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_to_a_heading(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.is_file(), target
        assert not anchor or anchor in {_slug(line) for line in text_of(file).splitlines() if line[:1] == "#"}, target


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


MODULE = re.compile(r"`([\w/]+(?:\.py|/))`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_that_a_document_names_exists(document: Path) -> None:
    modules = MODULE.findall(text_of(document))
    rooms = [path for room in ("training", "checks", "feedback") for path in (PACKAGE / room).rglob("*/")]
    homes = (ROOT, PACKAGE, *(PACKAGE / room for room in ("training", "checks", "feedback")), *rooms)
    assert modules or document.name not in ("design.md", "engine.md")
    assert [name for name in modules if not any((home / name).exists() for home in homes)] == []


def test_the_engine_page_names_modules_with_their_rooms() -> None:
    modules = MODULE.findall(text_of(DOCS / "engine.md"))
    assert [name for name in modules if not any((home / name).exists() for home in (ROOT, PACKAGE / "training"))] == []


def test_every_name_of_a_module_that_the_engine_page_names_exists() -> None:
    """`module.name`, but for settings: a recipe's section may be called as a module is."""
    named = re.findall(r"`([a-z_]+)\.([a-z_]\w+)`", text_of(DOCS / "engine.md"))
    lacking = []
    for stem, name in named:
        if stem in Recipe.model_fields or name in ("py", "md", "json"):
            continue
        sources = [text_of(path) for path in PACKAGE.rglob(f"{stem}.py")]
        if not any(re.search(rf"^\s*(?:def|class) {name}\b", source, re.M) for source in sources):
            lacking.append(f"{stem}.{name}")
    assert lacking == []


def test_every_constant_that_the_engine_page_names_exists() -> None:
    constants = set(re.findall(r"\b[A-Z_]{5,}\b(?!\.md)", text_of(DOCS / "engine.md")))
    sources = "\n".join(text_of(path) for path in PACKAGE.rglob("*.py"))
    defined = re.findall(r"^([A-Z_]+(?:, [A-Z_]+)*)(?:: .*)? =", sources, re.MULTILINE)
    assert constants
    assert constants <= {name for names in defined for name in names.split(", ")}


def test_every_extra_that_the_readme_names_can_be_installed() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(re.findall(r"dpo-assets\[(\w+)\]", text_of(README)))
    assert named
    assert named <= set(config["options.extras_require"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_valid_recipe(example: Path) -> None:
    declared = yaml.safe_load(text_of(example))
    assert declared["type"] == "dpo_assets.DpoPipeline"
    attributes = dict(declared["attributes"])
    assert attributes.pop("name")
    parse_recipe(attributes)


def test_the_defs_yaml_of_the_readme_loads() -> None:
    [block] = [b for b in re.findall(r"```yaml\n(.*?)```", text_of(README), re.DOTALL) if "attributes:" in b]
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(DpoPipeline, defs_yaml_contents=yaml.safe_load(block))
        (folder / "defs.yaml").write_text(block, encoding="utf-8")
        with sandbox.load_component_and_build_defs(defs_path=folder) as (component, defs):
            assert isinstance(component, DpoPipeline)
            assert component.pipeline.recipe.base_model.revision == "0" * 40
            assert component.pipeline.recipe.feedback.sources[0].path == str(folder / "feedback" / "*.jsonl")
            assert len(defs.resolve_all_asset_specs()) == len(NODES)


def test_the_recipe_in_the_readme_is_valid() -> None:
    """A block that is a part of a recipe is laid over the whole one."""
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text_of(README), re.DOTALL)]
    [whole] = [dict(block["attributes"]) for block in blocks if "attributes" in block]
    assert whole.pop("name")
    for part in [{}, *(block for block in blocks if "attributes" not in block and "ops" not in block)]:
        checks = parse_recipe(whole | part).checks
        validate_severities(checks.severity)
        default_bands().with_overrides(checks.bands)


def rollback_of_the_readme() -> str:
    [text] = [b for b in re.findall(r"```yaml\n(.*?)```", text_of(README), re.DOTALL) if b.startswith("ops:")]
    return str(text)


def test_the_rollback_of_the_readme_is_one_that_its_job_takes() -> None:
    job = build_dpo_defs("my_bot", demo_recipe()).resolve_job_def("my_bot_rollback")
    assert dg.validate_run_config(job, yaml.safe_load(rollback_of_the_readme()))


def commands(start: str) -> list[str]:
    """What the README tells to type, less the remark behind it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text_of(README), re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0].strip() for kind, block in blocks if not kind for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


def said_by(typed: str, folder: Path) -> str:
    """What a command of Dagster's says in a folder."""
    found = subprocess.run(
        [sys.executable, "-m", *shlex.split(typed)], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    return found.stdout + found.stderr


def test_every_job_and_sensor_that_the_readme_names_is_one_of_a_pipeline() -> None:
    defs = build_dpo_defs("my_bot", demo_recipe())
    jobs, sensors = ({one.name for one in found or []} for found in (defs.jobs, defs.sensors))
    named = set(re.findall(r"`(my_bot_\w+)`|(?:-j|--job) (\w+)", text_of(README)))
    assert {one or other for one, other in named} - sensors == jobs


@pytest.mark.parametrize("location", ["shop.definitions", "dpo_assets.definitions"])
def test_the_rollback_command_of_the_readme_loads_its_job(location: str, tmp_path: Path) -> None:
    """In a project of one's own, and in a clone. It goes as far as a pipeline of dry runs lets it."""
    [typed] = commands("dagster job execute")
    text = rollback_of_the_readme()
    if location == "dpo_assets.definitions":
        assert f"`-m {location}` has the pipelines `demo` and `chat`" in text_of(README)
        typed, text = (said.replace("my_bot", "demo").replace("shop.definitions", location) for said in (typed, text))
    dg_project(tmp_path, {"name": "my_bot", **demo_recipe()})
    (tmp_path / "rollback.yaml").write_text(text, encoding="utf-8")
    assert "publishing.dry_run is true: this pipeline sends nothing" in said_by(typed, tmp_path)


def test_the_readme_starts_a_pipeline_of_ones_own_with_a_home_and_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As typed, on a pipeline whose inputs are missing: it would train otherwise."""
    [home] = [line for line in commands("export DAGSTER_HOME") if "mkdir" in line]
    [typed], [retention] = commands("dg launch"), commands("dpo-assets retention")
    assert home == 'export DAGSTER_HOME="$HOME/dagster_home" && mkdir -p "$DAGSTER_HOME"'
    assert commands("dg dev") == ["dg dev"]
    nothing = {"sources": [{"path": "feedback.jsonl", "format": "trl"}]}
    project = dg_project(tmp_path, {"name": "my_bot", **demo_recipe(base_model={"source": "./gone"}, feedback=nothing)})
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    launched = dg_cli(project, *shlex.split(typed)[1:])
    assert str(project / "shop/defs/bot/gone") in launched.stdout + launched.stderr
    assert (tmp_path / "home/storage/dpo_assets/my_bot").is_dir()
    arguments = [a.replace("src/shop/defs/my_bot", str(project / "shop/defs/bot")) for a in shlex.split(retention)[1:]]
    assert main(arguments) == 0


def test_a_release_from_the_home_that_dagster_makes_where_none_is_set_is_refused_with_the_line_to_set(
    tmp_path: Path,
) -> None:
    """The command line really makes it here: the name of that folder is Dagster's own."""
    project = dg_project(
        tmp_path, {"name": "my_bot", **demo_recipe(publishing={"dry_run": False, "repo_id": "org/bot"})}
    )
    said = said_by("dagster asset materialize -m shop.definitions --select my_bot/published_model", project)
    [line] = [line for line in commands("export DAGSTER_HOME") if "mkdir" in line]
    assert f"DAGSTER_HOME is not set: {project / TEMPORARY_HOME}" in said
    assert line in said


def test_the_asset_count_of_the_demo_is_that_of_the_graph() -> None:
    assert re.findall(r"SUCCESS in \d+ s, (\d+) assets", text_of(README)) == [str(len(NODES))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_code_is_broken_over_two_lines(document: Path) -> None:
    """Whoever copies it would copy the line break."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if line.count("`") % 2] == []
