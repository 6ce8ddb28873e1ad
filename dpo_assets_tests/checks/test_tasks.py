"""The user's capability probe: what a task file may hold, and when an answer meets a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.checks.tasks import Task, compared, read_tasks
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import parse_recipe, resolve_paths
from dpo_assets_tests.samples import RECIPE


def write(folder: Path, *lines: str) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(prompt=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3), match=st.sampled_from(["contains", "exact"]))
def test_a_written_task_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, answers: list[str], match: str
) -> None:
    row = {"prompt": prompt, "answers": answers, "match": match}
    # Not escaped, so that line separators of other alphabets stand in the file as they are.
    [task] = read_tasks(write(tmp_path_factory.mktemp("t"), json.dumps(row, ensure_ascii=False), "", "  "))
    assert task.model_dump() == row
    assert task.messages == [{"role": "user", "content": prompt}]
    assert task.met_by(f" {answers[0]}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        ('{"prompt": "a"}', "answers"),
        ('{"prompt": "a", "answers": []}', "answers"),
        ('{"prompt": "", "answers": ["b"]}', "prompt"),
        ('{"prompt": "a", "answers": ["b"], "match": "like"}', "match"),
        ('{"prompt": "a", "answers": ["b"], "score": 1}', "score"),
        ('{"prompt": [{"role": "oracle", "content": "a"}], "answers": ["b"]}', "role"),
        ('{"prompt": "a", "answers": ["  "]}', "an accepted answer is blank"),
        ("3", "line 2"),
    ],
)
def test_a_damaged_row_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    good = '{"prompt": "a", "answers": ["b"]}'
    with pytest.raises(ConfigError, match=said) as refused:
        read_tasks(write(tmp_path, good, line))
    assert "line 2" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_a_file_without_tasks_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tasks.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"checks.capability_probe: .*(holds no task|cannot be read)"):
        read_tasks(tmp_path / "tasks.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tasks(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("match", "answer", "met"),
    [
        ("contains", "It is PARIS, of course.", True),
        ("contains", "It is Lyon.", False),
        ("exact", " paris\n", True),
        ("exact", "Paris.", False),
    ],
)
def test_an_answer_meets_a_task_by_its_match(match: Any, answer: str, met: bool) -> None:
    assert Task(prompt="Capital of France?", answers=["Paris", "Lutetia"], match=match).met_by(answer) is met


def test_only_tasks_that_one_side_met_count_as_lost_or_gained() -> None:
    task = Task(prompt="a", answers=["yes"])
    before, after = ["yes", "yes", "no", "no", "yes"], ["yes", "no", "yes", "no", "no"]
    assert compared([task] * 5, before, after) == {"tasks": 5, "reference": 0.6, "policy": 0.4, "lost": 2, "gained": 1}


def test_the_file_lies_relative_to_the_yaml(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE | {"checks": {"capability_probe": "probes/facts.jsonl"}})
    assert resolve_paths(recipe, tmp_path).checks.capability_probe == str(tmp_path / "probes" / "facts.jsonl")
    assert resolve_paths(parse_recipe(RECIPE), tmp_path).checks.capability_probe is None
