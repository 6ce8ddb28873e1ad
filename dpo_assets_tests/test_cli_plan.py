"""`dpo-assets plan`: the decision for a card that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_assets.checks.catalog import checks_of
from dpo_assets.cli import main
from dpo_assets.planning import offers
from dpo_assets.planning.cards import CARDS
from dpo_assets.planning.describe import KERNELS
from dpo_assets.planning.sizes import SIZES
from dpo_assets_tests.pipelines import STORIES, demo_recipe

PROBE = """
import json, sys
from dpo_assets.checks.catalog import checks_of
from dpo_assets.cli import main
main(sys.argv[1:])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == status
    said = capsys.readouterr()
    assert said.err == ""
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_a_plan_holds_every_part_of_the_decision(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--gpu", "rtx4090", "--model", "8b")
    assert (plan["gpu"], plan["device_name"], plan["model"]) == ("rtx4090", "GeForce RTX 4090", "8b")
    assert (plan["precision"], plan["kernels"], plan["fits"]) == ("bf16", "fused", True)
    assert plan["reason"].startswith("bf16: ")
    assert plan["memory_gib"] == pytest.approx(sum(plan["memory_parts"].values()), abs=0.02)
    assert plan["memory_gib"] <= plan["memory_available_gib"] == 23.5
    assert plan["token_budget"] >= plan["longest_pair"] == 2048
    assert 0 <= plan["recomputed_layers"] <= plan["layers"] == 32
    assert plan["gradient_checkpointing"] is (plan["recomputed_layers"] > 0)
    assert (plan["max_length"], plan["batch_size"], plan["rank"], plan["would_fit"]) == (1024, 16, 16, [])


def test_options_change_what_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    usual = plan_json(capsys, "--gpu", "h200", "--model", "8b")
    options = ("--max-length", "512", "--batch-size", "4", "--rank", "64", "--precision", "4bit", "--memory-gib", "40")
    plan = plan_json(capsys, "--gpu", "h200", "--model", "8b", *options)
    assert (plan["max_length"], plan["batch_size"], plan["rank"], plan["precision"]) == (512, 4, 64, "4bit")
    assert (plan["longest_pair"], plan["memory_available_gib"]) == (1024, 40.0)
    assert plan["memory_parts"]["adapter and optimizer"] == pytest.approx(
        4 * usual["memory_parts"]["adapter and optimizer"], rel=0.01
    )
    assert plan["memory_parts"]["weights"] < usual["memory_parts"]["weights"] / 2


def test_other_kernels_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--gpu", "h200", "--model", "1b", "--kernels", "transformers")
    assert plan["kernels"] == "transformers"


def test_every_engine_is_shown_beside_the_one_that_is_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is installed is asked where the command runs."""
    arguments = ("--gpu", "h100", "--model", "8b", "--kernels", "transformers", "--memory-gib", "26")
    for installed, said in ((offers.BUILT_IN, "not installed"), (offers.BUILT_IN | {"unsloth"}, "hardware.kernels")):
        monkeypatch.setattr(offers, "installed_here", lambda found=installed: found)
        engines = plan_json(capsys, *arguments)["engines"]
        assert engines[0]["name"] == "transformers"
        assert {engine["name"] for engine in engines} == {"fused", "transformers", "unsloth", "rows"}
        assert all(engine["pairs_per_s"] > 1 and engine["peak_gib"] > 10 for engine in engines)
        assert said in next(engine["why_not"] for engine in engines if engine["name"] == "unsloth")
        assert main(["plan", *arguments]) == 0
        table = " ".join(capsys.readouterr().out.split())
        assert (
            f"predicted transformers {engines[0]['pairs_per_s']:.3g} pairs/s, {engines[0]['peak_gib']:.1f} GiB" in table
        )


def test_a_plan_that_does_not_fit_exits_1_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--gpu", "h200", "--model", "70b", "--precision", "bf16", status=1)
    assert plan["fits"] is False
    assert [said.split(" (")[0] for said in plan["would_fit"]] == [
        "set hardware.precision to `8bit`",
        "use a B200",
    ]


def test_the_table_says_in_words_what_the_json_says_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = plan_json(capsys, "--gpu", "t4", "--model", "70b", status=1)["kernels"]
    assert main(["plan", "--gpu", "t4", "--model", "70b"]) == 1
    table = " ".join(capsys.readouterr().out.split())
    for said in (
        "model 70b (shape of Llama-3.1-70B): 70.55 billion parameters, 80 layers",
        "device Tesla T4: 14.5 GiB, compute capability 7.5",
        "precision 4bit: fp16 needs",
        f"kernels {KERNELS[kernels]}",
        "80 of 80 layers are computed again in the backward pass",
        "fits no would fit use a",
        "planned for pairs of at most 2,048 tokens, 1,024 on average",
    ):
        assert said in table


def test_a_local_folder_is_planned_for_on_this_machines_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--gpu", "cpu", "--model", str(STORIES), "--max-length", "128")
    assert (plan["gpu"], plan["precision"], plan["layers"]) == ("cpu", "fp32", 5)
    assert plan["model"] == str(STORIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "a100", "--model", "8b"), "say which: `a100-40` or `a100-80`"),
        (("--gpu", "rtx4900", "--model", "8b"), "did you mean `rtx4090`"),
        (("--gpu", "t4", "--model", "9b"), "did you mean `8b`?"),
        (("--gpu", "t4", "--model", "8b", "--precision", "bf16"), "has no bf16; use `fp16`"),
        (("--gpu", "rtx3090", "--model", "8b", "--precision", "fp8"), "Use `8bit`, or `bf16` where memory allows"),
        (("--gpu", "cpu", "--model", "8b", "--precision", "4bit"), "needs a GPU; on this CPU use `fp32`"),
        (("--gpu", "t4", "--model", "8b", "--batch-size", "0"), "dpo.batch_size"),
        (("--gpu", "t4", "--model", "8b", "--max-length", "3"), "feedback.max_length"),
        (("--gpu", "t4", "--model", "8b", "--rank", "-1"), "lora.rank"),
        (("--gpu", "t4", "--model", "8b", "--memory-gib", "0"), "hardware.memory_gib"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["plan", *arguments, "--json"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize("arguments", [("--gpu", "t4"), ("--model", "8b"), ("--gpu", "t4", "--model", "8b", "--x")])
def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 2
    assert "usage: dpo-assets" in capsys.readouterr().err


def test_every_card_has_a_plan_for_every_size_and_a_way_out_where_it_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for card in CARDS[::5]:
        for size in SIZES[::2]:
            arguments = ["plan", "--gpu", card.key, "--model", size.key, "--json"]
            status = main(arguments)
            plan = json.loads(capsys.readouterr().out)
            assert status == (0 if plan["fits"] else 1)
            assert plan["fits"] or plan["would_fit"], (card.key, size.key)
            assert plan["precision"] in card.precisions


def test_a_plan_is_made_without_dagster_and_without_torch(tmp_path: Path) -> None:
    line = [sys.executable, "-c", PROBE, "plan", "--gpu", "l4", "--model", str(STORIES)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "dpo_assets" in imported
    assert not imported & {"dagster", "dagster_pipes", "torch", "transformers", "peft", "trl", "polars", "pandera"}


# The checks


def levels(plan: dict[str, Any]) -> dict[str, str]:
    return {check["check"]: check["level"] for check in plan["checks"]}


def test_a_plan_tells_every_check_that_needs_no_store_with_band_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--gpu", "l4", "--model", "1b")
    known = [check.name for check in checks_of("dpo_plan") if check.name != "refresh_policy"]  # A store says that one.
    assert [check["check"] for check in plan["checks"]] == known
    assert set(levels(plan).values()) == {"pass"}
    assert all(check["band"] and check["source"] and not check["fix"] for check in plan["checks"])


@pytest.mark.parametrize(
    ("options", "blocked"),
    [
        (("--learning-rate", "2e-4"), ["learning_rate_band", "dpo_rate_against_sft"]),
        (("--learning-rate", "1e-4", "--epochs", "3", "--batch-size", "4", "--sft-learning-rate", "1e-3"),
         ["training_dose"]),
        (("--beta", "0.00001"), ["beta_for_loss"]),
        (("--loss", "kto_pair"), ["loss_supported"]),
        (("--loss", "sigmoid_norm"), ["beta_for_loss"]),
    ],
)  # fmt: skip
def test_a_plan_that_a_check_blocks_exits_1_and_says_what_to_change(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], blocked: list[str]
) -> None:
    plan = plan_json(capsys, "--gpu", "l4", "--model", "8b", *options, status=1)
    assert plan["fits"]
    assert [name for name, level in levels(plan).items() if level == "error"] == blocked
    assert all(check["fix"] for check in plan["checks"] if check["level"] == "error")


def test_a_plan_that_is_only_warned_of_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--gpu", "l4", "--model", "8b", "--epochs", "9", "--batch-size", "1")
    assert {name for name, level in levels(plan).items() if level == "warn"} == {"training_dose"}


def test_the_table_tells_level_value_band_source_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--gpu", "l4", "--model", "8b", "--beta", "0.00001", "--epochs", "9", "--batch-size", "1"]
    assert main(arguments) == 1
    table = " ".join(capsys.readouterr().out.split())
    for said in (
        "beta_for_loss BLOCKED: 1e-05; band: 0.005 to 1, blocked below 0.0001",
        "source: DPO repository",
        "what to change: set dpo.beta between 0.005 and 1",
        "training_dose warning: 2.25; band: at most 0.1875",
        "learning_rate_band pass: 5e-06",
    ):
        assert said in table


def declared(folder: Path, text: str) -> Path:
    path = folder / "defs.yaml"
    path.write_text(text, encoding="utf-8")
    return path


RECIPE = """
type: dpo_assets.DpoPipeline
attributes:
  name: bot
  base_model: {source: ./base}
  feedback: {sources: [{path: pairs.jsonl}], max_length: 256}
  dpo: {learning_rate: 2.0e-4, batch_size: 32}
  sft: {strategy: adopt}
"""


def test_a_recipe_is_judged_with_its_own_bands_and_severities(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--gpu", "l4", "--model", "8b", "--recipe")
    hot = declared(tmp_path, RECIPE)
    plan = plan_json(capsys, *arguments, str(hot), status=1)
    assert (plan["max_length"], plan["batch_size"]) == (256, 32)
    assert [name for name, level in levels(plan).items() if level == "error"] == ["learning_rate_band"]
    # An option changes what the file says, and nothing beside it.
    mild = plan_json(capsys, *arguments, str(hot), "--learning-rate", "5e-6")
    assert (mild["batch_size"], levels(mild)["learning_rate_band"]) == (32, "pass")
    raised = (
        "  checks: {bands: {learning_rate_band: {numbers: {error_above: 1.0e-3}, reason: our sweep of six seeds}}}\n"
    )
    plan = plan_json(capsys, *arguments, str(declared(tmp_path, RECIPE + raised)))
    [check] = [check for check in plan["checks"] if check["check"] == "learning_rate_band"]
    assert (check["level"], "our sweep of six seeds" in check["band_changed"]) == ("warn", True)
    lowered = declared(tmp_path, RECIPE + "  checks: {severity: {learning_rate_band: warn}}\n")
    assert levels(plan_json(capsys, *arguments, str(lowered)))["learning_rate_band"] == "warn"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: dpo_assets.DpoPipeline\n", "0 pipelines"),
        (RECIPE + "---" + RECIPE, "2 pipelines"),
        ("attributes: {dpo: [", "defs.yaml"),
        (RECIPE.replace("learning_rate", "learing_rate"), "did you mean `learning_rate`?"),
        (RECIPE.replace("dpo: {learning_rate: 2.0e-4, batch_size: 32}", "dpo: 7"), "dpo"),
        (RECIPE + "  checks: {severity: {learning_rate: warn}}\n", "there is no check `learning_rate`"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_with_the_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    path = declared(tmp_path, text)
    assert main(["plan", "--gpu", "l4", "--model", "8b", "--recipe", str(path), "--beta", "0.1"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_the_templates_of_a_recipe_are_rendered_in_the_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "defs.yaml"
    recipe = demo_recipe() | {"name": "bot", "lora": {"rank": "{{ env.RANK }}"}}
    path.write_text(yaml.safe_dump({"type": "dpo_assets.DpoPipeline", "attributes": recipe}), encoding="utf-8")
    arguments = ("--gpu", "h200", "--model", "8b", "--recipe", str(path))
    monkeypatch.delenv("RANK", raising=False)
    assert main(["plan", *arguments]) == 1
    assert "lora.rank: the template {{ env.RANK }}: the environment variable RANK is not set" in " ".join(
        capsys.readouterr().err.split()
    )
    monkeypatch.setenv("RANK", "48")
    assert plan_json(capsys, *arguments, status=1)["rank"] == 48  # The rates of the demo are too high for it.


def test_a_recipe_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--gpu", "l4", "--model", "8b", "--recipe", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err
