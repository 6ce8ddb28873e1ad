"""The conversation with the Hub about one repository: every call has a time limit, is tried again where that helps, and
fails with an error that names the Hub and the way out, without a secret in it."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_assets.planning.companions import CARD
from dpo_assets.planning.model_card import is_front_matter_alone
from dpo_assets.publishing.errors import HubFailure, HubOffline, Passing, PublishRefused, StaleHead
from dpo_assets.publishing.plan import HUB_OWNED, PROVENANCE, Head, HeldFile, ReleasePlan, ReleaseRecord
from dpo_assets.publishing.secrets import scrub
from dpo_assets.retry_after import asked_to_wait, wait

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import HfApi

ResultT = TypeVar("ResultT")
CONNECT_SECONDS = 10.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # Answers that another try may not get.
LARGEST_TEXT = 4 * 2**20  # Bytes of a text file that is read whole.


@dataclass(frozen=True)
class Patience:
    """How long an answer is waited for, and after how many seconds each what failed in passing is tried again."""

    seconds: float = 60.0
    waits: tuple[float, ...] = (1.0, 2.0, 4.0)


DEFAULT_PATIENCE = Patience()
AGAIN = "materialise published_model again"


@dataclass(frozen=True)
class HubRepository:
    """One model repository, by the real client.

    Attributes:
        token_variable: for messages.
        pipeline: whose releases there are ours; empty: those of any.
        again: how whoever reads an error goes on from it.
    """

    api: HfApi
    repo_id: str
    token_variable: str
    patience: Patience
    pipeline: str = ""
    again: str = AGAIN

    def head(self) -> Head | None:
        """What lies there now, or None where there is no such repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> Any:
            try:
                return self.api.model_info(self.repo_id, files_metadata=True, timeout=self.patience.seconds)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:  # The token is not valid, whatever is there.
                    raise
                return None

        info = self._call(ask)
        if info is None:
            return None
        files = {file.rfilename: _held(file) for file in info.siblings or ()}
        commit = str(info.sha)
        found = self.record(commit, files)
        other = found.pipeline if found is not None and self.pipeline not in ("", found.pipeline) else ""
        earlier = None if other else found
        hub_made = set(HUB_OWNED)
        card = self._text(CARD, commit, files) if earlier is None else None
        if is_front_matter_alone((card or b"").decode(errors="replace")):
            hub_made.add(CARD)
        return Head(commit, bool(info.private), files, earlier, frozenset(hub_made), other)

    def held(self, commit: str) -> dict[str, HeldFile]:
        """The files of a commit, by the Hub's metadata."""
        info = self._call(
            lambda: self.api.model_info(
                self.repo_id, revision=commit, files_metadata=True, timeout=self.patience.seconds
            )
        )
        return {file.rfilename: _held(file) for file in info.siblings or ()}

    def record(self, commit: str, files: dict[str, HeldFile]) -> ReleaseRecord | None:
        """What a commit with these files says of itself, or None where it is no release of this package."""
        return ReleaseRecord.read(self._text(PROVENANCE, commit, files))

    def tags(self) -> dict[str, str]:
        """Name and commit of every tag."""
        refs = self._call(lambda: self.api.list_repo_refs(self.repo_id))
        return {ref.name: ref.target_commit for ref in refs.tags}

    def create(self, private: bool) -> None:
        """Makes the repository. One that somebody made in the meantime stays as it is."""
        self._call(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))

    def commit(self, plan: ReleasePlan, folder: Path, message: str) -> str:
        """Sends the changes of a plan as one commit on its head, tried once, and returns its id.

        Raises:
            StaleHead: the head moved on.
            Passing: no answer came, or one that a moment later may be another; the commit may have been made.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [
            CommitOperationDelete(o.path) if o.action == "delete" else CommitOperationAdd(o.path, folder / o.path)
            for o in plan.changes
        ]
        made = self._once(
            lambda: self.api.create_commit(
                self.repo_id, operations=operations, commit_message=message, parent_commit=plan.head
            )
        )
        return str(made.oid)

    def tag(self, name: str, commit: str) -> None:
        """Puts a tag on a commit. One of that name that is elsewhere stays there: see `tags`."""
        self._call(lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=True))

    def untag(self, name: str) -> None:
        """Takes a tag away. One that is gone already is no fault."""
        from huggingface_hub.errors import HfHubHTTPError

        def ask() -> None:
            try:
                self.api.delete_tag(self.repo_id, tag=name)
            except HfHubHTTPError as error:
                if error.response.status_code != 404:
                    raise

        self._call(ask)

    def sha256(self, path: str, commit: str) -> str | None:
        """sha256 of a file's bytes as the Hub hands them out, streamed and not kept; None where it has none."""

        def digest(parts: Iterator[bytes]) -> str:
            found = hashlib.sha256()
            for part in parts:
                found.update(part)
            return found.hexdigest()

        return self._read(path, commit, digest)

    def account(self) -> dict[str, Any]:
        """Who the token belongs to, and its role."""
        return self._call(self.api.whoami)

    def refuse_without_right_to_write(self) -> None:
        """Asks the Hub whether the token may write to the repository, which exists.

        Raises:
            PublishRefused: it may not.
        """
        from huggingface_hub.errors import HfHubHTTPError

        def ask() -> None:
            try:
                self.api.auth_check(self.repo_id, write=True)
            except HfHubHTTPError as error:
                # Hubs that are self-hosted may not have this question; the commit itself will tell.
                if error.response.status_code not in (404, 405, 501):
                    raise

        self._call(ask)

    def refuse_unreadable_card(self, card: str) -> None:
        """Asks the Hub whether it can read the metadata of a card, as it is asked again before a commit.

        Raises:
            PublishRefused: it cannot, with what it says.
        """
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def ask() -> None:
            headers = build_hf_headers(token=self.api.token)
            body = {"content": card, "repoType": "model"}
            response = get_session().post(f"{self.api.endpoint}/api/validate-yaml", json=body, headers=headers)
            if response.status_code == 400:
                said = [str(error.get("message")) for error in response.json().get("errors", [])]
                raise ValueError(f"the card's metadata: {'; '.join(said)}.")
            hf_raise_for_status(response)

        self._call(ask)

    def _text(self, path: str, commit: str, files: dict[str, HeldFile]) -> bytes | None:
        """A small file's bytes; None where it is not there or too large for a text of ours."""
        if path not in files or files[path].size > LARGEST_TEXT:
            return None
        return self._read(path, commit, b"".join)

    def _read(self, path: str, commit: str, take: Callable[[Iterator[bytes]], ResultT]) -> ResultT | None:
        """What `take` makes of a file's bytes as they come; None where there is no such file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo_id, path, revision=commit, endpoint=self.api.endpoint)
        headers = {**build_hf_headers(token=self.api.token), "Accept-Encoding": "identity"}

        def read() -> ResultT | None:
            # To another host, as that of a store, the session takes no token along.
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
                if response.status_code == 404:
                    return None
                if response.is_error:
                    response.read()
                hf_raise_for_status(response)
                return take(response.iter_raw())

        return self._call(read)

    def _call(self, ask: Callable[[], ResultT]) -> ResultT:
        """A call that changes nothing, or the same thing however often it is made."""
        for seconds in self.patience.waits:
            try:
                return self._once(ask)
            except Passing as error:
                self.pause(seconds, error)
        return self._once(ask)

    def pause(self, seconds: float, error: Passing) -> None:
        """Waits, as long as the Hub asks for, within bounds."""
        time.sleep(wait(seconds, error.after))

    def _once(self, ask: Callable[[], ResultT]) -> ResultT:
        from httpx import HTTPError

        try:
            with limited(self.patience.seconds):
                return ask()
        # The client lets broken connections through as httpx errors, wraps a refused upload as RuntimeError, and
        # refuses names and cards as ValueError.
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            raise self._told(error) from None

    def _told(self, error: Exception) -> Exception:
        """The error that says what happened at which Hub, and what to do about it."""
        from httpx import HTTPError, TimeoutException
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        said, endpoint = scrub(str(error)), scrub(str(self.api.endpoint))
        cause = _cause(error, HfHubHTTPError)
        status = cause.response.status_code if cause is not None else None
        # A store has no say in what the token may: the addresses there are signed.
        of_hub = cause is not None and str(cause.response.url).startswith(str(self.api.endpoint))
        if _cause(error, OfflineModeIsEnabled):
            return HubOffline(f"publishing {self.repo_id} needs the Hub, and HF_HUB_OFFLINE is set; unset it. {said}")
        if status == 401 and of_hub:
            return PublishRefused(
                f"publishing {self.repo_id} is refused: the token in {self.token_variable} must be valid for "
                f"{endpoint}; it is unknown there, or has expired. Make a new one and set {self.token_variable}. {said}"
            )
        if status == 403 and of_hub:
            return PublishRefused(
                f"publishing {self.repo_id} is refused: the token in {self.token_variable} may not write there. Give "
                f"it write access to {self.repo_id}, or name a repository of your own in publishing.repo_id. {said}"
            )
        if status in (409, 412):
            return StaleHead(f"publishing {self.repo_id} failed: another writer was faster at {endpoint}: {said}")
        if _cause(error, TimeoutException):
            return HubFailure(
                f"publishing {self.repo_id} failed: {endpoint} did not answer within {self.patience.seconds:g} s. See "
                f"whether publishing.endpoint is right and that Hub is well, and {self.again}: "
                f"what was sent is not sent twice. {said}"
            )
        if status in PASSING or (status is None and _cause(error, HTTPError)):
            return Passing(
                f"publishing {self.repo_id} failed: {endpoint} is not well or not reached: {said}. Later, "
                f"{self.again}: what was sent is not sent twice",
                after=_asked_to_wait(cause.response) if cause is not None else 0.0,
            )
        if _cause(error, JSONDecodeError):  # A gateway's page, where the client expects the Hub's answer.
            return Passing(
                f"publishing {self.repo_id} failed: {endpoint} answers with something else than JSON: {said}"
            )
        if isinstance(error, ValueError) or status in (400, 404, 413, 422):
            return PublishRefused(f"publishing {self.repo_id} is refused by {endpoint}: {said}")
        return HubFailure(f"publishing {self.repo_id} failed: {said}")


def _asked_to_wait(response: httpx.Response) -> float:
    """Seconds that an answer asks to wait: HTTP's own header, or the Hub's for the rest of a window of requests."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if (asked := asked_to_wait(response.headers)) is not None:
        return asked
    window = parse_ratelimit_headers(response.headers)
    return window.reset_in_seconds + 1.0 if window is not None else 0.0  # A second more, as its seconds are rounded.


def _held(file: Any) -> HeldFile:
    lfs = file.lfs
    if lfs is not None:
        return HeldFile(int(lfs.size), sha256=str(lfs.sha256))
    return HeldFile(int(file.size or 0), git_blob=str(file.blob_id or ""))


ErrorT = TypeVar("ErrorT", bound=BaseException)


def _cause(error: BaseException, kind: type[ErrorT]) -> ErrorT | None:
    """The error or the nearest one that it came from of a kind."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kind):
        found = found.__cause__ or found.__context__
    return found


_LIMITS = threading.Lock()
_waiting = 0
_before: httpx.Timeout | None = None


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside it, the session that all of huggingface_hub shares has a time limit, and its log keeps no secret.

    By itself the session waits for ever, and most calls have no limit of their own. The factory of sessions is not
    replaced: another one may be set for a proxy, and cannot be asked for. After the last of several users the session
    is as it was. A session that the client opens anew within one call, because a connection was refused, gets its limit
    with the next call.
    """
    import httpx
    from huggingface_hub.utils import get_session

    global _waiting, _before
    with _LIMITS:
        session = get_session()
        if _waiting == 0:
            _before = session.timeout
        _waiting += 1
        session.timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
    handlers = list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:  # A logger's own filter is not asked about records of the loggers below it.
        handler.addFilter(_SCRUBBED)
    try:
        yield
    finally:
        with _LIMITS:
            _waiting -= 1
            if _waiting == 0:
                get_session().timeout = _before
                for handler in handlers:
                    handler.removeFilter(_SCRUBBED)


class _Scrubbed(logging.Filter):
    """The client logs the addresses of what it tries again, and those of stores are signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage()), None
        return True


_SCRUBBED = _Scrubbed()
logging.getLogger("httpx").addFilter(_SCRUBBED)  # It logs the address of every request, whoever makes it.
