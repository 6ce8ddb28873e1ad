"""`gguf_model`: the merged model as one file for llama.cpp and Ollama, read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import Artifact
from dpo_assets.assets.base_model import in_worker, read_facts
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.gguf import gguf_verdicts
from dpo_assets.checks.reports import GgufReport, GgufWeights
from dpo_assets.contract import GGUF_FOLDER, MODELFILE, GgufSpec
from dpo_assets.publishing.loading import gguf_upload_line, llama_server_line, ollama_line


def materialise(step: Step) -> Events:
    """Converts the merged model, and holds what the file holds against it."""
    inputs = step.inputs()
    merged, base = inputs["merged_model"], inputs["base_model"]

    def make(folder: Path, print_: str) -> None:
        step.launch("gguf", _spec(step, inputs, merged, base, folder, print_))

    artifact, reused = step.build("gguf_model", _config(step), inputs, make)
    report = GgufReport.of(artifact)
    folder = artifact.path / GGUF_FOLDER
    file, modelfile = folder / report.file, folder / MODELFILE
    yield from step.result(
        "gguf_model",
        artifact,
        reused,
        gguf_verdicts(report),
        {
            "file": dg.MetadataValue.path(str(file)),
            "type": report.type,
            "converter": report.converter,
            "llama_server": llama_server_line(str(file), read_facts(base).template_arguments),
            "ollama": ollama_line(_name(step), str(modelfile)),
            "modelfile": dg.MetadataValue.md(_block(modelfile.read_text(encoding="utf-8"))),
            "upload": gguf_upload_line(step.recipe.publishing.repo_id or f"YOUR-ORG/{_name(step)}", str(folder)),
            **({"no_ollama_template": report.template} if report.template else {}),
            **_weights(report),
        },
    )


def rehearse(step: Step, base: Artifact) -> None:
    """Before anything is trained for it: whether the converter takes the base, which a merged model is stored like.

    Settings, tokenizer and the name of every tensor are converted, and nothing is written.

    Raises:
        ConfigError: there is no converter, or it refuses the model; with the ways out.
    """
    if step.recipe.publishing.gguf is None or step.only_checks:
        return
    inputs = Inputs.of("gguf_model", {"base_model": base})

    def make(folder: Path, print_: str) -> None:
        step.launch("gguf", _spec(step, inputs, base, base, folder, print_, rehearsal=True))

    step.build("gguf_rehearsal", _config(step), inputs, make)


def _spec(
    step: Step, inputs: Inputs, model: Artifact, base: Artifact, folder: Path, print_: str, *, rehearsal: bool = False
) -> GgufSpec:
    settings = step.recipe.publishing.gguf
    assert settings is not None, "the node is wanted where the recipe has a section for it"
    return GgufSpec(
        kind="gguf_rehearsal" if rehearsal else "gguf_model",
        output_dir=folder,
        fingerprint=print_,
        inputs=inputs.digests,
        threads=step.recipe.hardware.threads,
        **in_worker(base) | {"base_model": model.path / "model"},
        name=_name(step),
        type=settings.type,
        converter=Path(settings.converter) if settings.converter else None,
        rehearsal=rehearsal,
    )


def _config(step: Step) -> dict[str, Any]:
    settings = step.recipe.publishing.gguf
    assert settings is not None, "the node is wanted where the recipe has a section for it"
    return {"name": _name(step), **settings.model_dump()}


def _name(step: Step) -> str:
    """As the release is called; a file and a model of Ollama can be called so too."""
    name = (step.recipe.publishing.repo_id or step.pipeline.name).split("/")[-1]
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)


def _weights(report: GgufReport) -> dict[str, Any]:
    if not isinstance(report.weights, GgufWeights):
        return {"weights": f"not compared: {report.weights.not_measured}"}
    return {
        "kl_per_token": report.weights.kl_per_token,
        "same_next_token": report.weights.agreement,
        "largest_difference": report.weights.largest_difference,
    }


def _block(text: str) -> str:
    return f"```\n{text}```" if "```" not in text else f"~~~~\n{text}~~~~"


NODE = Node(
    name="gguf_model",
    description="The merged model as one GGUF file for llama.cpp and Ollama, read back and compared.",
    phase="release",
    kinds=frozenset({"gguf"}),
    body=materialise,
    reads=(Read("merged_model"), Read("base_model")),
    recipe=("publishing",),
    wanted=lambda recipe: recipe.publishing.gguf is not None,
)
