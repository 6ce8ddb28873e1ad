"""What else scores a policy is looked at before anything is trained for it: a refusal afterwards costs a training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

from dpo_assets.assets.model_files import look_at
from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.judging.endpoint import Endpoint
from dpo_assets.judging.questions import read_questions
from dpo_assets.planning.model_folder import refuse_as_reward_model
from dpo_assets.recipe import EvaluationSection, HarnessSection, JudgeSection, RewardModelSection, looks_like_hub_id
from dpo_assets.resources.hub import HubResource


def refuse_scorers(evaluation: EvaluationSection, hub: HubResource) -> str:
    """Empty, or what of `evaluation` could not be looked at, and may be there later.

    Raises:
        ConfigError: something that it names is not there, or cannot be what it is named as.
    """
    said = []
    if evaluation.reward_model is not None:
        said.append(refuse_reward_model(evaluation.reward_model, hub))
    for benchmark in evaluation.benchmarks:
        read_questions(Path(benchmark.path), benchmark.format)
    if evaluation.harness is not None:
        refuse_harness(evaluation.harness)
    if evaluation.judge is not None:
        said.append(judge_endpoint(evaluation.judge).refuse_ahead())
    return "; ".join(filter(None, said))


def judge_endpoint(section: JudgeSection) -> Endpoint:
    """The judge that a recipe declares."""
    return Endpoint(
        section.url, section.model, section.key_variable, section.max_tokens, section.timeout_seconds, section.verdict
    )


def refuse_reward_model(section: RewardModelSection, hub: HubResource) -> str:
    """What can be told of a reward model without its weights, by all its other files: of a folder, or of the Hub.

    Returns:
        empty, or why the Hub's could not be looked at, which may pass.

    Raises:
        ConfigError: it cannot be one; the Hub has no such model or revision, or does not show it.
    """
    if not looks_like_hub_id(section.source):
        refuse_as_reward_model(Path(section.source))
        return ""
    with TemporaryDirectory(prefix="dpo-assets-") as folder:
        try:
            weights = look_at(hub.api(), section.source, section.revision, Path(folder), hub.token_variable)
        except InfrastructureError as error:
            return f"evaluation.reward_model: {error}"
        refuse_as_reward_model(Path(folder), called=section.source, weighed=bool(weights))
    return ""


def refuse_harness(section: HarnessSection) -> None:
    """Whether its package and its folder are there. What it needs beside them, only a run shows.

    Raises:
        ConfigError: lm-eval is not installed, or the folder of tasks is none.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.harness needs lm-evaluation-harness, which this environment lacks: "
            "pip install 'dpo-assets[lm-eval]', or take evaluation.harness out of the recipe"
        )
    if section.include_path is not None and not Path(section.include_path).is_dir():
        raise ConfigError(f"evaluation.harness.include_path: there is no folder {section.include_path}")
