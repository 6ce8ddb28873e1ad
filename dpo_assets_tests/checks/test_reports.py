"""Reports of the worker through their file: what is no number stays none, and what is of another version says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.artifact import Artifact, seal, without_nan, write_json
from dpo_assets.assets.dpo_dataset import dataset_stats
from dpo_assets.checks.aftermath import aftermath_verdicts
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.promotion import evaluation_verdicts
from dpo_assets.checks.reports import (
    FILE,
    AdoptedBase,
    DpoReport,
    EvaluationReport,
    MergeReport,
    Report,
    SftReport,
    read_metrics,
    read_sft,
)
from dpo_assets.checks.training import dpo_verdicts, merge_verdicts, sft_verdicts
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError
from dpo_assets_tests.samples import aftermath_report, dpo_report, evaluation_report, learned

BANDS = default_bands()
LEVELS = ("pass", "warn", "error")
SFT = {
    "finite": True, "steps": 60, "held_out_nll_before": 2.0, "held_out_nll_after": 1.8, "ends_with_eos": 1.0,
    "kernels": "transformers", "adapted_share": 1.0,
}  # fmt: skip
MERGE = {
    "mean_difference_per_token": 0.005, "max_difference_per_token": 0.01, "probe_pairs": 32, "parameters": 10,
    "method": "streamed", "carried": {"tensors": 40, "adapted": 14},
}  # fmt: skip


def kinds(of: type[Report] = Report) -> Iterator[type[Report]]:
    for kind in of.__subclasses__():
        yield kind
        yield from kinds(kind)


def kept(folder: Path, report: Report | Mapping[str, Any], kind: str = "sft_checkpoint") -> Artifact:
    """The artefact of a report."""
    if isinstance(report, Report):
        report.write(folder)
    else:
        write_json(folder / FILE, report)
    return seal(folder, kind=kind, fingerprint="f" * 32, inputs={})


def strictly(text: str) -> Any:
    """JSON as its standard has it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", sorted(set(kinds()), key=lambda kind: kind.__name__))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_report_reads_back_from_standard_json_whatever_its_numbers_are(kind: type[Report], data: Any) -> None:
    report = data.draw(st.from_type(kind))
    with TemporaryDirectory() as folder:
        artifact = kept(Path(folder), report)
        told = strictly((Path(folder) / FILE).read_text(encoding="utf-8"))
        again = kind.of(artifact)
    assert told == without_nan(report.model_dump(mode="json"))
    assert without_nan(again.model_dump(mode="json")) == told


def dpo_levels(report: DpoReport) -> list[Verdict]:
    return [*dpo_verdicts(report, BANDS), *aftermath_verdicts(report, BANDS)]


JUDGED: list[tuple[Report, Callable[[Any], list[Verdict]]]] = [
    (SftReport.model_validate(SFT), lambda report: sft_verdicts(report, BANDS)),
    (dpo_report(**aftermath_report()), dpo_levels),
    (MergeReport.model_validate(MERGE), lambda report: merge_verdicts(report, BANDS)),
    (
        evaluation_report(),
        lambda report: evaluation_verdicts(report, BANDS, seen=0, learned=learned(), merged=True),
    ),
]


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where floats stand in nested objects."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from numbers(part, (*path, name))
    elif isinstance(value, float):
        yield path


def replaced(value: Mapping[str, Any], path: tuple[str, ...], number: float) -> dict[str, Any]:
    first, *rest = path
    return {**value, first: replaced(value[first], tuple(rest), number) if rest else number}


@pytest.mark.parametrize(("report", "judge"), JUDGED, ids=[type(report).__name__ for report, _ in JUDGED])
def test_a_nan_fails_after_its_file_what_it_fails_before(report: Report, judge: Any, tmp_path: Path) -> None:
    plain = report.model_dump(mode="json")
    places = list(numbers(plain))
    assert places
    for n, place in enumerate(places):
        spoilt = type(report).model_validate(replaced(plain, place, math.nan))
        folder = tmp_path / str(n)
        folder.mkdir()
        read = type(report).of(kept(folder, spoilt))
        before, after = ([LEVELS.index(verdict.level) for verdict in judge(one)] for one in (spoilt, read))
        assert all(late >= early for early, late in zip(before, after, strict=True)), place


def test_a_loss_at_zero_margin_that_is_no_number_is_not_taken_for_one_that_nobody_knows(tmp_path: Path) -> None:
    report = DpoReport.of(kept(tmp_path, dpo_report(expected_first_loss=math.nan, trainer="packed")))
    [verdict] = [one for one in dpo_verdicts(report, BANDS) if one.check == "reference_is_start"]
    assert verdict.level == "error"


def test_a_metric_that_is_no_number_is_null_in_the_log_and_reads_as_nan(tmp_path: Path) -> None:
    from dpo_assets.training.reporting import all_finite, write_metrics

    rows = write_metrics([{"loss": math.inf, "step": 1}, {"loss": 0.5, "step": 2}], tmp_path / "metrics.jsonl")
    assert not all_finite(rows)
    assert strictly((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"loss": None, "step": 1}
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read[0]["loss"])
    assert read[1] == {"loss": 0.5, "step": 2}


# ----------------------------------------------------------------------------------------------------- other versions


@pytest.mark.parametrize(
    "report", [{}, {"finite": False, "steps": 1}, {"adopted": False}, {name: SFT[name] for name in ("steps", "finite")}]
)
def test_a_cut_sft_report_is_no_adopted_base(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report\.json is of an earlier version; materialise `sft_checkpoint` again"):
        read_sft(kept(tmp_path, report))


def test_an_adopted_base_reads_back_as_one(tmp_path: Path) -> None:
    assert read_sft(kept(tmp_path, AdoptedBase(adopted=True))) == AdoptedBase(adopted=True)


def test_an_sft_report_from_before_engines_were_told_is_judged_by_what_it_holds(tmp_path: Path) -> None:
    old = {name: SFT[name] for name in SFT if name not in ("kernels", "adapted_share")} | {"finite": False}
    report = read_sft(kept(tmp_path, old))
    assert isinstance(report, SftReport)
    assert (report.kernels, report.adapted_share) == ("", None)
    assert [verdict.level for verdict in sft_verdicts(report, BANDS)] == ["error", "pass", "pass"]


def test_scores_from_before_prompts_were_counted_are_read_and_say_so(tmp_path: Path) -> None:
    plain = evaluation_report().model_dump(mode="json")
    for name in ("reward_against_chance", "logp_against_sft", "margin"):
        del plain[name]
    scores = {name: value for name, value in plain.items() if isinstance(value, dict) and "value" in value}
    old = plain | {name: {key: score[key] for key in ("value", "low", "high", "n")} for name, score in scores.items()}
    report = EvaluationReport.of(kept(tmp_path, old))
    assert len(scores) == 4
    assert (report.implicit_reward_accuracy.clusters, report.implicit_reward_accuracy.effective) == (None, None)
    assert (report.reward_against_chance, report.logp_against_sft, report.margin) == (None, None, None)


def test_counts_of_an_earlier_dataset_are_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of an earlier version; materialise `dpo_dataset` again"):
        dataset_stats(kept(tmp_path, {"train_pairs": 3}, "dpo_dataset"))


@pytest.mark.parametrize("kind", [DpoReport, MergeReport, EvaluationReport])
def test_a_report_that_says_less_than_this_version_reads_is_told_as_of_an_earlier_one(
    kind: type[Report], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="of an earlier version; materialise `merged_model` again"):
        kind.of(kept(tmp_path, {"steps": 3}, "merged_model"))
