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


_SIGMOID_LIKE = BetaBand(
    0.005, 0.01, 0.5, 1.0, "DPO repository: 0.1 to 0.5 is a good start; Zephyr 0.01; beta 0 freezes the loss (TRL 1627)"
)
BETA: dict[str, BetaBand] = {
    "sigmoid": _SIGMOID_LIKE,
    "hinge": _SIGMOID_LIKE,
    "robust": _SIGMOID_LIKE,
    "apo_zero": _SIGMOID_LIKE,
    "ipo": BetaBand(0.005, 0.01, 1.0, 5.0, "HF preference-tuning post; IPO's gap is 1/(2 beta) nats per token"),
    "sigmoid_norm": BetaBand(0.5, 1.0, 10.0, 20.0, "Tulu 3 and OLMo recipes: 5; 0.1 here is a unit error"),
}

SUPPORTED_LOSSES: tuple[str, ...] = ("sigmoid",)
LOSS_ADVICE: dict[str, str] = {
    "kto_pair": "TRL removed kto_pair (its author: 'simplified, does not work as well', TRL 1387); use sigmoid "
    "here, or TRL's KTOTrainer on unpaired labels.",
    "cdpo": "TRL 1.15 has no cdpo, and its sigmoid ignores label_smoothing; use sigmoid.",
}
SMOOTHING_SOURCE = "TRL 1.15 source: label_smoothing is used by robust, exo_pair and aot only"

EPOCHS_OK, EPOCHS_ERROR = 3.0, 5.0
BATCH_OK, BATCH_ERROR = 8, 4
STEPS_TO_JUDGE = 30
BUDGET_SOURCE = (
    "published recipes use 1 to 3 epochs at a batch of 16 or more; TRL 1236 and LLaMA-Factory 5325 failed at 1"
)

# Zero margin on both sides: what the first loss must be before any update (Rafailov et al., arXiv 2305.18290, eq. 7).
FIRST_LOSS: dict[str, float] = {"sigmoid": math.log(2)}
FIRST_LOSS_TOLERANCE = 5e-4
FIRST_LOSS_SOURCE = "equation 7 of arXiv 2305.18290 at policy = reference; TRL issue 1236 trained against a wrong one"

# NLL ratio of chosen answers, policy over reference. zephyr-7b-dpo-full (beta 0.01) ended healthy at 1.40.
NLL_RATIO_WARN, NLL_RATIO_ERROR = 1.5, 2.0
NLL_RATIO_SOURCE = "Razin et al., arXiv 2410.08847 (likelihood displacement); model card of zephyr-7b-dpo-full: 1.40"

# |log-prob(adapter) - log-prob(merged)| per token, mean over probe pairs.
FIDELITY_WARN, FIDELITY_ERROR = 0.02, 0.1
FIDELITY_SOURCE = "merge faults reported as unsloth 869, 2142, 5410; bf16 merges measured at 0.006 nats mean"

REPETITION_WARN = 0.15  # Rise over SFT in the share of answers that repeat themselves, or that never end.
GENERATION_SOURCE = "LLaMA-Factory 7734, 2984; SimPO 12, 80: repetition and endless answers after DPO"
