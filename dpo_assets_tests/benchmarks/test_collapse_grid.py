"""The fault-injection grid: its world, its faults, and the rule that labels its runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import polars as pl
import pytest
from transformers import AutoTokenizer

from benchmarks.collapse import grid, world
from benchmarks.collapse import grid_faults as faults
from benchmarks.collapse import grid_labels as labels
from benchmarks.collapse import grid_report as report
from benchmarks.collapse import grid_runs as runs
from benchmarks.collapse import grid_scoring as scoring

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "collapse_grid.jsonl"
SFT = {"answers": 1536, "facts": 0.97, "style_a": 0.46, "repetition": 0.0, "no_eos": 0.0}
RUN = SFT | {"answers": 192}


@pytest.mark.parametrize(
    ("change", "fault", "expected"),
    [
        ({}, "clean", "unmoved"),
        ({"style_a": 0.9}, "clean", "moved"),
        ({"style_a": 0.9, "facts": 0.9}, "clean", "moved"),  # 7 points less: within the rule.
        ({"style_a": 0.9, "facts": 0.85}, "clean", "damaged"),
        ({"repetition": 0.2}, "repetitive", "damaged"),
        ({"repetition": 0.1}, "repetitive", "unmoved"),
        ({"no_eos": 0.2}, "clean", "damaged"),
        ({"style_a": 0.2}, "all_flipped", "damaged"),
        ({"style_a": 0.2}, "near_identical", "unmoved"),  # Its pairs do not speak of the style.
        ({"facts": 0.0}, "leaked", "must_be_caught"),
    ],
)
def test_a_run_is_labelled_by_its_behaviour_alone(change, fault, expected):
    assert labels.label(SFT, RUN | change, fault) == expected


def test_a_fall_that_a_small_probe_cannot_tell_from_noise_is_no_damage():
    assert labels.damage(SFT | {"answers": 8}, RUN | {"answers": 8, "facts": 0.75}, "clean") == []


def test_the_probe_asks_nothing_that_a_preference_pair_holds():
    paired = {question.text for question in world.paired_questions()}
    assert not paired & {question.text for question in world.probe_questions()}
    assert not any(q.creature in world.UNPAIRED for q in world.paired_questions())


def test_an_answer_is_right_only_when_it_states_the_fact_and_no_other_value():
    question = world.Question("cat", "color", 0, "")
    right = question.answer(world.STYLE_A, random.Random(0))
    wrong = next(v for v in world.VALUES["color"] if v != world.FACTS["cat", "color"])
    assert question.states_fact(right)
    assert not question.states_fact(right.replace(world.FACTS["cat", "color"], wrong))
    assert not question.states_fact(f"{right} it was {wrong}.")
    assert not question.states_fact("")


def test_every_value_is_the_answer_equally_often():
    for attribute, values in world.VALUES.items():
        dealt = [world.FACTS[creature, attribute] for creature in world.CREATURES]
        assert {dealt.count(value) for value in values} == {len(dealt) // len(values)}


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_is_what_it_is_called(fault):
    tokenizer = AutoTokenizer.from_pretrained(world.STORIES)
    rows = faults.rows_of(fault, seed=0)

    def ids(row, side):
        return tokenizer(row[side][0]["content"], add_special_tokens=False)["input_ids"]

    pairs = [(ids(row, "chosen"), ids(row, "rejected")) for row in rows[:40]]
    if fault == faults.NEAR:
        assert all(len(c) == len(r) and sum(a != b for a, b in zip(c, r, strict=True)) == 1 for c, r in pairs)
    elif fault == faults.TRUNCATED:
        assert all(c != r and c[: world.MAX_LENGTH] == r[: world.MAX_LENGTH] for c, r in pairs)
    else:
        starts = [row["chosen"][0]["content"].startswith(world.STARTS["a"]) for row in rows]
        share = sum(starts) / len(starts)
        assert share == pytest.approx(0.6, abs=0.06) if fault == faults.FLIPPED else share == 1
    if fault == faults.REPETITIVE:
        texts = [row["chosen"][0]["content"] for row in rows]
        assert all(text.count(world.STARTS["a"]) == faults.REPEATS for text in texts)


def test_leaked_and_swapped_datasets_are_written_so(tmp_path):
    def read(fault, split):
        return pl.read_parquet(tmp_path / fault / f"{split}.parquet")

    for fault in (faults.CLEAN, faults.LEAKED, faults.ALL_FLIPPED):
        faults.write_dataset(fault, 0, world.STORIES, tmp_path / fault)
    assert not set(read("clean", "train")["prompt_id"]) & set(read("clean", "eval")["prompt_id"])
    assert set(read("leaked", "eval")["prompt_id"]) <= set(read("leaked", "train")["prompt_id"])
    clean, swapped = read("clean", "train").sort("pair_id"), read("all_flipped", "train").sort("pair_id")
    assert swapped["chosen_ids"].equals(clean["rejected_ids"].alias("chosen_ids"))
    assert read("all_flipped", "eval").equals(read("clean", "eval"))


@pytest.fixture(scope="module")
def rows():
    return grid.read(RESULTS)


@pytest.fixture(scope="module")
def scored(rows):
    return scoring.score(rows)


def test_of_the_recorded_runs_those_that_ruined_the_model_are_stopped(scored):
    found = scoring.detection(scored)
    assert found.n == 91
    assert found.value >= 0.95
    assert scoring.by_construction(scored).value == 1


def test_of_the_recorded_runs_none_on_clean_data_that_left_the_model_sound_is_blocked(rows, scored):
    sound = [one for one in scored if one.fault == faults.CLEAN and one.label != "damaged"]
    controls = scoring.score(rows, cells="seeds")
    assert len(sound) == 12
    assert len(controls) == 5
    assert not any(one.caught for one in [*sound, *controls])
    assert all(one.label == "moved" for one in controls)


def test_every_run_of_the_grid_is_recorded_once(scored):
    assert sorted(one.row["name"] for one in scored) == sorted(cell.name for cell in runs.grid())


def test_a_metric_log_survives_its_columns(tmp_path):
    log = [
        {"step": 1, "loss": 0.693147, "nll_ratio": 1.0, "learning_rate": 0.0},
        {"step": 2, "loss": 0.5, "nll_ratio": 1.2, "probe/answers": 8, "probe/kl_per_token": 0.25},
        {"step": 3, "loss": 0.4, "nll_ratio": 1.3},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    again = scoring.metric_rows({"metrics": runs.columns(path)})
    kept = [{name: value for name, value in row.items() if name != "learning_rate"} for row in log]
    assert again == [row | {"loss": float(f"{row['loss']:.3g}")} for row in kept]


def test_a_stop_keeps_the_last_healthy_probe_before_it(rows):
    one = next(one for one in scoring.score(rows) if one.row["name"] == "clean-x10-b0.1-s0")
    assert one.trigger.step == 16
    assert one.kept_step == 8
    strict = scoring.score(rows, scoring.with_numbers({"kl_per_token_sign": 0.05}))
    assert next(other for other in strict if other.row["name"] == one.row["name"]).kept_step == 8


def test_a_limit_is_tuned_to_part_what_can_be_parted():
    assert report.best_limit([(0.1, False), (0.2, False), (0.9, True), (1.0, True)]) == pytest.approx(0.55)
