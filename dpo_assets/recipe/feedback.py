"""Where preferences come from, and what is done about pairs that are not fit."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_assets.recipe import dated
from dpo_assets.recipe.address import LocalPath, TimeZone, VariableName
from dpo_assets.recipe.model import is_commit
from dpo_assets.secret_shapes import MASK, without_url_secrets
from dpo_assets.section import Section, hidden_fault


class SqlSource(Section):
    """A table or query whose rows are feedback. What is new since the last ingest is read; nothing is written."""

    database: str | None = Field(
        default=None,
        description="An SQLite file, relative to the folder of the YAML file.",
        examples=["./feedback.db"],
    )
    url_env: VariableName | None = Field(
        default=None,
        description="Environment variable with the URL (`postgresql://user:password@host/db` or `sqlite:///file.db`).",
        examples=["FEEDBACK_DATABASE_URL"],
    )
    table: str | None = Field(default=None, description="Table or view, also `schema.table`.", examples=["votes"])
    query: str | None = Field(
        default=None,
        description="One SELECT instead of a table.",
        examples=["SELECT id, prompt, chosen, rejected, updated_at FROM votes WHERE deleted = false"],
    )
    id: str = Field(description="Column that tells rows apart: it orders them, and tells what was read before.")
    watermark: str | None = Field(
        default=None,
        description=(
            "Column that grows with every new or changed row, such as `updated_at`: only rows at or above the highest "
            "value read so far are asked for. Without one, the whole table is read again when it changed."
        ),
    )

    # Not after the model: that would repeat the value.
    @field_validator("database")
    @classmethod
    def _is_a_file(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise hidden_fault(
                "`database` is a file; put a URL into an environment variable and its name in `url_env`."
            )
        return value

    @model_validator(mode="after")
    def _one_database_and_one_table(self) -> SqlSource:
        if (self.database is None) == (self.url_env is None):
            raise ValueError(
                "name one database: `database: ./feedback.db` for an SQLite file, or `url_env` with the name of the "
                "environment variable that holds the URL."
            )
        if (self.table is None) == (self.query is None):
            raise ValueError("name one of `table` and `query`.")
        if self.query is not None and not self.query.lstrip().lower().startswith(("select", "with")):
            raise ValueError("`query` is one SELECT (or WITH ... SELECT): feedback is only read.")
        return self


class FeedbackSource(Section):
    """One set of feedback rows of one format: files, a dataset of the Hub, or a SQL table."""

    path: str | None = Field(
        default=None,
        description=(
            "File or glob (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; all but the last also with `.gz` or `.zst` "
            "behind), relative to the folder of the YAML file, or a URL such as `s3://bucket/feedback/*.jsonl.gz` "
            "(its query is never shown; credentials belong into the environment); `builtin:oasst` is a real sample. "
            "`{day}` in it, or `{day:%Y/%m/%d}`, stands for every day, and makes the source one of `feedback.days`."
        ),
        examples=["feedback/*.jsonl", "builtin:oasst"],
    )
    hub: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$",
        description="A dataset of the Hugging Face Hub (`org/name`), instead of `path`.",
        examples=["trl-lib/ultrafeedback_binarized"],
    )
    revision: str | None = Field(
        default=None, description="With `hub`: the commit sha (40 hex digits). A branch name can move."
    )
    files: list[str] = Field(
        default=[],
        description="With `hub`: files or patterns in the repository, which is how a config or a split is chosen.",
        examples=[["data/train-*.parquet"]],
    )
    sql: SqlSource | None = Field(default=None, description="A SQL table or query, instead of `path`.")
    # Any name: formats can come from other packages, so the component decides, with the names that there are.
    format: str = Field(
        default="trl",
        min_length=1,
        description=(
            "The reader: `trl` (prompt/chosen/rejected as text or messages), `oasst_tree`, `hh_rlhf` and the others of "
            "docs/feedback.md; `auto` looks at the first rows and says what it saw, or refuses."
        ),
        examples=["trl", "auto", "hh_rlhf"],
    )
    columns: dict[str, str] = Field(
        default={},
        description="Column map: what the reader knows a column as -> its name in the file, or a path (`input.text`).",
        examples=[{"prompt": "question", "chosen": "best", "rejected": "worst"}],
    )
    json_columns: list[str] = Field(
        default=[],
        description=(
            "Columns whose text is JSON, as CSV and SQL have it. Lists of messages are known without; what is named "
            "here must be JSON."
        ),
    )
    fields: dict[str, str] = Field(
        default={},
        description=(
            "Names that a format leaves to its users' configuration (Label Studio, Argilla). For all formats, "
            "`reasoning: leave_out` drops reasoning that stands apart from an answer (else it refuses the row), "
            "and `repeated_prompt: keep` leaves answers as they are that begin with their prompt, as code may."
        ),
        examples=[{"question": "helpful"}, {"reasoning": "leave_out"}, {"repeated_prompt": "keep"}],
    )
    companion: LocalPath | None = Field(
        default=None,
        description="A second file that the format joins with (Langfuse's observations, LangSmith's runs).",
    )

    @field_validator("files", mode="before")
    @classmethod
    def _one_file_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _without_credentials(cls, value: str | None) -> str | None:
        if value is not None and _has_credentials(value):
            raise hidden_fault(
                "`path` holds credentials, which would be kept in every run's record; set them in the environment, "
                "where the file system's package looks for them."
            )
        return value

    @model_validator(mode="after")
    def _one_source(self) -> FeedbackSource:
        given = [name for name in ("path", "hub", "sql") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"there are {' and '.join(f'`{name}`' for name in given)}" if given else "there is none"
            raise ValueError(
                f"a source has one of `path` (files or a URL), `hub` (a dataset) and `sql` (a table); {said}. Write "
                "further ones as further sources."
            )
        if self.hub is not None and not is_commit(self.revision):
            raise ValueError(
                f"the dataset `{self.hub}` needs `revision`: the 40-digit commit sha from its page (a branch such as "
                "`main` can change under you)."
            )
        if self.is_dated and (fault := dated.fault_of(str(self.path))):
            raise ValueError(f"`path`: {fault}")
        if self.is_dated and str(self.path).lower().startswith(("http://", "https://")):
            raise ValueError("`path`: days of a web address cannot be listed; use a file system such as `s3://`.")
        if self.hub is None and (self.revision is not None or self.files):
            raise ValueError("`revision` and `files` belong to `hub`; name files on disk in `path`.")
        return self

    @property
    def is_dated(self) -> bool:
        """Whether its files lie by day."""
        return dated.names_a_day(self.path)

    def pattern(self, day: date | None = None) -> str:
        """`path` with the files of one day, or of every day, in place of the day."""
        path = str(self.path)
        if not self.is_dated:
            return path
        return dated.of_every_day(path) if day is None else dated.of_day(path, day)

    @property
    def shown(self) -> str:
        """The source for people: no secret can be in it."""
        if self.sql is not None:
            database = Path(self.sql.database).name if self.sql.database else self.sql.url_env
            return f"sql:{database}:{self.sql.table or 'query'}"
        if self.hub is not None:
            return f"hub:{self.hub}@{str(self.revision)[:8]}"
        return without_url_secrets(str(self.path))


ContentAction = Literal["flag", "redact", "quarantine"]


class CleaningSection(Section):
    """What is done about pairs that are sound one by one, and still not good to train on."""

    near_duplicates: Literal["quarantine", "drop", "keep"] = Field(
        default="quarantine",
        description="Pairs that say nearly what another pair says, of an earlier day where days are known: set aside, "
        "counted and dropped, or kept.",
    )
    near_duplicate_similarity: float = Field(
        default=0.85,
        ge=0.5,
        le=1.0,
        description="Share of runs of three words that prompt, chosen and rejected answers must each have in common.",
    )
    max_pairs_per_prompt: int = Field(
        default=0, ge=0, description="More pairs of one prompt than this are set aside; 0: no limit."
    )
    template_marks: Literal["quarantine", "escape", "keep"] = Field(
        default="quarantine",
        description="Texts that hold marks of a chat template (`<|im_end|>`), which would end a turn in training.",
    )
    personal_data: ContentAction = Field(
        default="flag",
        description="E-mail addresses, card and phone numbers: flag the pair, mask them, or set it aside.",
    )
    secrets: ContentAction = Field(
        default="flag", description="Keys and tokens: flag the pair, mask them, or set it aside."
    )
    evaluation_sets: list[LocalPath] = Field(
        default=[],
        description="Files of prompts that models are judged by (JSONL or lines); pairs that ask them are set aside.",
        examples=[["evaluation/mt_bench.jsonl"]],
    )


class WindowSection(Section):
    """Which pairs are trained on, by the day (UTC) on which the preference was given. What is held out stays."""

    days: int | None = Field(
        default=None,
        ge=1,
        description="The last so many days, counted back from the newest dated pair: nothing changes while no feedback "
        "comes.",
    )
    step_days: int = Field(
        default=1,
        ge=1,
        description="The first day of `days` moves in steps of so many (7: Mondays), up to a step earlier: pairs "
        "then leave training by the week, and what was trained on them is not made anew at each refresh.",
    )
    since: date | None = Field(
        default=None, description="From this day on. With `days` too, the later start counts.", examples=["2026-01-01"]
    )
    undated: Literal["keep", "leave_out"] = Field(
        default="keep", description="What is done with pairs whose source says no date; they are counted either way."
    )

    @model_validator(mode="after")
    def _has_a_start(self) -> WindowSection:
        if self.days is None and self.since is None:
            raise ValueError("a window needs `days` or `since`; leave `window` out to train on all pairs.")
        return self


class DaysSection(Section):
    """Sources whose path names a day, as daily partitions of the asset `feedback_by_day`."""

    start: date = Field(description="The first day that is a partition. Earlier ones are read all the same.")
    time_zone: TimeZone = Field(default="UTC", description="Time zone in which a day ends, by its IANA name.")


class ReleaseRule(Section):
    """Rows that are taken out of quarantine, and why."""

    reason: Literal[
        "near_duplicate", "over_prompt_cap", "template_marks", "personal_data", "secret", "conflict",
        "evaluation_overlap",
    ] = Field(description="What they are in quarantine for; what is no sound pair cannot be released.")  # fmt: skip
    source: str = Field(default="*", description="Name of their file, or a pattern.", examples=["export-2026-*"])
    note: str = Field(min_length=10, description="Why they may be trained on; kept in the dataset's report.")


class FeedbackSection(Section):
    """Where preferences come from, and what a pair must satisfy."""

    sources: list[FeedbackSource] = Field(min_length=1, description="Feedback files, read in this order.")
    pairing: Literal["best_worst", "adjacent", "all_above_margin"] = Field(
        default="best_worst",
        description=(
            "How ranked, rated or thumbed answers to one prompt become pairs: best against worst, each against the "
            "next, or every two that lie `min_margin` apart."
        ),
    )
    min_margin: float = Field(
        default=0.0, ge=0.0, description="Least difference of two scores or ranks; equal ones are always a tie."
    )
    include_synthetic: bool = Field(default=False, description="Keep OpenAssistant pairs with a machine-written side.")
    max_length: int = Field(
        default=1024, ge=16, description="Tokens of prompt + answer; longer answers lose their end (TRL keep_start)."
    )
    eval_fraction: float = Field(
        default=0.1,
        gt=0.0,
        lt=0.9,
        description=(
            "Share of prompt groups held out for evaluation, never trained on. What a kept model was trained on is not "
            "held out later."
        ),
    )
    min_pairs: int = Field(default=50, ge=1, description="Fewer training pairs than this block the run.")
    max_quarantine_rate: float = Field(
        default=0.2, ge=0.0, le=1.0, description="A larger share of rejected rows blocks the run; single rows never do."
    )
    max_row_fall: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description=(
            "A source that lost a larger share of its rows, or a whole file, since the last materialisation is warned "
            "of; with `checks.severity.feedback_volume: error` it blocks."
        ),
    )
    max_unpacked_gib: float = Field(
        default=4.0,
        gt=0.0,
        description=(
            "GiB that one `.gz`, `.zst` or Parquet file may hold once unpacked; one that holds more is refused, for a "
            "few KB can stand for days of reading. A file that you unpacked yourself has no such bound."
        ),
    )
    max_unpacked_rows: int = Field(
        default=2_000_000, ge=1, description="Rows that one `.gz`, `.zst` or Parquet file may hold, likewise."
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of the train/eval split. With another one, what a kept model was trained on stays in train.",
    )
    window: WindowSection | None = Field(
        default=None,
        description="Days that are trained on; empty: all. Older pairs are counted, not in quarantine.",
    )
    days: DaysSection | None = Field(
        default=None,
        description="Makes the days of sources with `{day}` in their path daily partitions, which can be read again. "
        "Empty: there are none.",
    )
    drift_days: int = Field(
        default=28,
        ge=0,
        description="The newest so many days are held against as many before them (`feedback_drift`); 0: they are not.",
    )
    cleaning: CleaningSection = Field(default_factory=CleaningSection, description="What is done about unfit pairs.")
    release: list[ReleaseRule] = Field(default=[], description="What is taken out of quarantine, by rule.")

    @model_validator(mode="after")
    def _days_have_sources(self) -> FeedbackSection:
        if self.days is not None and not any(source.is_dated for source in self.sources):
            raise ValueError("`days` needs a source whose path names the day, as in `feedback/{day}/*.jsonl`.")
        return self


def _has_credentials(path: str) -> bool:
    """Whether a URL, or what was to be one, names a user or a password before its host."""
    return re.search(rf":/{{1,3}}{re.escape(MASK)}", without_url_secrets(path)) is not None
