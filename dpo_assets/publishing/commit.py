"""One release as one atomic commit: stage a folder by allow-list, plan the operations, send them, read them back."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_assets.artifact import file_sha256
from dpo_assets.errors import ConfigError, GateError, InfrastructureError
from dpo_assets.planning.companions import copy_files, is_released
from dpo_assets.publishing.secrets import find_secrets, scrub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# A release holds these, what belongs to a model beside its weights (`is_released`), and nothing else. Pickles,
# optimizer states and training_args.bin (which holds the token in clear text) can never be among them.
ALLOWED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
)
HUB_OWNED = frozenset({".gitattributes"})


class PublishError(InfrastructureError):
    """The Hub did not answer, or did not take what was sent."""


@dataclass(frozen=True)
class Operation:
    """One line of a commit."""

    action: str
    path: str
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Release:
    """Where a release ended up.

    `sent`: this call made the commit; otherwise the Hub held the release already. `read_back`: this call downloaded and
    compared it; otherwise the tag says that an earlier one did.
    """

    url: str
    commit: str
    tag: str
    sent: bool
    read_back: bool


def stage(source: Path, target: Path, card: str, provenance: Mapping[str, Any]) -> list[Operation]:
    """Copies what a release may hold, adds card and provenance, and returns the operations that would send it.

    Raises:
        ConfigError: when a text file of the release holds something shaped like a credential.
    """
    for path in sorted({p for pattern in ALLOWED for p in source.glob(pattern) if p.is_file()}):
        shutil.copyfile(path, target / path.name)
    copy_files(source, target, is_released)
    (target / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (target / "provenance.json").write_text(text, encoding="utf-8")
    operations = []
    for name in staged_files(target):
        path = target / name
        if path.suffix != ".safetensors" and (
            kinds := find_secrets(path.read_text(encoding="utf-8", errors="replace"))
        ):
            raise ConfigError(f"{name} of the release seems to hold a {', a '.join(kinds)}; nothing was sent.")
        operations.append(Operation("add", name, path.stat().st_size, file_sha256(path)))
    return operations


def staged_files(folder: Path) -> list[str]:
    """The files of a staged release, by their paths in the repository, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def content_tag(operations: list[Operation]) -> str:
    """A tag that names the content: equal releases get equal tags."""
    rows = [[o.path, o.sha256] for o in operations]
    return "content-" + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def publish(
    api: HfApi, repo_id: str, folder: Path, operations: list[Operation], *, private: bool, token_variable: str
) -> Release:
    """Sends a staged release as one commit on the head that was read, compares it byte for byte, and tags it.

    A release whose tag is on the head was compared before it was tagged, so it is neither sent nor downloaded again.

    Args:
        token_variable: environment variable that holds the token, for messages.

    Raises:
        ConfigError: the token is refused, or may not write there.
        GateError: what the Hub holds is not what was sent, or not what its tag says.
        PublishError: on any other refusal of the Hub, with secrets masked.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return _publish(api, repo_id, folder, operations, private)
    # The client lets broken connections through as httpx errors, and wraps a refused upload as RuntimeError.
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
        said = scrub(str(error))
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise ConfigError(
                f"publishing {repo_id} is refused: the token in {token_variable} must be valid, and may write there: "
                f"{said}"
            ) from None
        raise PublishError(f"publishing {repo_id} failed: {said}") from None


def _publish(api: HfApi, repo_id: str, folder: Path, operations: list[Operation], private: bool) -> Release:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    tag = content_tag(operations)
    url = str(api.create_repo(repo_id, private=private, exist_ok=True))
    tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}.get(tag)
    head = str(api.model_info(repo_id).sha)
    if tagged == head:
        return Release(url, head, tag, sent=False, read_back=False)
    if tagged is not None and _differing(api, repo_id, tagged, operations):
        raise _not_equal(
            f"tag {tag} of {repo_id} points at {tagged}, which holds something else; nothing was sent",
            f"delete the tag {tag} of {repo_id}, and materialise published_model again",
        )
    keep = {o.path for o in operations} | HUB_OWNED
    stale = [name for name in api.list_repo_files(repo_id, revision=head) if name not in keep]
    commit = api.create_commit(
        repo_id,
        operations=[
            *(CommitOperationAdd(o.path, folder / o.path) for o in operations),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"Release {tag}",
        parent_commit=head,
    )
    if wrong := _differing(api, repo_id, commit.oid, operations):
        raise _not_equal(
            f"{', '.join(wrong)} at {repo_id}@{commit.oid} is not what was sent",
            "do not use that commit; it has no tag. Materialise published_model again: that sends the release anew",
        )
    # Last: the tag says that the content was read back. Going back to an older release leaves its tag where it is.
    if tagged is None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    # The client makes no commit where nothing would change, as after an answer that was lost, and names the head.
    return Release(url, commit.oid, tag, sent=commit.oid != head, read_back=True)


def _not_equal(message: str, fix: str) -> GateError:
    return GateError(
        "release_verified",
        message,
        value=message,
        band="every file of the release on the Hub, byte for byte",
        source="docs/design.md, publishing",
        fix=fix,
    )


def _differing(api: HfApi, repo_id: str, commit: str, operations: list[Operation]) -> list[str]:
    """Files of a commit, downloaded into a fresh folder, that are missing or not as listed."""
    with tempfile.TemporaryDirectory(prefix="dpo-assets-verify-") as fresh:
        # By force: the client would copy what this machine's cache holds of the commit, and nothing was read back.
        api.snapshot_download(repo_id, revision=commit, local_dir=fresh, force_download=True)
        paths = {o.path: Path(fresh) / o.path for o in operations}
        return [o.path for o in operations if not paths[o.path].is_file() or file_sha256(paths[o.path]) != o.sha256]
