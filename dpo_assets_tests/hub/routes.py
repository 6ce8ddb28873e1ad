"""The routes of the in-test Hub: one small handler each, in the order in which a publisher meets them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from dpo_assets.planning.licence import HUB_LICENCES
from dpo_assets_tests.hub.repository import Blob, Commit, HubError, Json, Repo

if TYPE_CHECKING:
    from dpo_assets_tests.hub_server import HubServer

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".parquet", ".pt", ".zip", ".gz")
SIGNATURE = "5e1f" * 16
LICENCES = HUB_LICENCES | {"unknown", "openmdw-2.0"}  # One is newer than the package.
LFS_THRESHOLD = 10 * 1024 * 1024

_ID = r"(?P<id>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_WEB = rf"/(?:(?P<kind>datasets)/)?{_ID}"
_REV = r"(?P<rev>[^/]+)"
_STORED = r"/lfs-storage/(?P<sha256>[0-9a-f]{64})"


@dataclass(frozen=True)
class Request:
    """One recorded request: ``path`` is as sent, without the query. The token itself is never kept."""

    method: str
    path: str
    query: str
    body: bytes
    token_sent: bool
    token_valid: bool

    @property
    def size(self) -> int:
        """Bytes of the request's body."""
        return len(self.body)

    @property
    def changes_hub(self) -> bool:
        """Whether its route changes what the Hub holds; a POST that only asks does not."""
        found = find_route(self.method, self.path)
        return found is not None and found[0].changes_hub

    def flag(self, name: str) -> bool:
        """A boolean of the query."""
        return parse_qs(self.query).get(name, [""])[0].lower() in ("true", "1")

    def json(self) -> Json:
        """The body's JSON object."""
        payload: Json = json.loads(self.body)
        return payload


@dataclass(frozen=True)
class Reply:
    """An answer that is ready to be written."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        """A JSON answer."""
        # Card metadata may hold dates, which JSON does not know.
        body = json.dumps(payload, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def error(cls, error: HubError, more: Mapping[str, str] | None = None) -> Reply:
        """A refusal, said in the body and in the headers, for HEAD has no body."""
        headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
        headers |= more or {}
        return cls.json({"error": error.message, **error.details}, error.status, headers)


@dataclass(frozen=True)
class Call:
    """A request on its way to a handler, with the parts of the path that the route's pattern names."""

    hub: HubServer
    request: Request
    args: Mapping[str, str]

    @property
    def repo(self) -> Repo:
        """The repository of the path; a private one does not exist for a stranger."""
        repo = self.hub.repos.get((self.args.get("kind", "models"), self.args["id"]))
        if repo is None or (repo.private and not self.request.token_valid):
            raise HubError(404 if self.request.token_valid else 401, "Repository not found", "RepoNotFound")
        return repo

    @property
    def commit(self) -> Commit:
        """The commit of the path's revision."""
        return self.repo.resolve(self.args.get("rev", "main"))


Handler = Callable[[Call], Reply]


@dataclass(frozen=True)
class Route:
    """A method and path pattern, whether it needs a token and whether it changes what the Hub holds."""

    method: str
    pattern: re.Pattern[str]
    handler: Handler
    needs_token: bool
    changes_hub: bool


ROUTES: list[Route] = []


def route(
    method: str, pattern: str, *, needs_token: bool = False, changes_hub: bool = False
) -> Callable[[Handler], Handler]:
    """Put the decorated handler into the route table."""

    def register(handler: Handler) -> Handler:
        ROUTES.append(Route(method, re.compile(pattern), handler, needs_token, changes_hub))
        return handler

    return register


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]] | None:
    """The route of a request and the unquoted parts that its pattern names; HEAD is GET without the body."""
    served_as = "GET" if method == "HEAD" else method
    for candidate in ROUTES:
        if candidate.method == served_as and (match := candidate.pattern.fullmatch(path)):
            # Unquoted only now: a revision or folder may hold a quoted slash.
            return candidate, {name: unquote(part) for name, part in match.groupdict().items() if part}
    return None


@route("GET", "/api/whoami-v2", needs_token=True)
def whoami(call: Call) -> Reply:
    """Who the token belongs to."""
    access = {"accessToken": {"role": call.hub.role}}
    orgs = [{"name": org, "roleInOrg": "write"} for org in call.hub.orgs]
    return Reply.json({"type": "user", "name": call.hub.user, "orgs": orgs, "auth": access})


@route("GET", f"{_API}/auth-check(?P<write>/write)?")
def auth_check(call: Call) -> Reply:
    """Whether the token may see a repository, or write to it."""
    assert call.repo
    if "write" in call.args and (not call.request.token_valid or call.hub.role == "read"):
        raise HubError(403, "Forbidden: no write access to this repository")
    return Reply.json({})


@route("POST", "/api/repos/create", needs_token=True, changes_hub=True)
def create_repo(call: Call) -> Reply:
    """A new repository; one that exists is refused with its url."""
    wanted = call.request.json()
    repo_id = f"{wanted.get('organization') or call.hub.user}/{wanted['name']}"
    kind = f"{wanted.get('type') or 'model'}s"
    url = f"{call.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if (kind, repo_id) in call.hub.repos:
        # With exist_ok the client goes on with the url of this refusal.
        raise HubError(409, "You already created this repo", url=url)
    call.hub.repos[kind, repo_id] = Repo(repo_id, private=wanted.get("visibility") == "private")
    return Reply.json({"url": url, "name": repo_id, "id": "0" * 24})


def _card_data(text: str) -> Json:
    """The metadata block at the head of a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    data: Any = {}
    try:
        data = (yaml.safe_load(match[1]) if match else None) or {}
        problem = None if isinstance(data, dict) else "metadata is not a mapping"
    except yaml.YAMLError as error:
        problem = str(error)
    licence = data.get("license") if isinstance(data, dict) else None
    if isinstance(licence, str) and licence not in LICENCES:
        problem = f'"license" must be one of [{", ".join(sorted(LICENCES))}], and is {licence}'
    if problem:
        raise HubError(400, "Invalid metadata", errors=[{"message": problem}], warnings=[])
    return dict(data)


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    """Whether a card's metadata can be read."""
    _card_data(call.request.json()["content"])
    return Reply.json({"errors": [], "warnings": []})


@route("POST", f"{_API}/preupload/{_REV}", needs_token=True)
def preupload(call: Call) -> Reply:
    """Which way each file goes, and the id of the version that is already here."""
    known = call.commit.files
    answers = []
    for file in call.request.json()["files"]:
        large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_THRESHOLD
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if blob := known.get(file["path"]):
            # By this id the client drops files that have not changed, and so makes no empty commit.
            answer["oid"] = blob.content_id
        answers.append(answer)
    return Reply.json({"files": answers})


@route("POST", rf"{_WEB}\.git/info/lfs/objects/batch", needs_token=True)
def lfs_batch(call: Call) -> Reply:
    """Where to upload each LFS object."""
    verify = f"{call.hub.endpoint}{call.request.path.removesuffix('batch')}verify"
    objects = []
    for wanted in call.request.json()["objects"]:
        answer: Json = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.lfs:
            # No actions means "already stored", which is how an interrupted upload resumes.
            # Signed, as those of real stores are: who has the address may write there.
            upload = f"{call.hub.storage}/lfs-storage/{wanted['oid']}?X-Amz-Signature={SIGNATURE}"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(answer)
    return Reply.json({"transfer": "basic", "objects": objects})


def _refuse_token(call: Call) -> None:
    """Storage links are signed: a token beside the signature is refused there, and has leaked."""
    if call.request.token_sent:
        raise HubError(400, "Only one auth mechanism allowed")


@route("PUT", _STORED, changes_hub=True)
def store_object(call: Call) -> Reply:
    """Keep an LFS object whose content is what its name says."""
    _refuse_token(call)
    if hashlib.sha256(call.request.body).hexdigest() != call.args["sha256"]:
        raise HubError(400, "content does not have the announced sha256")
    call.hub.lfs[call.args["sha256"]] = Blob.large(call.request.body)
    return Reply()


@route("GET", _STORED)
def fetch_object(call: Call) -> Reply:
    """The bytes of an LFS object."""
    _refuse_token(call)
    blob = call.hub.lfs[call.args["sha256"]]
    return Reply(200, blob.data, {"ETag": f'"{blob.content_id}"'})


@route("POST", rf"{_WEB}\.git/info/lfs/objects/verify", needs_token=True)
def verify_object(call: Call) -> Reply:
    """Whether an uploaded object arrived whole."""
    announced = call.request.json()
    stored = call.hub.lfs.get(announced["oid"])
    if stored is None or stored.size != announced["size"]:
        raise HubError(404, "object missing or of another size")
    return Reply.json({})


def _apply(operation: Json, files: dict[str, Blob], lfs: Mapping[str, Blob]) -> None:
    """Apply one line of a commit to the files of a new snapshot."""
    key, value = operation["key"], operation["value"]
    path = value["path"]
    if key == "file":
        files[path] = Blob.regular(base64.b64decode(value["content"]))
        if path == "README.md":
            _card_data(files[path].data.decode())
    elif key == "lfsFile":
        if value["oid"] not in lfs:
            raise HubError(400, "the commit names an LFS object that was never uploaded")
        files[path] = lfs[value["oid"]]
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for inside in [known for known in files if known.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    else:
        raise HubError(400, f"unknown commit operation {key}")


@route("POST", f"{_API}/commit/{_REV}", needs_token=True, changes_hub=True)
def make_commit(call: Call) -> Reply:
    """One atomic commit from NDJSON lines: a header, then the operations."""
    header, *operations = [json.loads(line) for line in call.request.body.splitlines() if line.strip()]
    branch = call.args["rev"]
    if branch not in call.repo.branches:
        raise HubError(404, "Invalid rev id", "RevisionNotFound")
    head = call.repo.resolve(branch)
    if not head.oid.startswith(header["value"].get("parentCommit", "")):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    # Applied to a copy: a commit with one bad line leaves nothing behind.
    files = dict(head.files)
    for operation in operations:
        _apply(operation, files, call.hub.lfs)
    commit = call.repo.commit(header["value"]["summary"], files, branch)
    url = f"{call.hub.endpoint}/{call.repo.id}/commit/{commit.oid}"
    return Reply.json({"success": True, "commitOid": commit.oid, "commitUrl": url, "pullRequestUrl": None})


@route("POST", f"{_API}/tag/{_REV}", needs_token=True, changes_hub=True)
def create_tag(call: Call) -> Reply:
    """A new tag on a revision."""
    tag = call.request.json()["tag"]
    target = call.commit.oid
    if tag in call.repo.tags:
        raise HubError(409, "Tag already exists")
    call.repo.tags[tag] = target
    return Reply.json({})


@route("DELETE", f"{_API}/tag/{_REV}", needs_token=True, changes_hub=True)
def delete_tag(call: Call) -> Reply:
    """Forget a tag."""
    if call.repo.tags.pop(call.args["rev"], None) is None:
        raise HubError(404, "Invalid rev id", "RevisionNotFound")
    return Reply.json({})


@route("GET", f"{_API}/refs")
def list_refs(call: Call) -> Reply:
    """Every branch and tag, and the commit it points at."""

    def named(prefix: str, refs: Mapping[str, str]) -> list[Json]:
        return [{"name": name, "ref": f"{prefix}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    branches, tags = named("refs/heads", call.repo.branches), named("refs/tags", call.repo.tags)
    return Reply.json({"branches": branches, "tags": tags, "converts": []})


@route("GET", f"{_API}(?:/revision/{_REV})?")
def repo_info(call: Call) -> Reply:
    """A repository at a revision, its card and its files."""
    repo, commit = call.repo, call.commit
    card = _card_data(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
    detailed = call.request.flag("blobs")
    info = {
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid,
        "createdAt": repo.history()[-1].date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "cardData": card,
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "siblings": [blob.sibling(path, detailed) for path, blob in sorted(commit.files.items())],
    }
    return Reply.json(info)


def _folder_entry(path: str) -> Json:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


@route("GET", f"{_API}/tree/{_REV}(?:/(?P<path>.+))?")
def list_tree(call: Call) -> Reply:
    """The files and folders inside a folder."""
    prefix = f"{call.args['path']}/" if "path" in call.args else ""
    inside = {path: blob for path, blob in sorted(call.commit.files.items()) if path.startswith(prefix)}
    if prefix and not inside:
        raise HubError(404, "This folder does not exist", "EntryNotFound")
    slashes = [(path, found.start()) for path in inside for found in re.finditer("/", path)]
    folders = sorted({path[:end] for path, end in slashes if end > len(prefix)})
    entries = [_folder_entry(path) for path in folders] + [b.tree_entry(path) for path, b in inside.items()]
    if not call.request.flag("recursive"):
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    return Reply.json(entries)


@route("POST", f"{_API}/paths-info/{_REV}")
def paths_info(call: Call) -> Reply:
    """The files and folders at the paths asked for; unknown ones are left out."""
    files = call.commit.files
    entries = []
    for path in parse_qs(call.request.body.decode()).get("paths", []):
        if path in files:
            entries.append(files[path].tree_entry(path))
        elif any(known.startswith(f"{path}/") for known in files):
            entries.append(_folder_entry(path))
    return Reply.json(entries)


@route("GET", f"{_WEB}/resolve/{_REV}/(?P<path>.+)")
def resolve_file(call: Call) -> Reply:
    """The bytes of a file, or the way to them when they are in LFS."""
    blob = call.commit.files.get(call.args["path"])
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": call.commit.oid, "ETag": f'"{blob.content_id}"'}
    if not blob.lfs:
        return Reply(200, blob.data, headers)
    linked = {"X-Linked-Etag": f'"{blob.content_id}"', "X-Linked-Size": str(blob.size)}
    location = f"{call.hub.storage}/lfs-storage/{blob.content_id}"
    return Reply(302, b"", headers | linked | {"Location": location})
