"""The numbers that runs are held against, each with its source. The only place they stand.

The evidence behind them: published recipes and published failures (docs/checks.md). A learning rate is judged on its
own: while margins are small, beta only scales the gradient and Adam removes that scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Method = Literal["lora", "full"]


@dataclass(frozen=True)
class LearningRateBand:
    """Peak DPO learning rates for one method and model size."""

    method: Method
    billions_below: float
    ok_low: float
    ok_high: float
    error_above: float
    source: str


LEARNING_RATE: tuple[LearningRateBand, ...] = (
    LearningRateBand(
        "lora", 1, 1e-6, 5e-5, 2e-4, "SmolLM-135M model card: healthy at 2e-4; 10x the full fine-tuning band (TRL docs)"
    ),
    LearningRateBand(
        "lora", math.inf, 1e-6, 2e-5, 1e-4, "TRL docs: 5e-6 to 1e-5 for adapters; NeuralHermes lowered 5e-4 to 5e-5"
    ),
    LearningRateBand("full", 3, 1e-7, 2.5e-6, 1e-5, "OLMo 2 1B recipe: 2.5e-6; NeMo-RL 1B: 5e-6"),
    LearningRateBand("full", 20, 5e-8, 1e-6, 5e-6, "SimPO grid: 3e-7 to 1e-6 good, 1e-5 incoherent and repetitive"),
    LearningRateBand("full", math.inf, 5e-8, 5e-7, 2e-6, "Tulu 3 70B recipe: 2e-7; OLMo 3 32B recipe: 1e-6"),
)
HEAVY_EPOCHS = 3  # At this many epochs, or below this batch, the upper warn region becomes an error:
HEAVY_BATCH = 8  # 5e-5 failed at 3 to 5 epochs and was fine at 200 steps (NeuralHermes, TRL issue 1236).

LOW_BETA = 0.05  # Below it the restraint is weak, and the ok ceiling falls (TRL's KTO notes say the same of KTO).
LOW_BETA_CEILING: dict[Method, float] = {"lora": 6e-6, "full": 7e-7}


@dataclass(frozen=True)
class BetaBand:
    """Betas of one loss: outside [error_below, error_above] a run is blocked, outside [ok_low, ok_high] warned."""

    error_below: float
    ok_low: float
    ok_high: float
    error_above: float
    source: str


_SIGMOID = (0.005, 0.01, 0.5, 1.0)
BETA: dict[str, BetaBand] = {
    "sigmoid": BetaBand(
        *_SIGMOID, "DPO repository: 0.1 to 0.5 is a good start; Zephyr 0.01; beta 0 freezes the loss (TRL 1627)"
    ),
    "cdpo": BetaBand(*_SIGMOID, "the sigmoid loss with smoothed labels: its unit and its band"),
    "robust": BetaBand(*_SIGMOID, "arXiv 2403.00409, section B: 0.01; otherwise the band of sigmoid"),
    "hinge": BetaBand(*_SIGMOID, "RSO, arXiv 2309.06657: 0.05; the margin aimed at is 1/beta nats: 10 at 0.1"),
    "exo_pair": BetaBand(*_SIGMOID, "arXiv 2402.00856, section B: 0.1; otherwise the band of sigmoid"),
    "nca_pair": BetaBand(*_SIGMOID, "arXiv 2402.05369, section C: 0.01; otherwise the band of sigmoid"),
    "bco_pair": BetaBand(*_SIGMOID, "arXiv 2404.04656, section C: 0.01; otherwise the band of sigmoid"),
    "apo_zero": BetaBand(*_SIGMOID, "arXiv 2408.06266, section 5.2: 0.1; otherwise the band of sigmoid"),
    "apo_down": BetaBand(*_SIGMOID, "arXiv 2408.06266, section 5.2: 0.1; otherwise the band of sigmoid"),
    "discopop": BetaBand(*_SIGMOID, "arXiv 2406.08414, section B.1: 0.05; otherwise the band of sigmoid"),
    "aot": BetaBand(*_SIGMOID, "no published beta known; the band of sigmoid, whose formula it applies to quantiles"),
    "aot_unpaired": BetaBand(
        *_SIGMOID, "no published beta known; the band of sigmoid, whose formula it applies to quantiles"
    ),
    "sppo_hard": BetaBand(
        0.0002,
        0.0005,
        0.1,
        1.0,
        "arXiv 2405.00675: 0.001; log-ratios aim at +-1/(2 beta) nats per answer; for the upper end no source is known",
    ),
    "ipo": BetaBand(0.005, 0.01, 1.0, 5.0, "HF preference-tuning post; IPO's gap is 1/(2 beta) nats per token"),
    "sigmoid_norm": BetaBand(0.5, 1.0, 10.0, 20.0, "Tulu 3 and OLMo recipes: 5; 0.1 here is a unit error"),
}


@dataclass(frozen=True)
class LossFacts:
    """What a loss takes. `coupled`: it sorts over the pairs of a step, so it is no mean of one value per pair."""

    smoothing: Literal["ignored", "optional", "needed"] = "ignored"
    f_divergence: bool = False
    coupled: bool = False


# As in TRL 1.15 (`DPOTrainer.__init__` and `_compute_loss`), and `cdpo`, which TRL does not have.
LOSSES: dict[str, LossFacts] = {
    "sigmoid": LossFacts(f_divergence=True),
    "cdpo": LossFacts("optional", f_divergence=True),
    "robust": LossFacts("optional", f_divergence=True),
    "hinge": LossFacts(f_divergence=True),
    "ipo": LossFacts(f_divergence=True),
    "exo_pair": LossFacts("needed", f_divergence=True),
    "nca_pair": LossFacts(),
    "bco_pair": LossFacts(),
    "sppo_hard": LossFacts(),
    "aot": LossFacts("optional", coupled=True),
    "aot_unpaired": LossFacts("optional", coupled=True),
    "apo_zero": LossFacts(),
    "apo_down": LossFacts(),
    "discopop": LossFacts(f_divergence=True),
    "sigmoid_norm": LossFacts(f_divergence=True),
    "sft": LossFacts(f_divergence=True),
}
SUPPORTED_LOSSES: tuple[str, ...] = tuple(LOSSES)
TRL_LACKS: frozenset[str] = frozenset({"cdpo"})
_KTO = (
    "TRL removed kto_pair (its author: 'simplified, does not work as well', TRL 1387); use sigmoid here, apo_zero or "
    "bco_pair for a loss that also judges each answer by itself, or TRL's KTOTrainer on unpaired labels"
)
_NO_REFERENCE = "it has no reference model, which this pipeline is built on; use sigmoid here, or TRL's"
LOSS_ADVICE: dict[str, str] = {
    "kto_pair": _KTO,
    "kto": _KTO,
    "dpo": "set dpo.loss to sigmoid: it is the loss of the DPO paper",
    "rpo": "set dpo.loss to [sigmoid, sft], and rpo_alpha as the second of dpo.loss_weights",
    "mpo": "set dpo.loss to [sigmoid, bco_pair, sft] and dpo.loss_weights to [0.8, 0.2, 1.0] (arXiv 2411.10442)",
    "simpo": f"{_NO_REFERENCE} CPOTrainer; sigmoid_norm is the length-normalised loss with a reference",
    "cpo": f"{_NO_REFERENCE} CPOTrainer",
    "orpo": f"{_NO_REFERENCE} ORPOTrainer",
    "aot_pair": "TRL 1.15 calls this loss aot_unpaired, and the one for paired data aot; set dpo.loss to one of them",
    "slic": "set dpo.loss to hinge",
    "rso": "set dpo.loss to hinge",
    "exo": "set dpo.loss to exo_pair",
    "nca": "set dpo.loss to nca_pair",
    "bco": "set dpo.loss to bco_pair",
    "apo": "set dpo.loss to apo_zero, or to apo_down where the policy is better than the chosen answers",
    "sppo": "set dpo.loss to sppo_hard",
    "rdpo": "set dpo.loss to robust",
}
LOSS_SOURCE = "TRL 1.15 source, DPOTrainer._compute_loss; cdpo: the DPO repository's conservative DPO"
SMOOTHING_SOURCE = "TRL 1.15 source: label_smoothing is used by robust, exo_pair and aot only"
F_DIVERGENCE_SOURCE = "f-DPO, arXiv 2309.16240: its normaliser cancels only in the difference of two rewards"
EXO_SMOOTHING, NOISE = "1e-3 (arXiv 2402.00856)", "0.1 (arXiv 2403.00409)"

EPOCHS_OK, EPOCHS_ERROR = 3.0, 5.0
BATCH_OK, BATCH_ERROR = 8, 4
STEPS_TO_JUDGE = 30
BUDGET_SOURCE = (
    "published recipes use 1 to 3 epochs at a batch of 16 or more; TRL 1236 and LLaMA-Factory 5325 failed at 1"
)

# What the first loss must be before any update: the loss at zero margin (Rafailov et al., arXiv 2305.18290, eq. 7, and
# `training.losses.DpoLoss.at_zero_margin` for every other loss).
FIRST_LOSS_TOLERANCE = 5e-4
FIRST_LOSS_SOURCE = "equation 7 of arXiv 2305.18290 at policy = reference; TRL issue 1236 trained against a wrong one"


def first_loss_tolerance(expected: float) -> float:
    """How far the first loss may lie from `expected`: relative above 1, since ipo starts at 1 / (4 beta^2)."""
    return FIRST_LOSS_TOLERANCE * max(1.0, abs(expected))


def first_loss_holds(loss: float, expected: float) -> bool:
    """Whether a first loss shows that the reference is the start of training."""
    return abs(loss - expected) <= first_loss_tolerance(expected)


# NLL ratio of chosen answers, policy over reference. zephyr-7b-dpo-full (beta 0.01) ended healthy at 1.40.
NLL_RATIO_WARN, NLL_RATIO_ERROR = 1.5, 2.0
NLL_RATIO_SOURCE = "Razin et al., arXiv 2410.08847 (likelihood displacement); model card of zephyr-7b-dpo-full: 1.40"

# |log-prob(adapter) - log-prob(merged)| per token, mean over probe pairs.
FIDELITY_WARN, FIDELITY_ERROR = 0.02, 0.1
FIDELITY_SOURCE = "merge faults reported as unsloth 869, 2142, 5410; bf16 merges measured at 0.006 nats mean"

REPETITION_WARN = 0.15  # Rise over SFT in the share of answers that repeat themselves, or that never end.
GENERATION_SOURCE = "LLaMA-Factory 7734, 2984; SimPO 12, 80: repetition and endless answers after DPO"
