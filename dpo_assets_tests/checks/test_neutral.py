"""Neutral texts: read, compared, judged."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.neutral import NEUTRAL, neutral_perplexity, perplexities, read_texts
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import parse_recipe, resolve_paths
from dpo_assets_tests.samples import RECIPE, evaluation_report, neutral

BANDS = default_bands()


def test_the_package_holds_sixty_texts_of_its_own() -> None:
    texts = read_texts(NEUTRAL)
    assert len(texts) == len(set(texts)) == 60
    assert any("\n" in text for text in texts), "code keeps its lines"


def test_rows_of_jsonl_and_paragraphs_are_texts(tmp_path: Path) -> None:
    rows, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    rows.write_text('{"text": "one\\u2028line"}\n\n{"text": " two ", "more": 1}\n', encoding="utf-8")
    plain.write_bytes(b"one\r\nstill one\r\n\r\n  \r\n\r\ntwo\n")
    assert read_texts(rows) == ["one\u2028line", " two "]
    assert read_texts(plain) == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", " \n\n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}', 'line 2: not a row of the form {"text": "..."}'),
        ("a.jsonl", '{"text": "  "}', "line 1: not a row"),
        ("a.jsonl", '["one"]', "line 1: not a row"),
        ("a.jsonl", '\n{"text": ', "line 2: no JSON"),
    ],
)
def test_a_corpus_that_is_none_is_refused_with_the_place(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_texts(tmp_path / name)
    assert str(error.value).startswith("evaluation.corpus: ")
    assert told in str(error.value)


def test_a_corpus_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path in (tmp_path / "latin.txt", tmp_path / "none.txt"):
        with pytest.raises(ConfigError, match=r"evaluation\.corpus: .* cannot be read"):
            read_texts(path)


def test_a_corpus_is_found_beside_the_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE | {"evaluation": {"corpus": "probes/plain.txt"}})
    assert resolve_paths(recipe, tmp_path).evaluation.corpus == str(tmp_path / "probes" / "plain.txt")
    assert resolve_paths(parse_recipe(RECIPE), tmp_path).evaluation.corpus is None


def test_every_token_weighs_the_same() -> None:
    found = perplexities([1, 9], [-1.0, -9.0], [-1.0 - math.log(2), -9.0 - 9 * math.log(2)])
    assert (found.texts, found.tokens) == (2, 10)
    assert (found.sft, found.policy, found.ratio) == pytest.approx((math.e, 2 * math.e, 2.0))
    uneven = perplexities([1, 9], [-1.0, -9.0], [-11.0, -9.0])
    assert uneven.ratio == pytest.approx(math.e)


@given(st.integers(20, 60), st.floats(-1.0, 3.0), st.integers(0, 2**32))
def test_the_interval_holds_the_ratio_and_follows_its_spread(count: int, shift: float, seed: int) -> None:
    draws = Random(seed)
    tokens = [draws.randint(5, 80) for _ in range(count)]
    noise = [draws.gauss(0.0, 1.0) for _ in tokens]
    before = [-3.0 * n for n in tokens]
    narrow, wide = (
        perplexities(
            tokens, before, [b - n * (shift + spread * z) for b, n, z in zip(before, tokens, noise, strict=True)]
        )
        for spread in (0.01, 1.0)
    )
    widths = []
    for found in (narrow, wide):
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.ratio < found.high
        widths.append(found.high / found.low)
    assert widths[0] < widths[1]
    assert narrow.ratio == pytest.approx(math.exp(shift), rel=0.02)


def test_texts_of_one_prompt_are_no_independent_evidence() -> None:
    after = [-3.0, -5.0] * 30
    apart = perplexities([1] * 60, [-3.0] * 60, after)
    together = perplexities([1] * 120, [-3.0] * 120, [a for a in after for _ in range(2)], [n // 2 for n in range(120)])
    assert (together.ratio, together.low) == pytest.approx((apart.ratio, apart.low))


def test_likelihood_that_is_gone_altogether_is_infinite_and_none_is_nan() -> None:
    assert perplexities([1], [0.0], [-1e6]).ratio == math.inf
    assert math.isnan(perplexities([], [], []).ratio)
    assert math.isnan(perplexities([1], [0.0], [math.nan]).ratio)


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        (neutral(0.9), "pass"),
        (neutral(1.1), "pass"),
        (neutral(1.11), "warn"),
        (neutral(1.5), "warn"),
        (neutral(1.51), "error"),
        (neutral(1.6) | {"low": 1.05}, "warn"),
        (neutral(1.6) | {"low": None, "high": None}, "error"),
        (neutral(1.6) | {"low": math.nan}, "error"),
        (neutral(math.nan), "error"),
        (neutral(math.inf), "error"),
        ({"not_measured": "no neutral texts were asked"}, "warn"),
        (None, "warn"),
    ],
)
def test_neutral_text_that_lost_its_likelihood_warns_and_then_blocks(changes: object, level: str) -> None:
    verdict = neutral_perplexity(evaluation_report(neutral=changes), BANDS)
    assert verdict.level == level
    assert bool(verdict.fix) == (level != "pass")
