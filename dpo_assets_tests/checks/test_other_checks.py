"""Checks of datasets, training, merging and scores, and the catalog that lists them all."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.artifact import Artifact, Manifest
from dpo_assets.assets.base_model import verdicts as base_model_verdicts
from dpo_assets.assets.published_model import RELEASE
from dpo_assets.assets.published_model import verify as release_verified
from dpo_assets.checks.aftermath import aftermath_verdicts, collapse_verdict
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.benchmarks import benchmark_verdicts
from dpo_assets.checks.catalog import CHECKS, checks_of
from dpo_assets.checks.collapse import CollapseLimits
from dpo_assets.checks.config import plan_verdicts
from dpo_assets.checks.coverage import lora_coverage
from dpo_assets.checks.dataset import dataset_verdicts
from dpo_assets.checks.evaluation import champion_scored, divergence_in_training, released_kl
from dpo_assets.checks.evidence.ledger import Override
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.gguf import gguf_verdicts
from dpo_assets.checks.harness import harness_verdicts
from dpo_assets.checks.instructions import instructions_followed, summarised
from dpo_assets.checks.judged import judge_verdicts, reward_model_verdicts
from dpo_assets.checks.judged_text import judged_text_kept
from dpo_assets.checks.neutral import neutral_perplexity
from dpo_assets.checks.promotion import (
    Margins,
    evaluation_verdicts,
    greedy_health,
    kept_by_merge,
    override_of,
    promotion_verdict,
)
from dpo_assets.checks.reports import (
    AdoptedBase,
    Aftermath,
    Divergence,
    DpoReport,
    HeldOutPairs,
    MergeReport,
    NotMeasured,
    SftReport,
)
from dpo_assets.checks.training import dpo_verdicts, merge_verdicts, sft_verdicts
from dpo_assets.checks.verdict import Level, Verdict, upper_limit, worst
from dpo_assets.errors import ConfigError
from dpo_assets.planning.licence import Licence
from dpo_assets.planning.matrices import Role
from dpo_assets.planning.model_folder import ModelFolder
from dpo_assets.planning.plan import ModelShape
from dpo_assets.planning.refresh import Refresh
from dpo_assets.planning.targets import Covered, LoraCoverage
from dpo_assets.publishing.commit import stage
from dpo_assets.recipe import BaseModelSection, LoraSection
from dpo_assets_tests.checks.test_ingest_checks import bad_ingest, good_ingest
from dpo_assets_tests.samples import (
    SHA,
    aftermath_report,
    answers,
    benchmark_scores,
    champion_scores,
    coverage,
    dataset_report,
    dpo_report,
    drifted,
    evaluation_report,
    gguf_report,
    harness_scores,
    judged_answers,
    learned,
    neutral,
    plan,
    promotion_outcome,
    quality,
    recipe,
    reward_model_scores,
    score,
)

BANDS = default_bands()
NOTHING = LoraCoverage(kinds=(Covered(name="self_attn.q_proj", role="linear", weights=1000, adapted=0),))

Report = dict[str, Any]
CARRIED = {"tensors": 40, "adapted": 14, "beside": 9}
SFT: Report = {
    "finite": True, "steps": 60, "held_out_nll_before": 2.0, "held_out_nll_after": 1.8, "ends_with_eos": 1.0,
    "kernels": "transformers", "adapted_share": 1.0,
}  # fmt: skip
DPO: Report = dpo_report().model_dump(mode="json", exclude={*Aftermath.model_fields, "stopped", "trigger"})
MERGE: Report = {
    "probe_pairs": 32, "mean_difference_per_token": 0.005, "max_difference_per_token": 0.01, "parameters": 10,
    "method": "streamed", "carried": CARRIED,
}  # fmt: skip


def adapter_verdicts(report: Report) -> list[Verdict]:
    """All checks of `dpo_adapter`, in the order in which its asset returns them."""
    limits = CollapseLimits.of(BANDS, losses=("sigmoid",), beta=0.1)
    read = DpoReport.model_validate(report)
    return [
        *dpo_verdicts(read, BANDS),
        collapse_verdict(read, [{"step": 1.0, "nll_ratio": 1.0}], limits, BANDS),
        *aftermath_verdicts(read, BANDS),
    ]


def ruined_report() -> Report:
    """What is measured on an adapter that every check fails."""
    report = aftermath_report()
    report["held_out"] |= {"accuracy": score(0.2, 0.1, 0.3), "nll_ratio": 9.0, "chosen_nats_per_token": -4.0}
    report["answers"] |= {"kl": {"per_token": 2.0, "low": 1.5, "high": 2.5}}
    report["answers"]["policy"] = report["answers"]["policy"] | {"repetition": 1.0}
    report["capability"] |= {"policy": 0.1, "lost": 90, "gained": 0}
    report["adapter_norm"] |= {"largest": 2.0}
    said = {"rule": "kl", "metric": "probe/kl_per_token", "step": 12, "value": 0.9, "limit": 0.5, "band": "at most 0.5"}
    told = {"source": "a paper", "fix": "lower the rate", "kept_step": 6, "steps_saved": 48, "of_steps": 60}
    return report | {"stopped": said | told, "trigger": said | told}


def named(check: str, verdicts: list[Verdict]) -> Verdict:
    [verdict] = [verdict for verdict in verdicts if verdict.check == check]
    return verdict


# Verdicts


@settings(max_examples=60, deadline=None)
@given(value=st.floats(), limits=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)))
def test_an_upper_limit_blocks_whatever_is_not_finite_and_grows_with_the_value(
    value: float, limits: tuple[float, float]
) -> None:
    warn, error = sorted(limits)
    level = upper_limit(value, warn, error)
    if not math.isfinite(value):
        assert level == "error"
    else:
        assert level == ("error" if value > error else "warn" if value > warn else "pass")


def test_the_worst_of_several_levels_counts_and_of_none_is_a_pass() -> None:
    levels: list[Level] = ["pass", "warn", "error"]
    for n, high in enumerate(levels):
        for low in levels[: n + 1]:
            assert worst(low, high) == worst(high, low) == high
    assert worst() == "pass"


def test_a_verdict_passes_only_without_a_warning_and_says_its_value_and_band() -> None:
    assert Verdict("c", "pass", 1, "b").passed
    assert not Verdict("c", "warn", 1, "b").passed
    assert not Verdict("c", "error", 1, "b").passed
    assert Verdict("c", "pass", 0.123456789, "below 1").headline == "c: 0.123457 (band: below 1)"
    assert Verdict("c", "pass", "16 pairs", "8").headline == "c: 16 pairs (band: 8)"


# dpo_dataset


@pytest.mark.parametrize(
    ("check", "changes", "level"),
    [
        ("every_pair_accounted_for", {}, "pass"),
        ("every_pair_accounted_for", {"rows_in": 1201}, "error"),
        ("every_pair_accounted_for", {"quarantined": 69}, "error"),
        ("every_pair_accounted_for", {"duplicates": 11}, "error"),
        ("every_pair_accounted_for", {"outside_window": 1}, "error"),
        ("every_pair_accounted_for", {"outside_window": 1, "rows_in": 1201}, "pass"),
        ("every_pair_accounted_for", {"train_pairs": 999}, "error"),
        ("schema", {}, "pass"),
        ("schema", {"reasons": {"schema": 1}}, "error"),
        ("split_leak", {}, "pass"),
        ("split_leak", {"leaked_prompts": 1}, "error"),
        ("distinct_after_truncation", {}, "pass"),
        ("distinct_after_truncation", {"reasons": {"identical_after_truncation": 9}}, "pass"),
        ("distinct_after_truncation", {"identical_after_truncation": 1}, "error"),
        ("quarantine_rate", {}, "pass"),
        ("quarantine_rate", {"rows_in": 1000, "damaged": 200}, "pass"),
        ("quarantine_rate", {"rows_in": 1000, "damaged": 201}, "error"),
        ("quarantine_rate", {"rows_in": 0, "damaged": 0}, "pass"),
        ("quarantine_rate", {"rows_in": 0, "damaged": 1}, "error"),
        ("enough_pairs", {}, "pass"),
        ("enough_pairs", {"train_pairs": 500, "eval_pairs": 1}, "pass"),
        ("enough_pairs", {"train_pairs": 499}, "warn"),
        ("enough_pairs", {"train_pairs": 50}, "warn"),
        ("enough_pairs", {"train_pairs": 49}, "error"),
        ("enough_pairs", {"eval_pairs": 0}, "error"),
    ],
)
def test_a_dataset_is_held_against_its_report(check: str, changes: Report, level: str) -> None:
    verdicts = dataset_verdicts(dataset_report(**changes), recipe(), BANDS)
    verdict = named(check, verdicts)
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


def test_the_limits_of_a_dataset_are_the_recipes() -> None:
    strict = recipe(feedback={"sources": [{"path": "x"}], "max_quarantine_rate": 0.0, "min_pairs": 2000})
    failed = {v.check for v in dataset_verdicts(dataset_report(), strict, BANDS) if not v.passed}
    assert failed == {"quarantine_rate", "enough_pairs"}
    lenient = recipe(feedback={"sources": [{"path": "x"}], "max_quarantine_rate": 1.0, "min_pairs": 1})
    poor = dataset_report(damaged=1200, train_pairs=1, accepted=121, quarantined=1069)
    assert [v.check for v in dataset_verdicts(poor, lenient, BANDS) if v.level == "error"] == []


def test_a_broken_export_is_told_its_reasons() -> None:
    report = dataset_report(damaged=900, reasons={"invalid_json": 800, "duplicate_key": 100})
    verdict = named("quarantine_rate", dataset_verdicts(report, recipe(), BANDS))
    assert "duplicate_key 100, invalid_json 800" in verdict.fix
    assert verdict.value == 0.75


# sft_checkpoint


@pytest.mark.parametrize(
    ("check", "changes", "level"),
    [
        ("sft_finite", {}, "pass"),
        ("sft_finite", {"finite": False}, "error"),
        ("sft_learned", {}, "pass"),
        ("sft_learned", {"held_out_nll_after": 2.0}, "warn"),
        ("sft_learned", {"held_out_nll_after": 2.5}, "warn"),
        ("sft_learned", {"held_out_nll_after": math.nan}, "warn"),
        ("sft_learned", {"held_out_nll_before": math.nan}, "warn"),
        ("eos_kept", {}, "pass"),
        ("eos_kept", {"ends_with_eos": 0.99}, "pass"),
        ("eos_kept", {"ends_with_eos": 0.98}, "error"),
        ("eos_kept", {"ends_with_eos": 0.0}, "error"),
        ("eos_kept", {"ends_with_eos": math.nan}, "error"),
    ],
)
def test_an_sft_run_is_held_against_its_report(check: str, changes: Report, level: str) -> None:
    verdict = named(check, sft_verdicts(SftReport.model_validate(SFT | changes), BANDS))
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


def test_an_adopted_base_was_not_trained_and_passes() -> None:
    verdicts = sft_verdicts(AdoptedBase(adopted=True), BANDS)
    assert [v.check for v in verdicts] == [c.name for c in checks_of("sft_checkpoint")]
    assert all(v.passed and v.note for v in verdicts)


# dpo_adapter


def kinds(*names: tuple[str, Role, int, int]) -> Report:
    """A coverage of (name, role, weights, adapted)."""
    made = [Covered(name=name, role=role, weights=weights, adapted=adapted) for name, role, weights, adapted in names]
    return LoraCoverage(kinds=tuple(made)).model_dump()


@pytest.mark.parametrize(
    ("planned", "measured", "level", "said"),
    [
        # As PEFT rewrites some models: the same share of other weights.
        (
            kinds(("up_proj", "linear", 100, 100), ("experts.w1", "experts", 50, 0), ("experts.w3", "experts", 50, 0)),
            kinds(("up_proj", "linear", 100, 0), ("experts.gate_up_proj", "experts", 100, 100)),
            "error",
            "less of up_proj than planned; more of experts than planned",
        ),
        (
            kinds(("q_proj", "linear", 100, 100), ("k_proj", "linear", 100, 0)),
            kinds(("q_proj", "linear", 100, 0), ("k_proj", "linear", 100, 100)),
            "error",
            "less of q_proj than planned; more of k_proj than planned",
        ),
        (
            kinds(("q_proj", "linear", 9, 9), ("experts.w1", "experts", 50, 50), ("experts.w3", "experts", 50, 50)),
            kinds(("q_proj", "linear", 9, 9), ("experts.gate_up_proj", "experts", 100, 100)),
            "pass",
            "100% of 100%",
        ),
    ],
    ids=["experts for linear layers", "one kind for another", "experts stored one by one"],
)
def test_an_adapter_elsewhere_than_planned_blocks(planned: Report, measured: Report, level: str, said: str) -> None:
    changes = {"lora_coverage": measured, "lora_planned": planned}
    verdict = named("adapter_attached", dpo_verdicts(DpoReport.model_validate(DPO | changes), BANDS))
    assert verdict.level == level
    assert said in str(verdict.value)


def test_layers_that_no_setting_adapts_are_told_as_such() -> None:
    some = coverage(**{"mlp.shared_experts.up_proj": 10}).model_copy(
        update={"out_of_reach": ("mlp.shared_experts.up_proj",)}
    )
    verdict = lora_coverage(some, 4, BANDS)
    assert verdict.level == "warn"
    assert "lora.target_modules" not in verdict.fix
    assert "PEFT cannot put an adapter on mlp.shared_experts.up_proj" in verdict.fix


@pytest.mark.parametrize(
    ("check", "changes", "level"),
    [
        ("reference_is_start", {}, "pass"),
        ("reference_is_start", {"first_loss": math.log(2) + 4.9e-4}, "pass"),
        ("reference_is_start", {"first_loss": math.log(2) - 4.9e-4}, "pass"),
        ("reference_is_start", {"first_loss": math.log(2) + 5.1e-4}, "error"),
        ("reference_is_start", {"first_loss": math.log(2) - 5.1e-4}, "error"),
        ("reference_is_start", {"first_loss": math.nan}, "error"),
        ("reference_is_start", {"expected_first_loss": None, "trainer": "trl"}, "warn"),
        ("finite", {}, "pass"),
        ("finite", {"finite": False}, "error"),
        ("engine_as_planned", {}, "pass"),
        ("engine_as_planned", {"kernels": "transformers", "kernels_note": ""}, "pass"),
        ("engine_as_planned", {"kernels": "rows", "kernels_note": "Llama4 scores -3 nats and -4"}, "warn"),
        ("adapter_attached", {}, "pass"),
        ("adapter_attached", {"lora_planned": LoraCoverage().model_dump()}, "pass"),
        ("adapter_attached", {"lora_coverage": coverage(down_proj=1).model_dump()}, "pass"),
        ("adapter_attached", {"lora_coverage": coverage(down_proj=10).model_dump()}, "warn"),
        ("adapter_attached", {"lora_planned": coverage(down_proj=10).model_dump()}, "warn"),
        ("adapter_attached", {"lora_coverage": NOTHING.model_dump()}, "error"),
        ("displacement", {}, "pass"),
        ("displacement", {"nll_ratio": 0.5}, "pass"),
        ("displacement", {"nll_ratio": 1.5}, "pass"),
        ("displacement", {"nll_ratio": 1.51}, "warn"),
        ("displacement", {"nll_ratio": 2.0}, "warn"),
        ("displacement", {"nll_ratio": 40.0}, "error"),
        ("displacement", {"nll_ratio": math.nan}, "error"),
        ("displacement", {"nll_ratio": math.inf}, "error"),
    ],
)
def test_a_dpo_run_is_held_against_its_report(check: str, changes: Report, level: str) -> None:
    verdict = named(check, dpo_verdicts(DpoReport.model_validate(DPO | changes), BANDS))
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


# merged_model


@pytest.mark.parametrize(
    ("check", "changes", "level"),
    [
        ("fidelity", {}, "pass"),
        ("fidelity", {"mean_difference_per_token": 0.02}, "pass"),
        ("fidelity", {"mean_difference_per_token": 0.021}, "warn"),
        ("fidelity", {"mean_difference_per_token": 0.1}, "warn"),
        ("fidelity", {"mean_difference_per_token": 0.11}, "error"),
        ("fidelity", {"mean_difference_per_token": math.nan}, "error"),
        ("all_finite", {}, "pass"),
        ("all_finite", {"not_finite": ["model.norm.weight"]}, "error"),
        ("tensors_kept", {}, "pass"),
        ("tensors_kept", {"carried": None}, "warn"),
        ("tensors_kept", {"carried": CARRIED | {"lost": ["model.visual.patch.weight"]}}, "error"),
        ("tensors_kept", {"carried": CARRIED | {"altered": ["model.visual.patch.weight"]}}, "error"),
        ("tensors_kept", {"carried": CARRIED | {"added": ["model.patch.weight"]}}, "error"),
    ],
)
def test_a_merge_is_held_against_its_report(check: str, changes: Report, level: str) -> None:
    verdict = named(check, merge_verdicts(MergeReport.model_validate(MERGE | changes), BANDS))
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


# eval_scores


@pytest.mark.parametrize(
    ("decision", "champion", "dry_run", "level"),
    [
        ("first_publication", None, False, "pass"),
        ("promote", "model 1", False, "pass"),
        ("hold", None, False, "error"),
        ("insufficient_evidence", None, False, "error"),
        ("reject", None, False, "error"),
        ("hold", "model 1", False, "warn"),
        ("insufficient_evidence", "model 1", False, "warn"),
        ("reject", "model 1", False, "error"),
        ("hold", None, True, "warn"),
        ("insufficient_evidence", "model 1", True, "warn"),
        ("reject", "model 1", True, "error"),
    ],
)
def test_a_hold_is_no_fault_of_a_run_where_a_model_is_live(
    decision: str, champion: str | None, dry_run: bool, level: str
) -> None:
    verdict = promotion_verdict(promotion_outcome(decision, champion), dry_run=dry_run)
    assert (verdict.level, verdict.value, bool(verdict.fix)) == (level, decision, level != "pass")
    if decision in ("hold", "insufficient_evidence"):
        assert "error spent: nothing yet" in verdict.fix
        assert "with `override` and a `reason`" in verdict.fix


@pytest.mark.parametrize(
    ("word", "reason", "told"),
    [
        ("release", "because I can, and want to", "`override: release` is no decision"),
        ("promote", "", "needs a `reason` of at least 10 characters"),
        ("hold", "  short    ", "needs a `reason` of at least 10 characters"),
        ("", "the owners want it", "`reason` is that of an override"),
    ],
)
def test_an_override_is_a_decision_with_a_reason(word: str, reason: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        override_of(word, reason)
    assert override_of("", " ") is None
    assert override_of(" hold ", " the owners want to wait ") == Override(
        decision="hold", reason="the owners want to wait"
    )


@pytest.mark.parametrize(
    ("sft", "policy", "level"),
    [
        ({}, {}, "pass"),
        ({}, {"repetition": 0.05}, "pass"),
        ({}, {"repetition": 0.06}, "warn"),
        ({}, {"repetition": 0.15}, "warn"),
        ({}, {"no_eos": 0.5}, "error"),
        ({}, {"empty": 1.0}, "error"),
        ({"no_eos": 0.9}, {"no_eos": 1.0}, "warn"),
        ({"repetition": 0.5}, {"repetition": 0.0}, "pass"),
        ({}, {"repetition": math.nan}, "error"),
        ({}, {"answers": 0, "repetition": math.nan}, "warn"),
    ],
)
def test_answers_are_compared_with_those_of_the_start(sft: Report, policy: Report, level: str) -> None:
    report = evaluation_report(generation={"sft": answers(**sft), "policy": answers(**policy)})
    verdict = greedy_health(report, BANDS)
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


def test_the_largest_rise_is_the_one_that_is_shown() -> None:
    policy = answers(repetition=0.2, no_eos=0.5, empty=0.1)
    verdict = greedy_health(evaluation_report(generation={"sft": answers(), "policy": policy}), BANDS)
    assert verdict.value == "no_eos +0.500"
    broken = greedy_health(
        evaluation_report(generation={"sft": answers(), "policy": policy | {"empty": math.nan}}), BANDS
    )
    assert str(broken.value).startswith("empty ")


@pytest.mark.parametrize("name", ["no_eos", "empty"])
def test_a_share_of_answers_that_is_no_number_does_not_pass(name: str) -> None:
    report = evaluation_report(generation={"sft": answers(), "policy": answers(**{name: math.nan})})
    assert not greedy_health(report, BANDS).passed


# base_model, raw_preferences, published_model: their verdicts are pure, though they stand beside their assets


def model_folder(**changes: Any) -> ModelFolder:
    values: dict[str, Any] = {
        "shape": ModelShape(parameters=1, layers=1, hidden=1, intermediate=1, vocabulary=1, context=1),
        "architecture": "LlamaForCausalLM",
        "safetensors": ("model.safetensors",),
        "unused": (),
        "pickled": (),
        "licence": Licence(identifier="mit", stated_by="model card"),
        "chat_template": "{{ messages }}",
        "eos_token": "</s>",
    }
    return ModelFolder(**values | changes)


LOCAL = BaseModelSection(source="./base")


@pytest.mark.parametrize(
    ("check", "section", "facts", "level"),
    [
        ("revision_pinned", LOCAL, {}, "pass"),
        ("revision_pinned", BaseModelSection(source="org/name", revision=SHA), {}, "pass"),
        ("revision_pinned", BaseModelSection(source="org/name"), {}, "error"),
        ("safetensors_only", LOCAL, {}, "pass"),
        ("safetensors_only", LOCAL, {"safetensors": (), "pickled": ("pytorch_model.bin",)}, "error"),
        ("safetensors_only", LOCAL, {"safetensors": ()}, "error"),
        ("licence_known", LOCAL, {}, "pass"),
        ("licence_known", LOCAL, {"licence": None}, "error"),
        ("licence_known", BaseModelSection(source="./base", licence="mit"), {"licence": None}, "pass"),
        ("licence_known", BaseModelSection(source="./base", licence="apache2"), {"licence": None}, "warn"),
        ("licence_known", BaseModelSection(source="builtin:stories260k"), {"licence": None}, "pass"),
    ],
)
def test_a_base_model_is_held_against_what_its_folder_holds(
    check: str, section: BaseModelSection, facts: dict[str, Any], level: str
) -> None:
    verdict = named(check, base_model_verdicts(section, model_folder(**facts), sends=True))
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


def test_an_unknown_licence_only_warns_where_nothing_is_sent() -> None:
    verdict = named("licence_known", base_model_verdicts(LOCAL, model_folder(licence=None), sends=False))
    assert (verdict.level, verdict.value) == ("warn", "none stated")
    assert "base_model.licence" in verdict.fix


@pytest.mark.parametrize("flag", ["later_turns_cut", "prompt_repeated", "reasoning_left_out", "foreign_turn"])
def test_judged_text_that_is_cut_or_is_somebody_elses_is_warned_of_above_one_in_a_hundred(flag: str) -> None:
    def verdict(count: int, paired: int = 0) -> Verdict:
        files = [{"pairs": 150, "answers": 50, "flags": {flag: count, "nfc": 200}}]
        return judged_text_kept({"files": files, "paired": {"flags": {flag: paired}}}, BANDS)

    assert verdict(0).value == "200 pairs and judged answers as they were"
    assert [verdict(n).level for n in (0, 2, 3)] == ["pass", "pass", "warn"]
    assert verdict(1, paired=2).level == "warn"
    assert verdict(3).value == f"3 {flag} of 200 pairs and judged answers"
    assert flag in verdict(3).fix
    assert judged_text_kept({"files": [], "paired": None}, BANDS).level == "pass"


def released(folder: Path) -> tuple[Artifact, list[Any]]:
    source, target = folder / "model", folder / RELEASE
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}")
    manifest = Manifest(kind="published_model", fingerprint="0" * 32, inputs={}, versions={}, files={})
    return Artifact(folder, manifest), stage(source, target, "# card", {})


def test_a_release_that_is_not_what_was_listed_is_an_error(tmp_path: Path) -> None:
    artifact, operations = released(tmp_path)
    assert release_verified(artifact, operations, None).level == "pass"
    (tmp_path / RELEASE / "extra.txt").write_text("x")
    assert "extra.txt" in release_verified(artifact, operations, None).fix
    (tmp_path / RELEASE / "extra.txt").unlink()
    (tmp_path / RELEASE / "config.json").write_text("[]")
    assert release_verified(artifact, operations, None).level == "error"
    (tmp_path / RELEASE / "config.json").unlink()
    assert "config.json" in release_verified(artifact, operations, None).fix


# The catalog


@pytest.mark.parametrize(
    ("measured", "in_training", "level", "told"),
    [
        ({"per_token": 0.1, "low": 0.0, "high": 0.2}, None, "pass", "the release's own answers"),
        ({"per_token": 0.2, "low": 0.1, "high": 0.3}, {"per_token": 0.9}, "warn", "the release's own answers"),
        ({"per_token": 0.6, "low": 0.2, "high": 0.9}, None, "error", "the release's own answers"),
        ({"per_token": 0.6, "low": 0.1, "high": 0.9}, None, "warn", "the release's own answers"),
        ({"per_token": math.nan}, None, "error", "the release's own answers"),
        ({"not_measured": "no answers were sampled"}, {"per_token": 0.1, "low": 0.0}, "pass", "of the adapter"),
        ({"not_measured": "no answers were sampled"}, {"per_token": 0.9, "low": 0.8}, "error", "of the adapter"),
        ({"not_measured": "no answers were sampled"}, None, "warn", ""),
        (None, None, "warn", ""),
    ],
)
def test_the_release_is_judged_by_its_kl_or_by_that_which_training_measured(
    measured: Any, in_training: Any, level: Level, told: str
) -> None:
    adapter = None if in_training is None else Divergence.model_validate(in_training)
    verdict = released_kl(evaluation_report(kl=measured), adapter, BANDS)
    assert (verdict.level, verdict.note.startswith(told)) == (level, True)
    assert bool(verdict.fix) == (level != "pass")
    assert verdict.source == BANDS.limit("kl_budget").source


def test_training_measured_a_kl_only_where_its_report_has_one() -> None:
    whole = dpo_report(**aftermath_report())
    found = divergence_in_training(whole)
    assert isinstance(found, Divergence)
    unasked = whole.model_copy(update={"answers": NotMeasured(not_measured="checks.sampled_answers is 0")})
    assert [divergence_in_training(one) for one in (None, unasked, dpo_report(answers=None))] == [None] * 3


def instructions(policy: list[bool]) -> dict[str, Any]:
    """Of 24 instructions, all of which SFT followed."""
    names = [str(n) for n in range(len(policy))]
    return summarised(names, [True] * len(policy), policy, None, 0.95).model_dump(mode="json")


def every_verdict(folder: Path, *, fail: bool) -> dict[str, list[Verdict]]:
    """Every verdict of every asset, of values that pass or of values that fail."""
    artifact, operations = released(folder)
    if fail:
        (folder / RELEASE / "config.json").unlink()
    bad_plan = plan(
        parameters=10**10,
        memory_gib=99.0,
        dpo_steps=5,
        lora=LoraSection(rank=16, alpha=64),
        coverage=NOTHING,
        refresh=Refresh(policy="continue", generation=3, new=8),
        dpo={"learning_rate": 1.0, "beta": 0.0, "label_smoothing": 0.1, "batch_size": 1, "warmup_ratio": 0.0},
    )
    bad_scores = evaluation_report(
        implicit_reward_accuracy=score(0.2, 0.1, 0.3),
        generation={"sft": answers(), "policy": answers(no_eos=1.0)},
        kl={"per_token": 0.9, "low": 0.7, "high": 1.1},
        neutral=neutral(2.0),
        champion="c" * 64,
        champion_scores=champion_scores(left_out={"template_refused": 3}),
        instructions=instructions([False] * 24),
    )
    bad_dataset = dataset_report(
        damaged=1200, reasons={"schema": 1}, leaked_prompts=1, identical_after_truncation=1, train_pairs=0,
        quality=quality(
            truncation={"share": 0.2}, distance={"median": 0.1}, lengths={"ratio": 3.0}, degenerate={"others": 1120},
            contradictions={"pairs": 600}, surface={"auc": 0.99},
        ),
        drift=drifted(),
    )  # fmt: skip
    bad_sft = SFT | {"finite": False, "held_out_nll_after": 9.0, "ends_with_eos": 0.0}
    bad_dpo = DPO | {
        "lora_coverage": NOTHING.model_dump(),
        "kernels_note": "it scores -3 nats row by row and -4 by `transformers`",
        "finite": False,
        "first_loss": 1.0,
        "nll_ratio": 9.0,
        **ruined_report(),
    }
    unpinned = BaseModelSection(source="org/name")
    bad_facts = model_folder(safetensors=(), licence=None)
    judged = {"pairs": 5, "answers": 2, "flags": {"foreign_turn": 7 if fail else 0}}
    return {
        "base_model": base_model_verdicts(
            unpinned if fail else LOCAL, bad_facts if fail else model_folder(), sends=True
        ),
        "raw_preferences": [
            *(bad_ingest() if fail else good_ingest()),
            judged_text_kept({"files": [judged], "paired": None}, BANDS),
        ],
        "dpo_dataset": dataset_verdicts(bad_dataset if fail else dataset_report(), recipe(), BANDS),
        "dpo_plan": plan_verdicts(bad_plan if fail else plan(), BANDS),
        "sft_checkpoint": sft_verdicts(SftReport.model_validate(bad_sft if fail else SFT), BANDS),
        "dpo_adapter": adapter_verdicts(bad_dpo if fail else DPO | aftermath_report()),
        "merged_model": merge_verdicts(
            MergeReport.model_validate(
                MERGE
                | (
                    {"not_finite": ["model.norm.weight"], "mean_difference_per_token": 1.0, "carried": None}
                    if fail
                    else {}
                )
            ),
            BANDS,
        ),
        "eval_scores": [
            *evaluation_verdicts(
                bad_scores if fail else evaluation_report(),
                BANDS,
                seen=1 if fail else 0,
                learned=learned(0.1 if fail else None),
                merged=True,
            ),
            released_kl(bad_scores if fail else evaluation_report(), None, BANDS),
            neutral_perplexity(bad_scores if fail else evaluation_report(), BANDS),
            champion_scored(bad_scores if fail else evaluation_report()),
            instructions_followed(bad_scores if fail else evaluation_report(instructions=instructions([True] * 24))),
        ],
        "judged_answers": judge_verdicts(
            judged_answers(nulls=50, share=score(0.2, 0.1, 0.3), corrected=score(0.1, 0.0, 0.2))
            if fail
            else judged_answers()
        ),
        "gguf_model": gguf_verdicts(gguf_report(not_finite=("blk.0.attn_q.weight",)) if fail else gguf_report()),
        "reward_model_scores": reward_model_verdicts(
            reward_model_scores(left_out={"too_long": 50}, corrected=score(0.1, 0.0, 0.2))
            if fail
            else reward_model_scores()
        ),
        "benchmark_scores": benchmark_verdicts(
            benchmark_scores(left_out={"too_long": 3} if fail else {}), {"b": 1 if fail else 0}
        ),
        "harness_scores": harness_verdicts(
            harness_scores(comparison=compare([0.0] * 50, [1.0] * 50)) if fail else harness_scores()
        ),
        "promotion": [promotion_verdict(promotion_outcome("reject" if fail else "first_publication"), dry_run=True)],
        "published_model": [release_verified(artifact, operations, None)],
    }


@pytest.mark.parametrize("fail", [False, True])
def test_the_catalog_lists_the_checks_that_exist_on_their_assets_in_their_order(tmp_path: Path, fail: bool) -> None:
    returned = {asset: [v.check for v in verdicts] for asset, verdicts in every_verdict(tmp_path, fail=fail).items()}
    assert returned == {asset: [c.name for c in checks_of(asset)] for asset in dict.fromkeys(c.asset for c in CHECKS)}
    assert max(Counter(c.name for c in CHECKS).values()) == 1
    assert all(c.description.endswith(".") for c in CHECKS)


def test_every_check_can_pass_and_every_check_can_fail(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    assert [v for verdicts in every_verdict(good, fail=False).values() for v in verdicts if not v.passed] == []
    assert [v for verdicts in every_verdict(bad, fail=True).values() for v in verdicts if v.passed] == []


def test_a_check_that_does_not_block_has_a_case_that_fails_it(tmp_path: Path) -> None:
    shown = {c.name for c in CHECKS if not c.blocking}
    failed = [v for verdicts in every_verdict(tmp_path, fail=True).values() for v in verdicts]
    assert {v.check for v in failed if not v.passed} >= shown


WITHOUT_A_WAY_OUT = {"reference_is_start"}


def test_every_verdict_names_its_band_and_source_and_a_failed_one_the_way_out(tmp_path: Path) -> None:
    failed = [v for verdicts in every_verdict(tmp_path, fail=True).values() for v in verdicts]
    assert all(v.band and v.source for v in failed)
    assert {v.check for v in failed if not v.fix} <= WITHOUT_A_WAY_OUT


def test_a_wrong_reference_is_told_the_way_out() -> None:
    assert named("reference_is_start", dpo_verdicts(DpoReport.model_validate(DPO | {"first_loss": 1.0}), BANDS)).fix


@pytest.mark.parametrize(
    ("margin", "held_out", "level"),
    [
        (0.104, {}, "warn"),
        (0.2, {}, "pass"),
        (-0.1, {}, "warn"),
        (math.nan, {}, "warn"),
        (0.0, {"accuracy": score(0.58, 0.43, 0.71)}, "pass"),
        (0.0, {"margin_nats": -0.1}, "pass"),
    ],
    ids=["a third", "most", "turned round", "not a number", "nothing was learned", "learned the wrong way"],
)
def test_what_the_merge_rounds_away_is_told_where_something_was_learned(
    margin: float, held_out: dict[str, Any], level: str
) -> None:
    adapter = learned_of(margin_nats=0.328, margins={"a": 0.3, "b": 0.356}) | held_out
    verdict = kept_by_merge(Margins(HeldOutPairs.model_validate(adapter), {"a": margin, "b": margin}), merged=True)
    assert verdict.level == level
    assert bool(verdict.fix) is (level == "warn")


def learned_of(**changes: Any) -> dict[str, Any]:
    """What was measured of an adapter on held-out pairs."""
    found: dict[str, Any] = aftermath_report()["held_out"]
    return found | changes


def test_a_merge_is_judged_on_the_pairs_that_the_adapter_was_measured_on() -> None:
    """It was asked for the first of them; what the others have is neither kept nor lost."""
    adapter = HeldOutPairs.model_validate(learned_of(margin_nats=1.0, margins={"a": 1.0, "b": 1.0, "gone": 9.0}))
    kept = kept_by_merge(Margins(adapter, {"a": 0.9, "b": 0.9, "c": -5.0, "d": -5.0}), merged=True)
    assert (kept.level, kept.value) == ("pass", "90%: 0.900 of 1.000 nats")
    assert kept.note == "2 held-out pairs, scored before and after"
    lost = kept_by_merge(Margins(adapter, {"a": 0.1, "b": 0.1, "c": 5.0, "d": 5.0}), merged=True)
    assert (lost.level, lost.value) == ("warn", "10%: 0.100 of 1.000 nats")
    other = kept_by_merge(Margins(adapter, {"c": 5.0}), merged=True)
    assert (other.level, str(other.value)[:12]) == ("warn", "not measured")
    assert other.fix


@pytest.mark.parametrize("held_out", [None, {"not_measured": "no held-out pairs"}], ids=["earlier", "asked for none"])
def test_a_merge_of_an_adapter_that_was_not_measured_is_a_warning(held_out: Any) -> None:
    before = dpo_report(**aftermath_report() | {"held_out": held_out}).held_out
    assert not isinstance(before, HeldOutPairs)
    verdict = kept_by_merge(before, merged=True)
    assert verdict.level == "warn"
    assert "not measured" in str(verdict.value)
    assert verdict.fix


def test_scores_of_the_adapter_say_nothing_of_its_merge() -> None:
    adapter = HeldOutPairs.model_validate(learned_of())
    before = Margins(adapter, adapter.margins)
    assert kept_by_merge(before, merged=True).passed
    verdict = kept_by_merge(before, merged=False)
    assert verdict.level == "warn"
    assert verdict.fix
