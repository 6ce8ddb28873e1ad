"""How the bands follow from published cases, so that they can be derived again without any one source.

Five statistics are read off the good cases, each source with one voice, whatever its number of rows. A rate counts in
units of the reference of its method and size (`Procedure`), so that models of every size tell of one number.

- reference: the median, over sources, of the highest good rate;
- ceiling of a method: the upper decile of the same, over the sources of that method alone;
- likelihood term: the lowest, over sources, of the highest good rate of full fine-tuning with such a term;
- dose: the upper quartile, over sources, of the highest `training_dose`;
- beta: the median, over sources, of the median beta of each unit.

A median is where half of the good sources lie above, so no warning starts there. `Procedure` holds what is set by hand,
with the shipped cases in view, the bad ones too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.collapse.published import Case
from dpo_assets.checks.bands import Bands, BetaBand, LearningRateBand, Limit, Method
from dpo_assets.checks.configuration import Configuration, has_likelihood_term, rate_ceilings, significant

# Losses whose beta scales the log-ratio of a whole answer, and those where it scales one per token. `ipo`, where it
# sets the gap aimed at, and `sppo_hard` stand in no case: their bands rest on papers.
WHOLE_ANSWER = (
    "sigmoid", "cdpo", "robust", "hinge", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down", "discopop", "aot",
    "aot_unpaired", "kto", "orpo", "cpo",
)  # fmt: skip
PER_TOKEN = ("sigmoid_norm", "simpo")
METHODS: tuple[Method, ...] = ("lora", "full")


@dataclass(frozen=True)
class Procedure:
    """What is set by hand, each with its reason.

    lora: TRL's documentation and "LoRA Without Regret" name ten; twice that is taken, since good LoRA runs are known up
    to 5e-5 (NeuralHermes) and 1e-4 (neural-chat). small: OLMo 2 trains 1B at 5 times the rate of 7B, NeMo-RL 1B at 10
    times that of 8B; less is taken. large: Tulu 3 trains 70B at 0.4 times the rate of 8B. warned: the decile. blocked:
    full fine-tuning is known as good at 5e-6 (NeMo-RL, 1B), and as incoherent at 1e-5 (SimPO); there is a warning from
    half of that on at the latest. undertrained: handbook 39 and 68, LoRA at 5e-7. dose_warned: above 1.67 times the
    quartile, the highest good run whose epochs and batch are known (Mistral-ORPO). dose_blocked: between 6.6 times
    (neural-chat, good, epochs and batch guessed) and 8.3 times (LLaMA-Factory 2984, gibberish).
    """

    lora: float = 20
    small: float = 2.5
    large: float = 0.5
    warned: float = 0.9
    blocked: float = 5
    undertrained: float = 20
    dose_warned: float = 2
    dose_blocked: float = 8
    # error_below, ok_low, weak_below, ok_high over the usual beta. Whole answers: good ones from 0.005 (SimPO 23, the
    # best of a sweep) to 0.6 (HF preference-tuning post, the best of another, which goes to 0.9); only 0 is known to be
    # dead (TRL 1627). Per token: SimPO 2 to 10, Tulu 3 and OLMo 5.
    whole_answer: tuple[float, float, float, float] = (0.001, 0.05, 0.5, 10)
    per_token: tuple[float, float, float, float] = (0.1, 0.4, 0.5, 2)


BY_HAND = Procedure()


def derive(cases: Iterable[Case], shipped: Bands, procedure: Procedure = BY_HAND) -> Bands:
    """The bands that the good ones of `cases` give. What no case decides is taken from `shipped`."""
    good = [case for case in cases if case.label == "good"]
    # In units of these bands, whose reference for full fine-tuning of 3 to 20B is 1.
    units = with_limit(_with_rates(shipped, procedure, 1.0), "sft_term", factor=1.0)
    free = [case for case in good if not has_likelihood_term(case.configuration, shipped)]
    reference = significant(median(_highest(free, units).values()))
    held = _highest([case for case in good if case not in free and case.configuration.method == "full"], units)
    factor = float(math.floor(min(held.values()) / reference)) if held else shipped.limit("sft_term")["factor"]
    bands = with_limit(_with_rates(shipped, procedure, reference), "sft_term", factor=factor)
    times = {
        method: _upper(_highest(own, bands), procedure.warned)
        for method in METHODS
        if (own := [case for case in good if case.configuration.method == method])
    }
    bands = replace(bands, learning_rates=_with_rates(shipped, procedure, reference, times).learning_rates)
    quartile = _upper(_of_sources(good, lambda case: _dose(case.configuration, bands)), 0.75)
    bands = with_limit(
        bands,
        "training_dose",
        warn=significant(procedure.dose_warned * quartile, 4),
        error=significant(procedure.dose_blocked * quartile, 4),
    )
    betas = dict(shipped.betas)
    for names, spread in ((WHOLE_ANSWER, procedure.whole_answer), (PER_TOKEN, procedure.per_token)):
        betas |= _betas(good, names, spread, shipped)
    return replace(bands, betas=betas)


def _with_rates(
    bands: Bands, procedure: Procedure, reference: float, times: Mapping[Method, float] | None = None
) -> Bands:
    """Rows whose reference is `reference` for full fine-tuning of 3 to 20B, and the ok ceiling `times` as high."""

    def times_of(row: LearningRateBand) -> float:
        return (times or {}).get(row.method, row.ok_high / row.reference)

    rows = tuple(_row(row, procedure, reference, times_of(row)) for row in bands.learning_rates)
    return replace(bands, learning_rates=rows)


def _row(row: LearningRateBand, procedure: Procedure, rate: float, times: float) -> LearningRateBand:
    method = procedure.lora if row.method == "lora" else 1.0
    smallest, largest = row.billions_below <= 3, row.method == "full" and math.isinf(row.billions_below)
    reference = rate * method * (procedure.small if smallest else procedure.large if largest else 1.0)
    error_above = round_down(procedure.blocked * reference)
    return replace(
        row,
        ok_low=significant(rate * method / procedure.undertrained),
        reference=significant(reference),
        ok_high=round_down(min(times * reference, error_above / 2)),
        error_above=error_above,
    )


def round_down(value: float) -> float:
    """To 1, 2 or 5 times a power of ten: more digits would claim more than is known.

    >>> round_down(2.5e-4), round_down(1e-4)
    (0.0002, 0.0001)
    """
    power = 10.0 ** math.floor(math.log10(significant(value)))
    return significant(max(step for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)) * power)


def with_limit(bands: Bands, check: str, **numbers: float) -> Bands:
    """The bands with other numbers of one check."""
    limit = bands.limit(check)
    return replace(bands, limits={**bands.limits, check: Limit({**limit.numbers, **numbers}, limit.source)})


def _relative(configuration: Configuration, bands: Bands) -> float:
    return configuration.learning_rate / rate_ceilings(configuration, bands).band.reference


def _dose(configuration: Configuration, bands: Bands) -> float:
    updates = configuration.updates_per_pair
    return 0.0 if updates is None else _relative(configuration, bands) * updates


def _highest(cases: Sequence[Case], bands: Bands) -> Mapping[str, float]:
    """Of each source its highest rate, in units of the reference of the run's method, size and losses."""
    return _of_sources(cases, lambda case: _relative(case.configuration, bands))


def _of_sources(cases: Sequence[Case], value: Callable[[Case], float]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for case in cases:
        found[case.project] = max(found.get(case.project, -math.inf), value(case))
    return found


def _upper(values: Mapping[str, float], share: float) -> float:
    """The value that `share` of the sources do not exceed, between two of them by a straight line."""
    ordered = sorted(values.values())
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _betas(
    good: Sequence[Case], names: Sequence[str], spread: tuple[float, float, float, float], shipped: Bands
) -> dict[str, BetaBand]:
    by_source: dict[str, list[float]] = defaultdict(list)
    for case in good:
        beta = case.configuration.beta
        if beta is not None and set(names) & set(case.configuration.losses):
            by_source[case.project].append(beta)
    if not by_source:
        return {name: shipped.betas[name] for name in names}
    usual = median(median(betas) for betas in by_source.values())
    error_below, ok_low, weak_below, ok_high = (significant(usual * factor, 3) for factor in spread)
    return {
        name: BetaBand(error_below, ok_low, weak_below, usual, ok_high, shipped.betas[name].source) for name in names
    }
