"""The retention of a pipeline: who needs what of its store, and the job that shows or deletes the rest."""
# No `from __future__ import annotations` here: Dagster reads the annotation of an op's `context` as a class.

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import dagster as dg
from pydantic import Field

from dpo_assets import score_file
from dpo_assets.artifact import ArtifactTree, is_fingerprint
from dpo_assets.assets.graph import nodes_of
from dpo_assets.assets.kept_models import forget_splits
from dpo_assets.assets.materialisations import FINGERPRINT
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.promotion import read_ledger
from dpo_assets.assets.step import final
from dpo_assets.checks.evidence.ledger import Decided, Ledger
from dpo_assets.disk import gib
from dpo_assets.errors import DpoAssetsError, InfrastructureError
from dpo_assets.locks import IN_USE, if_nobodys
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import RetentionSection
from dpo_assets.report.tables import table
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.retention import DAY, Aside, Choice, Needed, choose, delete, delete_aside, frees, old_aside, stored

SCORED = 4  # Models that a refresh scores pairs by: the reference, and what is evaluated.
RECENT = 100  # Materialisations of a node that are looked at for runs that are not finished.
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


class RetentionConfig(dg.Config):
    """Whether anything is deleted."""

    delete: bool = Field(default=False, description="Delete what the list shows; without it, it is only shown.")


@dataclass(frozen=True)
class Retained:
    """What a call chose, what goes beside artefacts, what it deleted, and the bytes that this frees, or would."""

    choice: Choice
    aside: Sequence[Aside]
    deleted: int
    freed: int

    @property
    def also(self) -> str:
        """What is said beside the number of artefacts."""
        return f" and {len(self.aside)} folders of checkpoints or damaged models" if self.aside else ""

    @property
    def rows(self) -> list[tuple[str, str, int, str]]:
        """Kind, name, bytes and reason of all that goes."""
        artefacts = [(one.kind, one.fingerprint[:12], one.size, why) for one, why in self.choice.gone.items()]
        return artefacts + [(one.kind, one.path.name, one.size, one.why) for one in self.aside]


def retain(
    instance: dg.DagsterInstance, pipeline: Pipeline, tree: ArtifactTree, say: Callable[[str], None], *, really: bool
) -> Retained:
    """Chooses what of a pipeline's store is kept, and deletes the rest if that is `really` wanted.

    Nothing is deleted while a step of any run reads or writes the store, and none begins meanwhile.

    Raises:
        InfrastructureError: somebody is at work in the store.
        ConfigError: the ledger does not hold, so that nobody can say what a rollback may want.
    """
    rules = pipeline.recipe.retention
    if not really:
        choice, aside = _chosen(instance, pipeline, tree), old_aside(tree.root, rules, time.time())
        return Retained(choice, aside, 0, frees(tree.root, list(choice.gone)) + sum(one.size for one in aside))
    tree.root.mkdir(parents=True, exist_ok=True)
    with if_nobodys(tree.root / IN_USE) as free:
        if not free:
            raise InfrastructureError(
                f"a run is at work in {tree.root}: nothing was deleted. Call it again afterwards."
            )
        choice = _chosen(instance, pipeline, tree)
        aside = old_aside(tree.root, rules, time.time())
        freed = frees(tree.root, list(choice.gone))
        deleted = sum(1 for _ in delete(tree.root, choice.gone, say))
        freed += delete_aside(tree.root, aside, say)
        _forget(tree, rules, say)
    return Retained(choice, aside, deleted, freed)


def _forget(tree: ArtifactTree, rules: RetentionSection, say: Callable[[str], None]) -> None:
    """What is remembered of models that are gone, beside their artefacts."""
    splits = forget_splits(tree)
    since = time.time() - rules.keep_days * DAY
    scores = score_file.forget(tree.root / score_file.FILE, SCORED * rules.keep_models, since)
    if splits or scores:
        say(f"forgot {scores} kept scores and the splits of {splits} training sets, of models that are gone")


def _chosen(instance: dg.DagsterInstance, pipeline: Pipeline, tree: ArtifactTree) -> Choice:
    needed = [
        *of_ledger(read_ledger(tree), pipeline.recipe.retention.keep_releases),
        *of_event_log(instance, pipeline),
    ]
    return choose(stored(tree), needed, pipeline.recipe.retention, time.time())


def of_ledger(ledger: Ledger, keep_releases: int) -> Iterator[Needed]:
    """The champion, the last releases, which a rollback may want, what each of them was held against, and the
    challenger that was decided on last."""
    latest = {one.release: one for one in ledger.releases}
    numbers = sorted(latest)[-keep_releases:] if keep_releases else []
    if ledger.live is not None:
        yield Needed("published_model", ledger.live.artefact, "live")
        numbers = sorted({*numbers, ledger.live.release})
    for number in numbers:
        release = latest[number]
        live = ledger.live is not None and ledger.live.release == number
        why = f"release {number}, live" if live else f"release {number}, for a rollback"
        yield Needed("published_model", release.artefact, why)
        yield Needed("merged_model", release.challenger, why)
        decided = ledger.lines[release.decision - 1]
        if decided.champion is not None:
            yield Needed("merged_model", decided.champion, f"release {number} was held against it")
    if decisions := [line for line in ledger.lines if isinstance(line, Decided)]:
        yield Needed("merged_model", decisions[-1].challenger, "decided on last")


def of_event_log(instance: dg.DagsterInstance, pipeline: Pipeline) -> Iterator[Needed]:
    """The latest materialisation of every node, and all of runs that are not finished."""
    running = {run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))}
    for node in nodes_of(pipeline.recipe):
        latest = True
        for record in instance.fetch_materializations(pipeline.key(node.name), limit=RECENT).records:
            metadata = record.asset_materialization.metadata if record.asset_materialization is not None else {}
            if FINGERPRINT not in metadata or not is_fingerprint(str(metadata[FINGERPRINT].value)):
                continue
            print_ = str(metadata[FINGERPRINT].value)
            if latest:
                yield Needed(node.name, print_, "materialised last")
            elif record.run_id in running:
                yield Needed(node.name, print_, f"run {record.run_id} is not finished")
            latest = False


def retention_job(pipeline: Pipeline) -> dg.JobDefinition:
    """The job of a pipeline that shows what of its store may go, and deletes it when it is told to."""

    @dg.op(
        name=f"{pipeline.name}__retention",
        description="Lists what the recipe's `retention` would delete; with `delete: true` it does.",
        required_resource_keys={pipeline.resource_key("artifacts")},
    )
    def retain_op(context: dg.OpExecutionContext, config: RetentionConfig) -> dg.Output[int]:
        store = getattr(context.resources, pipeline.resource_key("artifacts"))
        assert isinstance(store, ArtifactStore)
        tree = store.tree(context.instance, pipeline.name, context.log.warning, context.run_id)
        try:
            found = retain(
                context.instance, pipeline, tree, lambda said: context.log.info(scrub(said)), really=config.delete
            )
        except DpoAssetsError as error:
            raise final(str(error)) from None
        did = "deleted" if config.delete else "would be deleted"
        count = found.deleted if config.delete else len(found.choice.gone)
        context.log.info(
            f"{count} artefacts{found.also} {did}; {len(found.choice.kept)} are kept; {gib(found.freed)} freed"
        )
        return dg.Output(
            count,
            metadata={
                did: dg.MetadataValue.md(
                    table(["kind", "artefact", "bytes", "why"], [list(row) for row in found.rows])
                ),
                "bytes freed": found.freed,
                "kept": len(found.choice.kept),
            },
        )

    @dg.job(
        name=f"{pipeline.name}_retention",
        description=f"Shows what of the store of `{pipeline.name}` is not needed any more, and deletes it with "
        "`delete: true`. Feedback, datasets, scores and decisions always stay.",
    )
    def job() -> None:
        retain_op()

    return job
