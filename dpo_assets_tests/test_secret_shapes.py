"""What is shaped like a secret never gets into a text, and what is not stays as it is."""

from __future__ import annotations

import re
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.reading import _Process
from dpo_assets.recipe import parse_recipe
from dpo_assets.secret_shapes import HINT, MASK, PATTERNS, masked, shown_url
from dpo_assets_tests.publishing.test_release import KEYS, MORE_KEYS
from dpo_assets_tests.samples import RECIPE

SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=me&X-Amz-Expires=600&X-Amz-Signature=0a1b2c"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("feedback/*.jsonl", "feedback/*.jsonl"),
        ("C:\\votes?.csv", "C:\\votes?.csv"),
        ("s3://bucket/votes-?.jsonl", "s3://bucket/votes-?.jsonl"),
        ("s3://reader:hunter2@bucket/votes.jsonl", "s3://bucket/votes.jsonl"),
        ("postgresql://reader:p@ss/w@host/db", "postgresql://host/db"),
        ("abfs://container@account.example/votes", "abfs://container@account.example/votes"),
        ("hf://datasets/org/name@main/votes.jsonl", "hf://datasets/org/name@main/votes.jsonl"),
        ("https://some-token@host/votes.jsonl", "https://host/votes.jsonl"),
        ("https://host:8080/votes@v1.jsonl", "https://host:8080/votes@v1.jsonl"),
        (f"https://bucket.example/votes.jsonl?{SIGNED}&versionId=3", "https://bucket.example/votes.jsonl?versionId=3"),
        (f"https://bucket.example/votes.jsonl?{SIGNED}", "https://bucket.example/votes.jsonl"),
        ("https://a.example/votes?sv=2024-08-04&se=2026-12-01&sr=b&sp=r&sig=aB%3D", "https://a.example/votes"),
        ("https://h.example/get?se=north&file=votes.jsonl", "https://h.example/get?se=north&file=votes.jsonl"),
        (
            "https://h.example/get?file=a.jsonl&access_token=x1",
            f"https://h.example/get?file=a.jsonl&access_token={MASK}",
        ),
        ("https://h.example/get?v=aB3dE5gH7jK9mN1pQ3sT5vW7", f"https://h.example/get?v={MASK}"),
        ("https://h.example/votes.jsonl#access_token=x1", "https://h.example/votes.jsonl"),
    ],
)
def test_a_url_is_shown_without_who_asks_and_with_what_right(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    assert shown_url(shown) == shown


@given(
    st.from_regex(r"[!-~]{1,30}", fullmatch=True).filter(
        lambda text: not re.search(r"[\"'<>`]|://|^\d{1,5}[/?#]", text)
    )
)
def test_whatever_a_password_holds_it_is_in_no_shown_url(password: str) -> None:
    for scheme in ("s3", "https", "postgresql"):
        assert shown_url(f"{scheme}://Reader:{password}@Host/Votes") in (
            f"{scheme}://Host/Votes",
            # A password that ends the address for every reader of URLs is cut with all that follows it.
            f"{scheme}://{MASK}@Host/Votes",
        )


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (
            "could not connect to mysql://me:hunter2@db:3306/x (timeout)",
            f"could not connect to mysql://me:{MASK}@db:3306/x (timeout)",
        ),
        (
            "GET https://b.example/f?X-Amz-Signature=0a1b&x=1 403",
            f"GET https://b.example/f?X-Amz-Signature={MASK}&x=1 403",
        ),
        ("host=db user=me password=hunter2 dbname=x", f"host=db user=me password={MASK} dbname=x"),
        ("Authorization: Bearer abcdefgh.12345678_xyz", f"Authorization: Bearer {MASK}"),
        ("Authorization: Basic cmVhZGVyOmh1bnRlcjI=", f"Authorization: Basic {MASK}"),
    ],
)
def test_a_secret_is_masked_by_where_it_stands(text: str, safe: str) -> None:
    assert masked(text) == safe
    assert masked(safe) == safe


@pytest.mark.parametrize("part", ["a", "a-", "sk-", "eyJa", "x@", "b:", "?a_", "a://b:", "hf_", "-----BEGIN "])
def test_a_long_text_takes_no_longer_than_it_is(part: str) -> None:
    """Whoever writes feedback chooses the text; patterns that look at each place twice would take minutes here."""
    started = time.process_time()
    masked(part * (200_000 // len(part)))
    assert time.process_time() - started < 5.0


@pytest.mark.parametrize(("kind", "key"), [*KEYS.items(), *MORE_KEYS], ids=lambda value: value[:16])
def test_the_hint_lets_no_key_through(kind: str, key: str) -> None:
    assert PATTERNS[kind].search(key)
    assert re.search(HINT, key)


def test_a_url_in_place_of_its_variable_is_refused_without_its_password() -> None:
    sql = {"url_env": "postgresql://reader:hunter2hunter2@db/votes", "table": "votes", "id": "id"}
    with pytest.raises(ConfigError, match="url_env") as refused:
        parse_recipe(RECIPE | {"feedback": {"sources": [{"sql": sql}]}})
    assert "hunter2" not in str(refused.value)


def test_a_process_that_reads_feedback_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correct horse battery")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    with _Process() as reader:
        started = psutil.Process(reader._process.pid)
        deadline = time.monotonic() + 60
        # A process has its environment a moment after it has its number.
        while not (environment := started.environ()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "correct horse battery" not in environment.values()
    assert environment["SOMETHING_ELSE"] == "kept"
