"""The starting model."""

from __future__ import annotations

from datetime import date

from pydantic import Field, JsonValue, field_validator, model_validator

from dpo_assets.recipe.address import LocalPath, PublicLink
from dpo_assets.section import Section

BUILTIN = "builtin:"
# What a template that asks for today's date is told: one day for all pairs, the same on every day of a re-run.
TEMPLATE_DATE = date(2026, 1, 1)
# Names that a chat template gets from elsewhere (transformers 5.17, `render_jinja_template` and `apply_chat_template`).
TAKEN_ARGUMENTS = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversation",
        "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception",
    }
)  # fmt: skip


class BaseModelSection(Section):
    """The starting model."""

    source: LocalPath = Field(
        description="A Hub id (`org/name`), a local folder, or `builtin:stories260k` (a real 260k-parameter model).",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct", "./models/my-base", "builtin:stories260k"],
    )
    revision: str | None = Field(
        default=None,
        description="Commit sha (40 hex digits) of a Hub model. Required for a Hub id: a branch name can move.",
    )
    chat_template: LocalPath | None = Field(
        default=None,
        description="Path of a Jinja chat template for a base that has none; it must end each assistant turn with EOS.",
    )
    template_arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Arguments of the chat template, for every text it renders: `{enable_thinking: false}` (Qwen3).",
        examples=[{"enable_thinking": False}],
    )
    template_date: date = Field(
        default=TEMPLATE_DATE,
        description="The day that a chat template is told which prints today's date (Llama 3.2, SmolLM3, Granite).",
    )
    licence: str | None = Field(
        default=None,
        description=(
            "Licence id of the model as the Hub lists it (`apache-2.0`, `llama3.2`), where its card states none; "
            "`other` with a name and a link for terms of its own."
        ),
    )
    licence_name: str | None = Field(default=None, description="Name of the licence, with `licence: other`.")
    licence_link: PublicLink | None = Field(
        default=None, description="Address of its text, or the name of a file of the base, with `licence: other`."
    )

    @field_validator("template_arguments")
    @classmethod
    def _names_are_free(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in arguments:
            if name in TAKEN_ARGUMENTS:
                raise ValueError(f"`{name}` is no argument of yours: the pipeline gives it to the template itself")
            if not name.isidentifier():
                raise ValueError(f"`{name}` is no name that a template can use")
        return arguments

    @model_validator(mode="after")
    def _a_name_is_of_another_licence(self) -> BaseModelSection:
        if (self.licence_name or self.licence_link) and self.licence != "other":
            raise ValueError("`licence_name` and `licence_link` go with `licence: other`: a known licence has its own.")
        return self

    @property
    def is_builtin(self) -> bool:
        return self.source.startswith(BUILTIN)


def looks_like_hub_id(source: str) -> bool:
    """`org/name` without a path prefix. A folder is told apart by `./`, `../`, `/`, `~` or a drive letter."""
    if source.startswith((BUILTIN, ".", "/", "~")) or ":" in source or "\\" in source:
        return False
    return source.count("/") == 1


def is_commit(revision: str | None) -> bool:
    """Whether it is the whole sha of a commit."""
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision.lower())


def refuse_unpinned(field: str, source: str, revision: str | None) -> None:
    """Raises ValueError where `source` of the section `field` is a Hub id, and `revision` no commit of it."""
    if looks_like_hub_id(source) and not is_commit(revision):
        raise ValueError(
            f"{field}.source `{source}` is a Hub id and needs `revision`: the 40-digit commit sha from the model page "
            "(a branch such as `main` can change under you). For a local folder write `./` in front."
        )
