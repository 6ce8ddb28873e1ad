"""`dpo_adapter`: the LoRA adapter that DPO trained, its metric log and its plots."""

from __future__ import annotations

import hashlib
from pathlib import Path

import dagster as dg

from dpo_assets.artifact import VOLATILE, Artifact
from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.assets.node import Node
from dpo_assets.assets.sft_checkpoint import start_adapter
from dpo_assets.assets.step import Events, Step, memory_record
from dpo_assets.checks.training import dpo_verdicts
from dpo_assets.contract import TrainSpec
from dpo_assets.report.plots import line_plot

UPSTREAM = ("sft_checkpoint", "dpo_dataset", "base_model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def materialise(step: Step) -> Events:
    """Runs the DPO stage; its reference scores come from the cache where they are known."""
    plan = read_plan(step.upstream("dpo_plan"))
    inputs = {name: step.upstream(name) for name in UPSTREAM}
    base = inputs["base_model"]

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "dpo",
            TrainSpec(
                kind="dpo_adapter",
                output_dir=folder,
                fingerprint=print_,
                inputs={name: artifact.digest for name, artifact in inputs.items()},
                base_model=base.path / "model",
                threads=step.recipe.hardware.threads,
                dataset=inputs["dpo_dataset"].path,
                plan=plan,
                start_adapter=start_adapter(inputs["sft_checkpoint"]),
                reference_cache=step.tree.root / "cache" / "reference.sqlite",
                base_digest=base.digest,
                tokenizer_digest=tokenizer_digest(base),
            ),
        )

    artifact, reused = step.build("dpo_adapter", plan.dpo_part(), inputs, make)
    report, metrics = artifact.json("report.json"), artifact.path / "metrics.jsonl"
    margins = {"rewards/margins": "margin", "rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    yield from step.result(
        "dpo_adapter",
        artifact,
        reused,
        dpo_verdicts(report, step.bands),
        {
            **report,
            **memory_record(artifact),
            "reference_pairs_from_cache": artifact.json(VOLATILE)["reference_pairs_from_cache"],
            "loss": dg.MetadataValue.md(
                line_plot(metrics, {"loss": "loss"}, "DPO loss", level=report["expected_first_loss"])
            ),
            "margins": dg.MetadataValue.md(
                line_plot(metrics, margins, "implicit rewards (beta x log-ratio)", level=0.0)
            ),
        },
    )


def tokenizer_digest(base: Artifact) -> str:
    """Digest of the files that decide how text becomes tokens."""
    files = base.manifest.files
    parts = [f"{name}:{files[f'model/{name}'].sha256}" for name in TOKENIZER_FILES if f"model/{name}" in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


NODE = Node(
    name="dpo_adapter",
    description="The DPO adapter with its metric log: packed trainer, cached reference, first loss proven to be ln 2.",
    phase="training",
    kinds=frozenset({"pytorch", "huggingface"}),
    body=materialise,
    deps=("sft_checkpoint", "dpo_plan"),
    trains=True,
)
