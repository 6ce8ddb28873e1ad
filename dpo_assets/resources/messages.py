"""Messages of a worker on their way into the run's log: live, and without secrets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import dagster as dg
from dagster_pipes import PipesMessage, PipesParams

from dpo_assets.publishing.secrets import scrub_all


class ScrubbedMessageReader(dg.PipesMessageReader):
    """Reads like `inner`, and masks secrets in every text of a message before Dagster sees it.

    It stands on this side of the process boundary, because the worker knows no secret that it could mask.
    """

    def __init__(self, inner: dg.PipesMessageReader) -> None:
        self._inner = inner

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        # The handler of Dagster takes a whole run's context to make; readers call these two methods of it.
        scrubbed = cast("dg.PipesMessageHandler", _ScrubbedHandler(handler))
        with self._inner.read_messages(scrubbed) as params:
            yield params

    def on_opened(self, opened_payload: Any) -> None:
        self._inner.on_opened(opened_payload)

    def on_launched(self, launched_payload: Any) -> None:
        self._inner.on_launched(launched_payload)

    def no_messages_debug_text(self) -> str:
        return self._inner.no_messages_debug_text()


class _ScrubbedHandler:
    def __init__(self, handler: dg.PipesMessageHandler) -> None:
        self._handler = handler

    def handle_message(self, message: PipesMessage) -> None:
        self._handler.handle_message(cast("PipesMessage", scrub_all(message)))

    def report_pipes_framework_exception(self, origin: str, exc_info: Any) -> None:
        self._handler.report_pipes_framework_exception(origin, exc_info or sys.exc_info())
