"""How the bands follow from published cases, so that they can be derived again without any one source.

Four statistics are read off the good cases, each source with one voice, whatever its number of rows:

- rate: the median, over sources, of the highest learning rate, brought to full fine-tuning of 3 to 20B;
- low beta: the same of rates at a beta below 0.05, over that rate;
- dose: the upper quartile, over sources, of the highest `training_dose`;
- beta: the median, over sources, of the median beta of each unit.

`Procedure` holds what is set by hand, with all cases in view, the bad ones too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles

from benchmarks.collapse.published import Case
from dpo_assets.checks.bands import Bands, BetaBand, LearningRateBand, Limit
from dpo_assets.checks.configuration import Configuration, rate_ceilings, significant, weakly_restrained

# Losses whose beta scales the log-ratio of a whole answer, and those where it scales one per token. `ipo`, where it
# sets the gap aimed at, and `sppo_hard` stand in no case: their bands rest on papers.
WHOLE_ANSWER = (
    "sigmoid", "cdpo", "robust", "hinge", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down", "discopop", "aot",
    "aot_unpaired", "kto", "orpo", "cpo",
)  # fmt: skip
PER_TOKEN = ("sigmoid_norm", "simpo")


@dataclass(frozen=True)
class Procedure:
    """What is set by hand, each with its reason.

    lora: TRL's documentation and "LoRA Without Regret" name ten; twice that is taken, since good LoRA runs are known up
    to 5e-5 (NeuralHermes) and 1e-4 (neural-chat). small: OLMo 2 trains 1B at 5 times the rate of 7B, NeMo-RL 1B at 10
    times that of 8B; less is taken. large: Tulu 3 trains 70B at 0.4 times the rate of 8B. blocked: full fine-tuning is
    known as good at 5e-6 (NeMo-RL, 1B), and as incoherent at 1e-5 (SimPO). undertrained: handbook 39 and 68, LoRA at
    5e-7. dose_warned: above 1.33 times the quartile, the highest good run whose epochs and batch are known (NeMo-RL
    12B). dose_blocked: between 6.6 times (neural-chat, good, epochs and batch guessed) and 8.3 times (LLaMA-Factory
    2984, gibberish).
    """

    lora: float = 20
    small: float = 2.5
    large: float = 0.5
    blocked: float = 5
    undertrained: float = 20
    dose_warned: float = 2
    dose_blocked: float = 8
    # ok_low, ok_high, error_below, error_above over the typical beta. Whole answers: good ones from 0.01 (handbook,
    # SimPO's baselines) to 0.5 (SmolLM2, LLM Engineer's Handbook); only 0 is known to be dead (TRL 1627).
    # Per token: SimPO 2 to 10, Tulu 3 and OLMo 5.
    whole_answer: tuple[float, float, float, float] = (0.1, 5, 0.001, 30)
    per_token: tuple[float, float, float, float] = (0.4, 2, 0.1, 4)


BY_HAND = Procedure()


def derive(cases: Iterable[Case], shipped: Bands, procedure: Procedure = BY_HAND) -> Bands:
    """The bands that the good ones of `cases` give. What no case decides is taken from `shipped`."""
    good = [case for case in cases if case.label == "good"]
    bands = _with_rates(shipped, 1.0, procedure)
    # In units of these bands, whose ceiling for full fine-tuning of 3 to 20B is 1; a low beta does not count yet.
    plain = with_limit(bands, "low_beta", factor=1.0)
    rate = median(_highest(good, lambda case: _relative(case.configuration, plain)).values())
    weak = [case for case in good if weakly_restrained(case.configuration, shipped)]
    factor = median(_highest(weak, lambda case: _relative(case.configuration, plain)).values()) / rate if weak else 1.0
    bands = _with_rates(shipped, significant(rate), procedure)
    bands = with_limit(bands, "low_beta", factor=significant(factor, 3))
    doses = _highest(good, lambda case: _dose(case.configuration, bands))
    quartile = quantiles(doses.values(), n=4, method="inclusive")[2]
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


def _with_rates(bands: Bands, rate: float, procedure: Procedure) -> Bands:
    """Rows whose ok ceiling is `rate` for full fine-tuning of 3 to 20B."""
    return replace(bands, learning_rates=tuple(_row(row, rate, procedure) for row in bands.learning_rates))


def _row(row: LearningRateBand, rate: float, procedure: Procedure) -> LearningRateBand:
    method = procedure.lora if row.method == "lora" else 1.0
    smallest, largest = row.billions_below <= 3, row.method == "full" and math.isinf(row.billions_below)
    ok_high = rate * method * (procedure.small if smallest else procedure.large if largest else 1.0)
    return replace(
        row,
        ok_low=significant(rate * method / procedure.undertrained),
        ok_high=significant(ok_high),
        error_above=round_down(procedure.blocked * ok_high),
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
    return configuration.learning_rate / rate_ceilings(configuration, bands).ok_high


def _dose(configuration: Configuration, bands: Bands) -> float:
    updates = configuration.updates_per_pair
    return 0.0 if updates is None else _relative(configuration, bands) * updates


def _highest(cases: Sequence[Case], value: Callable[[Case], float]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for case in cases:
        found[case.project] = max(found.get(case.project, -math.inf), value(case))
    return found


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
    typical = median(median(betas) for betas in by_source.values())
    ok_low, ok_high, error_below, error_above = (significant(typical * factor, 3) for factor in spread)
    return {name: BetaBand(error_below, ok_low, ok_high, error_above, shipped.betas[name].source) for name in names}
