"""The texts of a pair as the recipe's cleaning wants them: masked, and without marks of a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dpo_assets.feedback.scan import BESIDE, changed_tools, escaped, marks_in, redacted, redacted_json
from dpo_assets.feedback.tables import CONVERSATIONS


@dataclass(frozen=True)
class Cleaner:
    """What is done to texts.

    Attributes:
        masked: kinds of what is masked where ingestion saw it: personal data, secrets.
        template_marks: of the recipe.
        marks: special tokens of the base model.
    """

    masked: Sequence[str]
    template_marks: Literal["quarantine", "escape", "keep"]
    marks: Sequence[str]

    def texts(self, record: dict[str, Any], flags: Sequence[str]) -> tuple[dict[str, Any], bool]:
        """(the columns of a pair that hold text, as they shall be; whether they held marks of a chat template).

        `flags` say what ingestion saw in them.
        """
        kinds = [kind for kind in self.masked if kind in flags]
        beside = [kind for kind in self.masked if f"{kind}{BESIDE}" in flags]
        looks = self.template_marks != "keep"
        found = False
        result: dict[str, Any] = {}
        for name in CONVERSATIONS:
            messages = []
            for message in record[name]:
                text = redacted(message["content"], kinds) if kinds else message["content"]
                if looks and marks_in(text, self.marks):
                    found = True
                    if self.template_marks == "escape":
                        text = escaped(text, self.marks, answer=message["role"] == "assistant")
                messages.append({"role": message["role"], "content": text})
            result[name] = messages
        if record["tools"]:
            found = found or (looks and bool(marks_in(record["tools"], self.marks)))
            result["tools"] = changed_tools(record["tools"], partial(self._tool_text, kinds=kinds))
        if beside:
            result["row"] = redacted(record["row"], beside)
            result["meta"] = redacted_json(record["meta"], beside)
        return result, found

    def _tool_text(self, text: str, kinds: Sequence[str]) -> str:
        text = redacted(text, kinds) if kinds else text
        return escaped(text, self.marks) if self.template_marks == "escape" else text
