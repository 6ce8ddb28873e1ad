"""A server of OpenAI's chat protocol in this process: the protocol is real, and who answers is given."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Candidates = dict[str, float]  # First tokens with their log-probabilities.
Answering = Callable[[list[dict[str, str]]], str | tuple[str, Candidates]]
KEY = "sk-judge-0123456789abcdef"  # Made up; shaped like a key, so that what leaks it is found.


class JudgeServer:
    """Attributes:
    faults: statuses of the next answers, before any is given; 0 closes the connection.
    requests: bodies of what was asked.
    retry_after: the header of that name of each fault.
    """

    def __init__(self, answering: Answering, key: str | None = None) -> None:
        self.answering, self.key = answering, key
        self.faults: list[int] = []
        self.retry_after = ""
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == 0:
                    self.close_connection = True
                    return
                allowed = outer.key is None or self.headers.get("Authorization") == f"Bearer {outer.key}"
                status = fault or (200 if allowed and self.path == "/v1/chat/completions" else 404 if allowed else 401)
                said: dict[str, Any] = {"error": f"status {status} for {self.headers.get('Authorization')}"}
                if status == 200:
                    said = {"choices": [outer._choice(body)]}
                text = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                if fault and outer.retry_after:
                    self.send_header("Retry-After", outer.retry_after)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """As OpenAI, vLLM and llama.cpp write one; `logprobs` where they are asked for and there are any."""
        answered = self.answering(body["messages"])
        text, candidates = answered if isinstance(answered, tuple) else (answered, None)
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        if candidates is not None and body.get("logprobs"):
            best = sorted(candidates.items(), key=lambda one: -one[1])[: body["top_logprobs"]]
            top = [{"token": token, "logprob": nats, "bytes": list(token.encode())} for token, nats in best]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return choice

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def parts_of(messages: list[dict[str, str]]) -> tuple[str, str]:
    """The two answers in a question."""
    text = messages[-1]["content"]
    marker = text.split(">", 1)[0].rpartition(" ")[2]
    behind = [text.split(f"<ANSWER {name} {marker}>\n", 1)[1] for name in "AB"]
    first, second = (part.split(f"\n</ANSWER {name} {marker}>", 1)[0] for part, name in zip(behind, "AB", strict=True))
    return first, second


def by_merit(merit: Callable[[str], float]) -> Answering:
    """A judge that prefers the answer of more merit."""

    def answer(messages: list[dict[str, str]]) -> str:
        first, second = map(merit, parts_of(messages))
        letter = "A" if first > second else "B" if second > first else "C"
        return f"I compared them.\n[[{letter}]]"

    return answer
