"""Whether what a repository hands out is the release that is live. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_assets.publishing.commit import CHAMPION
from dpo_assets.publishing.errors import HubFailure, PublishRefused
from dpo_assets.publishing.hub import HubRepository
from dpo_assets.publishing.plan import PROVENANCE, Head, ReleaseRecord


@dataclass(frozen=True)
class Served:
    """What users of a repository get, held against the commit of the release that is live.

    Attributes:
        instead: where main or the tag `champion` is in its place; empty: both are at it.
        changed: files of the release that somebody changed on main, or took away there.
        unknown: why it could not be asked; empty: it was.
    """

    instead: str = ""
    changed: tuple[str, ...] = ()
    unknown: str = ""


def served(hub: HubRepository, live: str) -> Served:
    """Asks a repository for its main and its tag `champion`.

    A later commit on main with the same list of files in provenance.json is the same release: somebody else committed
    beside it, or it was sent again.

    Args:
        live: the commit of the release, as the ledger says.
    """
    try:
        head = hub.head()
        if head is None:
            return Served(f"{hub.repo_id} is not there, or the token in {hub.token_variable} does not see it")
        tag = hub.tags().get(CHAMPION)
        if tag != live:
            where = "gone" if tag is None else f"at {tag}"
            return Served(f"the tag `{CHAMPION}` of {hub.repo_id} is {where}, and main at {head.commit}")
        # The tag is there, so that the commit is.
        record = head.earlier if head.commit == live else hub.record(live, hub.held(live))
    except (HubFailure, PublishRefused) as error:
        return Served(unknown=str(error))
    if head.earlier != record:
        return Served(f"main of {hub.repo_id} is at {head.commit}, which is not the release at {live}")
    return Served(changed=_changed(head, record))


def _changed(head: Head, record: ReleaseRecord | None) -> tuple[str, ...]:
    listed = {} if record is None else record.files
    lost = [path for path, file in listed.items() if path not in head.files or not head.files[path].holds(file)]
    return (*lost, *([] if PROVENANCE in head.files else [PROVENANCE]))
