"""What else scores a policy is looked at before anything is trained for it: a refusal afterwards costs a training."""

from __future__ import annotations

from pathlib import Path

from dpo_assets.judging.questions import read_questions
from dpo_assets.planning.model_folder import refuse_as_reward_model
from dpo_assets.recipe import EvaluationSection, RewardModelSection, looks_like_hub_id


def refuse_scorers(evaluation: EvaluationSection) -> None:
    """Raises:
    ConfigError: something that `evaluation` names is not there, or cannot be what it is named as.
    """
    if evaluation.reward_model is not None:
        refuse_reward_model(evaluation.reward_model)
    for benchmark in evaluation.benchmarks:
        read_questions(Path(benchmark.path), benchmark.format)


def refuse_reward_model(section: RewardModelSection) -> None:
    """What can be told of a reward model without fetching it: all of a folder, nothing of the Hub's.

    Raises:
        ConfigError: the folder cannot be one.
    """
    if not looks_like_hub_id(section.source):
        refuse_as_reward_model(Path(section.source))
