"""The soak in short: ticks of the sensor and the assets of data; and that its audits find what is wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg
import pytest
from filelock import FileLock

from benchmarks.soak.__main__ import FIRST_PAIRS, RECIPE, a_home, recipe
from benchmarks.soak.audit import Refreshed, models_beyond, strangers, wrong_leftovers, wrong_promotions, wrong_rows
from benchmarks.soak.inbox import Expected, Inbox
from benchmarks.soak.location import NAME, pipeline
from benchmarks.soak.refreshing import InProcess
from benchmarks.soak.rounds import Round, Soak
from benchmarks.soak.warm import Warm, warm_workers
from dpo_assets.artifact import ArtifactTree
from dpo_assets.checks.evidence.ledger import FIRST, Decided, Ledger
from dpo_assets.recipe import RetentionSection
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.pipelines import DATA

REFRESHES, SEED = 20, 26


@dataclass(frozen=True)
class Soaked:
    """What is there after all refreshes."""

    home: Path
    instance: dg.DagsterInstance
    tree: ArtifactTree
    inbox: Inbox
    rounds: list[Round]
    warm: Warm


@pytest.fixture(scope="module")
def soaked() -> Iterator[Soaked]:
    with a_home(None) as home, pytest.MonkeyPatch.context() as patched, warm_workers(home) as warm:
        patched.setattr("tempfile.tempdir", str(home / "tmp"))
        inbox = Inbox(home / "inbox", random.Random(SEED))
        inbox.begin(FIRST_PAIRS)
        (home / RECIPE).write_text(json.dumps(recipe(home)), encoding="utf-8")
        component = pipeline(home / RECIPE, warm.python)
        with dg.DagsterInstance.from_config(str(home)) as instance:
            tree = ArtifactStore().tree(instance, NAME)
            refreshing = InProcess(instance, component, DATA)
            soak = Soak(inbox, refreshing, instance, component.pipeline, tree, home, None, warm.pid, late=0.0)
            rounds = list(soak.rounds(REFRESHES))
            assert refreshing.ticked() == [], "nothing changed since"
            yield Soaked(home, instance, tree, inbox, rounds, warm)


def last_green(soaked: Soaked) -> tuple[Refreshed, Expected]:
    [run] = soaked.instance.get_runs(limit=1)
    return Refreshed.of(soaked.instance, run, soaked.tree), soaked.inbox.expected()


def test_twenty_refreshes_of_changing_feedback_account_for_every_row_and_leave_nothing_behind(soaked: Soaked) -> None:
    assert [said for one in soaked.rounds for said in one.wrong] == []
    kinds = soaked.inbox.kinds
    assert " ".join(sorted(kinds)) == "broken duplicate flipped late lost mended new put together unreadable withdrawn"
    held = [one.change for one in soaked.rounds if one.status == "FAILURE"]
    assert sorted(held) == ["lost"] * kinds["lost"] + ["unreadable"] * kinds["unreadable"]
    # Handles of a process that has refreshed a few times, and of one that has all.
    few, all_ = (one.measured["this process"].handles for one in (soaked.rounds[3], soaked.rounds[-1]))
    assert all_ <= few + 2


@pytest.mark.parametrize("what", ["pair", "row", "duplicate", "conflict", "broken row", "gate"])
def test_a_row_too_many_or_too_few_is_told(soaked: Soaked, what: str) -> None:
    refreshed, expected = last_green(soaked)
    assert list(wrong_rows(refreshed, expected)) == []
    changed = {
        "pair": {"accepted": frozenset(list(expected.accepted)[1:])},
        "row": {"rows": expected.rows + 1},
        "duplicate": {"duplicates": expected.duplicates + 1},
        "conflict": {"conflicts": expected.conflicts + 1},
        "broken row": {"broken": expected.broken | {("0001-first.jsonl", 9)}},
        "gate": {"red": "every_file_read"},
    }[what]
    assert list(wrong_rows(refreshed, replace(expected, **changed)))


def test_what_a_refresh_leaves_behind_is_told(soaked: Soaked) -> None:
    root, temporary = soaked.tree.root, soaked.home / "tmp"
    assert list(wrong_leftovers(soaked.tree, temporary)) == []
    scratch, checkpoint = root / "tokens" / ("0" * 32 + ".tmp-1"), root / "checkpoints" / "sft" / "a"
    left = [scratch, checkpoint, temporary / "dpo-assets-x"]
    for folder in left:
        folder.mkdir(parents=True)
    of_nothing = root / "tokens" / ("0" * 32 + ".lock")
    of_nothing.touch()
    with FileLock(root / "in_use.lock"):
        told = "\n".join(wrong_leftovers(soaked.tree, temporary))
    of_nothing.unlink()
    for folder in left:
        folder.rmdir()
        assert folder.name in told
    (root / "checkpoints" / "sft").rmdir()
    assert "the lock in_use.lock is held" in told
    assert "0.lock is of nothing" in told


def test_a_process_that_stayed_is_told(soaked: Soaked) -> None:
    known = {soaked.warm.pid}
    assert strangers(soaked.home, known) == []
    stays = subprocess.Popen([sys.executable, "-c", "input()", str(soaked.home)], stdin=subprocess.PIPE)
    try:
        assert f"process {stays.pid} is still there" in "\n".join(strangers(soaked.home, known))
    finally:
        stays.communicate(b"\n")
    assert strangers(soaked.home, set()), "the process whose forks the workers are is one, where nobody knows it"


def test_models_that_retention_should_have_deleted_are_told(soaked: Soaked) -> None:
    assert list(models_beyond(soaked.tree, RetentionSection(keep_models=3, keep_releases=2), 0)) == []
    assert any("tokens" in one for one in models_beyond(soaked.tree, RetentionSection(keep_models=1), 0))


def test_conversations_that_two_decisions_saw_are_told() -> None:
    def decided(number: int, saw: str) -> Decided:
        return Decided(
            number=number, before=FIRST, at="2026-01-01T00:00:00Z", champion=None, challenger="a", inputs={},
            primaries={}, level=None, saw=(saw,), decision="hold", found=False, reason="",
        )  # fmt: skip

    once = Ledger.model_construct(lines=(decided(1, "a"), decided(2, "b")))
    twice = Ledger.model_construct(lines=(decided(1, "a"), decided(2, "a")))
    assert list(wrong_promotions(once, None, "")) == []
    assert list(wrong_promotions(twice, None, "")) == [
        "decision 2 looked at 1 conversations that an earlier one had seen"
    ]
