"""The databases that feedback is read from: SQLite files and PostgreSQL, opened to read and for nothing else."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.recipe import SqlSource, is_url
from dpo_assets.secret_shapes import MASK, without_url_secrets

FETCH = 1_000  # Rows at a time.
CURSOR = "dpo_assets_feedback"


class Database(Protocol):
    """An open connection that only reads. `mark` is its parameter sign."""

    mark: str

    def rows(self, statement: str, parameters: Sequence[Any]) -> Iterator[Mapping[str, Any]]: ...

    def close(self) -> None: ...


def described(source: SqlSource) -> str:
    """What is read, for messages."""
    return f"the table `{source.table}`" if source.table else "the query"


def open_database(source: SqlSource) -> Database:
    """The database of a source.

    Raises:
        ConfigError: there is none, or nothing here that reads it.
        InfrastructureError: the server does not answer.
    """
    if source.database is not None:
        return Sqlite(source, Path(source.database))
    assert source.url_env is not None
    url = os.environ.get(source.url_env)
    if not url:
        raise ConfigError(f"the environment variable `{source.url_env}` is not set; it holds the database's URL.")
    protocol = url.split("://", 1)[0].lower() if is_url(url) else ""
    if protocol == "sqlite":
        return Sqlite(source, Path(unquote(urlsplit(url).path.removeprefix("/"))))
    if protocol in ("postgresql", "postgres"):
        return Postgres(source, url)
    # What is no URL is not repeated: it may be a password, or hold one (`host=... password=...`).
    said = f"a URL of {protocol!r}" if protocol else "no URL"
    raise ConfigError(f"`{source.url_env}` holds {said}; known are postgresql:// and sqlite:///.")


class Sqlite:
    mark = "?"

    def __init__(self, source: SqlSource, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"there is no SQLite file {path}")
        self._source = source
        with self._told_apart():
            self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            self._connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")

    def rows(self, statement: str, parameters: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
        with self._told_apart():
            cursor = self._connection.execute(statement, parameters)
            names = [column[0] for column in cursor.description]
            while many := cursor.fetchmany(FETCH):
                for row in many:
                    yield dict(zip(names, row, strict=True))

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if any(word in str(error) for word in ("locked", "busy", "disk I/O")):
                raise InfrastructureError(f"{described(self._source)} cannot be read now: {error}") from None
            raise ConfigError(f"{described(self._source)} cannot be read: {error}") from None

    def close(self) -> None:
        self._connection.close()


def _secrets_of(url: str) -> list[str]:
    """What a message may not repeat of a database's URL: itself, its password, and the parameters it ends with.

    Raises:
        ValueError: it is no URL.
    """
    parts = urlsplit(url)
    values = [value for _, value in parse_qsl(parts.query) if len(value) > 5]  # A short one stands in other words.
    return [one for one in (url, parts.password, unquote(parts.password or ""), *values) if one]


class Postgres:
    mark = "%s"

    def __init__(self, source: SqlSource, url: str) -> None:
        try:
            import psycopg
        except ImportError:
            raise ConfigError("PostgreSQL needs a package: pip install 'dpo-assets[postgres]'") from None
        self._source, self._psycopg = source, psycopg
        try:
            self._secrets = _secrets_of(url)
            # One snapshot of the table for the whole extract, and no way to change anything.
            self._connection = psycopg.connect(url, connect_timeout=15)
            self._connection.read_only = True
            self._connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        except (psycopg.ProgrammingError, ValueError):  # Of the URL itself, which the message repeats in parts.
            raise ConfigError(f"the URL in `{source.url_env}` cannot be understood by psycopg.") from None
        except psycopg.Error as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> InfrastructureError:
        """Without the URL or its password, which the message of a driver may repeat."""
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        said = without_url_secrets(text)[:300]
        return InfrastructureError(f"the database of `{self._source.url_env}` does not answer: {said}")

    def rows(self, statement: str, parameters: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
        psycopg = self._psycopg
        try:
            # With a name the cursor stays on the server, and rows come in portions.
            with self._connection.cursor(name=CURSOR, row_factory=psycopg.rows.dict_row) as cursor:
                cursor.itersize = FETCH
                cursor.execute(statement, parameters or None)
                yield from cursor
        except (psycopg.ProgrammingError, psycopg.DataError) as error:
            raise ConfigError(f"{described(self._source)} cannot be read: {str(error).splitlines()[0]}") from None
        except psycopg.Error as error:
            raise self._failed(error) from None

    def close(self) -> None:
        self._connection.close()
