"""Checks of the plan: each number of the bands has a value on either side of it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from dpo_assets.checks import losses
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.catalog import checks_of
from dpo_assets.checks.config import (
    beta_for_loss,
    budget,
    lora_scale,
    loss_supported,
    memory_fits,
    plan_verdicts,
    schedule_and_precision,
)
from dpo_assets.checks.configuration import Configuration
from dpo_assets.checks.rates import learning_rate_band, training_dose
from dpo_assets.checks.refresh import refresh_policy
from dpo_assets.checks.verdict import Verdict
from dpo_assets.planning.plan import DatasetStats, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.refresh import Refresh
from dpo_assets.planning.sizes import find_model
from dpo_assets.recipe import DpoSection, LoraSection
from dpo_assets_tests.pipelines import PACKAGE
from dpo_assets_tests.samples import plan, recipe

BANDS = default_bands()

PUBLISHED_ONLY = {"simpo", "kto", "orpo", "cpo"}  # Judged where someone else trained with them, refused here.
SMALL, LARGE = 135_000_000, 8_000_000_000
EPSILON = 1e-9


def of(**changes: Any) -> Configuration:
    """What a plan with changes is judged by."""
    return Configuration.of_plan(plan(**changes))


def unchecked(**values: Any) -> Configuration:
    """DPO values that a recipe would refuse: a check must not rely on the recipe."""
    dpo = DpoSection.model_construct(**DpoSection().model_dump() | values)
    return Configuration.of_plan(plan().model_copy(update={"dpo": dpo}))


def test_a_plan_of_default_values_passes_every_check_of_its_asset() -> None:
    verdicts = plan_verdicts(plan(), BANDS)
    assert [(v.check, v.level, v.fix) for v in verdicts] == [(c.name, "pass", "") for c in checks_of("dpo_plan")]
    assert all(v.passed and v.band and v.source for v in verdicts)


# learning_rate_band


@pytest.mark.parametrize(
    ("parameters", "rate", "level"),
    [
        (SMALL, 9.9e-7, "pass"),
        (SMALL, 1e-4, "pass"),
        (SMALL, 1.1e-4, "warn"),
        (SMALL, 2e-4, "warn"),
        (SMALL, 2.1e-4, "error"),
        (LARGE, 1e-9, "pass"),
        (LARGE, 5e-5, "pass"),
        (LARGE, 5.1e-5, "warn"),
        (LARGE, 1e-4, "warn"),
        (LARGE, 1.1e-4, "error"),
        (LARGE, 5e-3, "error"),
        # One billion belongs to the larger models.
        (10**9 - 1, 1e-4, "pass"),
        (10**9, 1e-4, "warn"),
    ],
)
def test_the_learning_rate_is_judged_by_the_size_of_the_model(parameters: int, rate: float, level: str) -> None:
    assert learning_rate_band(of(parameters=parameters, dpo={"learning_rate": rate}), BANDS).level == level


@pytest.mark.parametrize("much", [{"epochs": 9.0}, {"batch_size": 1}], ids=repr)
def test_epochs_and_batch_do_not_move_the_band_of_the_learning_rate(much: dict[str, Any]) -> None:
    for rate, level in ((1e-4, "pass"), (1.1e-4, "warn"), (2.1e-4, "error")):
        assert learning_rate_band(of(dpo={"learning_rate": rate, **much}), BANDS).level == level


def test_beta_does_not_move_the_band_of_the_learning_rate() -> None:
    # Adam takes away the scale that a low beta gives to the gradient.
    for rate in (1e-6, 1e-4, 1.1e-4, 2.1e-4):
        verdicts = {str(learning_rate_band(of(dpo={"learning_rate": rate, "beta": b}), BANDS)) for b in (0.005, 0.1, 1)}
        assert len(verdicts) == 1


def test_of_a_size_that_is_not_known_the_widest_band_counts() -> None:
    for method, ceiling in (("lora", 1e-4), ("full", 5e-6)):
        run = Configuration(method, None, ("sigmoid",), learning_rate=ceiling, beta=0.1)  # type: ignore[arg-type]
        assert learning_rate_band(run, BANDS).level == "pass"
        verdict = learning_rate_band(replace(run, learning_rate=1.01 * ceiling), BANDS)
        assert verdict.level == "warn"
        assert "the model's size is not known" in verdict.band


def test_a_likelihood_term_of_enough_weight_raises_both_ceilings() -> None:
    def level(rate: float, weight: float) -> str:
        dpo = {"learning_rate": rate, "loss": ["sigmoid", "sft"], "loss_weights": [2.0, 2.0 * weight]}
        return learning_rate_band(of(dpo=dpo), BANDS).level

    assert (level(4e-4, 0.09), level(4e-4, 0.1)) == ("error", "pass")
    assert (level(6e-4, 0.1), level(1.1e-3, 1.0)) == ("warn", "error")


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
def test_a_learning_rate_that_is_no_number_is_an_error(rate: float) -> None:
    assert learning_rate_band(unchecked(learning_rate=rate), BANDS).level == "error"


def test_a_learning_rate_too_high_is_told_the_reference_of_its_band() -> None:
    verdict = learning_rate_band(of(dpo={"learning_rate": 1e-2}), BANDS)
    assert "set dpo.learning_rate to 5e-05 or less" in verdict.fix
    assert "at most 0.0001, blocked above 0.0002" in verdict.band
    assert "model under 1B" in verdict.band


def test_a_learning_rate_too_low_is_noted_and_no_alarm() -> None:
    verdict = learning_rate_band(of(dpo={"learning_rate": 1e-9}), BANDS)
    assert (verdict.level, verdict.fix) == ("pass", "")
    assert "below 1e-06 a run hardly moves" in verdict.note
    assert "hardly moves" not in learning_rate_band(of(dpo={"learning_rate": 1e-6}), BANDS).note


# beta_for_loss


@pytest.mark.parametrize(
    ("loss", "beta", "level"),
    [
        ("sigmoid", 0.0, "error"),
        ("sigmoid", 0.00009, "error"),
        ("sigmoid", 0.0001, "warn"),
        ("sigmoid", 0.0049, "warn"),
        ("sigmoid", 0.005, "pass"),
        ("sigmoid", 1.0, "pass"),
        # A strong pull holds the policy, so it never blocks.
        ("sigmoid", 1.01, "warn"),
        ("sigmoid", 5.0, "warn"),
        ("sigmoid", 1000.0, "warn"),
        ("simpo", 0.1, "error"),
        ("simpo", 2.0, "pass"),
        ("kto", 0.1, "pass"),
        ("kto", 5.0, "warn"),
        ("ipo", 1.0, "pass"),
        ("ipo", 5.0, "warn"),
        ("ipo", 0.0049, "error"),
        ("sigmoid_norm", 0.1, "error"),
        ("sigmoid_norm", 0.5, "warn"),
        ("sigmoid_norm", 5.0, "pass"),
        ("sigmoid_norm", 20.1, "warn"),
        ("sppo_hard", 0.00019, "error"),
        ("sppo_hard", 0.0002, "warn"),
        ("sppo_hard", 0.001, "pass"),
        ("sppo_hard", 0.2, "warn"),
        ("bco_pair", 0.1, "pass"),
        ("bco_pair", 0.004, "warn"),
    ],
)
def test_beta_is_judged_in_the_unit_of_its_loss(loss: str, beta: float, level: str) -> None:
    verdict = beta_for_loss(of(dpo={"loss": loss, "beta": beta}), BANDS)
    assert (verdict.level, verdict.value) == (level, beta)
    assert bool(verdict.fix) == (level != "pass")


def test_a_loss_that_no_band_is_known_of_is_left_to_its_own_check() -> None:
    verdict = beta_for_loss(of(dpo={"loss": "nothing", "beta": 0.0}), BANDS)
    assert (verdict.level, verdict.note) == ("pass", "loss_supported says which losses there are")
    assert loss_supported(plan(dpo={"loss": "nothing"})).level == "error"


@pytest.mark.parametrize("loss", sorted(BANDS.betas))
def test_a_weak_beta_is_a_fact_of_its_loss_and_of_the_first_that_is_weak(loss: str) -> None:
    band = BANDS.betas[loss]
    assert BANDS.weak_beta([loss], band.weak_below) is None
    assert BANDS.weak_beta(["sft", loss], math.nextafter(band.weak_below, 0)) == band
    assert BANDS.weak_beta([loss], band.usual) is None
    assert BANDS.weak_beta([loss], None) is None


def test_a_beta_may_be_weak_for_one_of_two_losses() -> None:
    assert BANDS.weak_beta(["sppo_hard"], 0.001) is None
    assert BANDS.weak_beta(["sppo_hard", "sigmoid"], 0.001) == BANDS.betas["sigmoid"]
    assert BANDS.weak_beta(["nothing"], 0.001) is None


@pytest.mark.parametrize("beta", [math.nan, math.inf, -0.1])
def test_a_beta_that_is_no_strength_is_an_error(beta: float) -> None:
    assert beta_for_loss(unchecked(beta=beta), BANDS).level == "error"


def test_several_losses_share_one_beta_and_the_worst_verdict_counts() -> None:
    def verdict(*losses: str, beta: float) -> Verdict:
        return beta_for_loss(of(dpo={"loss": list(losses), "beta": beta}), BANDS)

    assert verdict("sigmoid", "ipo", beta=0.01).level == "pass"
    assert verdict("sigmoid", "ipo", beta=0.007).level == "warn"
    assert "loss ipo" in verdict("sigmoid", "ipo", beta=0.007).band
    assert verdict("ipo", "sigmoid", beta=0.007).fix == "set dpo.beta between 0.01 and 1"
    # The term has no beta, so it has no say.
    assert verdict("sppo_hard", "sft", beta=0.001) == verdict("sppo_hard", beta=0.001)
    assert verdict("sppo_hard", "sft", beta=0.001).level == "pass"


@pytest.mark.parametrize("beta", [0.1, 0.7, 5.0])
def test_no_beta_suits_two_losses_of_different_units(beta: float) -> None:
    verdict = beta_for_loss(of(dpo={"loss": ["sigmoid", "sigmoid_norm"], "beta": beta}), BANDS)
    assert verdict.level != "pass"
    assert "no beta suits sigmoid and sigmoid_norm at once" in verdict.fix


@pytest.mark.parametrize("loss", sorted(BANDS.betas))
def test_the_betas_that_a_wrong_one_is_told_pass(loss: str) -> None:
    fix = beta_for_loss(of(dpo={"loss": loss, "beta": 0.0}), BANDS).fix
    ends = [float(word) for word in fix.removeprefix("set dpo.beta between ").split(" and ")]
    assert [beta_for_loss(of(dpo={"loss": loss, "beta": end}), BANDS).level for end in ends] == [
        "pass",
        "pass",
    ]


# loss_supported


@pytest.mark.parametrize(
    ("dpo", "level", "fix"),
    [
        ({}, "pass", ""),
        *[
            ({"loss": name}, "pass", "")
            for name, facts in losses.LOSSES.items()
            if name not in ("cdpo", "robust", "exo_pair", "sft")
        ],
        *[
            ({"loss": n, "label_smoothing": 0.1}, "pass", "")
            for n, f in losses.LOSSES.items()
            if f.smoothing != "ignored"
        ],
        ({"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, "pass", ""),
        # A name that is no loss of this pipeline
        ({"loss": "kto_pair"}, "error", "use sigmoid here, apo_zero or bco_pair"),
        ({"loss": "kto_pair"}, "error", "TRL's KTOTrainer on unpaired labels"),
        ({"loss": ["sigmoid", "kto_pair"]}, "error", "TRL's KTOTrainer"),
        ({"loss": "simpo"}, "error", "CPOTrainer; sigmoid_norm is"),
        ({"loss": "rpo"}, "error", "set dpo.loss to [sigmoid, sft]"),
        ({"loss": "sigmoyd"}, "error", "did you mean sigmoid? set dpo.loss to one of: sigmoid, cdpo, "),
        ({"loss": "apo_zer0"}, "error", "did you mean apo_zero?"),
        ({"loss": "zzz"}, "error", "set dpo.loss to one of: sigmoid, cdpo, "),
        ({"loss": "sft"}, "error", "set dpo.loss to a preference loss and sft, as in [sigmoid, sft]"),
        # Label smoothing
        (
            {"label_smoothing": 0.1},
            "error",
            "set dpo.loss to cdpo, the sigmoid loss with label smoothing, or set dpo.lab",
        ),
        ({"label_smoothing": 0.1}, "error", "set dpo.label_smoothing to 0: the sigmoid loss ignores it"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "error", "set dpo.label_smoothing to 0: the ipo loss ignores it"),
        ({"loss": ["hinge", "sft"], "label_smoothing": 0.1}, "error", "the hinge + sft loss ignores it"),
        ({"loss": ["sigmoid", "robust"], "label_smoothing": 0.1}, "pass", ""),
        ({"loss": "exo_pair"}, "error", "set dpo.label_smoothing to 1e-3"),
        ({"loss": ["sigmoid", "exo_pair"]}, "error", "set dpo.label_smoothing to 1e-3"),
        ({"loss": "cdpo"}, "warn", "the share of wrong labels, 0.1 "),
        ({"loss": "robust"}, "warn", "or dpo.loss to sigmoid"),
        # Divergences and temperatures
        ({"f_divergence": "js_divergence"}, "pass", ""),
        ({"f_divergence": "alpha_divergence", "alpha": 0.3}, "pass", ""),
        ({"loss": ["sigmoid", "sft"], "f_divergence": "forward_kl"}, "pass", ""),
        (
            {"loss": "bco_pair", "f_divergence": "forward_kl"},
            "error",
            "set dpo.f_divergence to reverse_kl, or dpo.loss to",
        ),
        ({"loss": ["sigmoid", "aot"], "f_divergence": "js_divergence"}, "error", "set dpo.f_divergence to reverse_kl"),
        ({"alpha": 0.3}, "error", "set dpo.f_divergence to alpha_divergence, or dpo.alpha back to 0.5"),
        ({"loss": "discopop", "discopop_tau": 0.1}, "pass", ""),
        ({"discopop_tau": 0.1}, "error", "set dpo.loss to discopop, or dpo.discopop_tau back to 0.05"),
        # Who trains
        ({"loss": "cdpo", "label_smoothing": 0.1, "trainer": "trl"}, "error", "set dpo.trainer to packed"),
        ({"loss": "robust", "label_smoothing": 0.1, "trainer": "trl"}, "pass", ""),
    ],
)
def test_a_loss_that_cannot_be_or_an_option_without_effect_is_told_the_way_out(
    dpo: dict[str, Any], level: str, fix: str
) -> None:
    verdict = loss_supported(plan(dpo=dpo))
    assert verdict.level == level
    assert fix in verdict.fix
    assert bool(verdict.fix) == (level != "pass")
    assert verdict.source


def test_every_fault_of_a_loss_is_told_with_its_source() -> None:
    verdict = loss_supported(plan(dpo={"loss": "nca_pair", "label_smoothing": 0.1, "f_divergence": "js_divergence"}))
    assert "label_smoothing to 0" in verdict.fix
    assert "f_divergence to reverse_kl" in verdict.fix
    assert losses.SMOOTHING_SOURCE in verdict.source
    assert losses.F_DIVERGENCE_SOURCE in verdict.source


@pytest.mark.parametrize("name", sorted(losses.LOSS_ADVICE))
def test_advice_names_no_loss_that_does_not_exist(name: str) -> None:
    fix = loss_supported(plan(dpo={"loss": name})).fix
    assert fix == losses.LOSS_ADVICE[name]
    assert any(loss in fix for loss in losses.SUPPORTED_LOSSES) or "Trainer" in fix


def test_the_document_says_of_every_loss_what_it_takes() -> None:
    lines = (PACKAGE.parent / "docs" / "checks.md").read_text(encoding="utf-8").splitlines()
    for name, facts in losses.LOSSES.items():
        [row] = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert row.endswith(f"| {facts.smoothing} | {'yes' if facts.f_divergence else 'no'} |")


def test_every_supported_loss_has_a_band() -> None:
    # The term has no beta.
    assert set(losses.SUPPORTED_LOSSES) - {"sft"} == set(BANDS.betas) - PUBLISHED_ONLY
    assert {loss_supported(plan(dpo={"loss": name})).level for name in PUBLISHED_ONLY} == {"error"}
    assert set(losses.LOSS_ADVICE).isdisjoint(losses.SUPPORTED_LOSSES)


# budget


@pytest.mark.parametrize(
    ("dpo", "steps", "level", "fix"),
    [
        ({}, 30, "pass", ""),
        ({}, 29, "warn", "collect more pairs: 29 steps"),
        ({}, 1, "warn", "collect more pairs: 1 steps"),
    ],
)
def test_few_steps_warn_and_never_block(dpo: dict[str, Any], steps: int, level: str, fix: str) -> None:
    verdict = budget(of(dpo=dpo, dpo_steps=steps), BANDS)
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")
    assert fix in verdict.fix


@pytest.mark.parametrize(
    ("dpo", "notes"),
    [
        ({"batch_size": 8, "epochs": 3.0}, []),
        ({"batch_size": 7}, ["a batch below 8"]),
        ({"epochs": 3.1}, ["more than 3 epochs"]),
        ({"batch_size": 1, "epochs": 50.0}, ["a batch below 8", "more than 3 epochs"]),
    ],
)
def test_an_unusual_batch_or_number_of_epochs_is_noted_and_no_alarm(dpo: dict[str, Any], notes: list[str]) -> None:
    verdict = budget(of(dpo=dpo, dpo_steps=30), BANDS)
    assert (verdict.level, verdict.fix) == ("pass", "")
    assert [said in verdict.note for said in ("a batch below 8", "more than 3 epochs")] == [
        said in notes for said in ("a batch below 8", "more than 3 epochs")
    ]
    assert ("training_dose" in verdict.note) == bool(notes)


@pytest.mark.parametrize("epochs", [math.nan, math.inf])
def test_epochs_that_are_no_number_are_an_error(epochs: float) -> None:
    assert budget(unchecked(epochs=epochs), BANDS).level == "error"
    assert training_dose(unchecked(epochs=epochs), BANDS).level == "error"


def test_steps_that_are_only_supposed_are_not_judged() -> None:
    few = plan(dpo_steps=2)
    assert budget(Configuration.of_plan(few), BANDS).level == "warn"
    assert budget(Configuration.of_plan(few, pairs_known=False), BANDS).level == "pass"


# schedule_and_precision, lora_scale


@pytest.mark.parametrize(
    ("dpo", "precision", "fix"),
    [
        ({}, "bf16", ""),
        ({"warmup_ratio": 0.03}, "bf16", ""),
        ({"warmup_ratio": 0.2, "max_grad_norm": 10.0}, "4bit", ""),
        ({"warmup_ratio": 0.0}, "bf16", "set dpo.warmup_ratio between 0.03 and 0.2"),
        ({"warmup_ratio": 0.21}, "bf16", "set dpo.warmup_ratio"),
        ({"max_grad_norm": 10.1}, "bf16", "set dpo.max_grad_norm to 1"),
        ({}, "fp16", "set hardware.precision to bf16"),
    ],
)
def test_warm_up_clipping_and_number_format_warn(dpo: dict[str, Any], precision: str, fix: str) -> None:
    verdict = schedule_and_precision(of(dpo=dpo, precision=precision), BANDS)
    assert verdict.level == ("warn" if fix else "pass")
    assert fix in verdict.fix


@pytest.mark.parametrize(
    ("lora", "rate", "fix"),
    [
        ({"rank": 16, "alpha": 32}, 5e-5, ""),
        ({"rank": 16, "alpha": 33}, 5e-6, "set lora.alpha to 32 or less"),
        ({"rank": 128, "alpha": 128}, 2e-5, ""),
        ({"rank": 128, "alpha": 128}, 2.1e-5, "set dpo.learning_rate to 2e-05 or less, or lora.rank below 128"),
        ({"rank": 127, "alpha": 127}, 5e-5, ""),
    ],
)
def test_a_scale_above_two_or_a_large_rank_at_a_high_rate_warns(lora: dict[str, int], rate: float, fix: str) -> None:
    verdict = lora_scale(of(lora=LoraSection(**lora), dpo={"learning_rate": rate}), BANDS)
    assert (verdict.level, verdict.fix) == ("warn" if fix else "pass", fix)


# memory_fits


@pytest.mark.parametrize(
    ("needed", "level"),
    [(6.0, "pass"), (22.5, "pass"), (22.5 + 1e-6, "error"), (100.0, "error"), (math.nan, "error"), (math.inf, "error")],
)
def test_a_peak_beyond_the_device_is_an_error(needed: float, level: str) -> None:
    verdict = memory_fits(plan(memory_gib=needed))
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")
    assert "22.5 GiB on NVIDIA L4" in verdict.band
    assert verdict.note == ""


def test_a_peak_that_leaves_no_room_for_fragments_is_an_error_that_says_so() -> None:
    verdict = memory_fits(plan(memory_gib=22.4, fits=False))
    assert verdict.level == "error"
    assert "no room for fragments" in verdict.note
    assert verdict.fix.startswith("use a smaller base")


def test_a_plan_that_does_not_fit_is_told_what_would() -> None:
    ways = ["set hardware.precision to `4bit` (peak 9.0 GiB)", "set feedback.max_length to 512 (peak 20.1 GiB)"]
    assert memory_fits(plan(memory_gib=30.0, fits=False, would_fit=ways)).fix == "; or ".join(ways)
    assert memory_fits(plan(would_fit=ways)).fix == ""


def test_what_a_check_names_as_a_way_out_passes_it() -> None:
    pairs = DatasetStats(train_pairs=1000, eval_pairs=120, max_length=1024, longest_pair=2048, mean_pair=1024.0)

    def on_a_3060(**sections: Any) -> Verdict:
        device = Device("cuda", "GeForce RTX 3060 12 GB", 11.7, (8, 6))
        return memory_fits(make_plan(recipe(**sections), find_model("8b").shape, pairs, device))

    verdict = on_a_3060(hardware={"precision": "bf16"})
    assert verdict.level == "error"
    [precision] = re.findall(r"set hardware.precision to `(\w+)`", verdict.fix)
    assert on_a_3060(hardware={"precision": precision}).level == "pass"


# No check of the plan is true by construction: the planner lets what fails it through.

FAILING: dict[str, tuple[str, dict[str, Any]]] = {
    "learning_rate_band": ("error", {"dpo": {"learning_rate": 1e-3}}),
    "training_dose": ("error", {"dpo": {"learning_rate": 1e-4, "epochs": 3.0, "batch_size": 4}}),
    "dpo_rate_against_sft": ("error", {"dpo": {"learning_rate": 6e-5}, "sft": {"learning_rate": 6e-5}}),
    "beta_for_loss": ("error", {"dpo": {"beta": 0.0}}),
    "loss_supported": ("error", {"dpo": {"loss": "kto_pair"}}),
    "budget": ("warn", {"dpo": {"batch_size": 256}}),
    "schedule_and_precision": ("warn", {"dpo": {"warmup_ratio": 0.0}}),
    "lora_scale": ("warn", {"lora": {"rank": 16, "alpha": 64}}),
    "lora_coverage": ("warn", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
    "memory_fits": ("error", {"hardware": {"precision": "bf16"}}),
}


@pytest.mark.parametrize("check", [check.name for check in checks_of("dpo_plan") if check.name != "refresh_policy"])
def test_a_recipe_can_fail_each_check_of_the_plan(check: str) -> None:
    pairs = DatasetStats(train_pairs=1000, eval_pairs=120, max_length=1024, longest_pair=2048, mean_pair=1024.0)
    device = Device("cuda", "GeForce RTX 3060 12 GB", 11.7, (8, 6))

    def level(**sections: Any) -> str:
        made = make_plan(recipe(**sections), find_model("8b").shape, pairs, device)
        return next(v.level for v in plan_verdicts(made, BANDS) if v.check == check)

    expected, sections = FAILING[check]
    assert (level(), level(**sections)) == ("pass", expected)


def test_going_on_with_new_pairs_alone_is_warned_of_and_every_start_tells_its_generation() -> None:
    full = refresh_policy(plan())
    assert (full.level, full.value) == ("pass", "full, generation 1: all pairs")
    replay = refresh_policy(plan(refresh=Refresh(policy="replay", generation=2, new=8, sampled=8)))
    assert (replay.level, replay.value) == ("pass", "replay, generation 2: 8 new pairs and 8 earlier ones")
    alone = refresh_policy(plan(refresh=Refresh(policy="continue", generation=3, new=8)))
    assert (alone.level, alone.value) == ("warn", "continue, generation 3: 8 new pairs and 0 earlier ones")
    assert "2605.01130" in alone.source
    assert "`full`" in alone.fix


# The bands themselves


def test_the_bands_are_in_order_and_cover_every_size() -> None:
    bands = BANDS
    for method in ("lora", "full"):
        rows = [band for band in bands.learning_rates if band.method == method]
        assert [band.billions_below for band in rows] == sorted(band.billions_below for band in rows)
        assert math.isinf(rows[-1].billions_below)
        assert all(0 < band.ok_low < band.reference < band.ok_high < band.error_above for band in rows)
        assert [band.error_above for band in rows] == sorted((band.error_above for band in rows), reverse=True)
    for beta in bands.betas.values():
        assert 0 < beta.error_below < beta.ok_low < beta.usual < beta.ok_high
        assert beta.error_below < beta.weak_below < beta.usual
    assert 0 < bands.limit("training_dose").warn < bands.limit("training_dose").error
    against = bands.limit("dpo_rate_against_sft")
    assert 0 < against["ok"] <= against.warn < against.error
    assert bands.limit("displacement").warn < bands.limit("displacement").error
    assert bands.limit("fidelity").warn < bands.limit("fidelity").error


def test_every_number_names_its_source() -> None:
    bands = BANDS
    assert all(len(band.source) > 10 for band in bands.learning_rates)
    assert all(len(band.source) > 10 for band in bands.betas.values())
    assert all(len(limit.source) > 10 for limit in bands.limits.values())
    assert all(text for name, text in vars(losses).items() if name.endswith("_SOURCE"))
