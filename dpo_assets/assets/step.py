"""One execution of one asset: its upstream artefacts, build-or-reuse, and how results reach the UI."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import VOLATILE, Artifact, ArtifactTree, fingerprint, is_fingerprint, write_json
from dpo_assets.assets.event_log import Event, scrubbed, without_secrets
from dpo_assets.assets.lineage import Conflict, Inputs, Lineage, Read, whole
from dpo_assets.checks.bands import Bands, default_bands
from dpo_assets.checks.catalog import checks_of, severity_of
from dpo_assets.checks.verdict import Level, Verdict, with_severity
from dpo_assets.contract import CheckpointSpec, PlannedSpec, Spec, Stage
from dpo_assets.errors import (
    ConfigError,
    GateError,
    InfrastructureError,
    OutOfMemory,
    StageSilent,
    StageTimeout,
)
from dpo_assets.planning.scoring import GENERATION_BATCH
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import Recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.gpu import GpuResource
from dpo_assets.resources.hub import HubResource
from dpo_assets.resources.launcher import TrainingLauncher

Events = Iterator[Event]
MAX_RETRIES, RETRY_SECONDS = 2, 5.0  # Of faults of infrastructure; the wait doubles.
SILENT_RETRIES = 1  # Of a stage that hung.
MAX_HALVINGS = 3  # Of the token budget, after a stage ran out of memory.
FINGERPRINT, PATH, DIGEST, REUSED = "dpo_assets/fingerprint", "path", "digest", "reused"
UNLESS_TRAINED = (
    ", unless a model was trained on another split since: its pairs stay in train, which makes another dataset"
)
PAGE = 20  # Events that are asked of the event log at a time.


@dataclass(frozen=True)
class Pipeline:
    """What all assets of an instance share. Every name derives from `name`, so instances never collide."""

    name: str
    recipe: Recipe

    def key(self, node: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, node])

    def resource_key(self, resource: str) -> str:
        return f"{self.name}_{resource}"


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
    def tree(self) -> ArtifactTree:
        store = self._resource("artifacts")
        assert isinstance(store, ArtifactStore)
        return store.tree(self.context.instance, self.pipeline.name)

    @property
    def user_key(self) -> bytes:
        """The store's key of the digests that stand for users."""
        store = self._resource("artifacts")
        assert isinstance(store, ArtifactStore)
        return store.user_key(self.context.instance)

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
        reads = self.lineage.reads(self.node)
        own = self._materialised(self.node) if self.only_checks and reads else None
        found = {read.node: self._upstream(read, own) for read in reads}
        if conflicts := self.lineage.conflicts(found, self._made):
            raise ConfigError(self._mixed(conflicts))
        return self.lineage.inputs(self.node, found)

    def _upstream(self, read: Read, own: Artifact | None) -> Artifact:
        """The artefact to read; `own` is the one whose checks are evaluated again, if that is what is done."""
        found = self._materialised(read.node)
        recorded = own.manifest.inputs.get(read.node) if own is not None else None
        if recorded is not None and read.part(found) != recorded:
            found = self._kept(read, recorded)
        if failed := self._failed_gates(found):
            raise ConfigError(
                f"`{self._shown(read.node)}` did not pass {', '.join(failed)}; mend it before going on from it."
            )
        return found

    def _kept(self, read: Read, recorded: str) -> Artifact:
        """The verified artefact whose part that is read has this digest."""
        for told in self.tree.listed(read.node):
            if read.part is whole and told.digest != recorded:
                continue
            found = self.tree.find(read.node, told.path.name)
            with suppress(ConfigError):  # One of an earlier version.
                if found is not None and read.part(found) == recorded:
                    return found
        raise ConfigError(
            f"the `{self._shown(read.node)}` that `{self._shown(self.node)}` was made from is no longer kept, so its "
            f"checks cannot be evaluated again; materialise `{self._shown(self.node)}` again."
        )

    def _made(self, node: str, digest: str) -> list[Artifact]:
        return [told for told in self.tree.listed(node) if told.digest == digest]

    def _mixed(self, conflicts: Sequence[Conflict]) -> str:
        """What does not fit, and the way out."""
        readers: dict[str, list[str]] = {}
        for one in conflicts:
            readers.setdefault(one.node, []).append(f"`{self._shown(one.reader)}`")
        told = [
            f"{', '.join(found)}: made from another `{self._shown(node)}` than is there now"
            for node, found in readers.items()
        ]
        again = ", ".join(map(self._shown, self.lineage.to_make_again(self.node, conflicts, self._latest)))
        roots = " and ".join(f"`{self._shown(node)}`" for node in readers)
        return (
            f"what `{self._shown(self.node)}` reads was not made from one another. {'; '.join(told)}. Materialise "
            f"again, in this order: {again}. Or, to keep what was made, give {roots} its earlier settings and inputs "
            f"back and materialise that: it is reused{UNLESS_TRAINED if 'dpo_dataset' in readers else ''}."
        )

    def _shown(self, node: str) -> str:
        return self.pipeline.key(node).to_user_string()

    def _materialised(self, node: str) -> Artifact:
        """The verified artefact of this run's materialisation of `node`, or else the latest."""
        print_ = self._latest_fingerprint(node)
        if print_ is None:
            raise ConfigError(f"`{self._shown(node)}` has not been materialised yet; materialise it first.")
        found = self.tree.find(node, print_)
        if found is None:
            raise ConfigError(f"the artefact of `{self._shown(node)}` is missing or was damaged; materialise it again.")
        return found

    def _latest(self, node: str) -> Artifact | None:
        """The same as its manifest tells it, if it is there: its files are not verified."""
        print_ = self._latest_fingerprint(node)
        return next((told for told in self.tree.listed(node) if told.fingerprint == print_), None)

    def _latest_fingerprint(self, node: str) -> str | None:
        """That of this run's materialisation, or else of the latest; None where there is none."""
        recent = list(islice(self._materialisations(node), PAGE))
        mine = [metadata for run, metadata in recent if run == self.context.run_id]
        found = mine or [metadata for _, metadata in recent]
        return str(found[0][FINGERPRINT].value) if found else None

    def _materialisations(self, node: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(run, metadata) of every materialisation that names an artefact, newest first.

        Not of one that somebody reported by hand, as the UI offers: nothing was made for it.
        """
        cursor: str | None = None
        while True:
            page = self.context.instance.fetch_materializations(self.pipeline.key(node), limit=PAGE, cursor=cursor)
            for record in page.records:
                metadata = record.asset_materialization.metadata if record.asset_materialization is not None else {}
                if FINGERPRINT in metadata and is_fingerprint(str(metadata[FINGERPRINT].value)):
                    yield record.run_id, metadata
            if not page.has_more:
                return
            cursor = page.cursor

    def build(self, node: str, config: Any, inputs: Inputs, make: Callable[[Path, str], None]) -> tuple[Artifact, bool]:
        """The artefact for `config` and `inputs`, and whether an equal one was there already.

        `make` gets an empty folder and the fingerprint. Where only checks are evaluated, it is the artefact that was
        materialised last, whatever the recipe says by now: that is what the checks of the UI stand on.
        """
        if self.only_checks:
            return self._materialised(node), True
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
        for _, metadata in self._materialisations(node):
            if (made := self.tree.find(node, str(metadata[FINGERPRINT].value))) is not None:
                value = metadata[name].value if name in metadata else None
                yield value, bool(self._failed_gates(made))

    def launch(self, stage: Stage, spec: Spec) -> None:
        """Runs a worker stage to its end.

        A stage that runs out of memory is started again in a fresh process with half the token budget. Pairs per
        optimizer step stay as they are, and so does the result's identity: a step takes more forwards.

        Raises:
            OutOfMemory: when the smallest forwards still need too much, with what to change.
        """
        launcher = self._resource("launcher")
        assert isinstance(launcher, TrainingLauncher)
        hardware = self.recipe.hardware
        while True:
            try:
                launcher.run(self.context, stage, spec, hardware.timeout_minutes * 60, hardware.silent_minutes * 60)
                return
            except OutOfMemory as error:
                spec = self._with_smaller_forwards(stage, spec, error)

    def _with_smaller_forwards(self, stage: Stage, spec: Spec, error: OutOfMemory) -> PlannedSpec:
        if not isinstance(spec, PlannedSpec):
            raise error
        smaller = spec.smaller_forwards()
        if smaller is None or smaller.out_of_memory_retries > MAX_HALVINGS:
            raise OutOfMemory(_given_up(stage, spec, error)) from error
        self.context.log.warning(
            f"stage `{stage}` ran out of memory in forwards of {spec.plan.token_budget} tokens ({error}). A fresh "
            f"process follows with {smaller.plan.token_budget} (retry {smaller.out_of_memory_retries} of "
            f"{MAX_HALVINGS}); pairs per optimizer step stay the same."
        )
        shutil.rmtree(spec.output_dir)
        spec.output_dir.mkdir()
        return smaller

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
        verdicts = [self.judged(verdict) for verdict in verdicts]
        if checks_of(node):  # Another node's artefact may be the same one.
            self._keep_gates(artifact, verdicts)
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

    def _gates_file(self, artifact: Artifact) -> Path:
        return artifact.path.parent / f"{artifact.path.name}.gates.json"

    def _keep_gates(self, artifact: Artifact, verdicts: Sequence[Verdict]) -> None:
        """Whole or not at all: a run that ends in mid-write must leave no open gate."""
        path = self._gates_file(artifact)
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        write_json(partial, {verdict.check: verdict.level for verdict in verdicts})
        partial.replace(path)

    def levels(self, artifact: Artifact) -> dict[str, Level] | None:
        """The outcomes of an artefact's checks, as they were judged last; None where no record can be read."""
        try:
            levels: dict[str, Level] = json.loads(self._gates_file(artifact).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return levels

    def _failed_gates(self, artifact: Artifact) -> list[str]:
        """The checks that hold an artefact back. One is held too where no record of its checks can be read."""
        severities = self.recipe.checks.severity
        if all(severity_of(check.name, severities) == "warn" for check in checks_of(artifact.manifest.kind)):
            return []
        if (levels := self.levels(artifact)) is None:
            return ["its checks, of which no record can be read (execute them again)"]
        return sorted(name for name, level in levels.items() if level == "error")


def memory_record(artifact: Artifact) -> dict[str, int]:
    """The forwards that a training stage ended up with, for its materialisation."""
    if not (artifact.path / VOLATILE).is_file():
        return {}
    said: dict[str, Any] = artifact.json(VOLATILE)
    return {name: int(said[name]) for name in ("token_budget_used", "out_of_memory_retries") if name in said}


def resume_record(artifact: Artifact) -> dict[str, int]:
    """How often a training stage went on from a checkpoint and what that cost, for its materialisation."""
    if not (artifact.path / VOLATILE).is_file():
        return {}
    said: dict[str, Any] = artifact.json(VOLATILE)
    return {
        name: int(said[name]) for name in ("times_resumed", "steps_done_twice", "checkpoints_failed") if name in said
    }


def _given_up(stage: Stage, spec: PlannedSpec, error: OutOfMemory) -> str:
    answers = stage == "evaluate"
    plan, retries = spec.plan.at_release() if answers else spec.plan, spec.out_of_memory_retries
    tried = f" after {retries} {'retry' if retries == 1 else 'retries'} with smaller ones" if retries else ""
    least = "; the longest pair alone takes that many" if plan.token_budget <= plan.longest_pair else ""
    ways = [f"lower feedback.max_length{'' if answers else ' or lora.rank'}", "take a smaller base"]
    if answers:
        least += f", and answers take forwards of {GENERATION_BATCH} prompts that no retry makes smaller"
        ways.insert(0, f"set evaluation.generations below {GENERATION_BATCH}")
    if plan.device == "cuda" and spec.plan.precision != "4bit":
        ways.insert(0, "set hardware.precision to 4bit")
    return (
        f"stage `{stage}` ran out of memory in forwards of {plan.token_budget} tokens{tried}{least}: {error} "
        f"To go on: {', or '.join(ways)}. `dpo-assets plan` says what fits on which card."
    )


def guarded(step: Step, node: str, events: Events) -> Events:
    """Runs an asset's body, keeps secrets out of what it reports, and turns its errors into what Dagster should do.

    A failed gate shows as that check's failure. Faults of configuration are not tried again, nor is a stage for which
    `launch` found no forward small enough, nor one that ran out of time; faults of infrastructure are. Retries are
    asked for here and not by a RetryPolicy, because Dagster follows a policy also when a run is terminated, and would
    start the training again that someone just stopped. A policy that a job brings along has no say in these.
    """
    try:
        yield from map(scrubbed, events)
    except GateError as error:
        fault = Verdict(error.check, "error", error.value, error.band, error.source, error.fix, note=str(error))
        yield scrubbed(step.check_result(node, fault))
        raise final(f"{error} {error.fix}") from None
    except (ConfigError, OutOfMemory, StageTimeout) as error:
        raise final(str(error)) from None
    except InfrastructureError as error:
        said, attempt = scrub(str(error)), step.context.op_execution_context.retry_number
        if attempt >= (SILENT_RETRIES if isinstance(error, StageSilent) else MAX_RETRIES):
            raise final(f"{said}\nGiven up after {attempt + 1} attempts.") from None
        step.context.log.warning(f"attempt {attempt + 1} failed, another follows: {said}")
        wait = RETRY_SECONDS * 2**attempt
        raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=wait) from InfrastructureError(said)
    except Exception as error:
        if isinstance(error, dg.Failure) or (safe := without_secrets(error)) is None:
            raise
        raise safe from None


def final(message: str) -> dg.Failure:
    """A failure, scrubbed, that no retry policy, of whatever job, tries again."""
    return dg.Failure(description=scrub(message), allow_retries=False)
