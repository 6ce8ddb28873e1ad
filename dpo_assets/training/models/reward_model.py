"""A reward model: a sequence classifier with one output, from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.weights import listed
from dpo_assets.training.models.loading import compute_dtype


def load_reward_model(folder: Path, plan: TrainingPlan) -> Any:
    """The model on the plan's device, in the number format that the plan computes in, in evaluation mode.

    Raises:
        ConfigError: it cannot be loaded, has another number of outputs than one, or lacks tensors. Transformers draws
            those at random: of a language model without a trained head every score would be noise.
    """
    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # Told below, all at once.
            output_loading_info=True,
            dtype=compute_dtype(plan),
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"the reward model in {folder} cannot be loaded: {said}") from None
    if faults := sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}):
        raise ConfigError(
            f"the reward model in {folder} is not whole: no file holds {listed(faults)} as its config.json describes "
            "them. Take one that was trained as a reward model: a language model has no head for it."
        )
    if model.config.num_labels != 1:
        raise ConfigError(f"the reward model in {folder} has {model.config.num_labels} outputs, and not one")
    return model.to(plan.device).eval()
