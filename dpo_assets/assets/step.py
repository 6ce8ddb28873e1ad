"""One execution of one asset: what its body works with, build-or-reuse, and how results and errors reach the UI."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import Artifact, ArtifactTree, fingerprint
from dpo_assets.assets.event_log import Event, scrubbed, without_secrets
from dpo_assets.assets.gates import closed_gates, keep_levels, kept_levels
from dpo_assets.assets.lineage import Inputs, Lineage
from dpo_assets.assets.materialisations import FINGERPRINT, Materialisations
from dpo_assets.assets.out_of_memory import run_with_smaller_forwards
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.turn import OutOfTurn, await_turn, retries_waited
from dpo_assets.assets.upstream import Upstream
from dpo_assets.checks.bands import Bands, default_bands
from dpo_assets.checks.catalog import checks_of, severity_of
from dpo_assets.checks.verdict import Level, Verdict, with_severity
from dpo_assets.contract import CheckpointSpec, Spec, Stage
from dpo_assets.disk import full, is_full, refuse_closed
from dpo_assets.errors import (
    ConfigError,
    DiskFull,
    GateError,
    InfrastructureError,
    OutOfMemory,
    StageSilent,
    StageTimeout,
)
from dpo_assets.hashing import share_hashes
from dpo_assets.leftovers import HASHED, sweep
from dpo_assets.locks import IN_USE, shared
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import Recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.gpu import GpuResource
from dpo_assets.resources.hub import HubResource
from dpo_assets.resources.launcher import TrainingLauncher

Events = Iterator[Event]
MAX_RETRIES, RETRY_SECONDS = 2, 5.0  # Of faults of infrastructure; the wait doubles.
MAX_WAITS, WAIT_SECONDS = 100_000, 10.0  # Of a step that gives its slot of a pool back while it waits for its turn.
SILENT_RETRIES = 1  # Of a stage that hung.
PATH, DIGEST, REUSED = "path", "digest", "reused"


@dataclass(frozen=True)
class Step:
    """What an asset's body works with."""

    context: dg.AssetExecutionContext
    pipeline: Pipeline
    node: str  # Of several that it makes together, the one whose artefact it is.
    lineage: Lineage
    config: Mapping[str, Any] = field(default_factory=dict)  # What the launchpad said for this run.

    @property
    def recipe(self) -> Recipe:
        return self.pipeline.recipe

    @property
    def bands(self) -> Bands:
        """The numbers of the checks, with what this pipeline changed."""
        return default_bands().with_overrides(self.recipe.checks.bands)

    @property
    def only_checks(self) -> bool:
        """Whether this execution evaluates checks again and makes nothing."""
        return not self.context.selected_asset_keys

    @property
    def store(self) -> ArtifactStore:
        store = self._resource("artifacts")
        assert isinstance(store, ArtifactStore)
        return store

    @property
    def tree(self) -> ArtifactTree:
        return self.store.tree(self.context.instance, self.pipeline.name, self.context.log.warning, self.context.run_id)

    @property
    def user_key(self) -> bytes:
        """The store's key of the digests that stand for users."""
        return self.store.user_key(self.context.instance)

    @property
    def gpu(self) -> GpuResource:
        gpu = self._resource("gpu")
        assert isinstance(gpu, GpuResource)
        return gpu

    @property
    def hub(self) -> HubResource:
        hub = self._resource("hub")
        assert isinstance(hub, HubResource)
        return hub

    def _resource(self, name: str) -> Any:
        return getattr(self.context.resources, self.pipeline.resource_key(name))

    def inputs(self) -> Inputs:
        """Everything that the node declares to read: verified, past its gates, and made from one another.

        Each is this run's artefact, or else the latest. A red one is refused also outside the run that failed: a gate
        holds until its check passes. Where only checks are evaluated, each is what the artefact under the checks was
        made from.

        Raises:
            ConfigError: when one was never made, is gone or damaged or failed a blocking check; and when two of them go
                back to different artefacts of one node, with what to materialise again.
        """
        return Upstream(self.node, self.lineage, self._made).inputs(self.only_checks)

    @property
    def _made(self) -> Materialisations:
        return Materialisations(self.context.instance, self.pipeline, self.tree, self.context.run_id)

    def overtaken_by(self, node: str) -> str | None:
        """The run that made something else of `node` after this run did; None: what this run reads is the latest."""
        return self._made.overtaken_by(node)

    def build(self, node: str, config: Any, inputs: Inputs, make: Callable[[Path, str], None]) -> tuple[Artifact, bool]:
        """The artefact for `config` and `inputs`, and whether an equal one was there already.

        `make` gets an empty folder and the fingerprint. Where only checks are evaluated, it is the artefact that was
        materialised last, whatever the recipe says by now: that is what the checks of the UI stand on.
        """
        if self.only_checks:
            return self._made.artifact(node), True
        print_ = fingerprint(node, config, inputs.digests)
        built = self.tree.find_or_build(node, print_, lambda folder: make(folder, print_), inputs.digests)
        self.tree.forget_checkpoints(node, print_)
        return built

    def checkpoints(self, node: str, print_: str) -> CheckpointSpec:
        """Where and how often the training stage of an artefact keeps what its next try goes on from."""
        hardware = self.recipe.hardware
        return CheckpointSpec(
            folder=self.tree.checkpoints(node, print_),
            share=hardware.checkpoint_share,
            least_seconds=hardware.checkpoint_seconds,
        )

    def found(self, node: str, config: Any, inputs: Inputs) -> Artifact | None:
        """The artefact that `build` would reuse, if there is one."""
        return self.tree.find(node, fingerprint(node, config, inputs.digests))

    def latest(self, node: str, inputs: Inputs) -> Artifact | None:
        """The newest artefact of `node` made from `inputs`, whatever its config was."""
        return self.tree.latest(node, inputs.digests)

    def history(self, node: str, name: str) -> Iterator[tuple[Any, bool]]:
        """(value of a metadata entry, whether a gate holds what was made) of all materialisations, newest first.

        None stands for the value of one without the entry. One whose artefact is gone is left out.
        """
        for _, metadata in self._made.of(node):
            if (made := self.tree.find(node, str(metadata[FINGERPRINT].value))) is not None:
                value = metadata[name].value if name in metadata else None
                yield value, bool(closed_gates(made, self.recipe.checks.severity))

    def launch(self, stage: Stage, spec: Spec) -> None:
        """Runs a worker stage to its end.

        A stage that runs out of memory is started again in a fresh process with half the token budget. Pairs per
        optimizer step stay as they are, and so does the result's identity: a step takes more forwards.

        Raises:
            OutOfMemory: when the smallest forwards still need too much, with what to change.
        """
        launcher = self._resource("launcher")
        assert isinstance(launcher, TrainingLauncher)
        seconds, silent = self.recipe.hardware.timeout_minutes * 60, self.recipe.hardware.silent_minutes * 60
        run_with_smaller_forwards(launcher, self.context, stage, spec, seconds, silent)

    def result(
        self,
        node: str,
        artifact: Artifact,
        reused: bool,
        verdicts: Iterable[Verdict] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Events:
        """The materialisation, with its checks; or the checks alone, where nothing else was asked for.

        The verdicts are kept beside the artefact for `inputs`.
        """
        key = self.pipeline.key(node)
        found = list(verdicts)
        _refuse_other_checks(node, found)
        verdicts = [self.judged(verdict) for verdict in found]
        if checks_of(node):  # Another node's artefact may be the same one.
            keep_levels(artifact, verdicts)
        for verdict in verdicts:
            if not verdict.passed:
                self.context.log.warning(scrub(f"{verdict.headline} {verdict.fix}".strip()))
        said = f"yes: inputs unchanged, {artifact.fingerprint[:12]} was there; nothing was computed again"
        if reused:
            self.context.log.info(f"{node}: reused, inputs are unchanged")
        asked = {check.name for check in self.context.selected_asset_check_keys if check.asset_key == key}
        results = [self.check_result(node, v) for v in verdicts if v.check in asked]
        if key not in self.context.selected_asset_keys:
            yield from results
            return
        yield dg.MaterializeResult(
            asset_key=key,
            data_version=dg.DataVersion(artifact.digest),
            metadata={
                **(metadata or {}),
                REUSED: said if reused else "no",
                PATH: dg.MetadataValue.path(str(artifact.path)),
                DIGEST: artifact.digest,
                "size_mib": round(artifact.size / 2**20, 3),
                FINGERPRINT: artifact.fingerprint,
            },
            check_results=results,
        )

    def judged(self, verdict: Verdict) -> Verdict:
        """The verdict under the severity that the recipe gives its check."""
        return with_severity(verdict, severity_of(verdict.check, self.recipe.checks.severity))

    def check_result(self, node: str, verdict: Verdict) -> dg.AssetCheckResult:
        """A verdict as Dagster shows it."""
        parts: dict[str, Any] = {
            "value": verdict.value,
            "band": verdict.band,
            "band changed": self.bands.reasons.get(verdict.check, ""),
            "source": verdict.source,
            "what to change": verdict.fix,
            "note": verdict.note,
        } | {title: dg.MetadataValue.md(text) for title, text in verdict.shown.items()}
        return dg.AssetCheckResult(
            asset_key=self.pipeline.key(node),
            check_name=verdict.check,
            passed=verdict.passed,
            severity=dg.AssetCheckSeverity.WARN if verdict.level == "warn" else dg.AssetCheckSeverity.ERROR,
            description=verdict.headline if verdict.passed else f"{verdict.headline}. {verdict.fix}".strip(),
            metadata={name: value for name, value in parts.items() if value != ""},
        )

    def levels(self, artifact: Artifact) -> dict[str, Level] | None:
        """The outcomes of an artefact's checks, as they were judged last; None where no record can be read."""
        return kept_levels(artifact)


def _refuse_other_checks(node: str, verdicts: Sequence[Verdict]) -> None:
    """Every check of a node has a verdict, and every verdict a check: Dagster would show neither as a fault.

    Raises:
        RuntimeError: when the body of an asset forgot one, or the catalogue does.
    """
    declared, found = sorted(check.name for check in checks_of(node)), sorted(verdict.check for verdict in verdicts)
    if declared != found:
        raise RuntimeError(f"`{node}` declares the checks {declared}, and its body gave verdicts of {found}")


def guarded(step: Step, node: str, events: Events) -> Events:
    """Runs an asset's body, keeps secrets out of what it reports, and turns its errors into what Dagster should do.

    A failed gate shows as that check's failure. Faults of configuration are not tried again, nor is a stage for which
    `launch` found no forward small enough, nor one that ran out of time; faults of infrastructure are. Retries are
    asked for here and not by a RetryPolicy, because Dagster follows a policy also when a run is terminated, and would
    start the training again that someone just stopped. A policy that a job brings along has no say in these.
    """
    root, say = step.tree.root, step.context.log.info
    try:
        refuse_closed(root)
        if not step.only_checks:
            await_turn(step.context, step.tree)
        sweep(root, say)
        share_hashes(root / HASHED / f"{step.context.run_id}.jsonl")
        # Whoever deletes what is not needed any more waits for those who read.
        with shared(root / IN_USE, say):
            yield from map(scrubbed, events)
    except OutOfTurn as error:
        raise dg.RetryRequested(max_retries=MAX_WAITS, seconds_to_wait=WAIT_SECONDS) from error
    except GateError as error:
        fault = Verdict(error.check, "error", error.value, error.band, error.source, error.fix, note=str(error))
        yield scrubbed(step.check_result(node, fault))
        raise final(f"{error} {error.fix}") from None
    except (ConfigError, DiskFull, OutOfMemory, StageTimeout) as error:
        raise final(str(error)) from None
    except InfrastructureError as error:
        waited = retries_waited(step.context, step.tree)
        said, attempt = scrub(str(error)), step.context.op_execution_context.retry_number - waited
        if attempt >= (SILENT_RETRIES if isinstance(error, StageSilent) else MAX_RETRIES):
            raise final(f"{said}\nGiven up after {attempt + 1} attempts.") from None
        step.context.log.warning(f"attempt {attempt + 1} failed, another follows: {said}")
        wait = RETRY_SECONDS * 2**attempt
        raise dg.RetryRequested(max_retries=MAX_RETRIES + waited, seconds_to_wait=wait) from InfrastructureError(said)
    except Exception as error:
        if is_full(error):
            raise final(full(root, 0, scrub(str(error)))) from None
        if isinstance(error, dg.Failure) or (safe := without_secrets(error)) is None:
            raise
        raise safe from None


def final(message: str) -> dg.Failure:
    """A failure, scrubbed, that no retry policy, of whatever job, tries again."""
    return dg.Failure(description=scrub(message), allow_retries=False)
