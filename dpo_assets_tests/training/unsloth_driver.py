"""Drives the real Unsloth in a process of its own: `python -m dpo_assets_tests.training.unsloth_driver request.json`.

Tests write the request and read `answer.json` beside it. Where there is no GPU, Unsloth's CPU backend loads and trains
(`load`), and the trainers that it generates for GPUs are made and run on plain Transformers layers (`generated`),
because its Triton kernels do not run there. With a request made for it, `load` runs on a GPU as it is.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpo_assets.errors import ConfigError, GateError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.engines.unsloth.loading import load_unsloth, prepare_unsloth

Request = dict[str, Any]
Answer = dict[str, Any]


def load(request: Request) -> Answer:
    """Unsloth's own loading, the classic trainer, and the adapter it leaves behind."""
    plan = TrainingPlan.model_validate(request["plan"])
    start = request.get("start_adapter")
    model = load_unsloth(Path(request["model"]), plan, Path(start) if start else None, plan.dpo.seed)
    return trained(request, plan, model) | {"dropouts": dropouts(model), "model": type(model).__module__}


def generated(request: Request) -> Answer:
    """The trainer that Unsloth generates for GPUs, on Transformers layers."""
    from dpo_assets.training.models.loading import attach_adapter, load_base
    from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

    plan = TrainingPlan.model_validate(request["plan"])
    model: Any = load_base(Path(request["model"]), plan)
    if not request.get("bare"):
        model = attach_adapter(model, plan, None, seed=plan.dpo.seed, dropout=0.0)
    # What Unsloth's forced fp32 is told by; otherwise its trainer switches 16-bit training on by itself.
    model._unsloth_forced_float32 = bool(request.get("float32", True))
    with dense_scoring():
        return trained(request, plan, model)


def trained(request: Request, plan: TrainingPlan, model: Any) -> Answer:
    """Losses of a run of the classic trainer, and what it changed around it."""
    from datasets import Dataset

    from dpo_assets.training.models.chat_format import load_tokenizer
    from dpo_assets.training.models.loading import save_adapter
    from dpo_assets.training.trainers.classic import classic_trainer
    from dpo_assets.training.trainers.packed import end_quietly

    out = Path(request["out"])
    rows = Dataset.from_parquet(request["rows"], columns=["prompt", "chosen", "rejected"], cache_dir=str(out / "cache"))
    trainer = classic_trainer(model, load_tokenizer(Path(request["model"])), rows, plan, out / "trainer")
    end_quietly(trainer, [])
    trainer.train()
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), out / "adapter")
    arguments = trainer.args
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "trainer": f"{type(trainer).__mro__[1].__module__}",
        "arguments": {
            name: str(getattr(arguments, name))
            for name in ("learning_rate", "optim", "per_device_train_batch_size", "gradient_accumulation_steps")
        },
        "adapters": list(trainer.model.peft_config),
    }


def peft_config_trap(request: Request) -> Answer:
    """What Unsloth's trainer does with a `peft_config`, unguarded: the share of all weights that it would train."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from dpo_assets.training.models.chat_format import load_tokenizer
    from dpo_assets.training.models.loading import load_base
    from dpo_assets.training.trainers.classic import classic_arguments

    plan = TrainingPlan.model_validate(request["plan"])
    model: Any = load_base(Path(request["model"]), plan)
    model._unsloth_forced_float32 = True
    out = Path(request["out"])
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**classic_arguments(plan, out)),
        train_dataset=Dataset.from_parquet(request["rows"], cache_dir=str(out / "cache")),
        processing_class=load_tokenizer(Path(request["model"])),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"trainable_share": trainable / sum(p.numel() for p in trainer.model.parameters())}


def shared_prefix(request: Request) -> Answer:
    """Unsloth's shared-prefix attention, uncompiled, beside ours on gathered rows: largest difference."""
    import torch
    from unsloth.utils import prefix_grouper_kernel as kernel

    from dpo_assets.training.batches.packing import Group, pack
    from dpo_assets.training.engines.attention import Tables, packed_rows
    from dpo_assets.training.engines.unsloth.engine import on_blocks

    worst = 0.0
    for n, groups in enumerate(request["groups"]):
        batch = pack([Group(range(prompt), tuple(range(c) for c in lengths)) for prompt, lengths in groups])
        laid, place = on_blocks(batch.groups)
        table, _ = kernel.build_seg_info_multigroup(laid, torch.device("cpu"))
        generator = torch.Generator().manual_seed(n)
        query, key, value = (
            torch.randn(1, heads, table.T, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
        )
        theirs = kernel.flex_shared_prefix_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), table, compiled=False
        )
        query, key, value = (x[:, :, place] for x in (query, key, value))
        ours, _ = packed_rows(torch.nn.Module(), query, key, value, None, packed=Tables(batch))
        worst = max(worst, float((ours - theirs[:, place]).abs().max()))
    return {"largest_difference": worst}


def gpu_loader(request: Request) -> Answer:
    """What is asked of the loader for GPUs, by its names of them: it takes others too, and hands them on."""
    import inspect

    import unsloth

    loader, asked = unsloth.FastLanguageModel, {}

    def record(**arguments: Any) -> Any:
        asked.update(arguments)
        raise ConfigError("nothing is loaded")

    unsloth.FastLanguageModel = SimpleNamespace(from_pretrained=record)
    plan = TrainingPlan.model_validate(request["plan"])
    with ExitStack() as stack:
        stack.callback(setattr, unsloth, "FastLanguageModel", loader)
        with suppress(ConfigError):
            load_unsloth(Path(request["model"]), plan, None, plan.dpo.seed)
    handed_on = asked.keys() - inspect.signature(loader.from_pretrained).parameters.keys()
    return {"asked": sorted(asked), "handed_on": sorted(handed_on)}


def dropouts(model: Any) -> list[float]:
    """Probabilities of all dropout layers."""
    import torch

    return sorted({m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)})


def generate_trainers() -> None:
    """Makes Unsloth write and install its own trainers, which it leaves out where it finds no GPU."""
    os.environ.pop("UNSLOTH_ALLOW_CPU")
    from unsloth.models.rl import PatchFastRL

    PatchFastRL()


ACTIONS = {
    "load": load,
    "generated": generated,
    "peft_config_trap": peft_config_trap,
    "shared_prefix": shared_prefix,
    "gpu_loader": gpu_loader,
}


def main(path: Path) -> None:
    requests = json.loads(path.read_text(encoding="utf-8"))
    answers: list[Answer] = []
    with ExitStack() as stack:
        stack.callback(lambda: path.with_name("answer.json").write_text(json.dumps(answers), encoding="utf-8"))
        if requests["generated"]:
            os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # The module tree for GPUs, without one.
        prepare_unsloth(Path(requests["scratch"]))
        if requests["generated"]:
            generate_trainers()
        for request in requests["actions"]:
            try:
                answers.append(ACTIONS[request["action"]](request))
            except (ConfigError, GateError) as error:
                answers.append({"error": type(error).__name__, "message": str(error)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
