"""A Hugging Face Hub inside the test process: a real HTTP server for the real ``huggingface_hub`` client.

    with HubServer(token="hf_test") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("org/model", private=True)
        hub.fail_next("POST", "/commit/", status=503)

It serves models and datasets, files in git and in LFS. It does not speak Xet: set ``HF_HUB_DISABLE_XET=1``
before the client is imported. A request outside the route table is answered 501, so that a new need of the
client shows at once.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from dpo_assets_tests.hub.repository import Blob, HubError, Repo
from dpo_assets_tests.hub.routes import Call, Reply, Request, find_route

SILENCE = Reply(0)

__all__ = ["Fault", "FaultPlan", "HubServer", "Repo", "Request"]


@dataclass
class Fault:
    """A planned failure: matching requests get ``status``, or are applied and never answered.

    ``then`` is called first. With ``silent`` nothing is applied, and the connection stays open without an answer.
    """

    method: str
    path: re.Pattern[str]
    status: int
    times: int
    lost_response: bool
    silent: bool = False
    then: Callable[[], None] = lambda: None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class FaultPlan:
    """The failures that have not happened yet, in the order in which they were planned."""

    pending: list[Fault] = field(default_factory=list)

    def take(self, request: Request) -> Fault | None:
        """The failure that this request runs into, used up by one."""
        for fault in self.pending:
            if fault.method == request.method and fault.path.search(request.path):
                fault.times -= 1
                if fault.times == 0:
                    self.pending.remove(fault)
                return fault
        return None


class HubServer:
    """A Hub on a free local port, alive inside its ``with`` block.

    One token is known; anyone may read what is not private. ``role`` is the token's: ``write``, or ``read``, with which
    nothing can be changed. ``orgs`` are the organisations in which its user may make repositories.
    """

    def __init__(
        self, token: str = "hf_test", user: str = "tester", role: str = "write", orgs: tuple[str, ...] = ("org",)
    ) -> None:
        self.token = token
        self.user = user
        self.role = role
        self.orgs = orgs
        self.requests: list[Request] = []
        self.faults = FaultPlan()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, Blob] = {}
        self._lock = threading.RLock()
        self.closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), partial(_Connection, self))
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # Another name of the same host: the client follows a redirect to the Hub's own name and then misses
        # the file's metadata, and it must drop its token for any other name.
        self.storage = f"http://localhost:{port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def changes(self) -> list[Request]:
        """The recorded requests to routes that change what the Hub holds: none of them means zero writes."""
        return [request for request in self.requests if request.changes_hub]

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """The repository ``repo_id``; KeyError when nobody created it."""
        return self.repos[f"{repo_type}s", repo_id]

    def fail_next(
        self,
        method: str,
        path: str,
        *,
        status: int = 503,
        times: int = 1,
        lost_response: bool = False,
        silent: bool = False,
        then: Callable[[], None] = lambda: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Fail the next ``times`` requests of ``method`` whose path contains the regular expression ``path``.

        They are answered ``status`` and not applied. With ``lost_response`` they are applied, and the
        connection closes without an answer. With ``silent`` they are not applied, and the connection stays open until
        the Hub closes. ``then`` is called when one arrives, before anything else. ``headers`` go with the refusal.
        """
        with self._lock:
            fault = Fault(method, re.compile(path), status, times, lost_response, silent, then, headers or {})
            self.faults.pending.append(fault)

    def meanwhile(self, method: str, path: str, then: Callable[[], None]) -> None:
        """Call ``then`` when the next such request arrives, which is answered as if nothing had happened."""
        self.fail_next(method, path, status=0, then=then)

    def answer(self, request: Request) -> Reply | None:
        """Record and answer one request; None when its answer gets lost, SILENCE when it is waited for."""
        with self._lock:
            self.requests.append(request)
            fault = self.faults.take(request)
            try:
                if fault:
                    fault.then()
                if fault and fault.silent:
                    return SILENCE
                if fault and fault.status and not fault.lost_response:
                    return Reply.error(HubError(fault.status, "injected failure"), fault.headers)
                reply = self._dispatch(request)
            except HubError as error:
                reply = Reply.error(error)
            return None if fault and fault.lost_response else reply

    def _dispatch(self, request: Request) -> Reply:
        found = find_route(request.method, request.path)
        if found is None:
            # Neither 404, which the client takes for an answer, nor 500, which it retries for half a minute.
            raise HubError(501, f"no route for {request.method} {request.path}")
        route, args = found
        if request.token_sent and not request.token_valid:
            raise HubError(401, "Invalid credentials in Authorization header")
        if route.needs_token and not request.token_valid:
            raise HubError(401, "Invalid username or password.")
        if route.changes_hub and route.needs_token and self.role == "read":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return route.handler(Call(self, request, args))


class _Server(ThreadingHTTPServer):
    """Closes its connections with itself: clients pool them, and a later server may get the same port."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.open):
            with suppress(OSError):
                # Wakes the connection's thread, which then closes it.
                connection.shutdown(socket.SHUT_RDWR)


class _Connection(BaseHTTPRequestHandler):
    """The HTTP side: reads whole requests, lets the Hub answer and writes the answers."""

    protocol_version = "HTTP/1.1"
    # One packet an answer: headers and body sent apart wait for each other's acknowledgement.
    wbufsize = -1

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        request = Request(self.command, url.path, url.query, self._body(), token != "", token == self.hub.token)
        reply = self.hub.answer(request)
        if reply is SILENCE:
            self.hub.closed.wait()
        if reply is None or reply is SILENCE:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the requests are recorded."""
