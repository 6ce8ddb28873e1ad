"""What is shaped like a secret never gets into a text, and what is not stays as it is."""

from __future__ import annotations

import re
import time
from urllib.parse import quote

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.feedback.reading import _Process
from dpo_assets.recipe import parse_recipe
from dpo_assets.secret_shapes import HINT, MASK, PATTERNS, masked, passwords_in, says_secret, without_url_secrets
from dpo_assets_tests.publishing.test_release import KEYS, MORE_KEYS
from dpo_assets_tests.samples import RECIPE

SECRETS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]), min_size=1).map(
    lambda text: f"hunter{text}2"
)


@given(secret=SECRETS, scheme=st.sampled_from(["https", "s3", "postgresql", "simplecache::http"]))
def test_no_part_of_a_url_that_can_be_a_secret_is_shown(secret: str, scheme: str) -> None:
    quoted = quote(secret, safe="")
    for url in (
        f"{scheme}://me:{quoted}@host/a.jsonl",
        f"{scheme}://{quoted}@host/a.jsonl",
        f"{scheme}://host/a.jsonl?day=1&X-Amz-Signature={quoted}",
        f"{scheme}://host/a.jsonl#access_token={quoted}",
    ):
        shown = without_url_secrets(f"cannot read '{url}', nor {url} 403")
        assert "hunter" not in shown
        assert shown.count("host/a.jsonl") == 2
        assert shown.endswith(" 403")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pa/hunter2@host/a", f"https://{MASK}@host/a"),
        ("https://me:hunter?2@host/a", f"https://{MASK}?{MASK}"),
        ("https://me:hunt'er2@host/a", f"https://{MASK}@host/a"),
        ("https:/me:hunter2@host/a", f"https:/{MASK}@host/a"),
        ("/project/https:/me:hunter2@host/a", f"/project/https:/{MASK}@host/a"),
    ],
)
def test_a_url_with_a_slip_in_it_hides_no_less(url: str, shown: str) -> None:
    assert without_url_secrets(url) == without_url_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a@b.jsonl", "s3://bucket/part-?.jsonl", "abfs://container@account.dfs.net/a.jsonl",
        "hf://datasets/org/name@main/a.jsonl", "memory://exports/*.jsonl*", "C:/users/me@home/a.jsonl",
        "http://[::1]:80/a.jsonl", "/data/a?b=c.jsonl", "ann@example.com wrote: a/b?c=d",
    ],
)  # fmt: skip
def test_what_holds_no_secret_is_shown_as_it_is(text: str) -> None:
    assert without_url_secrets(text) == text


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
        ('{"password": "hunter2222", "user": "me"}', f'{{"password": "{MASK}", "user": "me"}}'),
        (r'{"said": "{\"password\": \"hunter2222\"}"}', rf'{{"said": "{{\"password\": \"{MASK}\"}}"}}'),
        (r'{"db_password": "hunter\"2222"}', rf'{{"db_password": "{MASK}"}}'),
        ("password = 'hunt er2222' # mine", f"password = '{MASK}' # mine"),
        ("api_key: 'hunter2222'", f"api_key: '{MASK}'"),
        ("{'access_token': 'hunter2222'}", f"{{'access_token': '{MASK}'}}"),
        ("password = hunter2222", f"password = {MASK}"),
        ("PGPASSWORD=hunter2222 psql", f"PGPASSWORD={MASK} psql"),
        (
            "AccountName=me;AccountKey=aGVsbG8gd29ybGQgaHVudGVyMg==;EndpointSuffix=x",
            f"AccountName=me;AccountKey={MASK};EndpointSuffix=x",
        ),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPx", f"aws_secret_access_key = {MASK}"),
        ("jdbc:postgresql://me:hunter2222@db/x", f"jdbc:postgresql://me:{MASK}@db/x"),
        ("jdbc:sqlserver://db;user=me;password=hunter2222;", f"jdbc:sqlserver://db;user=me;password={MASK};"),
        ("jdbc:oracle:thin:me/hunter2222@//db:1521/x", f"jdbc:oracle:thin:me/{MASK}@//db:1521/x"),
        ("Authorization: Bearer abcdefgh.12345678_xyz", f"Authorization: Bearer {MASK}"),
        ("Authorization: Basic cmVhZGVyOmh1bnRlcjI=", f"Authorization: Basic {MASK}"),
    ],
)
def test_a_secret_is_masked_by_where_it_stands(text: str, safe: str) -> None:
    assert masked(text) == safe
    assert masked(safe) == safe


@pytest.mark.parametrize(
    "text",
    [
        '{"eos_token": "<|im_end|>", "pad_token": "</s>"}', "password = get_password(prompt)", '{"password": null}',
        "the secret: 'tis a long story", "password: must have eight characters", "token='hello'", 'the key = "value"',
        '{"passwords": "2 of 3"}', "OLDPWD=/home/me",
    ],
)  # fmt: skip
def test_what_only_stands_near_such_a_word_is_no_secret(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    "value",
    [
        "postgresql://me:hunter2222@db/x", "jdbc:postgresql://me:hunter2222@db/x", "use pg://me:hunter2222@db now",
        "host=db user=me password=hunter2222", "jdbc:sqlserver://db;user=me;password=hunter2222;encrypt=true",
        "jdbc:oracle:thin:me/hunter2222@//db", "redis://a:b@c redis://me:hunter2222@db",
    ],
)  # fmt: skip
def test_a_password_in_any_variable_is_known_wherever_it_stands(value: str) -> None:
    assert "hunter2222" in passwords_in(value)


@pytest.mark.parametrize("name", ["BASIC_AUTH", "JWT", "MY_JWT", "AZURE_STORAGE_SAS", "PGPASSFILE"])
def test_the_name_of_such_a_variable_says_secret(name: str) -> None:
    assert says_secret(name)
    assert not says_secret(f"{name}_COUNT") or name == "PGPASSFILE"


@pytest.mark.parametrize(
    "part",
    [
        "password='",
        "password=\"a'",
        'api_key: "',
        "password = ",
        "jdbc:oracle:a:b",
        "secret\\",
        "a",
        "a-",
        "sk-",
        "eyJa",
        "x@",
        "b:",
        "?a_",
        "a://b:",
        "hf_",
        "-----BEGIN ",
    ],
)
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
