"""Checks of the plan: each number of the bands has a value on either side of it."""

from __future__ import annotations

import math
import re
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
from dpo_assets.checks.verdict import Verdict
from dpo_assets.planning.plan import DatasetStats, make_plan
from dpo_assets.planning.precision import Device
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
        (SMALL, 9.9e-7, "warn"),
        (SMALL, 1e-6, "pass"),
        (SMALL, 5e-5, "pass"),
        (SMALL, 5.1e-5, "warn"),
        (SMALL, 2e-4, "warn"),
        (SMALL, 2.1e-4, "error"),
        (LARGE, 1e-6, "pass"),
        (LARGE, 2e-5, "pass"),
        (LARGE, 2.1e-5, "warn"),
        (LARGE, 1e-4, "warn"),
        (LARGE, 1.1e-4, "error"),
        (LARGE, 5e-3, "error"),
        # One billion belongs to the larger models.
        (10**9 - 1, 5e-5, "pass"),
        (10**9, 5e-5, "warn"),
    ],
)
def test_the_learning_rate_is_judged_by_the_size_of_the_model(parameters: int, rate: float, level: str) -> None:
    assert learning_rate_band(of(parameters=parameters, dpo={"learning_rate": rate}), BANDS).level == level


@pytest.mark.parametrize("much", [{"epochs": 9.0}, {"batch_size": 1}], ids=repr)
def test_epochs_and_batch_do_not_move_the_band_of_the_learning_rate(much: dict[str, Any]) -> None:
    for rate, level in ((5e-5, "pass"), (6e-5, "warn"), (2.1e-4, "error")):
        assert learning_rate_band(of(dpo={"learning_rate": rate, **much}), BANDS).level == level


def test_a_low_beta_lowers_the_ok_ceiling_and_blocks_nothing() -> None:
    def level(rate: float, **dpo: Any) -> str:
        return learning_rate_band(of(dpo={"learning_rate": rate, **dpo}), BANDS).level

    assert level(4e-5, beta=0.05) == "pass"
    assert level(4e-5, beta=0.049) == "warn"
    assert level(3e-5, beta=0.049) == "pass"
    assert (level(2e-4, beta=0.049), level(2.1e-4, beta=0.049)) == ("warn", "error")
    # cDPO and the mixture have the unit of sigmoid; in IPO's, 0.049 is nothing low.
    for loss in ("cdpo", ["ipo", "robust"]):
        assert level(4e-5, beta=0.049, loss=loss) == "warn"
    assert level(4e-5, beta=0.049, loss="ipo") == "pass"
    assert "beta is below 0.05" in learning_rate_band(of(dpo={"beta": 0.01}), BANDS).note


def test_a_likelihood_term_of_enough_weight_raises_both_ceilings() -> None:
    def level(rate: float, weight: float) -> str:
        dpo = {"learning_rate": rate, "loss": ["sigmoid", "sft"], "loss_weights": [2.0, 2.0 * weight]}
        return learning_rate_band(of(dpo=dpo), BANDS).level

    assert (level(9e-5, 0.09), level(9e-5, 0.1)) == ("warn", "pass")
    assert (level(3e-4, 0.09), level(3e-4, 0.1), level(4.1e-4, 1.0)) == ("error", "warn", "error")


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
def test_a_learning_rate_that_is_no_number_is_an_error(rate: float) -> None:
    assert learning_rate_band(unchecked(learning_rate=rate), BANDS).level == "error"


def test_a_learning_rate_too_high_is_told_the_highest_one_in_the_band() -> None:
    verdict = learning_rate_band(of(dpo={"learning_rate": 1e-2}), BANDS)
    assert "set dpo.learning_rate to 5e-05 or less" in verdict.fix
    assert "1e-06 to 5e-05, blocked above 0.0002" in verdict.band
    assert "model under 1B" in verdict.band


def test_a_learning_rate_too_low_is_told_to_rise() -> None:
    verdict = learning_rate_band(of(dpo={"learning_rate": 1e-9}), BANDS)
    assert verdict.level == "warn"
    assert "or less" not in verdict.fix
    assert "1e-06" in verdict.fix


# beta_for_loss


@pytest.mark.parametrize(
    ("loss", "beta", "level"),
    [
        ("sigmoid", 0.0, "error"),
        ("sigmoid", 0.00009, "error"),
        ("sigmoid", 0.0001, "warn"),
        ("sigmoid", 0.0099, "warn"),
        ("sigmoid", 0.01, "pass"),
        ("sigmoid", 0.5, "pass"),
        ("sigmoid", 0.51, "warn"),
        ("sigmoid", 2.0, "warn"),
        ("sigmoid", 3.01, "error"),
        ("simpo", 0.1, "error"),
        ("simpo", 2.0, "pass"),
        ("kto", 0.1, "pass"),
        ("kto", 5.0, "error"),
        ("ipo", 1.0, "pass"),
        ("ipo", 5.0, "warn"),
        ("ipo", 5.1, "error"),
        ("sigmoid_norm", 0.1, "error"),
        ("sigmoid_norm", 0.5, "warn"),
        ("sigmoid_norm", 5.0, "pass"),
        ("sigmoid_norm", 20.1, "error"),
        ("sppo_hard", 0.00019, "error"),
        ("sppo_hard", 0.0002, "warn"),
        ("sppo_hard", 0.001, "pass"),
        ("sppo_hard", 0.2, "warn"),
        ("bco_pair", 0.1, "pass"),
        ("bco_pair", 0.005, "warn"),
        ("nothing", 0.1, "warn"),
    ],
)
def test_beta_is_judged_in_the_unit_of_its_loss(loss: str, beta: float, level: str) -> None:
    verdict = beta_for_loss(of(dpo={"loss": loss, "beta": beta}), BANDS)
    assert (verdict.level, verdict.value) == (level, beta)
    assert bool(verdict.fix) == (level != "pass")


@pytest.mark.parametrize("beta", [math.nan, math.inf, -0.1])
def test_a_beta_that_is_no_strength_is_an_error(beta: float) -> None:
    assert beta_for_loss(unchecked(beta=beta), BANDS).level == "error"


def test_several_losses_share_one_beta_and_the_worst_verdict_counts() -> None:
    def verdict(*losses: str, beta: float) -> Verdict:
        return beta_for_loss(of(dpo={"loss": list(losses), "beta": beta}), BANDS)

    assert verdict("sigmoid", "ipo", beta=0.5).level == "pass"
    assert verdict("sigmoid", "ipo", beta=0.8).level == "warn"
    assert "loss sigmoid" in verdict("ipo", "sigmoid", beta=0.8).band
    assert verdict("ipo", "sigmoid", beta=0.8).fix == "set dpo.beta between 0.01 and 0.5"
    assert verdict("sigmoid", "nothing", beta=0.1).level == "warn"
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
        ({"batch_size": 16, "epochs": 1.0}, 30, "pass", ""),
        ({"batch_size": 8, "epochs": 3.0}, 30, "pass", ""),
        ({"batch_size": 7}, 30, "warn", "raise dpo.batch_size to 8 or more"),
        ({"batch_size": 1}, 30, "warn", "raise dpo.batch_size"),
        ({"epochs": 3.1}, 30, "warn", "lower dpo.epochs to 3 or less"),
        ({"epochs": 50.0}, 30, "warn", "lower dpo.epochs"),
        ({}, 29, "warn", "collect more pairs: 29 steps"),
        ({}, 1, "warn", "collect more pairs: 1 steps"),
    ],
)
def test_batch_epochs_and_steps_each_have_their_limits_and_never_block(
    dpo: dict[str, Any], steps: int, level: str, fix: str
) -> None:
    verdict = budget(of(dpo=dpo, dpo_steps=steps), BANDS)
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")
    assert fix in verdict.fix


def test_every_fault_of_a_budget_is_told() -> None:
    verdict = budget(of(dpo={"batch_size": 2, "epochs": 4.0}, dpo_steps=5), BANDS)
    assert [part.split(" ")[0] for part in verdict.fix.split("; ")] == ["raise", "lower", "collect"]


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


# The bands themselves


def test_the_bands_are_in_order_and_cover_every_size() -> None:
    bands = BANDS
    for method in ("lora", "full"):
        rows = [band for band in bands.learning_rates if band.method == method]
        assert [band.billions_below for band in rows] == sorted(band.billions_below for band in rows)
        assert math.isinf(rows[-1].billions_below)
        assert all(0 < band.ok_low < band.ok_high < band.error_above for band in rows)
        assert [band.error_above for band in rows] == sorted((band.error_above for band in rows), reverse=True)
    for beta in bands.betas.values():
        assert 0 < beta.error_below < beta.ok_low < beta.ok_high < beta.error_above
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
