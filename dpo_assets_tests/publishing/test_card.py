"""The card of a release: metadata that the Hub's client reads, numbers of its reports alone, lines that run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from pydantic import BaseModel

from dpo_assets.planning.licence import Licence
from dpo_assets.planning.model_card import front_matter
from dpo_assets.planning.refresh import Refresh, SftData
from dpo_assets.publishing.card import CardFacts, Standing, card_settings, render_card
from dpo_assets.publishing.loading import gguf_upload_line, llama_server_line, load_snippet, ollama_line, serve_line
from dpo_assets.publishing.trace import Withdrawn
from dpo_assets.recipe import Recipe, parse_recipe
from dpo_assets_tests.samples import RECIPE, SHA, dataset_report, dpo_report, evaluation_report, merge_report, plan

APACHE = Licence(identifier="apache-2.0", stated_by="model card")


SECOND = Standing(
    pipeline="bot", number=2, preview=False, replaces="release 1 (content-1, commit c1)", level=0.0072, spent=0.0219,
    alpha=0.05, override="", withdrawn=Withdrawn(gone=3, left_out=4),
)  # fmt: skip


def facts(**changes: Any) -> CardFacts:
    values: dict[str, Any] = {
        "title": "bot-dpo",
        "repo_id": "org/bot-dpo",
        "hub": "https://hub.example",
        "base_source": "org/base",
        "base_revision": SHA,
        "licence": APACHE,
        "licence_files": ("LICENSE", "NOTICE"),
        "artifact": "merged",
        "plan": plan(dpo={"beta": 0.2, "learning_rate": 1e-5, "epochs": 2.0}),
        "dataset": dataset_report(),
        "dataset_digest": "c" * 64,
        "training": dpo_report(kernels="fused"),
        "merge": merge_report(),
        "scores": evaluation_report(kernels="rows", scored="merged model in bf16"),
        "decision": "first_publication",
        "reason": "better than its start",
        "standing": Standing(
            "bot", 2, False, "release 1 (content-1, commit c1)", 0.0072, 0.0219, 0.05, "", Withdrawn(3, 4)
        ),
        "checks": {"base_model": {"licence_known": "pass"}, "dpo_adapter": {"displacement": "warn", "finite": "error"}},
        "versions": {"torch": "2.9.0", "dpo_assets": "0.1.0"},
    }
    return CardFacts(**values | changes)


def test_the_front_matter_of_a_merged_model_is_what_the_hub_reads() -> None:
    front = dict(front_matter(render_card(facts())))
    del front["model-index"]
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "dagster", "preference-optimization"],
        "base_model": "org/base",
        "base_model_relation": "finetune",
    }


def test_the_scores_stand_in_the_metadata_as_the_hubs_client_reads_them() -> None:
    report = evaluation_report()
    data = ModelCard(render_card(facts(scores=report)), ignore_metadata_errors=False).data
    assert data.license == "apache-2.0"
    results = data.eval_results
    assert data.model_name == "bot-dpo"
    assert [result.metric_value for result in results] == [
        report.implicit_reward_accuracy.value,
        report.logp_accuracy_policy.value,
        report.logp_accuracy_sft.value,
        report.pick_the_longer.value,
    ]
    first = report.implicit_reward_accuracy
    assert results[0].metric_args == {
        "low": first.low,
        "high": first.high,
        "level": 0.95,
        "pairs": first.n,
        "prompts": 100,
    }
    assert (results[0].dataset_split, results[0].dataset_args) == ("eval", {"digest": "c" * 64})


def test_a_score_over_several_pairs_a_prompt_says_how_many_prompts() -> None:
    score = {"value": 0.7, "low": 0.58, "high": 0.8, "n": 123, "clusters": 97, "effective": 88.5}
    independent = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 120}
    report = evaluation_report(implicit_reward_accuracy=score, pick_the_longer=independent)
    card = render_card(facts(scores=report))
    assert "| baseline: pick the longer answer | 0.500 | [0.400, 0.600] | 120 |" in card
    assert "| policy, implicit reward against SFT | 0.700 | [0.580, 0.800] | 123 in 97 conversations |" in card
    results = ModelCard(card, ignore_metadata_errors=False).data.eval_results
    assert (results[0].metric_args["pairs"], results[0].metric_args["prompts"]) == (123, 97)
    assert "prompts" not in results[-1].metric_args


def test_a_score_that_is_no_number_is_none_of_the_metadata() -> None:
    """The Hub refuses a card with one; the table shows it."""
    score = {"value": math.nan, "low": 0.0, "high": 1.0, "n": 0}
    card = render_card(facts(scores=evaluation_report(implicit_reward_accuracy=score)))
    assert len(ModelCard(card, ignore_metadata_errors=False).data.eval_results) == 3
    assert "| policy, implicit reward against SFT | nan |" in card


def test_an_adapter_says_so_and_a_base_that_is_not_on_the_hub_is_not_claimed() -> None:
    card = render_card(facts(artifact="adapter"))
    adapter = front_matter(card)
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")
    assert ("a LoRA adapter." in card, "one merged model." in card) == (True, False)
    assert "one merged model." in render_card(facts())
    for source in ("/srv/models/base", "./models/base", "builtin:stories260k", "base"):
        assert "base_model" not in front_matter(render_card(facts(base_source=source, base_revision=None)))


def test_a_card_says_the_numbers_of_its_artefacts() -> None:
    card = " ".join(render_card(facts()).split())
    for text in (
        "# bot-dpo",
        f"`org/base` at revision `{SHA}` (apache-2.0)",
        "1200 feedback rows: 1120 accepted (1000 train, 120 held out)",
        "70 quarantined (invalid_json: 20, synthetic: 50), 10 duplicates",
        f"Dataset digest `{'c' * 64}`",
        "loss sigmoid, beta 0.2, learning rate 1e-05",
        "63 steps of 16 pairs, 2 epochs",
        "Precision: base weights in bf16, computed in bf16.",
        "Trained by the packed trainer on fused kernels; scored on rows kernels as merged model in bf16;",
        "merged (streamed): 0.0012 nats",
        "0.0012 nats per token from base and adapter on 29 pairs, compared in bf16 on cuda.",
        "dpo_assets 0.1.0, torch 2.9.0",
        "| policy, implicit reward against SFT | 0.700 | [0.610, 0.780] | 120 in 100 conversations |",
        "| SFT, log-probability per token | 0.580 | [0.490, 0.660] | 120 in 100 conversations |",
        "| baseline: pick the longer answer | 0.550 | [0.460, 0.640] | 120 in 100 conversations |",
        "| score | value | 95% interval | pairs |",
        "120 pairs of 100 conversations.",
        "Verdict: **first_publication** (better than its start).",
        "| base_model | licence_known | passed |",
        "| dpo_adapter | displacement | warned |",
        "| dpo_adapter | finite | failed |",
        "The base is under apache-2.0, stated by the model card.",
        "their texts are here: `LICENSE`, `NOTICE`.",
    ):
        assert text in card


NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)*(?:e[-+]?\d+)?(?![\w.]*\w)")


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, BaseModel):
        yield from leaves(value.model_dump(mode="json"))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from leaves({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*leaves(key), *leaves(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def written(value: Any) -> set[str]:
    """The ways in which a card may write a number, or numbers in a text."""
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    forms = ("{}", "{:g}", "{:.3f}", "{:.2g}", "{:+.3f}")
    return {form.format(value) for form in forms} | {f"{100 * value:.6g}"} | {yaml.safe_dump(value).split("\n")[0]}


def test_every_number_of_a_card_is_one_of_its_artefacts() -> None:
    made = facts()
    known = {form for leaf in leaves(made) for form in written(leaf)} | {
        "2305.18290",  # The paper's number.
        "64", "0", "1",  # Of the snippet: tokens of an answer, and places in a tensor.
    }  # fmt: skip
    card = render_card(made)
    found = set(NUMBER.findall(card))
    assert found - known == set()
    assert {"1200", "0.610", "-0.050", "29", "95", "0.0012"} <= found


def test_a_card_says_no_more_of_a_plan_than_its_settings() -> None:
    """What differs here from night to night on a shared machine, or from one card to the next."""
    other = plan(
        dpo={"beta": 0.2, "learning_rate": 1e-5, "epochs": 2.0}, device_name="NVIDIA H200", device_index=3,
        device_uuid="GPU-2b3c", precision_reason="bf16: of the 7.25 GiB", token_budget=512, memory_gib=3.0,
        memory_available_gib=7.25, gradient_checkpointing=True, recomputed_layers=2,
    )  # fmt: skip
    assert card_settings(other) == card_settings(facts().plan)
    assert render_card(facts(plan=other)) == render_card(facts())
    more = facts().plan.model_copy(update={"dpo_steps": 64})
    assert card_settings(more) != card_settings(facts().plan)


def test_a_card_without_rejected_rows_revision_or_checks_still_reads() -> None:
    card = render_card(facts(dataset=dataset_report(reasons={}), base_revision=None, checks={"base_model": {}}))
    assert "quarantined (none)" in card
    assert "at revision" not in card
    assert "No outcome was recorded." in card


# The licence


def test_a_licence_that_yaml_would_read_as_something_else_stays_text() -> None:
    for text in ("no", "1.0"):
        licence = Licence(identifier=text, stated_by="recipe")
        assert front_matter(render_card(facts(licence=licence)))["license"] == text


@pytest.mark.parametrize(
    ("link", "source", "shown"),
    [
        ("LICENSE", "org/base", "LICENSE"),
        ("https://example.org/terms", "org/base", "https://example.org/terms"),
        ("docs/TERMS", "org/base", f"https://hub.example/org/base/blob/{SHA}/docs/TERMS"),
        ("docs/TERMS", "base", None),
        (None, "org/base", None),
    ],
    ids=["a file of the release", "a page", "a file that stayed behind", "a file of a folder", "nowhere"],
)
def test_the_licence_of_a_release_is_that_of_its_base_with_its_name_and_place(
    link: str | None, source: str, shown: str | None
) -> None:
    licence = Licence(identifier="other", name="their-terms", link=link, stated_by="model card")
    front = front_matter(render_card(facts(licence=licence, base_source=source)))
    assert (front["license"], front["license_name"], front.get("license_link")) == ("other", "their-terms", shown)


def test_a_card_without_a_licence_claims_none() -> None:
    card = render_card(facts(licence=None, licence_files=()))
    assert not {"license", "license_name", "license_link"} & front_matter(card).keys()
    assert "No licence of the base is known. This release must not be handed on." in card


# What can be run


def block(card: str, language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("artifact", ["merged", "adapter"])
def test_the_lines_of_a_card_load_the_release_and_ask_it(
    artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, in the folder of the card."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = Path(str(files("dpo_assets") / "data" / "stories260k"))
    for path in base.iterdir():
        if artifact == "merged" or path.name not in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    if artifact == "adapter":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(str(tmp_path))
    card = render_card(facts(artifact=artifact, repo_id=None, base_source=str(base), base_revision=None))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(block(card, "python"), "card", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 20


def test_an_adapter_is_put_on_the_revision_that_it_was_trained_on() -> None:
    snippet = load_snippet("org/bot", ("org/base", SHA), template_arguments={"enable_thinking": False})
    assert f'from_pretrained("org/base", revision="{SHA}", dtype="auto")' in snippet
    assert "PeftModel.from_pretrained(base, release)" in snippet
    assert 'return_tensors="pt", enable_thinking=False' in snippet
    compile(snippet, "card", "exec")
    assert "AutoModelForImageTextToText.from_pretrained(release" in load_snippet("org/bot", None, beyond_text=True)


def test_vllm_is_told_base_revision_tokenizer_and_a_rank_that_it_knows() -> None:
    assert serve_line("org/bot", None, 16) == "vllm serve org/bot"
    told = shlex.split(serve_line("org/bot", ("org/base", SHA), 24))
    assert told[:7] == ["vllm", "serve", "org/base", "--revision", SHA, "--tokenizer", "org/bot"]
    assert told[7:] == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", "bot=org/bot"]
    for of in (None, ("org/base", SHA)):
        told = shlex.split(serve_line("org/bot", of, 16, {"enable_thinking": False}))
        assert told[-2] == "--default-chat-template-kwargs"
        assert json.loads(told[-1]) == {"enable_thinking": False}
    for rank, room in {1: 8, 8: 8, 9: 16, 512: 512}.items():
        given = shlex.split(serve_line("a/b", ("c/d", None), rank))
        assert given[given.index("--max-lora-rank") + 1] == str(room)


def test_a_gguf_file_is_served_through_its_own_chat_template_with_the_arguments_of_training() -> None:
    assert shlex.split(llama_server_line("/a b/bot.gguf")) == ["llama-server", "--model", "/a b/bot.gguf", "--jinja"]
    told = shlex.split(llama_server_line("bot.gguf", {"enable_thinking": False}))
    assert told[-2] == "--chat-template-kwargs"
    assert json.loads(told[-1]) == {"enable_thinking": False}
    assert shlex.split(ollama_line("bot", "/a b/Modelfile")) == ["ollama", "create", "bot", "-f", "/a b/Modelfile"]
    assert shlex.split(gguf_upload_line("org/bot", "/a b"))[2:4] == ["org/bot-GGUF", "/a b"]


def test_the_settings_of_a_card_are_sections_of_a_recipe() -> None:
    made = facts(template_arguments={"enable_thinking": False, "note": "a\n```\nb"})
    sections = yaml.safe_load(block(render_card(made), "yaml"))
    feedback = RECIPE["feedback"] | sections.pop("feedback")
    again: Recipe = parse_recipe({**sections, "feedback": feedback})
    assert (again.dpo, again.sft, again.lora) == (made.plan.dpo, made.plan.sft, made.plan.lora)
    assert (again.feedback.max_length, again.hardware.precision) == (1024, "bf16")
    assert (again.base_model.revision, again.base_model.template_arguments) == (SHA, made.template_arguments)


def test_the_card_tells_what_the_chat_template_must_be_given() -> None:
    assert "Chat template arguments" not in render_card(facts())
    told = render_card(facts(template_arguments={"enable_thinking": False}))
    assert f"Chat template arguments: `{json.dumps({'enable_thinking': False})}`." in told


def test_the_level_of_the_intervals_is_shown_as_it_is() -> None:
    assert "99.5% interval" in render_card(facts(scores=evaluation_report(confidence=0.995)))


def test_a_card_tells_what_sft_and_dpo_were_trained_on_and_the_generation() -> None:
    def card(refresh: Refresh) -> str:
        known = facts()
        changed = known.plan.model_copy(update={"refresh": refresh})
        assert card_settings(changed) != card_settings(known.plan)
        return " ".join(render_card(dataclasses.replace(known, plan=changed)).split())

    sft = SftData(dataset="d0", pairs=90, newer=7)
    told = card(Refresh(policy="replay", generation=3, adapter="a", new=7, sampled=9, sft=sft))
    assert (
        "Generation depth: 3. It went on from an earlier release (`replay`): 7 new pairs and 9 of the earlier" in told
    )
    assert (
        "SFT: train, on the 90 training pairs of the dataset `d0`, an earlier one: 7 of those of now are newer" in told
    )
    own = SftData(dataset=facts().dataset_digest, pairs=97)
    assert "SFT: train. DPO:" in card(Refresh(sft=own))


def test_a_card_says_where_its_release_stands_in_the_pipeline() -> None:
    def told(**changes: Any) -> str:
        card = render_card(facts(standing=dataclasses.replace(SECOND, **changes)))
        return " ".join(card.split("## Release")[1].split("## Checks")[0].split())

    assert told() == (
        "Release 2 of the pipeline `bot`. It replaces release 1 (content-1, commit c1). Decided: first_publication; "
        "one-sided test at a level of 0.72 %. All decisions so far spent 2.19 % of 5 % error. Generation depth: "
        "1. It was trained from SFT on all training pairs, not from an earlier release. Of the feedback rows behind "
        "that release, 3 were withdrawn since, and 4 are still in the feedback and were left out."
    )
    first = told(number=1, replaces="", withdrawn=None, level=None, preview=True)
    assert "Release 1 of the pipeline `bot`, as a preview. It is the first. Decided" in first
    assert "no test was made for it" in first
    assert "withdrawn" not in first
    assert "A person decided, and not the rules: the owners want it." in told(override="the owners want it")
    assert "cannot be told: its datasets are not kept" in told(withdrawn=None)
    assert "Of 5 more it is not known why they are missing." in told(withdrawn=Withdrawn(0, 0, 5))
