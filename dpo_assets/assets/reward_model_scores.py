"""`reward_model_scores`: what a reward model says of the answers of SFT and policy, and how far it can be believed."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from dpo_assets.artifact import Artifact, write_json
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.model_files import download, take_over, told_files
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.judged import reward_model_verdicts
from dpo_assets.checks.reports import RewardModelScores
from dpo_assets.checks.statistics import percent
from dpo_assets.contract import REWARDED, RewardSpec
from dpo_assets.planning.model_folder import refuse_as_reward_model
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.recipe import RewardModelSection, looks_like_hub_id
from dpo_assets.report.tables import table

SHOWN = 20


def materialise(step: Step) -> Events:
    """Scores every answer that `eval_scores` kept, and held-out pairs of people, in the worker."""
    section, inputs = step.recipe.evaluation.reward_model, step.inputs()
    assert section is not None, "the node is wanted where a reward model is declared"
    confidence, plan = step.recipe.evaluation.confidence, read_plan(inputs["dpo_plan"])
    model = None if step.only_checks else _reward_model(step, section)

    def make(folder: Path, print_: str) -> None:
        assert model is not None, "nothing is made where checks alone are evaluated"
        step.launch(
            "reward",
            RewardSpec(
                kind="reward_model_scores",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                base_model=model.path / "model",
                threads=step.recipe.hardware.threads,
                plan=plan,
                answers=inputs["eval_scores"].path / "generations.json",
                people=inputs["dpo_dataset"].path,
                human_pairs=section.human_pairs,
                max_length=section.max_length,
                confidence=confidence,
                name=_named(section),
            ),
        )

    asked = section.model_dump(include={"human_pairs", "max_length"})
    config = {"model": model and model.digest, "confidence": confidence, **asked}
    artifact, reused = step.build("reward_model_scores", config, inputs, make)
    report = RewardModelScores.of(artifact)
    rows = [
        ["the policy's reward is higher", str(report.share)],
        ["corrected by its agreement with people", str(report.corrected)],
        ["agrees with people", str(report.agreement)],
    ]
    yield from step.result(
        "reward_model_scores",
        artifact,
        reused,
        reward_model_verdicts(report),
        {
            "reward_model": report.model,
            "shares": dg.MetadataValue.md(table(["share", f"{percent(report.confidence)} interval"], rows)),
            "at_equal_length": report.share_at_equal_length,
            "mean_difference": str(report.difference),
            "without_a_reward": dg.MetadataValue.json({"answers": report.left_out, "people": report.human_left_out}),
            "answers": dg.MetadataValue.md(_answers(artifact)),
        },
    )


def _answers(artifact: Artifact) -> str:
    told = artifact.json(REWARDED)[:SHOWN]
    rows = [[t["prompt"], t["policy"], t["sft"], t["outcome"], *(f"{r:.3f}" for r in t["rewards"] or ())] for t in told]
    header = ["prompt (last message)", "policy", "SFT", "the policy's is", "reward", "SFT's"]
    return table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def _named(section: RewardModelSection) -> str:
    return f"{section.source} at {section.revision}" if section.revision else section.source


def _reward_model(step: Step, section: RewardModelSection) -> Artifact:
    """The model as an artefact of its own: fetched or copied once, and known by its content."""
    hub = looks_like_hub_id(section.source)
    identity: dict[str, object] = section.model_dump(include={"source", "revision"})
    if not hub:
        refuse_as_reward_model(Path(section.source))
        identity |= {"held": "as copies", "files": told_files(Path(section.source))}  # Linked before.

    def make(folder: Path, _: str) -> None:
        model = folder / "model"
        if hub:
            download(step.hub.api(), section.source, section.revision, model, step.hub.token_variable)
        else:
            take_over(Path(section.source), model)
        refuse_as_reward_model(model)
        write_json(folder / "source.json", {"source": section.source, "revision": section.revision})

    model, _ = step.build("reward_model", identity, Inputs.of("reward_model", {}), make)
    return model


def device_settings(plan: TrainingPlan) -> dict[str, object]:
    """What rewards depend on in a plan: where they are computed, and in which numbers."""
    return {"device": plan.device, "compute": plan.compute}


NODE = Node(
    name="reward_model_scores",
    description="What a reward model prefers of the answers of SFT and policy, corrected by what people preferred.",
    phase="release",
    kinds=frozenset({"pytorch"}),
    body=materialise,
    reads=(followed(device_settings), Read("eval_scores"), Read("dpo_dataset")),
    recipe=("evaluation",),
    trains=True,
    wanted=lambda recipe: recipe.evaluation.reward_model is not None,
)
