"""One release as one atomic commit: stage a folder by allow-list, plan against the head, send, read back, tag."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.disk import share_file
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.planning.companions import CARD, copy_files, is_released
from dpo_assets.publishing.errors import Passing, PublishRefused, StaleHead
from dpo_assets.publishing.hub import AGAIN, DEFAULT_PATIENCE, HubRepository, Patience
from dpo_assets.publishing.plan import (
    MADE_BY,
    PROVENANCE,
    FileRecord,
    Head,
    ReleasePlan,
    first_release,
    plan_release,
    refuse_public,
)
from dpo_assets.publishing.secrets import find_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CHAMPION = "champion"  # Tag of what is live.
Accept = Callable[[Head], None]  # Told of a head; raises where nothing must be built upon it.
# A release holds these, what belongs to a model beside its weights (`is_released`), and nothing else. Pickles,
# optimizer states and training_args.bin (which holds the token in clear text) can never be among them.
ALLOWED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
)


@dataclass(frozen=True)
class Release:
    """Where a release ended up.

    `champion`: the commit that the tag of this name points at, which holds the release; the head, unless an earlier one
    held it already. `sent`: this call made the commit; otherwise the Hub held the release already. `read_back`: this
    call streamed every byte of it and compared; otherwise its tag says that an earlier one did, and this one compared
    the Hub's digests.
    """

    url: str
    commit: str
    champion: str
    tag: str
    sent: bool
    read_back: bool
    plan: ReleasePlan


def stage(source: Path, target: Path, card: str, provenance: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Gathers what a release may hold, adds card and provenance, and returns the files by name, in order of names.

    Weights take no room a second time: `source` is of a sealed artefact, and both names are of one read-only file. Both
    manifests hold its digest, so that a byte that changes under either name is found by whoever opens one of them.

    provenance.json lists the others: by that list the next release knows which files of a repository are its own.

    Raises:
        ConfigError: when a text file of the release holds something shaped like a credential.
    """
    for path in sorted({p for pattern in ALLOWED for p in source.glob(pattern) if p.is_file()}):
        share_file(path, target / path.name)
    copy_files(source, target, is_released)
    (target / CARD).write_text(card, encoding="utf-8")
    (target / PROVENANCE).unlink(missing_ok=True)
    files = {name: FileRecord.of(target / name) for name in staged_files(target)}
    record = {"made_by": MADE_BY, "files": {name: file.model_dump() for name, file in files.items()}}
    text = json.dumps({**provenance, **record}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (target / PROVENANCE).write_text(text, encoding="utf-8")
    files[PROVENANCE] = FileRecord.of(target / PROVENANCE)
    for name in staged_files(target):
        path = target / name
        if path.suffix != ".safetensors" and (
            kinds := find_secrets(path.read_text(encoding="utf-8", errors="replace"))
        ):
            raise ConfigError(f"{name} of the release seems to hold a {', a '.join(kinds)}; nothing was sent.")
    return dict(sorted(files.items()))


def staged_files(folder: Path) -> list[str]:
    """The files of a staged release, by their paths in the repository, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def content_tag(files: Mapping[str, FileRecord]) -> str:
    """A tag that names the content: equal releases get equal tags."""
    rows = [[path, file.sha256] for path, file in files.items()]
    return "content-" + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def preview(
    hub: HubRepository,
    files: Mapping[str, FileRecord],
    *,
    private: bool,
    adopt: str | None,
    accept: Accept = lambda head: None,
) -> ReleasePlan:
    """The plan that `publish` would make now. Nothing is written.

    Raises:
        GateError, PublishRefused: as `publish`.
        HubFailure: the Hub did not answer.
    """
    head = hub.head()
    if head is None:
        how = "private" if private else "public"
        return first_release(files, f"{hub.repo_id} does not exist yet; it would be made, {how}")
    _tagged(hub, files)
    plan = _plan(files, head, hub.repo_id, private, adopt, accept)
    champion_commit(hub, head, adopt)
    return plan


def publish(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: Mapping[str, FileRecord],
    *,
    private: bool,
    adopt: str | None = None,
    token_variable: str = "HF_TOKEN",
    patience: Patience = DEFAULT_PATIENCE,
    pipeline: str = "",
    planned: Callable[[ReleasePlan], None] = lambda _: None,
    accept: Accept = lambda head: None,
    note: str = "",
    again: str = AGAIN,
) -> Release:
    """Sends a staged release as one commit on the head that was read, compares what arrived, and tags it.

    The plan is made against the head, and what it lists is what is sent. Where somebody else commits in between, it is
    made once more. A commit whose answer was lost is found there and not made twice. The tag comes last, and says that
    every byte was read back. Where it, or the tag `champion`, is at the head already, the Hub's digests of what lies
    there are compared, and nothing is written. After it, the tag `champion` is moved to the release; where the Hub
    stops in between, the next call goes on from there.

    Args:
        files: what `stage` returned for `folder`.
        adopt: the repository, where its files of others may be replaced when the release needs their names.
        token_variable: environment variable that holds the token, for messages.
        pipeline: whose releases there are ours; empty: those of any.
        planned: told of the plan before anything of it is sent, and again when it is made anew.
        accept: told of every head before something is built upon it; raises where it must not be.
        note: for the message of the commit.
        again: how whoever reads an error goes on from it.

    Raises:
        PublishRefused: the token is refused or may not write there; the repository is public and must not be, or holds
            files of others, or a tag `champion` of theirs.
        GateError: what the Hub holds is not what was sent, or not what its tag says.
        HubFailure: on any other refusal of the Hub, with secrets masked.
    """
    hub = HubRepository(api, repo_id, token_variable, patience, pipeline, again)
    tag = content_tag(files)
    found = hub.head()
    if found is None:
        hub.create(private)
        found = hub.head()
    tagged = _tagged(hub, files)
    plan_on = partial(_plan, files, repo_id=repo_id, private=private, adopt=adopt, accept=accept)
    champion = None
    if found is not None:
        plan_on(found)  # What is refused is refused before anything else is asked.
        champion = champion_commit(hub, found, adopt)
    head, sent, plan = _commit(hub, folder, plan_on, found, planned, f"Release {tag}{note}")
    url = f"{api.endpoint}/{repo_id}"
    if tagged == head or (champion == head and not sent):
        live = _crown(hub, files, champion, head)
        return Release(url, head, live, tag, sent=False, read_back=False, plan=plan)
    if wrong := _unlike(hub, files, head) or _unread(hub, files, head):
        raise _not_equal(
            f"{', '.join(wrong)} at {repo_id}@{head} is not what was sent",
            f"do not use that commit; it has no tag. To read it once more, {again}. "
            "Where that fails too, what the Hub stores is damaged: name another repo_id, or tell who runs that Hub",
        )
    # Last: the tag says that the content was read back. Going back to an older release leaves its tag where it is.
    if tagged is None:
        hub.tag(tag, head)
        if (there := hub.tags().get(tag)) != head:
            raise _not_equal(
                f"tag {tag} of {repo_id} points at {there}, and the release is {head}",
                f"delete the tag {tag} of {repo_id}, and {again}",
            )
    live = _crown(hub, files, champion, head)
    return Release(url, head, live, tag, sent=sent, read_back=True, plan=plan)


def _commit(
    hub: HubRepository,
    folder: Path,
    plan_on: Callable[[Head], ReleasePlan],
    head: Head | None,
    planned: Callable[[ReleasePlan], None],
    message: str,
) -> tuple[str, bool, ReleasePlan]:
    """(commit that holds the release, whether this call made it, the plan by which it did)."""
    waits, others = list(hub.patience.waits), 1
    unanswered: ReleasePlan | None = None
    while True:
        if head is None:
            raise PublishRefused(f"{hub.repo_id} was made, and the token in {hub.token_variable} does not see it.")
        plan = plan_on(head)
        if unanswered is not None and not plan.changes:
            return head.commit, True, unanswered  # Its answer was lost, and it was made.
        planned(plan)
        if not plan.changes:
            return head.commit, False, plan
        try:
            return hub.commit(plan, folder, message), True, plan
        except StaleHead:
            if others == 0:
                raise
            others -= 1
        except Passing as error:
            if not waits:
                raise
            unanswered = plan
            hub.pause(waits.pop(0), error)
        head = hub.head()


def _tagged(hub: HubRepository, files: Mapping[str, FileRecord]) -> str | None:
    """The commit that has the tag of this content already.

    Raises:
        GateError: something else lies there.
    """
    tag = content_tag(files)
    found = hub.tags().get(tag)
    if found is not None and _unlike(hub, files, found):
        raise _not_equal(
            f"tag {tag} of {hub.repo_id} points at {found}, which holds something else; nothing was sent",
            f"delete the tag {tag} of {hub.repo_id}, and {hub.again}",
        )
    return found


def champion_commit(hub: HubRepository, head: Head, adopt: str | None) -> str | None:
    """The commit that the tag `champion` points at now.

    Raises:
        PublishRefused: no release of this pipeline lies there: the tag is somebody else's, and not adopted.
    """
    there = hub.tags().get(CHAMPION)
    if there is None or adopt == hub.repo_id or (there == head.commit and head.earlier is not None):
        return there
    record = hub.record(there, hub.held(there))
    if record is None or hub.pipeline not in ("", record.pipeline):
        raise PublishRefused(
            f"the tag `{CHAMPION}` of {hub.repo_id} points at {there}, which is no release of this pipeline. Nothing "
            f"was sent. Delete the tag on the Hub; or adopt the repository with publishing.adopt: {hub.repo_id}"
        )
    return there


def _crown(hub: HubRepository, files: Mapping[str, FileRecord], champion: str | None, head: str) -> str:
    """Moves the tag `champion` to a release that was verified, and returns the commit that it points at.

    One whose commit holds the release already stays, whatever others committed since. Tags of the Hub cannot be moved:
    it is taken away and made again, and whoever is stopped in between leaves none, which the next call makes.

    Raises:
        GateError: it is elsewhere afterwards.
    """
    if champion is not None and (champion == head or not _unlike(hub, files, champion)):
        return champion
    if champion is not None:
        hub.untag(CHAMPION)
    hub.tag(CHAMPION, head)
    if (there := hub.tags().get(CHAMPION)) != head:
        raise _not_equal(
            f"tag {CHAMPION} of {hub.repo_id} points at {there}, and the release is {head}",
            f"see who else moves the tag {CHAMPION} of {hub.repo_id}, and {hub.again}",
        )
    return head


def _plan(
    files: Mapping[str, FileRecord], head: Head, repo_id: str, private: bool, adopt: str | None, accept: Accept
) -> ReleasePlan:
    refuse_public(head, repo_id, private)
    plan = plan_release(files, head, repo_id, adopt)
    accept(head)
    return plan


def _unlike(hub: HubRepository, files: Mapping[str, FileRecord], commit: str) -> list[str]:
    """Files that a commit lacks, or that differ by the Hub's own digests: sha256 in LFS, git's ids elsewhere."""
    held = hub.held(commit)
    return [path for path, file in files.items() if path not in held or not held[path].holds(file)]


def _unread(hub: HubRepository, files: Mapping[str, FileRecord], commit: str) -> list[str]:
    """Files whose bytes, as the Hub hands them out, are others than those that were sent."""
    return [path for path, file in files.items() if hub.sha256(path, commit) != file.sha256]


def _not_equal(message: str, fix: str) -> GateError:
    return GateError(
        "release_verified",
        message,
        value=message,
        band="every file of the release on the Hub, byte for byte",
        source="docs/design.md, publishing",
        fix=fix,
    )
