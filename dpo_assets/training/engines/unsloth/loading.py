"""Unsloth: prepared before anything else is imported, loaded from a local folder, and held to what was asked of it.

Nothing of the training stack is imported at the top: Unsloth patches transformers, peft and trl as they are imported,
so `prepare_unsloth` has to run before them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.artifact import read_object
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.precision import Precision
from dpo_assets.recipe import ALL_LINEAR, EVERY_LINEAR
from dpo_assets.training.engines.unsloth import NAME, is_imported
from dpo_assets.training.private.unsloth import COMPILE_CACHE, NO_STATISTICS

if TYPE_CHECKING:
    from peft import PeftModel

INSTALL = "pip install 'dpo-assets[unsloth]' (unsloth==2026.10.9 unsloth_zoo==2026.10.9 bitsandbytes)"
PATCHED = ("trl", "transformers", "peft")  # Unsloth 2026.10.9 only warns when one of these came first.
# What a LoRA adapter may set beside its matrices and still be continued as the plain LoRA that Unsloth's kernels know.
PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "target_parameters": None,
}


def prepare_unsloth(scratch: Path) -> None:
    """Imports Unsloth, with its compile cache in `scratch` and its statistics off. Call it before any other import.

    By default Unsloth writes `unsloth_compiled_cache` into the working directory and puts that on `sys.path`. A folder
    that outlives the run saves the next one most of its compilation.

    Raises:
        ConfigError: when Unsloth is not installed or cannot be imported here, and when trl, transformers or peft were
            imported first: they would stay unpatched, and Unsloth would only warn.
    """
    if is_imported():
        return
    missing = [name for name in (NAME, "unsloth_zoo") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"hardware.kernels `unsloth` needs {' and '.join(missing)}, which this environment lacks. {INSTALL}, "
            "or set hardware.kernels to `auto`."
        )
    early = [name for name in PATCHED if name in sys.modules]
    if early:
        raise ConfigError(
            f"Unsloth must be imported before {', '.join(early)}, which this process has imported already: its patches "
            "would not reach them. Run the stage in a process of its own (`python -m dpo_assets.training`)."
        )
    cache = scratch.absolute() / "unsloth_compiled_cache"
    cache.mkdir(parents=True, exist_ok=True)
    os.environ[COMPILE_CACHE] = str(cache)
    os.environ[NO_STATISTICS] = "1"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    try:
        unsloth = importlib.import_module(NAME)
    except (ImportError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"Unsloth cannot be imported here: {error}. {INSTALL}, or set hardware.kernels to `auto`."
        ) from error
    # A no-op in the versions this is tested with, which patch at import; older ones need the call.
    patch = getattr(unsloth, "PatchDPOTrainer", None)
    if patch is not None:
        patch()


def load_unsloth(
    folder: Path, plan: TrainingPlan, start_adapter: Path | None, seed: int, *, dropout: float = 0.0
) -> PeftModel:
    """The policy on Unsloth's kernels: a new adapter whose B is zero, or `start_adapter` to go on with.

    The model comes from a local folder under its exact name (Unsloth maps names to pre-quantised repositories
    otherwise), in the plan's precision, with Unsloth's checkpointing exactly when the plan recomputes activations.

    Raises:
        ConfigError: when the precision loaded is not the one asked for (without bitsandbytes, Unsloth prints a line and
            loads 16 bit), for an adapter that is not plain LoRA, and when none or far too much would be trained.
    """
    from unsloth import FastLanguageModel  # type: ignore[import-not-found, import-untyped, unused-ignore]

    from dpo_assets.training.models.loading import compute_dtype

    checkpointing: str | bool = "unsloth" if plan.gradient_checkpointing else False
    lora = _adapter_shape(start_adapter) if start_adapter else _planned_shape(plan)
    base, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=plan.max_length,
        dtype=compute_dtype(plan),
        full_finetuning=False,
        use_gradient_checkpointing=checkpointing,
        trust_remote_code=False,
        use_exact_model_name=True,
        local_files_only=True,
        use_safetensors=True,
        random_state=seed,
        **precision_flags(plan.precision),
    )
    check_precision(base, plan)
    model: PeftModel = FastLanguageModel.get_peft_model(
        base,
        lora_dropout=dropout,
        bias="none",
        init_lora_weights=True,
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
        **lora,
    )
    check_adapter_only(model)
    if start_adapter:
        _load_adapter(model, start_adapter)
    return model


def precision_flags(precision: Precision) -> dict[str, bool]:
    """The flags of `from_pretrained`, where 4-bit is the default and so is switched off by name.

    `load_in_fp8` is only named where it is asked for: Unsloth's CPU backend hands unknown arguments to the model.
    """
    flags = {
        "load_in_4bit": precision == "4bit",
        "load_in_8bit": precision == "8bit",
        "load_in_16bit": precision in ("bf16", "fp16"),
    }
    return flags | ({"load_in_fp8": True} if precision == "fp8" else {})


def check_precision(model: Any, plan: TrainingPlan) -> None:
    """Refuses a base that was not loaded as the plan says.

    Raises:
        ConfigError: with what was loaded in place of what was asked for.
    """
    from dpo_assets.training.private.transformers import LOADED_IN

    loaded = [name for name, flag in LOADED_IN.items() if getattr(model, flag, False)]
    loaded += ["fp8"] if _has_fp8(model) else []
    asked = [plan.precision] if plan.precision in (*LOADED_IN, "fp8") else []
    if loaded != asked:
        raise ConfigError(
            f"hardware.precision `{plan.precision}` was asked for, and Unsloth loaded the base in "
            f"{loaded[0] if loaded else '16 or 32 bit'}. 4bit and 8bit need bitsandbytes on a GPU, fp8 needs "
            "torchao >= 0.15 and capability 9.0; or choose bf16."
        )


def _has_fp8(model: Any) -> bool:
    return any("float8" in f"{p.dtype} {type(p.data).__name__}".lower() for p in model.parameters())


def check_adapter_only(model: Any) -> None:
    """Refuses anything but a LoRA-wrapped model with a bounded trainable share.

    Unsloth's generated DPOTrainer drops `peft_config=` without a word (`unsloth/models/rl.py` of 2026.10.9 rewrites the
    branch to `if False`), so a bare model with a `peft_config` beside it is trained in full.

    Raises:
        ConfigError: for a bare model, for an adapter without the name `default`, and for a trainable share that is no
            LoRA's.
    """
    from peft import PeftModel

    from dpo_assets.training.models.loading import ADAPTER_NAME, LARGEST_TRAINABLE_SHARE

    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"{type(model).__name__} has no adapter: wrap it before the trainer (load_unsloth, attach_adapter). A "
            "`peft_config` given to the trainer is dropped by Unsloth, and all weights would be trained."
        )
    if ADAPTER_NAME not in model.peft_config:
        raise ConfigError(f"the adapter must be called `{ADAPTER_NAME}`, not {', '.join(model.peft_config)}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if not 0 < trainable <= LARGEST_TRAINABLE_SHARE * total:
        raise ConfigError(f"{trainable} of {total} parameters would be trained: the adapter was not attached as one")


def _planned_shape(plan: TrainingPlan) -> dict[str, Any]:
    return {
        "r": plan.lora.rank,
        "lora_alpha": plan.lora.alpha,
        "target_modules": list(ALL_LINEAR) if plan.lora.target_modules == EVERY_LINEAR else plan.lora.target_modules,
        "use_rslora": False,
    }


def _adapter_shape(folder: Path) -> dict[str, Any]:
    """What a saved adapter is made of. It stays as it is, whatever the plan would make anew."""
    config = read_object(folder / "adapter_config.json")
    for name, plain in PLAIN_LORA.items():
        if config.get(name, plain) not in (plain, None):
            raise ConfigError(
                f"{folder}: the adapter has {name} = {config[name]!r}, which Unsloth's kernels do not train. Set "
                "hardware.kernels to `transformers`, or merge the adapter into its base."
            )
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": sorted(config["target_modules"]),
        "use_rslora": bool(config.get("use_rslora", False)),
    }


def _load_adapter(model: PeftModel, folder: Path) -> None:
    """Copies a saved adapter into one of the same shape. Unsloth's own way needs the base's path in the adapter."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(model)
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())
        raise ConfigError(
            f"{folder}: the adapter does not fit the base, for example at {odd[0]}; train it on this base"
        )
    set_peft_model_state_dict(model, saved)
