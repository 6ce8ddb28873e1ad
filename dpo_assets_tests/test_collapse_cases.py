"""The published cases: what the shipped bands say of them, and that no band rests on one source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import collapse_guard
from benchmarks.collapse.derive import BY_HAND, derive, round_down
from benchmarks.collapse.published import COLUMNS, SHIPPED, Case, judge, level_of, project_of, read_cases
from benchmarks.collapse.scoring import leave_one_source_out, score
from dpo_assets.checks.bands import default_bands

BANDS = default_bands()
CASES = read_cases(SHIPPED)
RUN = CASES[0].configuration
ROW = {
    "model": "m", "size_b": "8", "method": "qlora", "loss": "sigmoid", "lr": "5e-6", "beta": "0.1", "epochs": "1",
    "effective_batch": "16", "label": "good", "source": "owner/repository file.yaml",
}  # fmt: skip


def csv_of(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "cases.csv"
    lines = [",".join(COLUMNS), *(",".join((ROW | row)[name] for name in COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_at_most_one_good_case_is_blocked_and_thirteen_bad_ones_are_flagged() -> None:
    scored = score(CASES, BANDS)
    assert (scored.good_blocked.n, scored.bad_flagged.n) == (45, 19)
    assert scored.of("good", "error").value * 45 <= 1
    assert scored.bad_flagged.value * 19 >= 13


def test_the_shipped_bands_are_what_the_procedure_gives() -> None:
    assert derive(CASES, BANDS) == BANDS


def test_no_source_moves_a_verdict_of_its_own() -> None:
    assert leave_one_source_out(CASES, BANDS) == []


def test_a_source_that_does_move_a_verdict_is_found() -> None:
    # The ceiling is 2e-7, and five times that is not above 1e-6; without the third source it is 1.5e-7.
    def case(rate: float, source: str) -> Case:
        return replace(CASES[0], source=source, configuration=replace(RUN, learning_rate=rate, beta=0.1))

    moved = leave_one_source_out([case(1e-7, "a/low"), case(2e-7, "b/middle"), case(1e-6, "c/high")], BANDS)
    assert [(m.case.project, m.with_source, m.without_source) for m in moved] == [("c/high", "warn", "error")]


def test_bad_cases_have_no_part_in_the_bands() -> None:
    assert derive([case for case in CASES if case.label == "good"], BANDS) == BANDS


def test_a_source_with_many_rows_has_one_voice() -> None:
    loud = [case for case in CASES if case.project == "allenai/open-instruct"]
    assert derive([*CASES, *loud * 10], BANDS) == BANDS


@pytest.mark.parametrize("name", ["blocked", "dose_blocked"])
def test_a_lower_limit_blocks_good_cases(name: str) -> None:
    # The score would see it: the numbers set by hand are not without effect.
    strict = derive(CASES, BANDS, replace(BY_HAND, **{name: getattr(BY_HAND, name) / 4}))
    assert score(CASES, strict).good_blocked.value > score(CASES, BANDS).good_blocked.value


def test_every_blocked_case_has_a_cause_that_is_enough_by_itself_or_an_unsafe_rate_with_others() -> None:
    for case in CASES:
        if level_of(case, BANDS) == "error":
            blocking = {v.check for v in judge(case, BANDS) if v.level == "error"}
            assert blocking & {"learning_rate_band", "training_dose", "beta_for_loss"}


@pytest.mark.parametrize(
    ("source", "project"),
    [
        ("huggingface/trl issue #1023 (also beta 0.1; worse than SFT)", "huggingface/trl"),
        ("https://github.com/huggingface/trl/issues/1023", "huggingface/trl"),
        ("hiyouga/LLaMA-Factory examples/train_lora/x.yaml", "hiyouga/llamafactory"),
        ("hiyouga/LlamaFactory issue #7734", "hiyouga/llamafactory"),
        ("arXiv:2305.18290 App. B (as indexed in huggingface/trl docs)", "arxiv:2305.18290"),
        ("https://arxiv.org/abs/2410.08847", "arxiv:2410.08847"),
        ("model card org/name (eval acc 0.72)", "org/name"),
        ("a book, chapter 6 (20+ runs)", "a book, chapter 6"),
    ],
)
def test_rows_of_one_author_count_as_one_source(source: str, project: str) -> None:
    assert project_of(source) == project


@given(text=st.text(max_size=80))
def test_any_source_has_a_project(text: str) -> None:
    assert project_of(text) == project_of(text).lower()


@given(value=st.floats(1e-9, 1e9))
def test_a_ceiling_is_rounded_down_by_less_than_a_factor_of_three(value: float) -> None:
    assert value / 2.6 < round_down(value) <= value * (1 + 1e-6)


def test_what_a_case_does_not_say_is_not_judged(tmp_path: Path) -> None:
    [case] = read_cases(csv_of(tmp_path, {"beta": "", "epochs": "", "effective_batch": "", "label": "bad"}))
    assert (case.configuration.beta, case.configuration.epochs, case.configuration.batch) == (None, None, None)
    assert level_of(case, BANDS) == "pass"


@pytest.mark.parametrize(
    ("row", "level"),
    [
        ({"loss": "dpo", "method": "dora", "lr": "2e-4"}, "error"),
        ({"loss": "kto_pair", "method": "full", "lr": "5e-6"}, "warn"),
        ({"loss": "orpo", "method": "full", "lr": "8e-6"}, "warn"),
        ({"loss": "simpo", "method": "full", "lr": "1e-6", "beta": "0.1"}, "error"),
        ({"loss": "RPO", "method": "full", "lr": "1.5e-6"}, "pass"),
        ({"loss": "no-such-loss"}, "warn"),
        ({"epochs": "20", "effective_batch": "1"}, "warn"),
    ],
)
def test_losses_and_methods_of_published_cases_are_understood(tmp_path: Path, row: dict[str, str], level: str) -> None:
    [case] = read_cases(csv_of(tmp_path, row))
    assert level_of(case, BANDS) == level


@pytest.mark.parametrize(
    ("row", "said"), [({"label": "ugly"}, "neither good nor bad"), ({"lr": "high"}, "could not convert")]
)
def test_a_row_that_is_no_case_is_refused_with_its_line(tmp_path: Path, row: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=rf"cases.csv:3: .*{said}"):
        read_cases(csv_of(tmp_path, {}, row))


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("model,lr\nm,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column size_b, method, loss, beta"):
        read_cases(path)


def test_the_command_prints_shares_misses_and_what_moves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hot = {"lr": "1e-3", "model": "hot but good"}
    calm = {"label": "bad", "model": "calm but bad"}
    assert collapse_guard.main(["cases", "--cases", str(csv_of(tmp_path, {}, hot, calm))]) == 0
    said = capsys.readouterr().out
    assert "good, blocked:           0.500" in said
    assert "bad, warned or blocked:  0.000" in said
    assert "good hot but good" in said
    assert "bad calm but bad" in said
    assert "leave one source out (17 sources): 0 verdicts move" in said
