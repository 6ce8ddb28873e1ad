"""The rollback of a pipeline: a release, as it was staged then, is published again and is the champion.

An earlier one; or the one that is live, where the Hub does not hold it any more.
"""
# No `from __future__ import annotations` here: Dagster reads the annotation of an op's `context` as a class.

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import dagster as dg
from pydantic import Field

from dpo_assets.artifact import Artifact, ArtifactTree, read_kept
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.promotion import history_table, read_ledger
from dpo_assets.assets.publication import RELEASE, refuse_unknown
from dpo_assets.assets.published_model import FILES
from dpo_assets.assets.step import final
from dpo_assets.checks.evidence.ledger import Ledger, Released
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.checks.promotion import REASON
from dpo_assets.errors import ConfigError, DpoAssetsError, GateError
from dpo_assets.locks import IN_USE, shared
from dpo_assets.publishing.commit import Release, publish
from dpo_assets.publishing.plan import ReleaseRecord
from dpo_assets.publishing.secrets import scrub
from dpo_assets.publishing.trace import Trace
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.hub import HubResource

SHOWN_ON = ("promotion", "published_model")


class RollbackConfig(dg.Config):
    """Where a rollback goes, and why."""

    to: str = Field(
        default="",
        description="Number, tag or commit of a release; empty: the one before what is live. The one that is live is "
        "sent again as it was.",
    )
    reason: str = Field(description="Why, in at least 10 characters. The ledger shows it.")


def rollback_job(pipeline: Pipeline) -> dg.JobDefinition:
    """The job of a pipeline that makes an earlier release live again. It trains nothing."""
    needed = {pipeline.resource_key(name) for name in ("artifacts", "hub")}

    @dg.op(
        name=f"{pipeline.name}__rollback",
        description="Publishes an earlier release again, moves the tag `champion` to it, and says so in the ledger.",
        required_resource_keys=needed,
        out=dg.Out(dg.Nothing),
    )
    def roll_back_op(context: dg.OpExecutionContext, config: RollbackConfig) -> Iterator[dg.AssetObservation]:
        store, hub = (getattr(context.resources, pipeline.resource_key(name)) for name in ("artifacts", "hub"))
        assert isinstance(store, ArtifactStore)
        assert isinstance(hub, HubResource)
        tree = store.tree(context.instance, pipeline.name)
        try:
            going_live = LedgerFile.of(tree.root).going_live(context.run_id, context.log.warning)
            with shared(tree.root / IN_USE, context.log.info), going_live:
                ledger = roll_back(pipeline, tree, hub, config.to.strip(), scrub(config.reason.strip()))
        except GateError as error:
            raise final(f"{error} {error.fix}") from None
        except DpoAssetsError as error:
            raise final(str(error)) from None
        live = ledger.live
        assert live is not None, "a rollback makes something live"
        context.log.info(scrub(f"release {live.release} is live again: {live.repo_id}@{live.commit}"))
        withdrawn = withdrawn_since(tree, live.artefact, context.log.warning)
        if withdrawn:
            context.log.warning(f"{withdrawn} pairs behind it were withdrawn since; `dpo-assets provenance` names them")
        # Observed, not materialised: nothing was made, and what the next refresh reads is what was made last.
        for node in SHOWN_ON:
            yield dg.AssetObservation(
                asset_key=pipeline.key(node),
                description=scrub(f"rolled back to release {live.release}: {config.reason}"),
                metadata={
                    "live_release": live.release,
                    "commit": live.commit,
                    "tag": live.tag,
                    "reason": scrub(config.reason),
                    "withdrawn_since": "not known" if withdrawn is None else withdrawn,
                    "history": dg.MetadataValue.md(scrub(history_table(ledger))),
                },
            )

    @dg.job(
        name=f"{pipeline.name}_rollback",
        description=f"Makes an earlier release of `{pipeline.name}` live again: one commit, the tag `champion`, a line "
        "in the ledger. Give a `reason`, and `to` where it is not the release before.",
    )
    def job() -> None:
        roll_back_op()

    return job


def withdrawn_since(tree: ArtifactTree, artefact: str, warn: Callable[[str], None]) -> int | None:
    """As `Trace.withdrawn_since`. Where it cannot be counted, for whatever reason, that is told, and no fault of a
    rollback that is done: the release is live, and a run that is red would be started again."""
    try:
        found = Trace.of(tree.root).withdrawn_since(artefact)
        why = "not all are kept"
    except Exception as error:
        found, why = None, scrub(f"{type(error).__name__}: {error}")
    if found is None:
        warn(f"how many rows behind it were withdrawn since cannot be told: {why}")
    return found


def roll_back(pipeline: Pipeline, tree: ArtifactTree, hub: HubResource, to: str, reason: str) -> Ledger:
    """Makes a release live again, and returns the ledger that says so. Whoever calls holds `LedgerFile.going_live`.

    A call that was stopped on the way is finished by the next one, without a second commit.

    Raises:
        ConfigError: there is no such release, its artefact is gone, it was made for another repository, or the pipeline
            sends nothing.
        PublishError, GateError: as `publish`; the ledger is as it was.
    """
    publishing, again = pipeline.recipe.publishing, f"run the job {pipeline.name}_rollback again"
    if publishing.dry_run or publishing.repo_id is None:
        raise ConfigError("publishing.dry_run is true: this pipeline sends nothing, so a rollback could not either")
    if len(reason) < REASON:
        raise ConfigError(f"a rollback needs a `reason` of at least {REASON} characters: the ledger shows it")
    ledger = read_ledger(tree)
    target = ledger.to_send_again(to)
    if target.repo_id != publishing.repo_id:
        raise ConfigError(
            f"release {target.release} was made for {target.repo_id}, which its card names, and publishing.repo_id is "
            f"{publishing.repo_id}. To go back to it set publishing.repo_id to {target.repo_id}; or name in `to` a "
            f"release that was made for {publishing.repo_id}. {ledger.known_releases()}"
        )
    artifact = _staged(tree, target)
    repository = hub.repository(publishing.repo_id, pipeline.name)
    release = publish(
        repository.api,
        publishing.repo_id,
        artifact.path / RELEASE,
        read_kept(artifact, FILES, ReleaseRecord).files,
        private=publishing.private,
        adopt=publishing.adopt,
        token_variable=hub.token_variable,
        patience=repository.patience,
        pipeline=pipeline.name,
        accept=lambda head: refuse_unknown(head, publishing, tree),
        note=f" (rollback to release {target.release})",
        again=again,
    )
    return LedgerFile.of(tree.root).extend(lambda now: _with_line(now, ledger, target, release, target.repo_id, reason))


def _with_line(now: Ledger, before: Ledger, target: Released, release: Release, repo_id: str, reason: str) -> Ledger:
    if now.live != before.live:
        raise ConfigError(
            f"while release {target.release} was sent again, another release of this pipeline went live. The ledger is "
            "as it was; see which is to be live, and go back again, or materialise `published_model` again."
        )
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return now.rolled_back(target, at=at, repo_id=repo_id, commit=release.champion, reason=reason)


def _staged(tree: ArtifactTree, target: Released) -> Artifact:
    found = tree.find("published_model", target.artefact)
    if found is None:
        raise ConfigError(
            f"release {target.release} was staged in {tree.directory('published_model', target.artefact)}, which "
            f"{tree.missing('published_model', target.artefact)}. Put the folder back from a backup, or name another "
            "release in `to`"
        )
    return found
