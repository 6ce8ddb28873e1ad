"""The recipe: what it refuses, what it says then, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dpo_assets import HubResource
from dpo_assets import recipe as module
from dpo_assets.assets.dpo_plan import override_config
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import (
    OVERRIDABLE,
    FeedbackSource,
    Recipe,
    apply_overrides,
    looks_like_hub_id,
    parse_recipe,
    resolve_paths,
)
from dpo_assets.section import Section, describe_validation_error
from dpo_assets_tests.samples import RECIPE, SHA, recipe

SECTIONS: list[type[Section]] = [
    value
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Section) and value is not Section
]
KEYS = [(section, key) for section in SECTIONS for key in section.model_fields]


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The sample recipe with one value set, `path` being its place: `dpo.beta`, `feedback.sources.0.format`."""
    values: dict[str, Any] = copy.deepcopy(RECIPE)
    place: Any = values
    *above, last = path.split(".")
    for part in above:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[last] = value
    return values


def refusal(values: Any) -> str:
    """What a recipe that cannot be parsed is told."""
    with pytest.raises(ConfigError) as refused:
        parse_recipe(values)
    return str(refused.value)


# Unknown keys


def test_the_sections_under_test_are_all_of_the_recipe() -> None:
    parts = [field.annotation for field in Recipe.model_fields.values()]
    assert {Recipe, FeedbackSource, *parts} <= set(SECTIONS)


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("publishin", "publishing"),
        ("base_model.revison", "revision"),
        ("feedback.sources.0.fromat", "format"),
        ("dpo.learning_rat", "learning_rate"),
        ("hardware.precison", "precision"),
    ],
)
def test_a_misspelt_key_is_refused_at_its_place_with_the_nearest_key(path: str, suggestion: str) -> None:
    assert refusal(with_value(path, 1)).startswith(f"{path}: there is no key `{path.split('.')[-1]}` here")
    assert f"did you mean `{suggestion}`?" in refusal(with_value(path, 1))


@pytest.mark.parametrize(("section", "key"), KEYS, ids=[f"{s.__name__}.{k}" for s, k in KEYS])
def test_every_key_with_a_letter_too_many_suggests_itself(section: type[Section], key: str) -> None:
    with pytest.raises(ValidationError) as refused:
        section.model_validate({f"{key}x": 1})
    assert f"did you mean `{key}`?" in describe_validation_error(refused.value)


def test_a_key_like_no_other_is_told_the_keys_that_exist() -> None:
    message = refusal(with_value("lora.zzz", 1))
    assert "did you mean" not in message
    assert all(f"`{key}`" in message for key in ("rank", "alpha", "dropout", "target_modules"))


def test_two_misspelt_keys_of_a_section_are_both_named() -> None:
    lines = refusal(with_value("dpo", {"bta": 1, "epoch": 2})).splitlines()
    assert [line.split(":")[0] for line in lines] == ["dpo.bta", "dpo.epoch"]


def test_faults_of_two_sections_are_both_named() -> None:
    lines = refusal(with_value("dpo", {"bta": 1}) | {"lora": {"rank": 0}}).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["dpo.bta", "lora.rank"]


def test_a_bad_value_beside_a_misspelt_key_is_named_too() -> None:
    lines = refusal(with_value("dpo", {"bta": 1, "epochs": -1})).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["dpo.bta", "dpo.epochs"]


def test_a_token_written_into_the_recipe_is_refused_and_not_repeated() -> None:
    token = "hf_" + "a" * 34
    message = refusal(with_value("publishing.token", token))
    assert "publishing.token" in message
    assert token not in message


def test_a_key_that_is_no_text_is_refused_like_any_other() -> None:
    assert "there is no key `1` here" in refusal({**RECIPE, 1: 2})


@pytest.mark.parametrize("values", [None, 3, "text", []], ids=repr)
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    assert refusal(values).startswith("recipe: ")


def test_an_empty_recipe_names_the_two_sections_it_needs() -> None:
    assert refusal({}).splitlines() == ["base_model: Field required", "feedback: Field required"]


# Values out of their domain

OUT_OF_DOMAIN: list[tuple[str, Any]] = [
    ("feedback.sources", []),
    ("feedback.sources.0.format", ""),
    ("feedback.pairing", "all"),
    ("feedback.max_length", 15),
    ("feedback.eval_fraction", 0.0),
    ("feedback.eval_fraction", 0.9),
    ("feedback.min_pairs", 0),
    ("feedback.max_quarantine_rate", 1.01),
    ("feedback.max_row_fall", -0.01),
    ("feedback.max_row_fall", 1.01),
    ("feedback.seed", -1),
    ("lora.rank", 0),
    ("lora.rank", 1025),
    ("lora.alpha", 0),
    ("lora.dropout", 1.0),
    ("lora.dropout", -0.01),
    ("lora.target_modules", []),
    ("lora.target_modules", ["lm_head"]),
    ("lora.target_modules", ["q_proj", "q_proj"]),
    ("lora.target_modules", ["q_proj", ""]),
    ("lora.target_modules", ["all-linear", "q_proj"]),
    ("lora.target_modules", 3),
    ("lora.target_parameters", ["experts.down_proj", "experts.down_proj"]),
    ("sft.strategy", "skip"),
    ("sft.learning_rate", 0.0),
    ("sft.max_grad_norm", 0.0),
    ("dpo.learning_rate", -5e-6),
    ("dpo.learning_rate", math.nan),
    ("dpo.beta", -0.1),
    ("dpo.beta", math.nan),
    ("dpo.epochs", 0),
    ("dpo.epochs", math.nan),
    ("dpo.batch_size", 0),
    ("dpo.warmup_ratio", 1.0),
    ("dpo.warmup_ratio", -0.01),
    ("dpo.weight_decay", -0.1),
    ("dpo.label_smoothing", 0.5),
    ("dpo.label_smoothing", -0.01),
    ("dpo.loss", []),
    ("dpo.loss", ""),
    ("dpo.loss", "sigmoid,,sft"),
    ("dpo.loss", ["sigmoid", ""]),
    ("dpo.loss", ["sigmoid", "sft", "sigmoid"]),
    ("dpo.loss", ["sigmoid", 1]),
    ("dpo.loss", 3),
    ("dpo.loss", None),
    ("dpo.f_divergence", "kl"),
    ("dpo.alpha", -0.01),
    ("dpo.alpha", 1.01),
    ("dpo.alpha", math.nan),
    ("dpo.discopop_tau", 0.0),
    ("dpo.seed", -1),
    ("dpo.reference", "champion"),
    ("dpo.trainer", "unsloth"),
    ("evaluation.confidence", 0.5),
    ("evaluation.confidence", 1.0),
    ("evaluation.min_pairs", 0),
    ("evaluation.generations", -1),
    ("evaluation.max_new_tokens", 0),
    ("publishing.artifact", "gguf"),
    ("refresh.sensor_interval_seconds", 29),
    ("refresh.min_new_pairs", -1),
    ("refresh.max_wait_hours", 0.0),
    ("refresh.cool_down_minutes", -0.1),
    ("refresh.retries", -1),
    ("refresh.fresh_hours", 0.049),
    ("refresh.gpu_hours", 0.0),
    ("refresh.gpu_days", 0.0),
    ("refresh.alert_wait_hours", 0.0),
    ("feedback.drift_days", -1),
    ("refresh.automation", "on"),
    ("refresh.executor", "k8s"),
    ("refresh.time_zone", "Mars/Olympus"),
    ("hardware.device", "tpu"),
    ("hardware.precision", "int8"),
    ("hardware.kernels", "triton"),
    ("hardware.memory_gib", 0.0),
    ("hardware.threads", 0),
    ("hardware.timeout_minutes", 0.0),
]


@pytest.mark.parametrize(("path", "value"), OUT_OF_DOMAIN, ids=[f"{p}={v!r}" for p, v in OUT_OF_DOMAIN])
def test_a_value_out_of_its_domain_is_refused_with_its_place_and_itself(path: str, value: Any) -> None:
    [line] = refusal(with_value(path, value)).splitlines()
    assert line.startswith(path)
    assert line.endswith(f"(got {value!r})")


LAST_ALLOWED: list[tuple[str, Any]] = [
    ("feedback.max_length", 16),
    ("feedback.eval_fraction", 0.89),
    ("feedback.min_pairs", 1),
    ("feedback.max_quarantine_rate", 0.0),
    ("feedback.max_quarantine_rate", 1.0),
    ("feedback.max_row_fall", 0.0),
    ("feedback.max_row_fall", 1.0),
    ("lora.rank", 1),
    ("lora.rank", 1024),
    ("lora.alpha", 1),
    ("lora.dropout", 0.0),
    ("lora.dropout", 0.99),
    ("dpo.beta", 0.0),
    ("dpo.label_smoothing", 0.0),
    ("dpo.label_smoothing", 0.49),
    ("dpo.warmup_ratio", 0.0),
    ("dpo.warmup_ratio", 0.99),
    ("dpo.weight_decay", 0.0),
    ("dpo.max_grad_norm", 0.001),
    ("dpo.batch_size", 1),
    ("dpo.seed", 0),
    ("sft.learning_rate", 1e-9),
    ("sft.epochs", 0.001),
    # Which losses work is the word of the check `loss_supported`, which can say what to use instead.
    ("dpo.loss", "kto_pair"),
    ("dpo.loss", ["sigmoid", "nothing"]),
    ("dpo.loss_weights", []),
    ("dpo.loss_weights", [0.001]),
    ("dpo.f_divergence", "alpha_divergence"),
    ("dpo.alpha", 0.0),
    ("dpo.alpha", 1.0),
    ("dpo.discopop_tau", 0.001),
    ("evaluation.confidence", 0.51),
    ("evaluation.confidence", 0.999),
    ("evaluation.min_pairs", 1),
    ("evaluation.generations", 0),
    ("evaluation.max_new_tokens", 1),
    ("refresh.sensor_interval_seconds", 30),
    ("refresh.min_new_pairs", 0),
    ("refresh.max_wait_hours", 0.001),
    ("refresh.cool_down_minutes", 0.0),
    ("refresh.retries", 0),
    ("refresh.fresh_hours", 0.05),
    ("refresh.gpu_hours", 0.001),
    ("refresh.gpu_days", 0.001),
    ("refresh.alert_wait_hours", 0.001),
    ("feedback.drift_days", 0),
    ("hardware.precision", "4bit"),
    ("hardware.memory_gib", 0.001),
    ("hardware.threads", 1),
    ("hardware.timeout_minutes", 0.001),
]


@pytest.mark.parametrize(("path", "value"), LAST_ALLOWED, ids=[f"{p}={v!r}" for p, v in LAST_ALLOWED])
def test_the_last_value_inside_a_domain_is_taken(path: str, value: Any) -> None:
    section, key = path.split(".")
    assert getattr(getattr(parse_recipe(with_value(path, value)), section), key) == value


@pytest.mark.parametrize(("path", "value"), OUT_OF_DOMAIN, ids=[f"{p}={v!r}" for p, v in OUT_OF_DOMAIN])
def test_a_misspelt_key_hides_no_other_fault_of_its_section(path: str, value: Any) -> None:
    values = with_value(path, value)
    values[path.split(".")[0]]["zzz"] = 1
    lines = refusal(values).splitlines()
    assert len(lines) == 2
    assert [line for line in lines if line.startswith(path)] == refusal(with_value(path, value)).splitlines()
    assert any(line.startswith(f"{path.split('.')[0]}.zzz: there is no key `zzz` here") for line in lines)


def test_a_negative_beta_is_refused_with_the_limit_and_the_value() -> None:
    assert refusal(with_value("dpo.beta", -1)) == "dpo.beta: Input should be greater than or equal to 0 (got -1)"


@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_endless_training_is_refused(section: str) -> None:
    assert f"{section}.epochs" in refusal(with_value(f"{section}.epochs", math.inf))


def test_the_values_of_whoever_declares_nothing_are_these() -> None:
    """Every value of a run is explicit, so a default that changes is a change of every pipeline that relies on it."""
    optim = {
        "epochs": 1.0,
        "batch_size": 16,
        "warmup_ratio": 0.1,
        "schedule": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "router_balance": 0.0,
    }
    assert recipe().model_dump(exclude={"base_model"}) == {
        "feedback": {
            "sources": [
                {
                    "path": "builtin:oasst",
                    "hub": None,
                    "revision": None,
                    "files": [],
                    "sql": None,
                    "format": "oasst_tree",
                    "columns": {},
                    "json_columns": [],
                    "fields": {},
                    "companion": None,
                }
            ],
            "pairing": "best_worst",
            "min_margin": 0.0,
            "include_synthetic": False,
            "max_length": 1024,
            "eval_fraction": 0.1,
            "min_pairs": 50,
            "max_quarantine_rate": 0.2,
            "max_row_fall": 0.1,
            "max_unpacked_gib": 4.0,
            "max_unpacked_rows": 2_000_000,
            "seed": 0,
            "window": None,
            "days": None,
            "drift_days": 28,
            "cleaning": {
                "near_duplicates": "quarantine",
                "near_duplicate_similarity": 0.85,
                "max_pairs_per_prompt": 0,
                "template_marks": "quarantine",
                "personal_data": "flag",
                "secrets": "flag",
                "evaluation_sets": [],
            },
            "release": [],
        },
        "lora": {"rank": 16, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear", "target_parameters": []},
        "sft": {**optim, "learning_rate": 2e-4, "strategy": "train"},
        "dpo": {
            **optim,
            "learning_rate": 5e-6,
            "beta": 0.1,
            "loss": "sigmoid",
            "loss_weights": [],
            "label_smoothing": 0.0,
            "f_divergence": "reverse_kl",
            "alpha": 0.5,
            "discopop_tau": 0.05,
            "reference": "sft",
            "reference_strategy": "cached",
            "micro_batch_size": 0,
            "trainer": "packed",
        },
        "checks": {
            "severity": {},
            "bands": {},
            "probe_prompts": 8,
            "probe_every": 0.1,
            "probe_tokens": 48,
            "held_out_pairs": 256,
            "sampled_answers": 32,
            "capability_probe": None,
        },
        "evaluation": {
            "confidence": 0.95,
            "min_pairs": 50,
            "generations": 16,
            "max_new_tokens": 64,
            "sampled_answers": 32,
            "corpus": None,
            "instructions": 24,
            "judge": None,
            "reward_model": None,
            "benchmarks": [],
            "harness": None,
        },
        "publishing": {
            "repo_id": None,
            "dry_run": True,
            "artifact": "merged",
            "private": True,
            "adopt": None,
            "endpoint": None,
            "gguf": None,
        },
        "refresh": {
            "policy": "full",
            "replay_ratio": 1.0,
            "most_continued": 3,
            "renew_sft_after": 0.2,
            "schedule": "0 3 * * *",
            "time_zone": "UTC",
            "sensor_interval_seconds": 60,
            "min_new_pairs": 0,
            "max_wait_hours": 24.0,
            "cool_down_minutes": 0.0,
            "gpu_hours": None,
            "gpu_days": 7.0,
            "retries": 3,
            "alert_url_env": None,
            "alert_wait_hours": 24.0,
            "fresh_hours": None,
            "automation": "off",
            "executor": "in_process",
        },
        "retention": {"keep_models": 5, "keep_days": 14.0, "keep_releases": 5},
        "hardware": {
            "device": "auto",
            "precision": "auto",
            "kernels": "auto",
            "speedups": [],
            "memory_gib": None,
            "threads": 1,
            "pool": "gpu",
            "timeout_minutes": 1440.0,
            "silent_minutes": 30.0,
            "checkpoint_share": 0.02,
            "checkpoint_seconds": 60.0,
        },
    }


# Rules between fields


@pytest.mark.parametrize("revision", [None, "main", SHA[:39], SHA + "0", SHA[:39] + "g", ""], ids=repr)
def test_a_hub_id_without_a_whole_commit_sha_is_refused(revision: str | None) -> None:
    message = refusal(RECIPE | {"base_model": {"source": "org/name", "revision": revision}})
    assert "`org/name` is a Hub id and needs `revision`: the 40-digit commit sha" in message
    assert "`./` in front" in message


@pytest.mark.parametrize("revision", [SHA, SHA.upper()])
def test_a_hub_id_at_a_commit_is_taken(revision: str) -> None:
    assert recipe(base_model={"source": "org/name", "revision": revision}).base_model.revision == revision


HUB_IDS = ["org/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c"]
FOLDERS = ["./models/base", "../base", "/srv/base", "~/base", "C:/base", "models\\base", "base", "a/b/c", "builtin:x/y"]


@pytest.mark.parametrize("source", HUB_IDS)
def test_an_organisation_and_a_name_are_a_hub_id(source: str) -> None:
    assert looks_like_hub_id(source)


@pytest.mark.parametrize("source", FOLDERS)
def test_a_folder_is_no_hub_id_and_needs_no_revision(source: str) -> None:
    assert not looks_like_hub_id(source)
    assert recipe(base_model={"source": source}).base_model.source == source


@pytest.mark.parametrize("repo_id", ["bot", "a/b/c", "org/", "/bot", "org/my bot", "https://hub/org/bot"])
def test_a_repository_is_named_with_its_owner(repo_id: str) -> None:
    message = refusal(RECIPE | {"publishing": {"repo_id": repo_id}})
    assert message == f"publishing: `repo_id: {repo_id}` must name user or organisation too: `my-org/my-bot-dpo`."


@pytest.mark.parametrize("repo_id", [{}, {"repo_id": None}, {"repo_id": ""}], ids=repr)
def test_a_release_without_a_repository_is_refused(repo_id: dict[str, Any]) -> None:
    message = refusal(RECIPE | {"publishing": {"dry_run": False, **repo_id}})
    assert message == "publishing: `dry_run: false` needs `repo_id` (for example `my-org/my-bot-dpo`)."


def test_a_repository_is_adopted_by_its_own_name_alone() -> None:
    """So that the wish does not go along to another repository."""
    assert recipe(publishing={"repo_id": "org/bot", "adopt": "org/bot"}).publishing.adopt == "org/bot"
    message = refusal(RECIPE | {"publishing": {"repo_id": "org/bot", "adopt": "org/other"}})
    assert message == "publishing: `adopt: org/other` must name the same repository as `repo_id`, or be left out."


def test_a_release_with_a_repository_is_taken_and_a_dry_run_needs_none() -> None:
    assert recipe(publishing={"dry_run": False, "repo_id": "org/bot"}).publishing.repo_id == "org/bot"
    assert recipe().publishing.dry_run is True


@pytest.mark.parametrize("precision", ["4bit", "8bit", "fp8", "bf16", "fp16"])
def test_a_gpu_precision_on_a_cpu_is_refused_and_names_what_works(precision: str) -> None:
    message = refusal(RECIPE | {"hardware": {"device": "cpu", "precision": precision}})
    assert f"`{precision}` needs a GPU; with `device: cpu` use `fp32` or `auto`" in message


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), ("cpu", "auto"), ("cuda", "bf16"), ("auto", "4bit")]
)
def test_a_precision_that_the_device_may_have_is_taken(device: str, precision: str) -> None:
    assert recipe(hardware={"device": device, "precision": precision}).hardware.precision == precision


# Losses


@pytest.mark.parametrize(
    ("written", "losses"),
    [
        ("ipo", ("ipo",)),
        (["ipo"], ("ipo",)),
        (" ipo ", ("ipo",)),
        ("sigmoid, sft", ("sigmoid", "sft")),
        (["sigmoid", "sft"], ("sigmoid", "sft")),
    ],
)
def test_equal_losses_are_equal_recipes_however_they_are_written(written: Any, losses: tuple[str, ...]) -> None:
    declared = recipe(dpo={"loss": written})
    assert declared.dpo.losses == losses
    assert declared == recipe(dpo={"loss": list(losses)})
    assert declared.dpo.loss == (losses[0] if len(losses) == 1 else list(losses))
    assert parse_recipe(declared.model_dump(mode="json")) == declared


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        (
            {"loss": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "dpo: `loss_weights` has 1 values for 2 losses (sigmoid, sft); give one for each, or none at all.",
        ),
        (
            {"loss_weights": [1.0, 2.0]},
            "dpo: `loss_weights` has 2 values for 1 losses (sigmoid); give one for each, or none at all.",
        ),
        (
            {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]},
            "dpo: a weight in `loss_weights` is not above 0; leave that loss out of `loss`.",
        ),
        ({"loss_weights": [-1.0]}, "dpo: a weight in `loss_weights` is not above 0; leave that loss out of `loss`."),
    ],
)
def test_weights_that_fit_no_loss_are_refused_with_the_way_out(dpo: dict[str, Any], message: str) -> None:
    assert refusal(RECIPE | {"dpo": dpo}) == message


def test_a_weight_that_is_no_number_is_refused_at_its_place() -> None:
    assert refusal(with_value("dpo.loss_weights", [math.nan])).startswith("dpo.loss_weights.0: ")


def test_a_loss_that_stands_twice_is_told_to_have_a_weight() -> None:
    assert "dpo.loss: `sft` stands twice; name it once and set its weight" in refusal(
        with_value("dpo.loss", ["sft", "sigmoid", "sft"])
    )


# The launchpad


@pytest.mark.parametrize("dpo", [{}, {"loss": ["sigmoid", "sft"], "loss_weights": [1, 0.25]}], ids=repr)
def test_the_launchpad_shows_one_loss_or_several_as_text_and_gives_the_same_recipe_back(dpo: dict[str, Any]) -> None:
    declared = recipe(dpo=dpo)
    form = override_config(declared)().model_dump()
    assert form["dpo"]["loss"] == ", ".join(declared.dpo.losses)
    assert form["dpo"]["loss_weights"] == declared.dpo.loss_weights
    assert apply_overrides(declared, form) == declared


@pytest.mark.parametrize("dpo", [{}, {"loss": ["sigmoid", "sft"], "loss_weights": [1, 0.25]}], ids=repr)
def test_the_launchpad_turns_any_loss_into_any_other(dpo: dict[str, Any]) -> None:
    form = override_config(recipe(dpo=dpo))
    for losses, weights in (("ipo", []), ("hinge, bco_pair, sft", [0.8, 0.2, 1.0])):
        config = form.model_validate({"dpo": {"loss": losses, "loss_weights": weights}})
        changed = apply_overrides(recipe(dpo=dpo), config.model_dump()).dpo
        assert (", ".join(changed.losses), changed.loss_weights) == (losses, weights)


# Overrides of one run


def test_an_override_changes_its_field_and_nothing_else() -> None:
    declared = recipe(dpo={"epochs": 2.0}, evaluation={"min_pairs": 7})
    before = declared.model_dump()
    changed = apply_overrides(declared, {"dpo": {"beta": 0.3}, "lora": {"rank": 4}})
    assert (changed.dpo.beta, changed.lora.rank) == (0.3, 4)
    assert declared.model_dump() == before
    expected = copy.deepcopy(before)
    expected["dpo"]["beta"], expected["lora"]["rank"] = 0.3, 4
    assert changed.model_dump() == expected


@pytest.mark.parametrize("section", [*sorted(set(Recipe.model_fields) - set(OVERRIDABLE)), "nothing"])
def test_a_section_that_decides_identity_or_release_cannot_be_overridden(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"section `{section}` cannot be overridden.*lora, sft, dpo"):
        apply_overrides(recipe(), {section: {}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"beta": -1.0}, r"^dpo\.beta: .*\(got -1\.0\)"), ({"bet": 1.0}, r"^dpo\.bet: .*did you mean `beta`\?")],
)
def test_an_override_is_held_against_the_same_rules_as_the_recipe(fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(recipe(), {"dpo": fields})


# Documentation and shape


def test_every_field_of_every_section_has_a_description() -> None:
    bare = []
    for section, key in KEYS:
        field = section.model_fields[key]
        part = field.annotation
        # A field that is a whole section is described by that section's docstring.
        documented = part.__doc__ if isinstance(part, type) and issubclass(part, Section) else field.description
        if not (documented and documented.strip()):
            bare.append(f"{section.__name__}.{key}")
    assert bare == []


def test_every_section_says_what_it_is_about_in_its_own_words() -> None:
    texts = [section.__dict__.get("__doc__") for section in SECTIONS]
    assert all(texts)
    assert len(set(texts)) == len(texts)


def test_a_recipe_does_not_change_once_it_is_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().dpo.beta = 0.5  # type: ignore[misc]


def test_a_recipe_read_back_from_its_values_is_equal() -> None:
    declared = recipe(dpo={"beta": 0.2}, hardware={"memory_gib": 8.0}, publishing={"repo_id": "org/bot"})
    assert parse_recipe(declared.model_dump()) == declared
    assert parse_recipe(declared.model_dump(mode="json")) == declared


# Paths


def test_relative_paths_start_at_the_folder_of_the_yaml_file(tmp_path: Path) -> None:
    declared = recipe(
        base_model={"source": "./base", "chat_template": "chat.jinja"},
        feedback={"sources": [{"path": "in/*.jsonl"}, {"path": "builtin:oasst"}, {"path": "/abs/x.jsonl"}]},
    )
    resolved = resolve_paths(declared, tmp_path)
    assert Path(resolved.base_model.source) == tmp_path / "base"
    assert Path(resolved.base_model.chat_template or "") == tmp_path / "chat.jinja"
    assert [s.path for s in resolved.feedback.sources] == [f"{tmp_path}/in/*.jsonl", "builtin:oasst", "/abs/x.jsonl"]
    assert declared.base_model.source == "./base"


def test_the_home_folder_is_found_and_hub_ids_and_builtin_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_paths(recipe(base_model={"source": "~/base"}), tmp_path).base_model.source == f"{tmp_path}/home/base"
    assert resolve_paths(recipe(), tmp_path) == recipe()
    pinned = recipe(base_model={"source": "org/name", "revision": SHA})
    assert resolve_paths(pinned, tmp_path) == pinned


# Feedback sources


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "there is none"),
        ({"format": "trl"}, "there is none"),
        ({"path": "a.jsonl", "hub": "org/data", "revision": SHA}, "there are `path` and `hub`"),
        ({"hub": "org/data"}, "needs `revision`: the 40-digit commit sha"),
        ({"hub": "org/data", "revision": "main"}, "a branch such as `main` can change under you"),
        ({"hub": "data", "revision": SHA}, "hub: String should match pattern"),
        ({"path": "a.jsonl", "revision": SHA}, "`revision` and `files` belong to `hub`"),
        ({"path": "a.jsonl", "files": "x"}, "`revision` and `files` belong to `hub`"),
        ({"path": "https://me:secret@host/a.jsonl"}, "`path` holds credentials"),
        ({"sql": {"id": "id", "table": "t"}}, "name one database"),
        ({"sql": {"id": "id", "table": "t", "database": "a.db", "url_env": "URL"}}, "name one database"),
        ({"sql": {"id": "id", "database": "a.db"}}, "name one of `table` and `query`"),
        (
            {"sql": {"id": "id", "database": "a.db", "table": "t", "query": "SELECT 1"}},
            "name one of `table` and `query`",
        ),
        ({"sql": {"id": "id", "database": "a.db", "query": "DELETE FROM t"}}, "feedback is only read"),
        ({"sql": {"id": "id", "database": "postgresql://host/db", "table": "t"}}, "its name in `url_env`"),
        ({"sql": {"id": "id", "url_env": "postgresql://host", "table": "t"}}, "the name of an environment variable"),
        ({"sql": {"database": "a.db", "table": "t"}}, "sql.id: Field required"),
        ({"path": "a.jsonl", "column": {"prompt": "q"}}, "did you mean `columns`?"),
    ],
)
def test_a_source_that_cannot_be_is_refused_with_the_way_out(source: dict[str, Any], said: str) -> None:
    assert said in refusal(with_value("feedback.sources", [source]))


@pytest.mark.parametrize(
    "source",
    [
        {"path": "s3://key:hunter2@bucket/a.jsonl"},
        {"path": "https:/key:hunter2@bucket/a.jsonl"},
        {"path": "https://bucket/a.jsonl?X-Amz-Signature=hunter2", "hub": "org/data"},
        {"path": "https://bucket/a.jsonl?sig=hunter2", "format": ""},
        {"path": ["https://bucket/a.jsonl?token=hunter2"]},
        {"sql": {"url_env": "postgresql://me:hunter2@host/db", "table": "t", "id": "id"}},
        {"sql": {"url_env": "host=db password=hunter2", "table": "t", "id": "id"}},
        {"sql": {"database": "postgresql://me:hunter2@host/db", "table": "t", "id": "id"}},
        {"urlenv": "postgresql://me:hunter2@host/db"},
        "https://me:hunter2@bucket/a.jsonl",
    ],
    ids=str,
)
def test_no_fault_of_a_source_repeats_a_secret(source: Any) -> None:
    values = with_value("feedback.sources", [source])
    assert "feedback.sources.0" in refusal(values)
    assert "hunter2" not in refusal(values)
    # Dagster shows pydantic's own faults, with their inputs.
    with pytest.raises(ValidationError) as raw:
        Recipe.model_validate(values)
    assert "hunter2" not in str(raw.value)
    assert "hunter2" not in str(raw.value.errors())


def test_what_a_source_is_called_holds_no_secret_of_its_url() -> None:
    source = FeedbackSource(path="https://bucket/a.jsonl?X-Amz-Signature=hunter2")
    assert source.shown == "https://bucket/a.jsonl?[secret]"


def test_sources_of_every_kind_are_taken_and_made_absolute(tmp_path: Path) -> None:
    sources = [
        {"path": "feedback/*.jsonl", "companion": "runs.jsonl", "columns": {"prompt": "question"}},
        {"path": "s3://bucket/feedback/*.jsonl.gz", "format": "auto"},
        {"path": "file:///data/a.jsonl"},
        {"hub": "org/data", "revision": SHA, "files": "data/train-*.parquet"},
        {"sql": {"database": "feedback.db", "table": "votes", "id": "id", "watermark": "updated_at"}},
        {"sql": {"url_env": "FEEDBACK_URL", "query": "SELECT * FROM votes", "id": "id"}},
    ]
    declared = recipe(feedback={"sources": sources})
    files, bucket, url, hub, sqlite, postgres = resolve_paths(declared, tmp_path).feedback.sources
    assert files.path == f"{tmp_path}/feedback/*.jsonl"
    assert files.companion == f"{tmp_path}/runs.jsonl"
    assert bucket.path == "s3://bucket/feedback/*.jsonl.gz"
    assert url.path == "/data/a.jsonl"
    assert hub.files == ["data/train-*.parquet"]
    assert sqlite.sql is not None
    assert sqlite.sql.database == f"{tmp_path}/feedback.db"
    assert postgres == declared.feedback.sources[-1]
    assert [source.shown for source in (hub, sqlite, postgres)] == [
        f"hub:org/data@{SHA[:8]}",
        "sql:feedback.db:votes",
        "sql:FEEDBACK_URL:query",
    ]


# Arguments of the chat template


def test_arguments_of_the_chat_template_may_be_any_value_that_yaml_has() -> None:
    given = {"enable_thinking": False, "reasoning_effort": "low", "xml_tools": ["a"], "budget": 3}
    section = parse_recipe(with_value("base_model.template_arguments", given)).base_model
    assert section.template_arguments == given
    assert section.template_date.isoformat() == "2026-01-01"
    dated = parse_recipe(with_value("base_model.template_date", "2024-07-26")).base_model
    assert dated.template_date.isoformat() == "2024-07-26"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tools", "`tools` is no argument of yours"),
        ("strftime_now", "`strftime_now` is no argument of yours"),
        ("enable thinking", "`enable thinking` is no name"),
    ],
)
def test_what_the_pipeline_gives_the_template_itself_cannot_be_given(name: str, said: str) -> None:
    assert said in refusal(with_value("base_model.template_arguments", {name: 1}))


WITH_SECRETS = [
    "https://me:hunter2@host/v1",
    "https://hunter2@host/v1",
    "https://host/v1?api-key=hunter2",
    "https://host/v1#hunter2",
    "https://host/sk-hunter2hunter2hunter2hunter2/v1",
    "https:/me:hunter2@host/v1",
    "me:hunter2@host/v1",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
@pytest.mark.parametrize("field", ["judge", "endpoint"])
def test_the_address_of_a_service_is_a_place_alone_and_its_fault_repeats_no_secret(field: str, url: str) -> None:
    sections: dict[str, Any] = {
        "judge": {"evaluation": {"judge": {"url": url, "model": "m"}}},
        "endpoint": {"publishing": {"endpoint": url}},
    }[field]
    with pytest.raises(ConfigError, match=r"no http address|environment variable") as refused:
        recipe(**sections)
    assert "hunter2" not in str(refused.value)


def test_addresses_of_services_stay_as_they_are_written() -> None:
    for url in ("http://localhost:8000/v1", "https://[::1]:11434/v1", "https://judge.example/openai/deployments/a_b"):
        judge = recipe(evaluation={"judge": {"url": url, "model": "m"}}).evaluation.judge
        assert judge is not None
        assert judge.url == url


@pytest.mark.parametrize("url", ["https://me:hunter2@host/x", "s3://bucket/x", "https:/me:hunter2@host/x"])
@pytest.mark.parametrize(
    "place",
    [
        "base_model.source", "base_model.chat_template", "feedback.cleaning.evaluation_sets", "evaluation.corpus",
        "evaluation.reward_model.source", "evaluation.harness.include_path", "evaluation.benchmarks.path",
        "checks.capability_probe", "publishing.gguf.converter",
    ],
)  # fmt: skip
def test_an_address_where_a_file_is_meant_is_refused_before_it_becomes_a_path_in_a_log(place: str, url: str) -> None:
    *_, name = place.split(".")
    sections: dict[str, Any] = {
        "base_model.source": {"base_model": {name: url}},
        "base_model.chat_template": {"base_model": {"source": "builtin:stories260k", name: url}},
        "feedback.cleaning.evaluation_sets": {
            "feedback": {"sources": [{"path": "builtin:oasst"}], "cleaning": {name: [url]}}
        },
        "evaluation.corpus": {"evaluation": {name: url}},
        "evaluation.reward_model.source": {"evaluation": {"reward_model": {name: url}}},
        "evaluation.harness.include_path": {"evaluation": {"harness": {"tasks": ["a"], name: url}}},
        "evaluation.benchmarks.path": {"evaluation": {"benchmarks": [{"name": "b", name: url}]}},
        "checks.capability_probe": {"checks": {name: url}},
        "publishing.gguf.converter": {"publishing": {"gguf": {"type": "f16", name: url}}},
    }[place]
    with pytest.raises(ConfigError, match="a file or folder of this machine is meant") as refused:
        recipe(**sections)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("link", ["https://me:hunter2@host/licence", "https://host/licence?sig=hunter2"])
def test_a_licence_link_with_a_secret_is_refused_because_the_card_shows_it(link: str) -> None:
    base = {"source": "builtin:stories260k", "licence": "other", "licence_name": "own"}
    with pytest.raises(ConfigError, match="the card of a release shows it") as refused:
        recipe(base_model=base | {"licence_link": link})
    assert "hunter2" not in str(refused.value)
    assert recipe(base_model=base | {"licence_link": "https://host/licence?lang=en#use"}).base_model.licence_link


def test_a_hub_address_of_the_environment_with_a_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="HF_ENDPOINT") as refused:
        HubResource(endpoint="https://me:hunter2@hub.example").api()
    assert "hunter2" not in str(refused.value)
    assert HubResource(endpoint="https://hub.example").api().endpoint == "https://hub.example"
