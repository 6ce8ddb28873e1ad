"""What a demo run showed, collected from its event log and artefacts."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import open_artifact, without_nan
from dpo_assets.assets.graph import NODES
from dpo_assets.assets.step import PATH, REUSED
from dpo_assets.checks.bands import first_loss_holds
from dpo_assets.checks.reports import DpoReport, EvaluationReport

_STAGE = re.compile(r"started worker stage `(\w+)`")
TRAINING_STAGES = ("sft", "dpo")


@dataclass
class FailedCheck:
    """A check that did not pass, with everything needed to act on it."""

    asset: str
    check: str
    blocked: bool
    value: str
    band: str
    source: str
    fix: str


@dataclass
class Summary:
    """Facts of one run."""

    run_id: str
    status: str
    seconds: float
    materialised: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    worker_stages: list[str] = field(default_factory=list)
    failed_checks: list[FailedCheck] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    pairs: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    dpo: DpoReport | None = None
    scores: EvaluationReport | None = None
    verdict: dict[str, str] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    release: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems

    def as_json(self) -> str:
        reports = {
            name: report.model_dump(mode="json") if report else {}
            for name, report in (("dpo", self.dpo), ("scores", self.scores))
        }
        told = without_nan(asdict(self) | reports | {"holds": self.holds})
        return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)


def summarise(instance: dg.DagsterInstance, run_id: str) -> Summary:
    """Reads a finished run."""
    stats = instance.get_run_stats(run_id)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    summary = Summary(run_id, run.status.value, round((stats.end_time or 0) - (stats.start_time or 0), 1))
    folders: dict[str, Path] = {}
    for entry in instance.all_logs(run_id):
        event = entry.dagster_event
        if event is None:
            if found := _STAGE.search(entry.user_message):
                summary.worker_stages.append(found[1])
        elif event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
            materialisation = event.step_materialization_data.materialization
            metadata = materialisation.metadata
            name = materialisation.asset_key.path[-1]
            folders[name] = Path(str(metadata[PATH].value))
            summary.materialised.append(name)
            if str(metadata[REUSED].value) != "no":
                summary.reused.append(name)
            if name == "promotion":
                summary.verdict = {"decision": _text(metadata, "verdict"), "reason": _text(metadata, "verdict_reason")}
            if name == "published_model":
                summary.release = _text(metadata, "release")
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            _add_check(summary, event.asset_check_evaluation_data)
        elif event.event_type == dg.DagsterEventType.STEP_FAILURE:
            failure = event.step_failure_data
            described = failure.user_failure_data.description if failure.user_failure_data else None
            summary.errors.append(described or str(failure.error.message if failure.error else event.message))
    _read_artifacts(summary, folders)
    summary.problems = _problems(summary)
    return summary


def _add_check(summary: Summary, evaluation: Any) -> None:
    if evaluation.passed:
        return
    metadata = evaluation.metadata
    summary.failed_checks.append(
        FailedCheck(
            asset=evaluation.asset_key.path[-1],
            check=evaluation.check_name,
            blocked=evaluation.severity == dg.AssetCheckSeverity.ERROR,
            value=_text(metadata, "value"),
            band=_text(metadata, "band"),
            source=_text(metadata, "source"),
            fix=_text(metadata, "what to change"),
        )
    )


def _text(metadata: Any, name: str) -> str:
    return str(metadata[name].value) if name in metadata else ""


def _read_artifacts(summary: Summary, folders: dict[str, Path]) -> None:
    def read(name: str, file: str) -> Any:
        return json.loads((folders[name] / file).read_text(encoding="utf-8")) if name in folders else {}

    report = read("dpo_dataset", "report.json")
    counts = ("rows_in", "accepted", "quarantined", "duplicates", "reasons", "train_pairs", "eval_pairs")
    summary.pairs = {key: report[key] for key in counts if key in report}
    plan = read("dpo_plan", "plan.json")
    choices = ("precision", "precision_reason", "device_name", "sft_steps", "dpo_steps")
    summary.plan = {key: plan[key] for key in choices if key in plan}
    if "dpo_adapter" in folders:
        summary.dpo = DpoReport.of(open_artifact(folders["dpo_adapter"]))
    if "eval_scores" in folders:
        summary.scores = EvaluationReport.of(open_artifact(folders["eval_scores"]))
    summary.answers = read("eval_scores", "generations.json") or []


def _problems(summary: Summary) -> list[str]:
    """Everything that keeps the demo from exit status 0."""
    problems = []
    if summary.status != "SUCCESS":
        problems.append(f"the run ended as {summary.status}")
    missing = [node.name for node in NODES if node.name not in summary.materialised]
    if missing:
        problems.append(f"not materialised: {', '.join(missing)}")
    problems += [f"check {c.check} on {c.asset} failed" for c in summary.failed_checks if c.blocked]
    dpo = summary.dpo
    if (
        dpo
        and dpo.expected_first_loss is not None
        and not first_loss_holds(dpo.first_loss, dpo.expected_first_loss, dpo.first_loss_tokens)
    ):
        problems.append(f"the first loss is {dpo.first_loss}")
    if summary.release and not (Path(summary.release) / "README.md").is_file():
        problems.append(f"no release lies at {summary.release}")
    return problems
