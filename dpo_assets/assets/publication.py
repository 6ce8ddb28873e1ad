"""What the assets ask of the Hub: whether a release may go there, what it would do there, and to send it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpo_assets.artifact import Artifact, ArtifactTree, write_json
from dpo_assets.assets.step import Step
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.planning.licence import Licence
from dpo_assets.publishing.access import check_access
from dpo_assets.publishing.commit import Release, preview, publish
from dpo_assets.publishing.errors import HubFailure, HubOffline, PublishRefused
from dpo_assets.publishing.plan import FileRecord, Head, ReleasePlan, first_release
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import PublishingSection

RELEASE = "release"


def access_ahead(step: Step, licence: Licence | None) -> dict[str, str]:
    """Before anything is trained for a release that will be sent: whether token, repository and licence let it.

    A Hub that does not answer now stops no training: what is made is kept, and can be sent when it answers again.

    Returns:
        what is known, for the materialisation; nothing for a dry run.

    Raises:
        PublishRefused: the release would be refused, with the way out.
    """
    publishing = step.recipe.publishing
    if publishing.dry_run or step.only_checks:
        return {}
    assert publishing.repo_id is not None, "the recipe requires repo_id when dry_run is false"
    hub = step.hub.repository(publishing.repo_id, step.pipeline.name)
    try:
        said = check_access(hub, private=publishing.private, adopt=publishing.adopt, licence=licence)
    except HubFailure as error:
        said = scrub(f"not known: {error}")
        step.context.log.warning(f"whether {publishing.repo_id} can be published is {said}")
    return {"release_access": said}


def refuse_unknown(head: Head, publishing: PublishingSection, tree: ArtifactTree) -> None:
    """A release of this pipeline whose decision its ledger does not know: the ledger there was another one.

    The ledger is read after the head: one read before would not know a release that was made in between.

    Raises:
        PublishRefused: with the way out.
        ConfigError: the ledger does not hold.
    """
    if head.earlier is None or not head.earlier.ledger or publishing.adopt == publishing.repo_id:
        return
    ledger = LedgerFile.of(tree.root).read()
    try:
        ledger.refuse_lost({head.earlier.ledger: f"{publishing.repo_id} at {head.commit}"})
    except ConfigError as error:
        raise PublishRefused(
            f"{error}. Nothing was sent. Where no copy is left, publishing.adopt: {publishing.repo_id} begins anew"
        ) from None


@dataclass(frozen=True)
class Publication:
    """One staged release and the repository that it is for."""

    step: Step
    artifact: Artifact
    files: Mapping[str, FileRecord]

    @property
    def operations_file(self) -> Path:
        """The operations of the last plan. Beside the artefact: they depend on what the repository held then."""
        return self.artifact.path.with_name(f"{self.artifact.path.name}.operations.json")

    def plan(self) -> tuple[ReleasePlan, str]:
        """What a release would do now, and why it would be refused (empty: it would not)."""
        publishing, hub = self.step.recipe.publishing, self.step.hub
        if publishing.repo_id is None:
            return self._unasked("publishing.repo_id names no repository"), ""
        if hub.token() is None:
            return self._unasked(f"{hub.token_variable} is not set, so {publishing.repo_id} was not asked"), ""
        try:
            repository = hub.repository(publishing.repo_id, self.step.pipeline.name)
            plan = preview(
                repository, self.files, private=publishing.private, adopt=publishing.adopt, accept=self._accept
            )
        except (HubFailure, HubOffline) as error:
            return self._unasked(scrub(f"{publishing.repo_id} was not asked: {error}")), ""
        except PublishRefused as error:
            return self._unasked("the release would be refused"), scrub(str(error))
        except GateError as error:
            return self._unasked("the release would be refused"), scrub(f"{error}: {error.fix}")
        self._keep(plan)
        return plan, ""

    def send(self) -> Release:
        """Publishes; the operations are on the disk before the first of them is sent."""
        publishing, hub = self.step.recipe.publishing, self.step.hub
        assert publishing.repo_id is not None, "the recipe requires repo_id when dry_run is false"
        repository = hub.repository(publishing.repo_id, self.step.pipeline.name)
        return publish(
            repository.api,
            publishing.repo_id,
            self.artifact.path / RELEASE,
            self.files,
            private=publishing.private,
            adopt=publishing.adopt,
            token_variable=hub.token_variable,
            patience=repository.patience,
            pipeline=repository.pipeline,
            planned=self._keep,
            accept=self._accept,
        )

    def _accept(self, head: Head) -> None:
        refuse_unknown(head, self.step.recipe.publishing, self.step.tree)

    def _unasked(self, why: str) -> ReleasePlan:
        plan = replace(first_release(self.files, f"as for an empty repository: {why}"), asked=False)
        self._keep(plan)
        return plan

    def _keep(self, plan: ReleasePlan) -> None:
        partial = self.operations_file.with_name(f"{self.operations_file.name}.tmp-{os.getpid()}")
        write_json(partial, [asdict(operation) for operation in plan.operations])
        partial.replace(self.operations_file)
