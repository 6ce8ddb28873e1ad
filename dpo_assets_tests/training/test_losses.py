"""The DPO family by itself: formulas, gradients, steps cut into forwards, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_assets.checks.bands import first_loss_tolerance
from dpo_assets.checks.losses import LOSSES
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import DpoSection, FDivergence
from dpo_assets.training.trainers.losses import DpoLoss, PairScores, divergence_score

DIVERGENCES: tuple[FDivergence, ...] = get_args(FDivergence)
LN2 = math.log(2)
ALL = [
    *[DpoLoss((name,), label_smoothing=0.0 if facts.smoothing == "ignored" else 0.1) for name, facts in LOSSES.items()],
    DpoLoss(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    DpoLoss(("aot", "cdpo", "sft"), label_smoothing=0.3),
    *[DpoLoss(("cdpo", "ipo", "exo_pair"), label_smoothing=0.2, f_divergence=divergence) for divergence in DIVERGENCES],
]
STEP = 1e-3  # Of the finite differences, in nats.


def named(loss: DpoLoss) -> str:
    return f"{'+'.join(loss.names)} {loss.f_divergence}"


def pairs_of(chosen: list[float], rejected: list[float], ref_chosen: list[float] | float = 0.0) -> PairScores:
    """Pairs in float64, with answers of different lengths and rejected answers that the reference gives -20 nats."""
    n = len(chosen)
    lengths = torch.arange(1, n + 1)
    return PairScores(
        torch.tensor(chosen, dtype=torch.float64),
        torch.tensor(rejected, dtype=torch.float64),
        torch.as_tensor(ref_chosen, dtype=torch.float64).expand(n),
        torch.full((n,), -20.0, dtype=torch.float64),
        3 * lengths,
        5 + lengths,
    )


logps = st.floats(-60, 0, allow_nan=False)


@st.composite
def batches(draw: st.DrawFn) -> PairScores:
    n = draw(st.integers(1, 5))
    columns = [draw(st.lists(logps, min_size=n, max_size=n)) for _ in range(3)]
    return pairs_of(*columns)


def far_from_kinks(scores: PairScores, loss: DpoLoss) -> bool:
    """Finite differences mean nothing across a corner: ties of the sorted values, and the end of the hinge."""
    r_chosen, r_rejected = scores.chosen - scores.ref_chosen, scores.rejected - scores.ref_rejected
    sorted_values = (scores.chosen - scores.rejected, scores.ref_chosen - scores.ref_rejected, r_chosen, r_rejected)
    gaps = [values.sort().values.diff() for values in sorted_values]
    apart = all(bool((gap > 4 * STEP).all()) for gap in (gaps if loss.coupled else []))
    return apart and bool(((r_chosen - r_rejected - 1 / loss.beta).abs() > 4 * STEP).all())


def by_differences(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Central differences of fourth order."""
    slopes = []
    for n in range(len(at)):
        unit = torch.zeros_like(at)
        unit[n] = STEP
        near, far = of(at + unit) - of(at - unit), of(at + 2 * unit) - of(at - 2 * unit)
        slopes.append((8 * near - far) / (12 * STEP))
    return torch.stack(slopes)


@pytest.mark.parametrize("loss", ALL, ids=named)
@given(scores=batches())
@settings(max_examples=25, deadline=None)
def test_gradients_equal_finite_differences(loss: DpoLoss, scores: PairScores) -> None:
    assume(far_from_kinks(scores, loss))
    value, by_chosen, by_rejected = loss.gradient(scores)
    assert value == loss.of_batch(scores)
    expected = (
        by_differences(lambda x: loss.of_batch(replace(scores, chosen=x)), scores.chosen),
        by_differences(lambda x: loss.of_batch(replace(scores, rejected=x)), scores.rejected),
    )
    # Forward KL grows as exp of the log-ratio: the rounding of the differences is relative to the value itself.
    size = float(max(1.0, value.abs()))
    torch.testing.assert_close((by_chosen, by_rejected), expected, rtol=1e-6, atol=1e-8 * size)


# Conservative DPO


@given(scores=batches(), eps=st.floats(0, 0.49), beta=st.floats(0.01, 1))
@settings(deadline=None)
def test_cdpo_is_the_mean_of_sigmoid_and_of_sigmoid_with_the_labels_exchanged(
    scores: PairScores, eps: float, beta: float
) -> None:
    """A note on DPO with noisy preferences (Mitchell, 2023): a share eps of the labels is the other way round."""
    exchanged = PairScores(
        scores.rejected,
        scores.chosen,
        scores.ref_rejected,
        scores.ref_chosen,
        scores.rejected_tokens,
        scores.chosen_tokens,
    )
    sigmoid = DpoLoss(("sigmoid",), beta=beta)
    expected = (1 - eps) * sigmoid.per_pair(scores) + eps * sigmoid.per_pair(exchanged)
    ours = DpoLoss(("cdpo",), beta=beta, label_smoothing=eps).per_pair(scores)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_cdpo_stops_where_the_policy_is_as_sure_as_the_labels_are() -> None:
    eps, beta = 0.1, 0.25
    loss = DpoLoss(("cdpo",), beta=beta, label_smoothing=eps)
    goal = math.log((1 - eps) / eps) / beta

    def slope(margin: float) -> float:
        return float(loss.gradient(pairs_of([margin], [-20.0]))[1][0])

    assert slope(goal) == pytest.approx(0, abs=1e-12)
    assert slope(goal - 1) < 0 < slope(goal + 1)


def test_label_smoothing_moves_every_loss_that_takes_it_and_no_other() -> None:
    scores = pairs_of([-3.0, -40.0, -7.0], [-30.0, -4.0, -8.0], [-9.0, -20.0, -11.0])
    for name, facts in LOSSES.items():
        values = [DpoLoss((name,), label_smoothing=eps).of_batch(scores) for eps in (0.1, 0.3)]
        assert bool(values[0] != values[1]) == (facts.smoothing != "ignored"), name


# The loss at zero margin


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DpoLoss(), LN2),
        (DpoLoss(("cdpo",), label_smoothing=0.3), LN2),
        (DpoLoss(("robust",), label_smoothing=0.3), LN2),
        (DpoLoss(("hinge",)), 1.0),
        (DpoLoss(("ipo",), beta=0.1), 25.0),
        (DpoLoss(("exo_pair",), label_smoothing=0.25), math.log(0.5) - math.log(0.1875) / 2),
        (DpoLoss(("nca_pair",)), 2 * LN2),
        (DpoLoss(("bco_pair",)), 2 * LN2),
        (DpoLoss(("sppo_hard",), beta=0.1), 50.0),
        (DpoLoss(("sppo_hard",), beta=0.001), 5e5),
        (DpoLoss(("aot",), label_smoothing=0.2), LN2),
        (DpoLoss(("aot_unpaired",), label_smoothing=0.2), LN2),
        (DpoLoss(("apo_zero",)), 1.0),
        (DpoLoss(("apo_down",)), 1.0),
        (DpoLoss(("discopop",)), (LN2 + 1) / 2),
        (DpoLoss(("sigmoid_norm",)), LN2),
        (DpoLoss(("sigmoid", "ipo"), (0.5, 2.0)), LN2 / 2 + 50.0),
        (DpoLoss(("hinge",), f_divergence="js_divergence"), 1.0),
        (DpoLoss(("sigmoid",), f_divergence="forward_kl"), LN2),
        (DpoLoss(("sigmoid",), f_divergence="alpha_divergence", alpha=0.3), LN2),
    ],
    ids=lambda value: named(value) if isinstance(value, DpoLoss) else f"{value:.4g}",
)
def test_the_loss_at_zero_margin(loss: DpoLoss, expected: float) -> None:
    assert loss.at_zero_margin() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ALL, ids=named)
def test_any_batch_with_the_policy_at_the_reference_has_the_loss_at_zero_margin(loss: DpoLoss) -> None:
    scores = pairs_of([-3.0, -40.0, -7.0], [-30.0, -4.0, -8.0], [-9.0, -20.0, -11.0])
    value = float(loss.of_batch(scores.at_reference()))
    if "sft" not in loss.names:
        assert value == pytest.approx(loss.at_zero_margin(), rel=1e-12)
        assert value != pytest.approx(float(loss.of_batch(scores)), rel=1e-3)
        return
    assert loss.at_zero_margin() is None
    [weight] = [w for name, w in zip(loss.names, loss.weights or (1.0,) * 9, strict=False) if name == "sft"]
    others = [(n, w) for n, w in zip(loss.names, loss.weights or (1.0,) * 9, strict=False) if n != "sft"]
    rest = replace(loss, names=tuple(n for n, _ in others), weights=tuple(w for _, w in others)) if others else None
    nll = (9 + 20 + 11) / float(scores.chosen_tokens.sum())
    assert value == pytest.approx((rest.at_zero_margin() or 0.0 if rest else 0.0) + weight * nll, rel=1e-12)


def test_the_tolerance_of_the_first_loss_grows_with_its_value_and_never_falls_below_that_of_sigmoid() -> None:
    assert first_loss_tolerance(LN2) == first_loss_tolerance(1.0) == 5e-4
    assert first_loss_tolerance(25.0) == pytest.approx(0.0125)


def test_in_16_bit_the_tolerance_grows_with_the_tokens_of_the_answers() -> None:
    assert first_loss_tolerance(LN2, 670.0) == first_loss_tolerance(LN2, 1000.0) == 5e-4
    # The first losses of one H100 run at 6,300 and 12,600 tokens a pair lay off by this much.
    assert 1.2e-3 < first_loss_tolerance(LN2, 6_300.0) < 4e-3
    assert 1.5e-3 < first_loss_tolerance(LN2, 12_600.0) < 8e-3


# Steps


@pytest.mark.parametrize("loss", ALL, ids=named)
def test_the_gradient_by_the_scores_gives_the_gradient_by_the_weights_of_a_step_cut_into_forwards(
    loss: DpoLoss,
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()

    def scored(rows: slice) -> PairScores:
        chosen, rejected = 8 * torch.tanh(inputs[:, rows] @ weight) - 30
        whole = pairs_of([0.0] * 6, [0.0] * 6, [-25.0, -31.0, -36.0, -22.0, -27.0, -33.0])
        return replace(PairScores(*(v[rows] for v in vars(whole).values())), chosen=chosen, rejected=rejected)

    [whole] = torch.autograd.grad(loss.of_batch(scored(slice(0, 6))), weight)
    with torch.no_grad():
        first = scored(slice(0, 6))
    _, by_chosen, by_rejected = loss.gradient(first)
    cut = torch.zeros_like(whole)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = scored(rows)
        surrogate = (by_chosen[rows] * part.chosen + by_rejected[rows] * part.rejected).sum()
        cut += torch.autograd.grad(surrogate, weight)[0]
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ALL, ids=named)
def test_scoring_a_step_twice_changes_nothing(loss: DpoLoss) -> None:
    scores = pairs_of([-3.0, -40.0, -7.0], [-30.0, -4.0, -8.0], [-9.0, -20.0, -11.0])
    assert loss.of_batch(scores) == loss.of_batch(scores) == loss.gradient(scores)[0]


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_coupled_loss_of_parts_is_not_that_of_the_step_and_is_refused_per_pair(name: str) -> None:
    loss = DpoLoss((name,))
    scores = pairs_of([-49.0, -48.0, -45.0, -44.0], [-10.0, -9.0, -19.0, -18.0], [-50.0, -50.0, -55.0, -55.0])
    halves = [PairScores(*(v[part] for v in vars(scores).values())) for part in (slice(0, 2), slice(2, 4))]
    assert sum(float(loss.of_batch(half)) for half in halves) / 2 != pytest.approx(float(loss.of_batch(scores)))
    assert loss.coupled
    assert DpoLoss(("sigmoid", name)).coupled
    with pytest.raises(ValueError, match=f"sigmoid \\+ {name} couples the pairs of a step: use of_batch"):
        DpoLoss(("sigmoid", name)).per_pair(scores)


def test_only_the_losses_that_sort_over_the_step_are_coupled() -> None:
    assert [name for name in LOSSES if DpoLoss((name,)).coupled] == ["aot", "aot_unpaired"]


def test_an_sft_term_without_the_tokens_of_the_step_is_refused() -> None:
    loss = DpoLoss(("sigmoid", "sft"))
    assert loss.needs_step_tokens
    assert not DpoLoss().needs_step_tokens
    with pytest.raises(ValueError, match="give mean_chosen_tokens"):
        loss.per_pair(pairs_of([-1.0], [-2.0]))


def test_the_order_of_the_pairs_does_not_matter() -> None:
    scores = pairs_of([-3.0, -40.0, -7.0], [-30.0, -4.0, -8.0], [-9.0, -20.0, -11.0])
    turned = PairScores(*(values.flip(0) for values in vars(scores).values()))
    for loss in ALL:
        assert float(loss.of_batch(turned)) == pytest.approx(float(loss.of_batch(scores)), rel=1e-12)


# Divergences


@given(ratio=st.floats(-30, 30), alpha=st.floats(0, 1))
def test_a_divergence_score_is_zero_at_the_reference_and_rises_with_the_log_ratio(ratio: float, alpha: float) -> None:
    x = torch.tensor([0.0, ratio, ratio + 0.5], dtype=torch.float64)
    for divergence in DIVERGENCES:
        at_zero, low, high = divergence_score(x, divergence, alpha).tolist()
        assert at_zero == pytest.approx(0, abs=1e-15)
        assert low < high


@given(ratio=st.floats(-20, 20))
def test_the_alpha_divergence_ends_in_forward_and_in_reverse_kl(ratio: float) -> None:
    x = torch.tensor([ratio], dtype=torch.float64)
    ends: list[tuple[float, FDivergence]] = [(0.0, "forward_kl"), (1.0, "reverse_kl"), (1 - 1e-9, "reverse_kl")]
    for alpha, same in ends:
        torch.testing.assert_close(divergence_score(x, "alpha_divergence", alpha), divergence_score(x, same, alpha))


def test_an_answer_that_became_impossible_gives_a_finite_alpha_score() -> None:
    assert divergence_score(torch.tensor([-1000.0]), "alpha_divergence", 0.5).isfinite().all()


@pytest.mark.parametrize("name", [name for name, facts in LOSSES.items() if not facts.coupled and name != "sft"])
def test_margins_far_beyond_training_give_numbers(name: str) -> None:
    loss = DpoLoss((name,), label_smoothing=0.1)
    value, *gradients = loss.gradient(
        PairScores(
            *(values.float() for values in vars(pairs_of([-5000.0, -1.0, -5000.0], [-1.0, -5000.0, -1.0])).values())
        )
    )
    finite = [bool(part.isfinite().all()) for part in (value, *gradients)]
    # exp(-beta m) itself is beyond float32 at beta m = -500.
    assert all(finite) if name != "discopop" else not value.isnan()


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": ("sigmoyd",)}, r"there is no loss \['sigmoyd'\]; losses: sigmoid, "),
        ({"names": ()}, "there is no loss"),
        ({"names": ("sigmoid", "sft"), "weights": (1.0,)}, "2 losses need as many weights, not 1"),
        ({"names": ("ipo",), "beta": 0.0}, "beta must be above 0"),
        ({"names": ("sigmoid", "sppo_hard"), "beta": 0.0}, "beta must be above 0"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DpoLoss(**values)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"loss": "kto_pair"}, "KTOTrainer"),
        ({"loss": "sigmoyd"}, "did you mean sigmoid?"),
        ({"label_smoothing": 0.1}, "set dpo.loss to cdpo"),
        ({"loss": "aot", "f_divergence": "js_divergence"}, "set dpo.f_divergence to reverse_kl"),
    ],
)
def test_a_recipe_that_no_check_has_seen_is_refused_with_the_words_of_the_check(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DpoLoss.of(DpoSection(**section))


def test_a_recipe_becomes_its_loss() -> None:
    section = DpoSection(
        loss=["discopop", "cdpo"],
        loss_weights=[0.5, 2],
        beta=0.2,
        label_smoothing=0.05,
        f_divergence="alpha_divergence",
        alpha=0.7,
        discopop_tau=0.1,
    )
    assert DpoLoss.of(section) == DpoLoss(
        ("discopop", "cdpo"), (0.5, 2.0), 0.2, 0.05, "alpha_divergence", 0.7, discopop_tau=0.1
    )
    assert DpoLoss.of(DpoSection()) == DpoLoss()
