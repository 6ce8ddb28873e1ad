"""The user's own capability probe: small tasks whose answers can be told right from wrong.

A row of the JSONL file: `{"prompt": "text" or [messages], "answers": ["accepted", ...], "match": "contains"}`.
Text that training never touched misses the commonest damage, so a probe should ask for what the model is used for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpo_assets.errors import ConfigError
from dpo_assets.section import describe_validation_error

Text = Annotated[str, Field(min_length=1)]


class TaskMessage(BaseModel):
    """One message of a task's prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "user", "assistant"]
    content: str


class Task(BaseModel):
    """A prompt, and the texts that count as an answer to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: Text | Annotated[list[TaskMessage], Field(min_length=1)]
    answers: list[Text] = Field(min_length=1)
    match: Literal["contains", "exact"] = "contains"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [message.model_dump() for message in self.prompt]

    def met_by(self, answer: str) -> bool:
        """Whether an answer is accepted; case and white space at the ends do not count."""
        said, accepted = answer.strip().casefold(), [text.strip().casefold() for text in self.answers]
        return said in accepted if self.match == "exact" else any(text in said for text in accepted)


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a probe file; blank lines are skipped.

    Raises:
        ConfigError: for a file that cannot be read or holds no task, and for the first damaged row, with its line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # Not splitlines: JSON text may hold U+2028.
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"checks.capability_probe: {path} cannot be read: {error}") from None
    tasks = [_task(line, f"{path.name}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise ConfigError(f"checks.capability_probe: {path} holds no task")
    return tasks


def _task(line: str, where: str) -> Task:
    try:
        task = Task.model_validate(json.loads(line))
    except ValidationError as error:
        raise ConfigError(f"checks.capability_probe: {where}: {describe_validation_error(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"checks.capability_probe: {where}: no JSON: {error}") from None
    if not all(text.strip() for text in task.answers):
        raise ConfigError(f"checks.capability_probe: {where}: an accepted answer is blank; every answer would hold it")
    return task


def compared(tasks: Sequence[Task], before: Sequence[str], after: Sequence[str]) -> dict[str, float]:
    """Shares of tasks that both met, and how many only one of them met.

    Args:
        before: answers of the reference, in the order of `tasks`.
        after: answers of the policy.
    """
    met = [(task.met_by(a), task.met_by(b)) for task, a, b in zip(tasks, before, after, strict=True)]
    return {
        "tasks": len(met),
        "reference": sum(a for a, _ in met) / len(met),
        "policy": sum(b for _, b in met) / len(met),
        "lost": sum(a and not b for a, b in met),
        "gained": sum(b and not a for a, b in met),
    }
