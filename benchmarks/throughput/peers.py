"""TRL's own DPOTrainer, on PEFT or on Unsloth, used as their documentation shows it.

Unsloth must be imported before TRL and Transformers, so `measure` and everything that imports them is imported by the
worker only after `import unsloth`.
"""

from __future__ import annotations

import importlib
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.trainer_callback import PrinterCallback

from benchmarks.throughput.data import PAIRS_PER_STEP, Row
from benchmarks.throughput.measure import CUDA, Block, Measured, memory_cap, seed_adapter, train, unwrap
from benchmarks.throughput.shapes import LORA_RANK

LONGEST = 2_048  # The longest max_length of a case: what Unsloth is told to be ready for.
SEED = 42
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "4bit": torch.bfloat16}


def stand_in_for_triton() -> bool:
    """Without a GPU, TRL 1.15 cannot score at all: its kernel is replaced by whole logits. True where that was done."""
    if CUDA:
        return False
    from dpo_assets_tests.training.trl_dense_scoring import DenseLogProbs

    trl_utils._ChunkedLogProbFunction = DenseLogProbs
    return True


def peer_trainer_class() -> Any:
    """TRL's trainer as it is now (Unsloth replaces it on import), for rows that are token ids already."""

    class TokenRows(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            # Kept on the device: a read per micro-batch would make the peer slower than it is.
            self.kept_losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.kept_losses: list[Any] = []
            super().__init__(*args, **kwargs)
            self.remove_callback(PrinterCallback)

    return TokenRows


def peer_arguments(block: Block, checkpointing: bool, precision: str) -> trl.DPOConfig:
    """Every value that matters set: Unsloth changes TRL's defaults. The reference is scored in each step, as usual."""
    assert block.micro_batch is not None
    return trl.DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="dpo-throughput-"),
        max_steps=block.warmup + block.steps,
        per_device_train_batch_size=block.micro_batch,
        gradient_accumulation_steps=PAIRS_PER_STEP // block.micro_batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=block.max_grad_norm,
        optim="adamw_torch",
        beta=0.1,
        loss_type=["sigmoid"],
        max_length=block.max_length,
        router_aux_loss_coef=0.0,  # Frozen routers learn nothing from it, and ours does not add it.
        bf16=precision in ("bf16", "4bit"),
        fp16=precision == "fp16",
        use_cpu=not CUDA,
        gradient_checkpointing=checkpointing,
        precompute_ref_log_probs=False,
        train_sampling_strategy="sequential",
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=CUDA,
    )


class TrlArm:
    """DPOTrainer with `peft_config`, gradient checkpointing on (TRL's default) or off."""

    def __init__(self, folder: Path, precision: str, targets: Sequence[str], checkpointing: bool) -> None:
        self.folder, self.precision, self.checkpointing = folder, precision, checkpointing
        self.targets = list(targets)
        self.dense = stand_in_for_triton()
        self.trainer_class = peer_trainer_class()
        self.base: Any = None

    def load(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self.base = self._base()

    def _base(self) -> Any:
        extra: dict[str, Any] = {"device_map": {"": 0}} if CUDA else {}
        if self.precision == "4bit":
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        load = partial(
            AutoModelForCausalLM.from_pretrained,
            self.folder,
            dtype=DTYPES[self.precision],
            local_files_only=True,
            **extra,
        )
        try:
            return load(attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return load()  # Attention sinks (gpt-oss): Transformers' own choice.

    def run(self, rows: list[Row], block: Block) -> Measured:
        # A base that a failed block left half wrapped is not used again.
        base, self.base = self.base if self.base is not None else self._base(), None
        with memory_cap(block.cap_gib) as peaks:
            begun = time.perf_counter()
            trainer = self.trainer_class(
                model=base,
                args=peer_arguments(block, self.checkpointing, self.precision),
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
                peft_config=LoraConfig(
                    r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=self.targets, bias="none", task_type="CAUSAL_LM"
                ),
            )
            seed_adapter(trainer.model)
            setup = time.perf_counter() - begun
            seconds, steps = train(trainer, block)
            self.base = unwrap(trainer).unload()
        more = {"checkpointing": self.checkpointing, "dense_stand_in": self.dense}
        return _measured(trainer, block, seconds, steps, peaks, setup, more)


class UnslothArm:
    """FastLanguageModel with "unsloth" checkpointing (the documented recipe) or none, under TRL's patched trainer."""

    def __init__(self, folder: Path, precision: str, targets: Sequence[str], checkpointing: bool) -> None:
        self.folder, self.precision, self.checkpointing = folder, precision, checkpointing
        self.targets = list(targets)
        self.dense = stand_in_for_triton()
        self.trainer_class = peer_trainer_class()

    def load(self) -> None:
        fast: Any = importlib.import_module("unsloth").FastLanguageModel
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        model, _ = fast.from_pretrained(
            str(self.folder),
            max_seq_length=LONGEST,
            dtype=DTYPES[self.precision],
            load_in_4bit=self.precision == "4bit",
            local_files_only=True,
        )
        self.model = fast.get_peft_model(
            model,
            r=LORA_RANK,
            lora_alpha=LORA_RANK,
            lora_dropout=0,
            bias="none",
            target_modules=self.targets,
            use_gradient_checkpointing="unsloth" if self.checkpointing else False,
            random_state=SEED,
        )

    def run(self, rows: list[Row], block: Block) -> Measured:
        # The copy of the adapter that the last trainer made as its reference is of a trained adapter.
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        seed_adapter(self.model)
        with memory_cap(block.cap_gib) as peaks:
            begun = time.perf_counter()
            trainer = self.trainer_class(
                model=self.model,
                args=peer_arguments(block, self.checkpointing, self.precision),
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
            )
            setup = time.perf_counter() - begun
            seconds, steps = train(trainer, block)
            self.model = unwrap(trainer)
        more = {"checkpointing": self.checkpointing, "dense_stand_in": self.dense}
        return _measured(trainer, block, seconds, steps, peaks, setup, more)


def _measured(
    trainer: Any,
    block: Block,
    seconds: float,
    steps: list[float],
    peaks: dict[str, float],
    setup: float,
    more: dict[str, Any],
) -> Measured:
    micro = torch.stack(trainer.kept_losses).tolist()
    parts = len(micro) // (block.warmup + block.steps)
    losses = [statistics.fmean(micro[n : n + parts]) for n in range(0, len(micro), parts)]
    return Measured(
        seconds=seconds,
        step_seconds=steps,
        losses=losses,
        first_loss_minus_ln2=losses[0] - math.log(2),
        peak_allocated_gib=peaks.get("peak_allocated_gib"),
        peak_reserved_gib=peaks.get("peak_reserved_gib"),
        setup_seconds=setup,
        more={"micro_batch": block.micro_batch, **more},
    )
