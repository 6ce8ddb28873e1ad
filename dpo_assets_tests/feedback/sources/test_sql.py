"""SQL tables as feedback: SQLite, and a real PostgreSQL server that the tests start."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError, FeedbackError, InfrastructureError
from dpo_assets.feedback.sources import FeedbackFile, files_of
from dpo_assets.feedback.sources.finding import glance
from dpo_assets.recipe import FeedbackSource, SqlSource
from dpo_assets_tests.feedback.sources.postgres_server import missing, postgres
from dpo_assets_tests.feedback.sources.reading import outcome

COLUMNS = "id integer, prompt text, chosen text, rejected text, at text"


@dataclass
class Table:
    """A table `votes` in some database, and how a recipe names it."""

    execute: Callable[[str, Sequence[Any]], None]
    names: dict[str, Any]

    def add(self, *rows: tuple[int, str]) -> None:
        """Rows by their id and watermark."""
        for number, at in rows:
            values = (number, f"q{number}", "yes", "no", at)
            self.execute(f"INSERT INTO votes VALUES ({', '.join(['?'] * 5)})", values)

    def source(self, **changes: Any) -> FeedbackSource:
        declared = {**self.names, "table": "votes", "id": "id", "watermark": "at", **changes}
        return FeedbackSource(sql=SqlSource(**{k: v for k, v in declared.items() if v is not None}))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    if reason := missing():
        pytest.skip(reason)
    with postgres() as url:
        yield url


@pytest.fixture
def sqlite_table(tmp_path: Path) -> Table:
    path = tmp_path / "feedback.db"

    def execute(statement: str, values: Sequence[Any] = ()) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement, values)

    execute(f"CREATE TABLE votes ({COLUMNS})")
    return Table(execute, {"database": str(path)})


@pytest.fixture
def postgres_table(server: str, monkeypatch: pytest.MonkeyPatch) -> Table:
    import psycopg

    def execute(statement: str, values: Sequence[Any] = ()) -> None:
        with psycopg.connect(server) as connection:
            connection.execute(statement.replace("?", "%s"), list(values) or None)

    execute("DROP TABLE IF EXISTS votes")
    execute(f"CREATE TABLE votes ({COLUMNS})")
    monkeypatch.setenv("FEEDBACK_URL", server)
    return Table(execute, {"url_env": "FEEDBACK_URL"})


@pytest.fixture(params=["sqlite", "postgres"])
def table(request: pytest.FixtureRequest) -> Table:
    made: Table = request.getfixturevalue(f"{request.param}_table")
    return made


def ids(file: FeedbackFile) -> list[int]:
    return [value["id"] for value in outcome(file).values]


def test_the_first_ingest_reads_all_and_the_next_ones_only_what_is_new(table: Table, tmp_path: Path) -> None:
    table.add((2, "2026-01-01"), (1, "2026-01-01"), (3, "2026-01-02"))
    [first] = files_of([table.source()], tmp_path)
    assert outcome(first).values[0] == {
        "id": 1, "prompt": "q1", "chosen": "yes", "rejected": "no", "at": "2026-01-01",
    }  # fmt: skip
    assert ids(first) == [1, 2, 3]
    assert first.facts == {"watermark from": "", "watermark to": "2026-01-02", "rows": "3"}
    assert files_of([table.source()], tmp_path) == [first]
    table.add((4, "2026-01-03"))
    same, second = files_of([table.source()], tmp_path)
    assert same == first
    assert (ids(second), second.facts["watermark from"]) == ([4], "2026-01-02")
    assert second.name.endswith(":votes#2")
    assert files_of([table.source()], tmp_path) == [first, second]


def test_rows_at_the_very_watermark_are_read_once_each(table: Table, tmp_path: Path) -> None:
    table.add((5, "2026-01-01"), (6, "2026-01-01"))
    assert ids(files_of([table.source()], tmp_path)[-1]) == [5, 6]
    table.add((4, "2026-01-01"), (7, "2026-01-01"))
    assert ids(files_of([table.source()], tmp_path)[-1]) == [4, 7]
    table.add((8, "2026-01-01"), (1, "2026-01-02"))
    assert ids(files_of([table.source()], tmp_path)[-1]) == [8, 1]
    assert len(files_of([table.source()], tmp_path)) == 3


def test_a_changed_row_with_a_new_watermark_comes_again(table: Table, tmp_path: Path) -> None:
    table.add((1, "2026-01-01"), (2, "2026-01-02"))
    files_of([table.source()], tmp_path)
    table.execute("UPDATE votes SET chosen = ?, at = ? WHERE id = 1", ("better", "2026-01-03"))
    earlier, changed = files_of([table.source()], tmp_path)
    assert [(value["id"], value["chosen"]) for value in outcome(changed).values] == [(1, "better")]
    assert outcome(earlier).faults == [(1, "superseded")]
    assert ids(earlier) == [2]


def test_of_a_row_that_changed_twice_the_newest_version_counts(table: Table, tmp_path: Path) -> None:
    table.add((1, "2026-01-01"), (2, "2026-01-01"), (3, "2026-01-01"))
    files_of([table.source()], tmp_path)
    for day in (2, 3):
        table.execute("UPDATE votes SET chosen = ?, at = ? WHERE id = 2", (f"day {day}", f"2026-01-0{day}"))
        found = files_of([table.source()], tmp_path)
    assert [outcome(file).faults for file in found] == [[(2, "superseded")], [(1, "superseded")], []]
    assert outcome(found[-1]).values[0]["chosen"] == "day 3"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=4))
def test_every_row_is_read_once_however_watermarks_and_ingests_fall(
    sqlite_table: Table, tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]]
) -> None:
    """As long as watermarks do not go back below the highest that was read."""
    landing = tmp_path_factory.mktemp("landing")
    sqlite_table.execute("DELETE FROM votes", ())
    number = highest = 0
    for steps in batches:
        for step in steps:
            number += 1
            sqlite_table.add((number, f"{highest + step:06d}"))
        highest += max(steps, default=0)
        if number:
            files_of([sqlite_table.source()], landing)
    if number:
        read = [one for file in files_of([sqlite_table.source()], landing) for one in ids(file)]
        assert sorted(read) == list(range(1, number + 1))


def test_the_same_table_gives_the_same_bytes(table: Table, tmp_path: Path) -> None:
    rows = [(number, f"2026-01-0{1 + number % 3}") for number in range(20)]
    table.add(*rows)
    [one] = files_of([table.source()], tmp_path / "one")
    table.execute("DELETE FROM votes", ())
    table.add(*reversed(rows))
    [other] = files_of([table.source()], tmp_path / "other")
    assert one.sha256 == other.sha256


def test_without_a_watermark_the_table_is_read_again_when_it_changed(table: Table, tmp_path: Path) -> None:
    table.add((2, "x"), (1, "y"))
    source = table.source(watermark=None)
    [first] = files_of([source], tmp_path)
    assert files_of([source], tmp_path) == [first]
    table.execute("DELETE FROM votes WHERE id = 1", ())
    [second] = files_of([source], tmp_path)
    assert (ids(first), ids(second)) == ([1, 2], [2])


def test_a_query_is_read_like_a_table(table: Table, tmp_path: Path) -> None:
    table.add((1, "2026-01-01"), (2, "2026-01-02"))
    query = "SELECT id, prompt AS question, at FROM votes WHERE prompt LIKE 'q%' AND id > 0;"
    source = table.source(table=None, query=query)
    assert [value["question"] for value in outcome(files_of([source], tmp_path)[0]).values] == ["q1", "q2"]
    table.add((3, "2026-01-03"))
    assert ids(files_of([source], tmp_path)[-1]) == [3]


def test_names_are_quoted(table: Table, tmp_path: Path) -> None:
    table.execute('CREATE TABLE "odd ""name%" ("the id" integer, "at%" integer)', ())
    try:
        table.execute('INSERT INTO "odd ""name%" VALUES (1, 5)', ())
        source = table.source(table='odd "name%', id="the id", watermark="at%")
        files_of([source], tmp_path)
        table.execute('INSERT INTO "odd ""name%" VALUES (2, 5)', ())
        assert [value["the id"] for value in outcome(files_of([source], tmp_path)[-1]).values] == [2]
    finally:
        table.execute('DROP TABLE "odd ""name%"', ())


@pytest.mark.parametrize(
    "changes",
    [
        {"table": "missing"},
        {"id": "missing"},
        {"watermark": "missing"},
        {"table": None, "query": "SELECT nope FROM votes"},
    ],
)
def test_what_is_not_there_is_a_fault_of_the_recipe(table: Table, tmp_path: Path, changes: dict[str, Any]) -> None:
    table.add((1, "2026-01-01"))
    with pytest.raises(ConfigError, match=r"missing|nope"):
        files_of([table.source(**changes)], tmp_path)


def test_a_row_without_id_or_watermark_is_refused_with_the_way_out(table: Table, tmp_path: Path) -> None:
    table.add((1, "2026-01-01"))
    files_of([table.source()], tmp_path)
    table.execute("INSERT INTO votes (id, prompt) VALUES (?, ?)", (2, "q"))
    with pytest.raises(ConfigError, match=r"rows without `at`.*COALESCE"):
        files_of([table.source()], tmp_path)


def test_an_empty_table_is_no_feedback(table: Table, tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="has no row"):
        files_of([table.source()], tmp_path)
    table.add((1, "2026-01-01"))
    assert len(files_of([table.source()], tmp_path)) == 1


def test_a_glance_sees_new_rows_without_reading_them(table: Table, tmp_path: Path) -> None:
    table.add((1, "2026-01-01"))
    for source in (table.source(), table.source(watermark=None)):
        before = glance(source)
        assert before == glance(source)
        table.add((2, "2026-01-01"))
        assert glance(source) != before


def test_two_tables_and_two_queries_keep_their_states_apart(table: Table, tmp_path: Path) -> None:
    table.add((1, "2026-01-01"), (2, "2026-01-02"))
    queries = [f"SELECT * FROM votes WHERE id = {number}" for number in (2, 1)]
    sources = [table.source(), *(table.source(table=None, query=query) for query in queries)]
    files = files_of(sources, tmp_path)
    assert [ids(file) for file in files] == [[1, 2], [2], [1]]
    assert [file.name.partition("votes")[0].partition("query")[2] for file in files] == ["", "#1", "#1 #2"]


def test_an_interrupted_extract_leaves_no_state(
    sqlite_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite_table.add((1, "2026-01-01"))
    with monkeypatch.context() as patch:
        patch.setattr("dpo_assets.feedback.sources.sql.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files_of([sqlite_table.source()], tmp_path)
    [file] = files_of([sqlite_table.source()], tmp_path)
    assert ids(file) == [1]


def test_an_extract_that_was_damaged_since_is_refused_with_the_way_out(sqlite_table: Table, tmp_path: Path) -> None:
    sqlite_table.add((1, "2026-01-01"))
    [file] = files_of([sqlite_table.source()], tmp_path)
    file.path.write_bytes(file.path.read_bytes().replace(b"yes", b"no!"))
    [damaged] = files_of([sqlite_table.source()], tmp_path)
    assert outcome(damaged).reason == "damaged_copy"
    assert f"remove {file.path.parent}" in str(outcome(damaged).refused)


# Each database's own


def test_sqlite_is_not_written_and_text_that_is_none_costs_its_row(sqlite_table: Table, tmp_path: Path) -> None:
    sqlite_table.add((1, "2026-01-01"), (3, "2026-01-03"))
    sqlite_table.execute("INSERT INTO votes VALUES (2, CAST(X'61FF62' AS TEXT), 'a', 'b', '2026-01-02')", ())
    before = Path(sqlite_table.names["database"]).read_bytes()
    result = outcome(files_of([sqlite_table.source()], tmp_path)[0])
    assert [value["id"] for value in result.values] == [1, 3]
    assert result.faults == [(2, "invalid_utf8")]
    assert Path(sqlite_table.names["database"]).read_bytes() == before


def test_sqlite_by_a_url_in_the_environment(
    sqlite_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite_table.add((1, "2026-01-01"))
    source = sqlite_table.source(database=None, url_env="FEEDBACK_URL")
    with pytest.raises(ConfigError, match="`FEEDBACK_URL` is not set"):
        files_of([source], tmp_path)
    monkeypatch.setenv("FEEDBACK_URL", f"sqlite:///{sqlite_table.names['database']}")
    assert ids(files_of([source], tmp_path)[0]) == [1]
    monkeypatch.setenv("FEEDBACK_URL", "mysql://me:hunter2@host/db")
    with pytest.raises(ConfigError, match="URL of 'mysql'") as refused:
        files_of([source], tmp_path)
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("FEEDBACK_URL", "host=db password=hunter2")
    with pytest.raises(ConfigError, match="holds no URL") as refused:
        files_of([source], tmp_path)
    assert "hunter2" not in str(refused.value)


def test_a_missing_or_foreign_file_is_no_database(sqlite_table: Table, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no SQLite file"):
        files_of([sqlite_table.source(database=str(tmp_path / "none.db"))], tmp_path)
    (tmp_path / "text.db").write_text("hello" * 500)
    with pytest.raises(ConfigError, match="not a database"):
        files_of([sqlite_table.source(database=str(tmp_path / "text.db"))], tmp_path)


def test_the_types_of_postgres_become_json(postgres_table: Table, tmp_path: Path) -> None:
    postgres_table.execute("DROP TABLE IF EXISTS typed", ())
    postgres_table.execute(
        "CREATE TABLE typed (id uuid, at timestamptz, score numeric(4,2), rating real, chosen jsonb, tags text[], "
        "raw bytea, day date, text_5 text, nothing text)",
        (),
    )
    postgres_table.execute(
        "INSERT INTO typed VALUES ('00000000-0000-0000-0000-000000000001', '2026-01-02 03:04:05.678901+02', 4.50, "
        "'NaN', '[{\"role\": \"assistant\", \"content\": \"h\u00e9\"}]', '{a,b}', '\\x61ff', '2026-01-02', '5', NULL)",
        (),
    )
    source = postgres_table.source(table="public.typed")
    [value] = outcome(files_of([source], tmp_path)[0]).values
    assert value == {
        "id": "00000000-0000-0000-0000-000000000001",
        "at": "2026-01-02T01:04:05.678901+00:00",
        "score": 4.5,
        "rating": None,
        "chosen": [{"role": "assistant", "content": "h\u00e9"}],
        "tags": ["a", "b"],
        "raw": {"base64": "Yf8="},
        "day": "2026-01-02",
        "text_5": "5",
        "nothing": None,
    }
    assert len(files_of([source], tmp_path)) == 1  # The time came back to the microsecond.


def test_postgres_is_read_in_one_snapshot_that_cannot_write(postgres_table: Table, tmp_path: Path) -> None:
    postgres_table.add((1, "2026-01-01"))
    spoil = "CREATE OR REPLACE FUNCTION spoil() RETURNS integer AS 'DELETE FROM votes; SELECT 1' LANGUAGE sql"
    postgres_table.execute(spoil, ())
    source = postgres_table.source(table=None, query="SELECT spoil() AS id, '1' AS at")
    with pytest.raises((ConfigError, InfrastructureError), match="read-only"):
        files_of([source], tmp_path)
    assert ids(files_of([postgres_table.source()], tmp_path)[0]) == [1]


@pytest.mark.parametrize(
    "url", ["postgresql://me:hunter2@127.0.0.1:1/db", "postgresql://127.0.0.1:1/hunter2?password=hunter2"]
)
def test_a_server_that_does_not_answer_is_infrastructure_and_its_password_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("FEEDBACK_URL", url)
    source = FeedbackSource(sql=SqlSource(url_env="FEEDBACK_URL", table="votes", id="id"))
    with pytest.raises(InfrastructureError, match="the database of `FEEDBACK_URL` does not answer") as refused:
        files_of([source], tmp_path)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["postgresql://me:hunter[2@host/db", "postgresql://host/db?hunter2=x"])
def test_a_url_that_the_driver_cannot_read_is_a_fault_of_the_variable_and_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("FEEDBACK_URL", url)
    with pytest.raises(ConfigError, match="the URL in `FEEDBACK_URL` cannot be understood") as refused:
        files_of([FeedbackSource(sql=SqlSource(url_env="FEEDBACK_URL", table="votes", id="id"))], tmp_path)
    assert "hunter" not in str(refused.value)


def test_postgres_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    monkeypatch.setenv("FEEDBACK_URL", "postgresql://host/db")
    with pytest.raises(ConfigError, match=r"pip install 'dpo-assets\[postgres\]'"):
        files_of([FeedbackSource(sql=SqlSource(url_env="FEEDBACK_URL", table="v", id="id"))], tmp_path)


def test_what_lies_in_the_landing_folder_holds_no_credentials(
    postgres_table: Table, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEEDBACK_URL", server.replace("postgres@", "postgres:hunter2@"))
    postgres_table.add((1, "2026-01-01"))
    files_of([postgres_table.source()], tmp_path)
    written = [path.read_text() for path in tmp_path.rglob("*.json*")]
    assert written
    assert not any("hunter2" in text for text in written)
    [note] = [json.loads(path.read_text()) for path in tmp_path.rglob("*.note.json")]
    assert (note["watermark"], note["ids_at_watermark"]) == ("2026-01-01", ["1"])
