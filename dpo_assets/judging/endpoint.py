"""A judge behind an address that speaks OpenAI's chat protocol: a hosted service, vLLM, llama.cpp, Ollama."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.judging.comparing import TEMPLATE_DIGEST, Message
from dpo_assets.publishing.secrets import scrub
from dpo_assets.retry_after import asked_to_wait, wait
from dpo_assets.secret_shapes import masked, without_url_secrets

if TYPE_CHECKING:
    import httpx

ATTEMPTS, WAIT_SECONDS = 4, 1.0  # Of a question; the wait doubles.
REFUSED = (401, 403)  # Asking again changes nothing.
BUSY = (408, 409, 425, 429)


@dataclass(frozen=True)
class Endpoint:
    """POST `url`/chat/completions, temperature 0.

    Attributes:
        key_variable: environment variable of the key; without a value none is sent.
        timeout_seconds: of connecting, and of each wait for the answer.
        wait_seconds: before the second attempt; the wait doubles. One that the server asks for is kept, within bounds.
    """

    url: str
    model: str
    key_variable: str
    max_tokens: int
    timeout_seconds: float
    wait_seconds: float = WAIT_SECONDS
    attempts: int = ATTEMPTS

    @property
    def identity(self) -> str:
        return f"{self.model} at {self.shown}, {self.max_tokens} tokens, question {TEMPLATE_DIGEST}"

    @property
    def shown(self) -> str:
        """The address for people and artefacts: no secret can be in it. The recipe refuses one that holds any."""
        return masked(without_url_secrets(self.url))

    def refuse_ahead(self) -> str:
        """Asks it one short question, once. Empty, or why it gave no answer, which may pass.

        Raises:
            ConfigError: it refuses the key, the address or the model.
        """
        try:
            replace(self, attempts=1).reply([{"role": "user", "content": "Reply with [[C]]."}])
        except InfrastructureError as error:
            return str(error)
        return ""

    def reply(self, messages: Sequence[Message]) -> str:
        """The text of the first choice.

        Raises:
            InfrastructureError: no answer, or one of no use, at every attempt.
            ConfigError: the key or the address is refused.
        """
        import httpx

        said, asked = "", None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(wait(self.wait_seconds * 2 ** (attempt - 1), asked))
            asked = None
            try:
                answer = self._client.post(
                    f"{self.url.rstrip('/')}/chat/completions",
                    json={
                        "model": self.model,
                        "messages": list(messages),
                        "temperature": 0,
                        "max_tokens": self.max_tokens,
                    },
                    headers=self._headers(),
                )
            except httpx.TimeoutException:
                said = f"no answer within {self.timeout_seconds:g} s"
                continue
            except httpx.InvalidURL as error:
                raise ConfigError(f"evaluation.judge.url {self.shown} is no address: {error}") from None
            except httpx.HTTPError as error:
                said = str(error)
                continue
            if answer.is_redirect:
                where = scrub(answer.headers.get("Location", "elsewhere"))
                raise ConfigError(f"the judge has moved to {where}: set evaluation.judge.url to the address there")
            if answer.status_code in REFUSED:
                raise ConfigError(
                    f"the judge at {self.shown} refuses the key in {self.key_variable} ({answer.status_code}): "
                    f"{scrub(answer.text)[:500]}"
                )
            if 400 <= answer.status_code < 500 and answer.status_code not in BUSY:
                raise ConfigError(
                    f"the judge at {self.shown} does not take evaluation.judge ({answer.status_code}); is `url` the "
                    f"address before /chat/completions, and `model` one that it has? {scrub(answer.text)[:500]}"
                )
            if answer.is_success and (text := _text(answer)) is not None:
                return text
            said, asked = f"status {answer.status_code}: {scrub(answer.text)[:500]}", asked_to_wait(answer.headers)
        raise InfrastructureError(
            f"the judge at {self.shown} gave no answer in {self.attempts} attempts: {scrub(said)}"
        )

    @cached_property
    def _client(self) -> httpx.Client:
        """One connection for all questions."""
        import httpx

        return httpx.Client(timeout=self.timeout_seconds)

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _text(answer: Any) -> str | None:
    """None where it is no answer of that protocol.

    One without content is: a model that reasons may have spent all its tokens on that. It is a reply without a verdict.
    """
    try:
        text = answer.json()["choices"][0]["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    return "" if text is None else text if isinstance(text, str) else None
