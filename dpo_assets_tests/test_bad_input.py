"""Bad input ends in a message that names the thing, the place and the way out; the rest goes on where it can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from dpo_assets.artifact import open_artifact
from dpo_assets.assets.base_model import _identity, _set_template, in_worker, needs_worker
from dpo_assets.assets.model_files import download, take_over
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import BaseModelSection
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import (
    DATA,
    OASST,
    STORIES,
    demo_recipe,
    failed_checks,
    failures,
    instance_after,
    materialize,
    metadata,
    short_recipe,
    trl_feedback,
    trl_recipe,
)


def test_a_missing_model_folder_is_named_and_not_retried(instance: dg.DagsterInstance) -> None:
    result = materialize(demo_recipe(base_model={"source": "/nowhere/model"}), instance, ["base_model"])
    assert failures(result) == ["base_model.source: there is no folder /nowhere/model; a Hub id looks like `org/name`."]
    assert not [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]


def test_a_model_with_pickled_weights_only_fails_its_gate_and_is_not_kept(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(STORIES, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    recipe = demo_recipe(base_model={"source": str(folder), "licence": "mit"})
    result = materialize(recipe, instance, ["base_model", "raw_preferences", "dpo_dataset", "quarantined_preferences"])
    assert not result.success
    gate = failed_checks(result)["safetensors_only"]
    assert gate["value"] == "pytorch_model.bin"
    assert "save_pretrained" in gate["what to change"]
    assert not list((Path(instance.storage_directory()) / "dpo_assets" / "demo" / "base_model").glob("*/model.json"))


def test_a_refused_base_is_told_without_a_secret(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEEDBACK_PASSWORD", "correct-horse-battery")
    folder = tmp_path / "pickled"
    shutil.copytree(STORIES, folder)
    (folder / "model.safetensors").rename(folder / "correct-horse-battery.bin")
    result = materialize(demo_recipe(base_model={"source": str(folder), "licence": "mit"}), instance, ["base_model"])
    [said] = failures(result)
    assert "[secret].bin" in said
    assert "correct-horse-battery" not in said


def test_a_model_of_unknown_licence_fails_its_gate_where_a_release_is_sent(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    folder = tmp_path / "unlicensed"
    shutil.copytree(STORIES, folder)
    sends = {"base_model": {"source": str(folder)}, "publishing": {"dry_run": False, "repo_id": "org/bot"}}
    result = materialize(demo_recipe(**sends), instance, ["base_model"])
    assert not result.success
    assert failed_checks(result)["licence_known"]["value"] == "none stated"


def test_a_licence_that_is_named_later_makes_no_other_base(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """Nor does the same template in another file: everything would be trained again for it."""
    folder = tmp_path / "unlicensed"
    shutil.copytree(STORIES, folder)
    for name in "ab":
        shutil.copy(STORIES / "chat_template.jinja", tmp_path / f"{name}.jinja")

    def made(**section: Any) -> dict[str, Any]:
        base = {"source": str(folder), "chat_template": str(tmp_path / "a.jinja"), **section}
        return metadata(materialize(demo_recipe(base_model=base), instance, ["base_model"]), "base_model")

    first = made()
    assert first["licence"] == "none known"
    for changed in ({"licence": "mit"}, {"chat_template": str(tmp_path / "b.jinja")}):
        again = made(**changed)
        assert (str(again["reused"])[:3], again["digest"]) == ("yes", first["digest"])
    assert made(licence="mit")["licence"] == "mit"


def test_a_base_in_another_place_is_the_same_base(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """Everything was trained again for a project that was checked out somewhere else."""
    digests = []
    for place in ("here", "there"):
        shutil.copytree(STORIES, tmp_path / place / "base")
        recipe = demo_recipe(base_model={"source": str(tmp_path / place / "base"), "licence": "mit"})
        digests.append(metadata(materialize(recipe, instance, ["base_model"]), "base_model")["digest"])
    assert len(set(digests)) == 1


def test_a_base_without_chat_template_is_refused_with_the_way_out(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(STORIES, folder)
    (folder / "chat_template.jinja").unlink()
    recipe = demo_recipe(base_model={"source": str(folder), "licence": "mit"})
    assert "base_model.chat_template" in failures(materialize(recipe, instance, ["base_model"]))[0]
    recipe["base_model"]["chat_template"] = str(STORIES / "chat_template.jinja")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    result = materialize(recipe, instance, ["base_model"])
    assert result.success
    said = metadata(result, "base_model")
    assert (said["parameters"], said["copies left out"]) == (260_032, "consolidated.safetensors")
    assert (said["a turn ends at"], said["tensors beside the language model: kept, not trained"]) == ("<s>, </s>", 0)
    assert not (Path(str(said["path"])) / "model" / "consolidated.safetensors").exists()


def test_a_base_with_missing_tensors_turns_its_own_asset_red_and_is_not_retried(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """It trained, merged and was released, on weights drawn at random at each load."""
    folder = tmp_path / "no-head"
    shutil.copytree(STORIES, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    recipe = demo_recipe(base_model={"source": str(folder), "licence": "mit"})
    result = materialize(recipe, instance, ["base_model"])
    assert "no file holds lm_head.weight" in failures(result)[0]
    assert not [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]
    assert not result.get_asset_materialization_events()


def test_a_template_that_fits_no_pair_is_told_once_with_the_way_out(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Every row was quarantined, and four checks said to mend the export."""
    path, template = tmp_path / "reasoned.jsonl", tmp_path / "cut.jinja"
    rows = [
        {"prompt": f"Is {n} even?", "chosen": f"<think>\n{n} modulo 2\n</think>\n\nYes: {n}.", "rejected": f"No: {n}."}
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = (STORIES / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text(
        whole.replace("{{ message.content }}{{ eos", "{{ message.content.split('</think>')[-1] }}{{ eos")
    )
    recipe = trl_recipe(path)
    recipe["base_model"]["chat_template"] = str(template)
    nodes = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset"]
    result = materialize(recipe, instance, nodes)
    assert failures(result) == [
        f"{template} does not fit the feedback: 20 of 20 pairs cannot be rendered: the chat template leaves out text "
        "of the chosen answer, so nothing would be learnt of it (20). Set base_model.chat_template to a Jinja file "
        "that renders such conversations whole, or base_model.template_arguments if the template has an argument for "
        "it."
    ]
    assert not failed_checks(result)


def test_what_a_template_is_given_is_part_of_the_base_and_told_to_the_worker(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    template = tmp_path / "dated.jinja"
    whole = (STORIES / "chat_template.jinja").read_text(encoding="utf-8")
    template.write_text("{{ strftime_now('%d %b %Y') }}{% if enable_thinking %}!{% endif %}" + whole)
    digests = []
    for day, arguments in (("2026-01-01", {}), ("2024-07-26", {"enable_thinking": False})):
        given = {"template_date": day, "template_arguments": arguments} if arguments else {}
        result = materialize(
            demo_recipe(base_model={"chat_template": str(template), **given}), instance, ["base_model"]
        )
        said = metadata(result, "base_model")
        digests.append(said["digest"])
        told = in_worker(open_artifact(Path(str(said["path"]))))["template"]
        assert (said["template date"], told.day.isoformat()) == (day, day)
        assert told.arguments == said.get("template arguments", {}) == arguments
    assert len(set(digests)) == 2
    recipe = demo_recipe(base_model={"chat_template": str(template), "template_arguments": {"enable_thinkin": False}})
    assert "has no use for enable_thinkin" in failures(materialize(recipe, instance, ["base_model"]))[0]


def test_the_recipes_template_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ theirs }}", "eos_token": "</s>"}))
    of_processor = tmp_path / "chat_template.json"
    of_processor.write_text(json.dumps({"chat_template": "{{ theirs }}"}))
    processor = tmp_path / "processor_config.json"
    processor.write_text(json.dumps({"chat_template": "{{ theirs }}", "processor_class": "X"}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ theirs }}")
    _set_template(STORIES / "chat_template.jinja", tmp_path)
    assert json.loads(config.read_text()) == {"eos_token": "</s>"}
    assert json.loads(processor.read_text()) == {"processor_class": "X"}
    assert not (tmp_path / "additional_chat_templates").exists()
    assert not of_processor.exists()
    assert (tmp_path / "chat_template.jinja").read_bytes() == (STORIES / "chat_template.jinja").read_bytes()


def test_a_built_in_model_is_verified_where_the_recipe_brings_another_template() -> None:
    assert not needs_worker(BaseModelSection(source="builtin:stories260k"))
    assert needs_worker(BaseModelSection(source="builtin:stories260k", chat_template="mine.jinja"))
    assert needs_worker(BaseModelSection(source="org/model", revision="0" * 40))


def test_the_hub_asks_for_the_token_in_the_variable_that_holds_it(tmp_path: Path) -> None:
    section = BaseModelSection(source="org/none", revision="0" * 40)
    with HubServer(token="hf_test") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        with pytest.raises(ConfigError, match="the token in MY_HUB_LOGIN may not see it"):
            download(api, section.source, section.revision, tmp_path / "model", "MY_HUB_LOGIN")


def downloaded(files: dict[str, bytes], target: Path) -> tuple[list[str], list[str]]:
    """(files of the folder, files left behind) of a model that the Hub holds."""
    with HubServer(token="hf_test") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("org/model")
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit("org/model", operations=operations, commit_message="a model")
        left = download(api, "org/model", commit.oid, target, "HF_TOKEN")
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()), left


WEIGHTS = bytes(range(256))
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS + b"x",
}


def test_weights_are_downloaded_once_and_from_nowhere_but_the_top(tmp_path: Path) -> None:
    """Repositories hold them in several layouts: the download and the memory plan were twice what they should be."""
    files = {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "consolidated.safetensors": WEIGHTS + b"x",
        "original/consolidated.safetensors": WEIGHTS + b"y",
        "onnx/config.json": b"[]",
        "pytorch_model.bin": WEIGHTS + b"z",
        "modeling_own.py": b"raise SystemExit",
    }
    found, left = downloaded(files, tmp_path)
    assert (found, left) == (["config.json", "model.safetensors"], ["consolidated.safetensors"])


def test_what_goes_with_a_model_is_fetched_wherever_it_lies_and_whatever_its_case(tmp_path: Path) -> None:
    wanted = (
        "LICENSE", "MODEL_LICENSE", "Licence.md", "license.txt", "NOTICE", "Third_Party_Notices.txt", "USE_POLICY.md",
        "USAGE_POLICY", "Community License for the [7B] Model.pdf", "additional_chat_templates/tool_use.jinja",
        "qwen.tiktoken", "tekken.json", "tokenizer.model.v3", "config.json",
    )  # fmt: skip
    left_there = {"additional_chat_templates/run.py": b"", "docs/LICENSE": b"", "license.py": b"", "logo.png": b""}
    found, _ = downloaded(dict.fromkeys(wanted, b"{}") | left_there, tmp_path)
    assert found == sorted(wanted)


def test_a_folders_named_templates_decide_the_base_as_its_own_does(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(STORIES, base)
    (base / "additional_chat_templates").mkdir()
    named = base / "additional_chat_templates" / "tool_use.jinja"
    named.write_text("{{ tools }}")
    (base / "LICENSE.md").write_text("terms")
    section = BaseModelSection(source=str(base))
    before = _identity(section)
    take_over(base, tmp_path / "copied")
    assert (tmp_path / "copied" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert (tmp_path / "copied" / "LICENSE.md").read_text() == "terms"
    named.write_text("{{ tools }} and more")
    assert _identity(section) != before


def test_of_weights_in_parts_those_of_the_index_are_downloaded(tmp_path: Path) -> None:
    found, left = downloaded(SHARDED | {"consolidated.safetensors": WEIGHTS + b"y"}, tmp_path)
    assert (found, left) == (sorted(SHARDED), ["consolidated.safetensors"])


def test_a_part_that_the_hub_does_not_hold_is_named_before_the_others_are_downloaded(tmp_path: Path) -> None:
    files = {name: data for name, data in SHARDED.items() if "00002-of" not in name}
    with pytest.raises(ConfigError, match=r"names model-00002-of-00002\.safetensors, but the repository lacks it"):
        downloaded(files, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_empty_feedback_file_is_named(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    result = materialize(trl_recipe(empty), instance, ["raw_preferences"])
    assert failures(result) == [f"empty_file: no feedback row in {empty}; the export is empty or was cut off."]


def test_a_source_that_matches_no_file_is_named(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    result = materialize(trl_recipe(tmp_path / "none-*.jsonl"), instance, ["raw_preferences"])
    assert "none-*.jsonl` matches no file" in failures(result)[0]


def test_feedback_with_no_valid_pair_is_blocked_and_its_rows_are_on_the_screen(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "Yes.", "rejected": "Yes."}) + "\n", encoding="utf-8")
    nodes = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset", "dpo_plan"]
    result = materialize(trl_recipe(path), instance, nodes)
    assert not result.success
    gates = failed_checks(result)
    assert gates["enough_pairs"]["value"] == "0 train, 0 eval"
    assert "no_preference 1" in gates["enough_pairs"]["what to change"]
    assert gates["quarantine_rate"]["value"] == 1.0
    assert gates["pair_distance"]["value"] == "no pair to measure"
    assert gates["pair_distance"]["what to change"] == "see enough_pairs"
    quarantine = metadata(result, "quarantined_preferences")
    assert quarantine["dagster/row_count"] == 1
    assert "no_preference" in quarantine["by_reason"]


def test_a_truncated_json_line_costs_that_line_only(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    path = trl_feedback(tmp_path / "cut.jsonl", pairs=20)
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"prompt": "and then the disk was fu')
    result = materialize(trl_recipe(path), instance, ["raw_preferences"])
    assert result.success
    said = metadata(result, "raw_preferences")
    assert (said["rows_in"], said["dagster/row_count"], said["rejected"]) == (21, 20, 1)
    batch = next(
        (Path(instance.storage_directory()) / "dpo_assets" / "demo" / "raw_batches").glob("*/quarantine.parquet")
    )
    row = pl.read_parquet(batch).to_dicts()[0]
    assert (row["reason"], row["line"]) == ("invalid_json", 21)
    assert "as if the file had been cut" in row["message"]


def test_max_length_beyond_the_models_context_is_refused(instance: dg.DagsterInstance) -> None:
    recipe = demo_recipe(feedback={"max_length": 1024})
    nodes = ["base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset"]
    assert "context of 512 tokens" in failures(materialize(recipe, instance, nodes))[0]


def test_a_red_upstream_is_refused_also_outside_its_run(homes: Path, tmp_path: Path) -> None:
    recipe = short_recipe()
    config = {"ops": {"demo__dpo_plan": {"config": {"dpo": {"learning_rate": 1e-3}}}}}
    with instance_after(recipe, DATA, homes, tmp_path / "home") as instance:
        assert not materialize(recipe, instance, ["dpo_plan"], run_config=config).success
        result = materialize(recipe, instance, ["sft_checkpoint"])
    assert failures(result) == [
        "`demo/dpo_plan` did not pass dpo_rate_against_sft, learning_rate_band, training_dose; mend it before going on "
        "from it."
    ]


def test_an_asset_before_its_upstream_says_what_to_materialise(instance: dg.DagsterInstance) -> None:
    result = materialize(demo_recipe(), instance, ["dpo_plan"])
    assert failures(result) == ["`demo/dpo_dataset` has not been materialised yet; materialise it first."]


def test_a_damaged_artefact_is_set_aside_and_made_again(instance: dg.DagsterInstance) -> None:
    recipe = demo_recipe()
    assert materialize(recipe, instance, ["raw_preferences"]).success
    root = Path(instance.storage_directory()) / "dpo_assets" / "demo"
    table = next((root / "raw_batches").glob("*/pairs.parquet"))
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    result = materialize(recipe, instance, ["raw_preferences"])
    assert metadata(result, "raw_preferences")["files_read_now"] == 1
    [aside] = (root / "_rejected").iterdir()
    warned = [event.user_message for event in instance.all_logs(result.run_id)]
    assert any(f"a `raw_batches` is damaged and was set aside as {aside}" in said for said in warned)


def test_feedback_read_before_costs_no_second_reading(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    shutil.copy(OASST, tmp_path / "a.jsonl")
    recipe = demo_recipe(feedback={"sources": [{"path": str(tmp_path / "*.jsonl"), "format": "oasst_tree"}]})
    assert metadata(materialize(recipe, instance, ["raw_preferences"]), "raw_preferences")["files_read_now"] == 1
    trl = OASST.read_bytes().splitlines(keepends=True)[:3]
    (tmp_path / "b.jsonl").write_bytes(b"".join(trl))
    assert metadata(materialize(recipe, instance, ["raw_preferences"]), "raw_preferences")["files_read_now"] == 1
