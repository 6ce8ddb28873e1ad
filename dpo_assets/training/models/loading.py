"""Base model and adapter from local folders: safetensors only, no remote code, no network."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from dpo_assets.artifact import read_object, rewrite_json
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.weights import listed
from dpo_assets.training.models.experts import serve_experts
from dpo_assets.training.models.fp8 import quantise_layers
from dpo_assets.training.models.targets import chosen_places, peft_targets, refuse_other_places
from dpo_assets.training.models.text_part import text_source
from dpo_assets.training.private.transformers import cannot_convert, every_unexpected

# The adapter must carry PEFT's default name: TRL reads `peft_config["default"]` unguarded.
ADAPTER_NAME = "default"
# A LoRA that trains a larger share than this is not a LoRA: a dropped `peft_config` once meant full fine-tuning.
LARGEST_TRAINABLE_SHARE = 0.6


def load_causal_lm(folder: Path, **how: Any) -> tuple[PreTrainedModel, list[str]]:
    """A causal language model whose weights all come from the folder's files, and the tensors that it has no use for.

    Of a checkpoint with more than text it is the text part. Transformers draws at random what the files lack, and says
    so in a warning.

    Args:
        how: arguments of `from_pretrained`; `device_map={"": "meta"}` reads the files' headers alone.

    Raises:
        ConfigError: naming tensors that config.json needs and no file holds, or holds in another shape; when the files
            are no model that can be loaded without code of their own, or one whose text part has no class.
    """
    try:
        source = text_source(folder)
        with every_unexpected() as unexpected:
            model, told = (source.cls or AutoModelForCausalLM).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                # Told below instead of raised, all at once.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **source.arguments,
                **how,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        # What the system says is no fault of the folder, and may pass: a disk, memory.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        raise ConfigError(f"the model in {folder} cannot be loaded: {_first_line(error)}") from None
    except ImportError as error:
        raise ConfigError(
            f"the model in {folder} needs a package that this environment lacks: {_first_line(error)}"
        ) from None
    except RuntimeError as error:
        # Memory and devices speak by a RuntimeError too; these are no fault of the folder.
        if not cannot_convert(error):
            raise
        raise ConfigError(
            f"the weights in {folder} cannot be put into the form that Transformers computes: {_first_line(error)}"
        ) from None
    lacking = sorted(map(source.in_files, told["missing_keys"]))
    other = sorted(
        f"{source.in_files(name)} {tuple(stored)}, not {tuple(needed)}"
        for name, stored, needed in told["mismatched_keys"]
    )
    if lacking or other:
        faults = [f"no file holds {listed(lacking)}"] if lacking else []
        faults += [f"the files hold {listed(other)}"] if other else []
        raise ConfigError(
            f"the weights in {folder} are not those that its config.json describes: {'; '.join(faults)}. Download the "
            "model again, or mend config.json (tie_word_embeddings, num_hidden_layers)."
        )
    return model, source.unused(sorted(unexpected))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_base(folder: Path, plan: TrainingPlan) -> PreTrainedModel:
    """The base model in the plan's precision on the plan's device, its attention that which Transformers chooses.

    Raises:
        ConfigError: when the weights are not whole.
    """
    dtype, extra = compute_dtype(plan), _quantisation(plan)
    model, _ = load_causal_lm(folder, dtype=dtype, **extra)
    serve_experts(model)
    if plan.precision == "fp8":
        quantise_layers(model, plan.device)
    elif plan.device == "cuda" and not extra:
        model.to("cuda")
    return model


def compute_dtype(plan: TrainingPlan) -> torch.dtype:
    """The plan's `compute` as torch has it."""
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[plan.compute]


def _quantisation(plan: TrainingPlan) -> Mapping[str, Any]:
    if plan.precision in ("4bit", "8bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"hardware.precision `{plan.precision}` needs bitsandbytes, which this environment lacks: "
            "pip install 'dpo-assets[gpu]', or choose another precision (`dpo-assets plan` says what fits)."
        )
    match plan.precision:
        case "4bit":
            settings = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute_dtype(plan),
            )
        case "8bit":
            settings = BitsAndBytesConfig(load_in_8bit=True)
        case _:
            return {}
    return {"quantization_config": settings, "device_map": {"": 0}}


def autocast_of(plan: TrainingPlan) -> torch.autocast:
    """The autocast that accelerate uses in training, for scoring outside of it."""
    return torch.autocast(plan.device, dtype=compute_dtype(plan), enabled=plan.compute != "fp32")


def attach_adapter(
    base: PreTrainedModel, plan: TrainingPlan, start: Path | None, *, seed: int, dropout: float
) -> PeftModel:
    """The policy: a trained adapter to go on with, or a new one whose B is zero (so that it starts as the base).

    Raises:
        ConfigError: when no adapter, or far too much, would be trained; for a target that the base does not have, or
            that PEFT takes for another.
    """
    set_seed(seed)
    if start is not None:
        model = PeftModel.from_pretrained(base, start, adapter_name=ADAPTER_NAME, is_trainable=True)
    else:
        chosen = chosen_places(base, plan.lora)
        config = LoraConfig(
            r=plan.lora.rank,
            lora_alpha=plan.lora.alpha,
            lora_dropout=dropout,
            **peft_targets(base, plan.lora),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
            bias="none",
            task_type="CAUSAL_LM",
        )
        wrapped = get_peft_model(base, config, adapter_name=ADAPTER_NAME)
        assert isinstance(wrapped, PeftModel)
        refuse_other_places(wrapped, ADAPTER_NAME, chosen)
        model = wrapped
    if dropout == 0.0:
        switch_off_dropout(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if not 0 < trainable <= LARGEST_TRAINABLE_SHARE * total:
        raise ConfigError(f"{trainable} of {total} parameters would be trained: the adapter was not attached as one")
    return model


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Two scores of one pair would differ by it, and by whatever else is random in training mode.

    A starting adapter brings the dropout it was trained with, as modules; layers keep rates as numbers too
    (`attention_dropout`, `layerdrop`, `router_jitter_noise`), or read their config's at every forward (Falcon).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name in random_rates(holder):
                setattr(holder, name, 0.0)


def random_rates(holder: Any) -> dict[str, float]:
    """The rates of what is random in training mode that a module or a config keeps as its own numbers."""
    return {
        name: float(value)
        for name, value in getattr(holder, "__dict__", {}).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def load_factors(model: PeftModel, folder: Path) -> None:
    """Overwrites the factors of the adapter that is trained with those of a saved one, in place.

    Raises:
        ConfigError: the saved adapter has other places or another rank.
    """
    saved = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in own.items()}:
        raise ConfigError(
            f"the adapter in {folder} has other layers or another rank than this run trains; set refresh.policy to "
            "`full`, or lora to what that release was trained with"
        )
    set_peft_model_state_dict(model, saved, adapter_name=ADAPTER_NAME)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Only the trained adapter: TRL keeps its reference as a second one, which must not be published."""
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER_NAME], safe_serialization=True)
    # PEFT writes down where the base lay on this machine, which would leak, and its target modules in the order of a
    # set, which changes from process to process: equal adapters would differ by either.
    config = read_object(folder / "adapter_config.json")
    config |= {"base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
    if config.get("target_parameters"):
        config["target_parameters"] = sorted(config["target_parameters"])
    rewrite_json(folder / "adapter_config.json", config)
    # PEFT writes a card that names the local folder of the base; the release gets a card of its own.
    (folder / "README.md").unlink(missing_ok=True)
