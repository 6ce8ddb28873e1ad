"""How a URL is shown: whatever its user, password, query or fragment are, no text repeats them."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.secret_shapes import without_url_secrets

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
        ("https://me:pa/hunter2@host/a", "https://***@host/a"),
        ("https://me:hunter?2@host/a", "https://***?***"),
        ("https://me:hunt'er2@host/a", "https://***@host/a"),
        ("https:/me:hunter2@host/a", "https:/***@host/a"),
        ("/project/https:/me:hunter2@host/a", "/project/https:/***@host/a"),
    ],
)
def test_a_url_with_a_slip_in_it_hides_no_less(url: str, shown: str) -> None:
    assert without_url_secrets(url) == shown


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
