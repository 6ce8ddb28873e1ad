"""What adds up, and a DPO rate beside that of SFT: a block needs a rate that is too high."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.config import verdicts
from dpo_assets.checks.configuration import Configuration, rate_ceilings
from dpo_assets.checks.rates import dpo_rate_against_sft, learning_rate_band, training_dose
from dpo_assets_tests.samples import plan

BANDS = default_bands()
USUAL = Configuration("lora", 8.0, ("sigmoid",), learning_rate=5e-6, beta=0.1, epochs=1.0, batch=16)
RATES = st.floats(1e-9, 1e-1)
METHODS = st.sampled_from(["lora", "full"])
SIZES = st.floats(0.001, 500.0)


def with_(**changes: Any) -> Configuration:
    return replace(USUAL, **changes)


# training_dose


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "pass"),
        # At the reference and below no number of epochs and no batch blocks.
        ({"learning_rate": 2e-5, "epochs": 8, "batch": 1}, "warn"),
        ({"learning_rate": 5e-6, "epochs": 3, "batch": 4}, "pass"),
        ({"learning_rate": 5e-6, "epochs": 3.1, "batch": 4}, "warn"),
        # Above it, what adds up does.
        ({"learning_rate": 5e-5, "epochs": 1, "batch": 16}, "pass"),
        ({"learning_rate": 5e-5, "epochs": 3, "batch": 16}, "warn"),
        ({"learning_rate": 5e-5, "epochs": 3, "batch": 10}, "warn"),
        ({"learning_rate": 5e-5, "epochs": 3, "batch": 9}, "error"),
        ({"learning_rate": 1e-4, "epochs": 1, "batch": 128}, "pass"),
        # A low beta is none of the causes: Adam takes its scale away.
        ({"learning_rate": 1.9e-5, "epochs": 4, "batch": 4, "beta": 0.01}, "warn"),
        ({"method": "full", "learning_rate": 5e-6, "epochs": 3, "batch": 16}, "error"),
    ],
)
def test_causes_add_up_and_block_only_above_the_reference(changes: dict[str, Any], level: str) -> None:
    verdict = training_dose(with_(**changes), BANDS)
    assert verdict.level == level
    assert bool(verdict.fix) == (level != "pass")


def test_the_causes_are_listed_with_their_sum() -> None:
    verdict = training_dose(with_(learning_rate=1e-4, epochs=3, batch=4), BANDS)
    assert verdict.value == pytest.approx(5 * 3 / 4)
    [table] = verdict.shown.values()
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == [
        "learning rate",
        "epochs",
        "batch",
        "together",
    ]
    assert "5 times its reference of 2e-05" in table
    assert "5 x the reference rate, 3 epochs, 4 pairs a step" in verdict.note


@pytest.mark.parametrize(
    "broken", [{"batch": 0}, {"epochs": math.nan}, {"learning_rate": math.inf}, {"batch": math.nan}]
)
def test_a_dose_that_is_no_number_is_an_error_with_a_way_out(broken: dict[str, float]) -> None:
    verdict = training_dose(with_(**broken), BANDS)
    assert verdict.level == "error"
    assert "positive numbers" in verdict.fix


def test_a_batch_that_is_not_known_is_not_judged() -> None:
    assert training_dose(with_(batch=None), BANDS).level == "pass"
    assert training_dose(with_(epochs=None), BANDS).level == "pass"


@given(rate=RATES, epochs=st.floats(0.01, 50), batch=st.integers(1, 1024), beta=st.sampled_from([0.01, 0.1]),
       method=METHODS, billions=SIZES)  # fmt: skip
def test_what_the_verdict_names_as_a_way_out_passes(
    rate: float, epochs: float, batch: int, beta: float, method: Any, billions: float
) -> None:
    run = with_(learning_rate=rate, epochs=epochs, batch=batch, beta=beta, method=method, billions=billions)
    fix = training_dose(run, BANDS).fix
    for way in fix.split(", or ") if fix else ():
        words = way.split(" ")
        if way.startswith("set dpo.learning_rate to"):
            mended = replace(run, learning_rate=float(words[3]))
        else:
            mended = replace(run, batch=float(words[3]))
            if "dpo.learning_rate" in way:
                mended = replace(mended, learning_rate=float(words[-1]))
        assert training_dose(mended, BANDS).level == "pass", way
        assert learning_rate_band(mended, BANDS).level in ("pass", learning_rate_band(run, BANDS).level)


@given(rate=RATES, epochs=st.floats(0.01, 50), batch=st.integers(1, 1024), beta=st.floats(1e-3, 2.0),
       method=METHODS, billions=SIZES, warmup=st.floats(0, 0.99), sft=st.floats(1e-9, 1.0))  # fmt: skip
def test_at_a_usual_rate_and_a_beta_of_the_right_unit_nothing_blocks(
    rate: float, epochs: float, batch: int, beta: float, method: Any, billions: float, warmup: float, sft: float
) -> None:
    run = with_(learning_rate=rate, epochs=epochs, batch=batch, beta=beta, method=method, billions=billions,
                warmup=warmup, precision="fp16", max_grad_norm=100.0, steps=1, sft_learning_rate=sft)  # fmt: skip
    if rate <= rate_ceilings(run, BANDS).band.reference:
        assert [v.check for v in verdicts(run, BANDS) if v.level == "error"] == []


@given(rate=RATES, epochs=st.floats(0.01, 50), batch=st.integers(1, 1024))
def test_a_higher_rate_is_never_judged_more_mildly(rate: float, epochs: float, batch: int) -> None:
    order = ("pass", "warn", "error")
    low = training_dose(with_(learning_rate=rate, epochs=epochs, batch=batch), BANDS)
    high = training_dose(with_(learning_rate=2 * rate, epochs=epochs, batch=batch), BANDS)
    assert order.index(high.level) >= order.index(low.level)


@given(rate=RATES, epochs=st.floats(0.01, 50), batch=st.integers(1, 1024), beta=st.floats(1e-5, 100.0),
       method=METHODS, billions=st.none() | SIZES, sft=st.floats(1e-9, 1.0))  # fmt: skip
def test_no_flag_advises_a_higher_rate(
    rate: float, epochs: float, batch: int, beta: float, method: Any, billions: float | None, sft: float
) -> None:
    run = with_(learning_rate=rate, epochs=epochs, batch=batch, beta=beta, method=method, billions=billions,
                sft_learning_rate=sft)  # fmt: skip
    for verdict in verdicts(run, BANDS):
        assert "raise dpo.learning_rate" not in verdict.fix
        for advised in re.findall(r"set dpo.learning_rate to (\S+) or less", verdict.fix):
            assert verdict.check != "learning_rate_band" or float(advised) < rate


# dpo_rate_against_sft


@pytest.mark.parametrize(
    ("rate", "sft", "level"),
    [
        (5e-6, 2e-4, "pass"),
        (2e-5, 2e-4, "pass"),
        (3.9e-5, 2e-4, "pass"),
        (4.1e-5, 2e-4, "warn"),
        (9.9e-5, 2e-4, "warn"),
        (1e-4, 2e-4, "error"),
        (2e-4, 2e-4, "error"),
        # A usual DPO rate: SFT's is low, which does no harm.
        (5e-6, 1e-5, "pass"),
        (2e-5, 2e-5, "pass"),
        (2.1e-5, 2e-5, "error"),
    ],
)
def test_a_rate_copied_from_sft_blocks_unless_it_is_right_for_dpo(rate: float, sft: float, level: str) -> None:
    verdict = dpo_rate_against_sft(with_(learning_rate=rate, sft_learning_rate=sft), BANDS)
    assert verdict.level == level
    assert bool(verdict.fix) == (level != "pass")
    assert ("it is SFT's that is low" in verdict.note) == (rate / sft > 0.2 and level == "pass")


def test_a_model_whose_sft_is_adopted_has_no_rate_to_compare_with() -> None:
    adopted = Configuration.of_plan(plan(sft={"strategy": "adopt"}, dpo={"learning_rate": 6e-5}))
    trained = Configuration.of_plan(plan(sft={"learning_rate": 2e-4}, dpo={"learning_rate": 6e-5}))
    assert adopted.sft_learning_rate is None
    assert dpo_rate_against_sft(adopted, BANDS).level == "pass"
    assert dpo_rate_against_sft(trained, BANDS).level == "warn"


def test_no_sft_rate_that_is_no_number_passes() -> None:
    assert dpo_rate_against_sft(with_(sft_learning_rate=0.0), BANDS).level == "error"
    assert dpo_rate_against_sft(with_(learning_rate=math.nan, sft_learning_rate=1e-4), BANDS).level == "error"
