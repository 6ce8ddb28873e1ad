"""A judge behind an address that speaks OpenAI's chat protocol: a hosted service, vLLM, llama.cpp, Ollama."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.judging.comparing import ASKED_AHEAD, LETTERS, Form, Message, Reply, template_digest
from dpo_assets.publishing.secrets import scrub
from dpo_assets.retry_after import asked_to_wait, wait
from dpo_assets.secret_shapes import masked, without_url_secrets

if TYPE_CHECKING:
    import httpx

ATTEMPTS, WAIT_SECONDS = 4, 1.0  # Of a question; the wait doubles.
REFUSED = (401, 403)  # Asking again changes nothing.
BUSY = (408, 409, 425, 429)
CANDIDATES = 20  # First tokens whose log-probabilities are asked for: the most that OpenAI and vLLM give.
LETTER_TOKENS = 4  # A letter may come behind a space or a quote where no log-probabilities do.


@dataclass(frozen=True)
class Endpoint:
    """POST `url`/chat/completions, temperature 0.

    Asked for a letter it sends `logprobs` and `top_logprobs`, which OpenAI, vLLM, llama.cpp and Ollama answer; a server
    that leaves them out is read by the letter that it wrote.

    Attributes:
        max_tokens: of a reply in text.
        key_variable: environment variable of the key; without a value none is sent.
        timeout_seconds: of connecting, and of each wait for the answer.
        wait_seconds: before the second attempt; the wait doubles. One that the server asks for is kept, within bounds.
    """

    url: str
    model: str
    key_variable: str
    max_tokens: int
    timeout_seconds: float
    form: Form = "text"
    wait_seconds: float = WAIT_SECONDS
    attempts: int = ATTEMPTS

    @property
    def identity(self) -> str:
        length = f"{self.max_tokens} tokens" if self.form == "text" else "a letter"
        return f"{self.model} at {self.shown}, {length}, question {template_digest(self.form)}"

    @property
    def shown(self) -> str:
        """The address for people and artefacts: no secret can be in it. The recipe refuses one that holds any."""
        return masked(without_url_secrets(self.url))

    def refuse_ahead(self) -> str:
        """Asks it one short question, once. Empty, or why it gave no answer, which may pass, or none with letters.

        Raises:
            ConfigError: it refuses the key, the address or the model.
        """
        try:
            said = replace(self, attempts=1).reply([{"role": "user", "content": ASKED_AHEAD[self.form]}])
        except InfrastructureError as error:
            return str(error)
        if self.form == "letter" and said.letters is None:
            return (
                f"the judge at {self.shown} gives no log-probabilities: its letter is read as text, and where the "
                "order of the answers decides, that is a tie"
            )
        return ""

    def reply(self, messages: Sequence[Message]) -> Reply:
        """The first choice.

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
                    json=self._body(messages),
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
                return Reply(text, _letters(answer) if self.form == "letter" else None)
            said, asked = f"status {answer.status_code}: {scrub(answer.text)[:500]}", asked_to_wait(answer.headers)
        raise InfrastructureError(
            f"the judge at {self.shown} gave no answer in {self.attempts} attempts: {scrub(said)}"
        )

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": 0}
        if self.form == "text":
            return body | {"max_tokens": self.max_tokens}
        return body | {"max_tokens": LETTER_TOKENS, "logprobs": True, "top_logprobs": CANDIDATES}

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


def _letters(answer: Any) -> dict[str, float] | None:
    """Log-probability of each letter as the first token, with or without white space around it.

    A letter that is not among the candidates is no more likely than the least of them. NaN where neither is: that is no
    verdict. None where the server names no candidates.
    """
    try:
        first = answer.json()["choices"][0]["logprobs"]["content"][0]
        told = [(str(one["token"]), float(one["logprob"])) for one in first["top_logprobs"]]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    if not told:
        return None
    found = {letter: [nats for token, nats in told if token.strip() == letter] for letter in LETTERS}
    if not any(found.values()):
        return dict.fromkeys(LETTERS, math.nan)
    least = min(nats for _, nats in told)
    return {letter: _log_sum(nats) if nats else least for letter, nats in found.items()}


def _log_sum(nats: Sequence[float]) -> float:
    most = max(nats)
    return most + math.log(math.fsum(math.exp(one - most) for one in nats)) if math.isfinite(most) else most
