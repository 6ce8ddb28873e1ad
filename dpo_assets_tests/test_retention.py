"""Retention: nothing that is needed goes, what goes is what the recipe says, and nobody at work loses anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import REJECTED, ArtifactTree, open_artifact, write_json
from dpo_assets.assets.materialisations import FINGERPRINT
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.retention import Retained, of_ledger, retain
from dpo_assets.checks.evidence.ledger import Decided, Ledger, Primary
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.cli import main
from dpo_assets.disk import share_file
from dpo_assets.errors import InfrastructureError
from dpo_assets.leftovers import TRASH, sweep
from dpo_assets.recipe import RetentionSection, parse_recipe
from dpo_assets.retention import CHECKPOINTS, DAY, LOG, MAY_GO, Needed, Stored, choose, delete, frees, stored
from dpo_assets_tests.pipelines import demo_recipe
from dpo_assets_tests.test_lineage import Shelf, gates_of

AT = "2026-11-27T12:00:00+00:00"
NOW = 1000 * DAY
KINDS = ("dpo_dataset", "base_model", "dpo_plan", "sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores",
         "promotion", "published_model")  # fmt: skip
TIGHT: dict[str, Any] = {"keep_models": 1, "keep_days": 1.0, "keep_releases": 1}

# The choice, over random stores


@st.composite
def stores(draw: st.DrawFn) -> tuple[list[Stored], list[Needed], RetentionSection]:
    """Artefacts that were each made from earlier ones, some of equal content; what is needed of them; and rules."""
    made: list[Stored] = []
    for n in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(KINDS))
        sources = draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
        digest = draw(st.sampled_from([f"digest {n}", "digest of several"]))
        inputs = {one.kind: one.digest for one in sources} | ({"gone": "digest"} if draw(st.booleans()) else {})
        used = NOW - draw(st.integers(0, 60)) * DAY
        made.append(Stored(kind, f"{n:032x}", digest, inputs, n, used))
    asked = draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
    needed = [Needed(one.kind, draw(st.sampled_from([one.fingerprint, one.digest])), "asked") for one in asked]
    rules = RetentionSection(keep_models=draw(st.integers(1, 4)), keep_days=draw(st.integers(0, 40)))
    return made, needed, rules


def back_to(store: list[Stored], roots: list[Stored]) -> set[Stored]:
    """The roots and all that they go back to, found the slow way: until nothing more is added."""
    found = set(roots)
    while more := {one for one in store for root in found if root.inputs.get(one.kind) == one.digest} - found:
        found |= more
    return found


@settings(max_examples=150, deadline=None)
@given(case=stores())
def test_nothing_that_is_needed_goes_and_what_goes_is_what_the_rules_say(
    case: tuple[list[Stored], list[Needed], RetentionSection],
) -> None:
    store, needed, rules = case
    choice = choose(store, needed, rules, NOW)
    gone, kept = list(choice.gone), set(choice.kept)
    assert set(gone) | kept == set(store)
    assert not set(gone) & kept
    assert all(choice.kept.values())
    assert all(choice.gone.values())
    asked = [s for s in store if any(n.kind == s.kind and n.name in (s.fingerprint, s.digest) for n in needed)]
    by_use = sorted(store, key=lambda s: (-s.used, s.fingerprint))
    lasting = [one for kind in MAY_GO for one in [s for s in by_use if s.kind == kind][: rules.keep_models]]
    young = [one for one in store if one.kind in MAY_GO and NOW - one.used <= rules.keep_days * DAY]
    stays = back_to(store, asked + lasting + young)
    # Exactly: of what may go, all goes that nothing holds.
    assert set(gone) == {one for one in store if one.kind in MAY_GO} - stays
    # Who was made from something goes before it does.
    for place, one in enumerate(gone):
        assert not [
            later for later in gone[place + 1 :] if later.inputs.get(one.kind) == one.digest
            and MAY_GO.index(later.kind) > MAY_GO.index(one.kind)
        ]  # fmt: skip


def test_feedback_datasets_scores_and_decisions_can_never_go() -> None:
    kinds = ("raw_preferences", "raw_batches", "raw_files", "paired_answers", "dpo_dataset", "eval_scores",
             "promotion", "dpo_plan", "what a later version makes")  # fmt: skip
    store = [Stored(kind, f"{n:032x}", f"{n}", {}, 1, 0.0) for n, kind in enumerate([*kinds, *kinds, "merged_model"])]
    rules = RetentionSection(keep_models=1, keep_days=0)
    assert not choose(store, [], rules, NOW).gone
    older = Stored("merged_model", "f" * 32, "x", {}, 1, -1.0)
    assert list(choose([*store, older], [], rules, NOW).gone) == [older]


# A store, an event log and a ledger


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        yield Shelf(opened)


def heavy(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(1000))


def generations(shelf: Shelf, count: int) -> list[Mapping[str, Any]]:
    """The artefacts of several refreshes with new models, the first of them long ago."""
    kept = []
    for n in range(count):
        for node in ("base_model", "raw_preferences", "dpo_dataset", "dpo_plan"):
            shelf.make(node)
        for node in ("sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores", "promotion", "published_model"):
            made = shelf.make(node, f"generation {n}", also=heavy)
            when = time.time() - 100 * (count - n) * DAY
            for path in (made.path / "manifest.json", gates_of(made)):
                os.utime(path, (when, when))
        kept.append(dict(shelf.now))
    return kept


def go_live(shelf: Shelf, made: Mapping[str, Any]) -> None:
    """A release of a model, decided on against what is live."""

    def lines(ledger: Ledger) -> Ledger:
        found = Primary(difference=0.2, low=0.1, high=0.3, p_better=0.001, adjusted=0.001, pairs=99, prompts=99)
        decided = Decided(
            number=len(ledger.lines) + 1, before=ledger.head, at=AT, champion=ledger.champion,
            challenger=made["merged_model"].digest, inputs={}, primaries={"reward": found}, level=0.0125, saw=("p",),
            decision="promote" if ledger.champion else "first_publication", found=True, reason="better",
        )  # fmt: skip
        return ledger.append(decided).released(
            decided, at=AT, repo_id="org/bot", commit="c" * 40, tag="t", known=["p"],
            artefact=made["published_model"].fingerprint,
        )  # fmt: skip

    LedgerFile.of(shelf.tree.root).extend(lines)


def call(shelf: Shelf, *, really: bool = True, **rules: Any) -> tuple[Retained, list[str]]:
    pipeline = Pipeline("demo", parse_recipe(demo_recipe(retention={**TIGHT, **rules})))
    said: list[str] = []
    return retain(shelf.instance, pipeline, shelf.tree, said.append, really=really), said


def there(shelf: Shelf, made: Mapping[str, Any]) -> set[str]:
    """Of one generation, the models that are in the store and whole."""
    return {node for node in made if node in MAY_GO and shelf.tree.find(node, made[node].fingerprint) == made[node]}


MODELS = {"base_model", "sft_checkpoint", "dpo_adapter", "merged_model", "published_model"}


def test_the_champion_a_release_for_a_rollback_and_what_was_made_last_stay_whole_and_the_rest_goes(
    shelf: Shelf,
) -> None:
    made = generations(shelf, 6)
    for number in (1, 3):  # The champion was held against the first release.
        go_live(shelf, made[number])
    shown, _ = call(shelf, really=False)
    assert [there(shelf, one) for one in made] == [MODELS] * 6, "what is shown is not deleted"
    found, said = call(shelf)
    assert shown.choice.gone == found.choice.gone
    # Release 2 is live and held against the model of release 1, which stays, but not its release: keep_releases is 1.
    assert [there(shelf, one) for one in made] == [
        {"base_model"},
        MODELS - {"published_model"},
        {"base_model"},
        MODELS,
        {"base_model"},
        MODELS,
    ]
    for one in made:
        assert all(shelf.tree.find(node, one[node].fingerprint) for node in ("dpo_dataset", "eval_scores", "promotion"))
    assert found.deleted == len(found.choice.gone) == 3 * 4 + 1
    log = [json.loads(line) for line in (shelf.tree.root / LOG).read_text().splitlines()]
    assert [(line["kind"], line["name"]) for line in log] == [(s.kind, s.fingerprint) for s in found.choice.gone]
    assert all(line["bytes"] > 1000 and "keep_days: 1" in line["why"] for line in log)
    assert len(said) == found.deleted
    # Of what is gone no record of gates, no lock and no trash is left.
    names = {path.name[:32] for kind in MODELS for path in (shelf.tree.root / kind).iterdir()}
    assert names == {s.fingerprint for s in found.choice.kept if s.kind in MODELS}
    assert not (shelf.tree.root / TRASH).exists()


def test_more_releases_for_a_rollback_stay_when_the_recipe_says_so(shelf: Shelf) -> None:
    made = generations(shelf, 4)
    for one in made[:3]:
        go_live(shelf, one)
    call(shelf, keep_releases=3)
    assert [there(shelf, one) for one in made] == [MODELS] * 4


def test_what_was_materialised_again_is_not_old_whenever_it_was_made(shelf: Shelf) -> None:
    made = generations(shelf, 3)
    write_json(gates_of(made[0]["merged_model"]), {})  # As every materialisation does, also in another instance.
    call(shelf)
    assert there(shelf, made[0]) == MODELS - {"published_model"}
    assert there(shelf, made[1]) == {"base_model"}


def test_what_a_run_made_that_is_not_finished_stays(shelf: Shelf) -> None:
    """An older run than the one that materialised last goes on with its own, between two of its steps."""
    mine, other = generations(shelf, 2)
    seen: list[set[str]] = []

    @dg.op
    def goes_on(context):  # type: ignore[no-untyped-def]  # Dagster reads an annotation as a class.
        print_ = mine["merged_model"].fingerprint
        context.log_event(dg.AssetMaterialization(["demo", "merged_model"], metadata={FINGERPRINT: print_}))
        generations(shelf, 4)  # Of another run, which ends first.
        call(shelf)
        seen.extend([there(shelf, mine), there(shelf, other)])

    @dg.job
    def older() -> None:
        goes_on()

    assert older.execute_in_process(instance=shelf.instance).success
    assert seen == [MODELS - {"published_model"}, {"base_model"}]
    call(shelf)
    assert there(shelf, mine) == {"base_model"}


WORKER = """
import sys
from pathlib import Path
from dpo_assets.locks import IN_USE, shared
with shared(Path(sys.argv[1]) / IN_USE):
    print("at work", flush=True)
    sys.stdin.readline()
"""


def test_nothing_is_deleted_while_a_step_is_at_work_and_everything_may_be_once_it_was_killed(shelf: Shelf) -> None:
    made = generations(shelf, 3)
    command = [sys.executable, "-c", WORKER, str(shelf.tree.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        with pytest.raises(InfrastructureError, match="a run is at work"):
            call(shelf)
        assert [there(shelf, one) for one in made] == [MODELS] * 3
        worker.kill()
    call(shelf)
    assert there(shelf, made[0]) == {"base_model"}


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from dpo_assets import retention
from dpo_assets.artifact import ArtifactTree
from dpo_assets.recipe import RetentionSection

def die(path):
    first = next(p for p in sorted(path.rglob("*")) if p.is_file())
    first.unlink()
    os.kill(os.getpid(), signal.SIGKILL)

retention.remove = die
tree = ArtifactTree(Path(sys.argv[1]))
choice = retention.choose(retention.stored(tree), [], RetentionSection(keep_models=1, keep_days=0), 2e9)
list(retention.delete(tree.root, choice.gone, print))
"""


def test_a_deletion_that_is_killed_leaves_an_artefact_or_none(shelf: Shelf) -> None:
    made = generations(shelf, 3)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(shelf.tree.root)], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    left = stored(shelf.tree)
    assert all(open_artifact(shelf.tree.directory(one.kind, one.fingerprint)) for one in left)
    assert {one.kind for one in left if one.fingerprint == made[0]["published_model"].fingerprint} == set()
    assert len(list((shelf.tree.root / TRASH).iterdir())) == 1
    sweep(shelf.tree.root)
    assert not (shelf.tree.root / TRASH).exists()


def test_a_file_with_a_second_name_in_what_stays_frees_nothing(tmp_path: Path) -> None:
    tree = ArtifactTree(tmp_path)
    tree.find_or_build("merged_model", "1" * 32, lambda folder: (folder / "w").write_bytes(bytes(5000)) and None, {})
    source = tree.directory("merged_model", "1" * 32) / "w"
    tree.find_or_build("published_model", "2" * 32, lambda folder: share_file(source, folder / "w"), {})
    both = {one.kind: one for one in stored(tree)}
    linked = source.stat().st_nlink == 2  # Where the file system has reflinks, it has one name and nobody can tell.
    assert frees(tmp_path, [both["published_model"]]) < 5000 or not linked
    assert frees(tmp_path, list(both.values())) > 5000
    assert [one.kind for one in delete(tmp_path, {both["published_model"]: "asked"}, print)] == ["published_model"]
    assert tree.find("merged_model", "1" * 32) is not None


def test_checkpoints_that_nobody_went_on_from_go_by_age(shelf: Shelf) -> None:
    generations(shelf, 1)
    old, new = (shelf.tree.root / CHECKPOINTS / "dpo" / name for name in ("1" * 32, "2" * 32))
    for folder in (old, new):
        (folder / "step-10").mkdir(parents=True)
        (folder / "step-10" / "adapter.safetensors").write_bytes(bytes(10))
    for path in (*old.rglob("*"), old):
        os.utime(path, (0, 0))
    found, said = call(shelf)
    assert (old.exists(), new.exists()) == (False, True)
    assert any("deleted checkpoints/dpo/111" in one for one in said)
    assert found.freed >= 10


def test_damaged_models_that_were_set_aside_go_by_age_and_damaged_feedback_never(shelf: Shelf) -> None:
    """Their age counts from when they were set aside: a model of long ago may have been found damaged today."""
    generations(shelf, 1)
    found = {}
    for kind, days in (("merged_model", 0.0), ("published_model", 90.0), ("dpo_dataset", 90.0)):
        made = shelf.make(kind, "damaged", also=heavy)
        os.utime(made.path, (0, 0))
        (made.path / "weights").write_bytes(b"x")
        assert shelf.tree.find(kind, made.fingerprint) is None
        (found[kind],) = (shelf.tree.root / REJECTED).glob(f"{kind}-*")
        when = found[kind].stat().st_mtime - days * DAY
        os.utime(found[kind], (when, when))
    shown, _ = call(shelf, really=False, keep_days=30)
    [row] = [row for row in shown.rows if row[0] == REJECTED]
    assert "set aside more than 30 days ago" in row[3]
    assert all(folder.exists() for folder in found.values())
    gone, said = call(shelf, keep_days=30)
    assert {kind for kind, folder in found.items() if not folder.exists()} == {"published_model"}
    assert any(f"deleted {REJECTED}/published_model" in one for one in said)
    assert gone.freed == shown.freed > 0
    assert json.loads((shelf.tree.root / "retention.jsonl").read_text().splitlines()[-1])["kind"] == REJECTED


def test_a_model_made_under_a_clock_that_was_ahead_stays_and_nobody_else_goes_for_it(shelf: Shelf) -> None:
    made = generations(shelf, 3)
    ahead = time.time() + 400 * DAY
    for path in (made[0]["merged_model"].path / "manifest.json", gates_of(made[0]["merged_model"])):
        os.utime(path, (ahead, ahead))
    call(shelf)
    assert "merged_model" in there(shelf, made[0])
    assert there(shelf, made[2]) == MODELS


def test_an_empty_ledger_needs_nothing() -> None:
    assert list(of_ledger(Ledger(), 5)) == []


# The job and the command


def run_job(shelf: Shelf, **config: Any) -> dg.ExecuteInProcessResult:
    defs = build_dpo_defs("demo", demo_recipe(retention=TIGHT))
    ops = {"ops": {"demo__retention": {"config": config}}}
    return defs.resolve_job_def("demo_retention").execute_in_process(instance=shelf.instance, run_config=ops)


def test_the_job_shows_first_and_deletes_when_it_is_told_to(shelf: Shelf) -> None:
    made = generations(shelf, 3)
    assert run_job(shelf).output_for_node("demo__retention") == 8
    assert there(shelf, made[0]) == MODELS
    assert run_job(shelf, delete=True).output_for_node("demo__retention") == 8
    assert [there(shelf, one) for one in made] == [{"base_model"}, {"base_model"}, MODELS]
    assert run_job(shelf, delete=True).output_for_node("demo__retention") == 0


def test_the_command_shows_first_and_deletes_when_it_is_told_to(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = generations(shelf, 3)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    recipe = tmp_path / "defs.yaml"
    attributes = {"name": "demo", **demo_recipe(retention=TIGHT)}
    recipe.write_text(json.dumps({"type": "dpo_assets.DpoPipeline", "attributes": attributes}))
    command = ["retention", "--recipe", str(recipe), "--store", str(shelf.tree.root.parent)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "8 artefacts may go" in shown
    assert made[0]["merged_model"].fingerprint[:12] in shown
    assert there(shelf, made[0]) == MODELS
    assert main([*command, "--delete"]) == 0
    assert "8 artefacts deleted" in capsys.readouterr().out
    assert there(shelf, made[0]) == {"base_model"}
    assert main(["retention", "--recipe", str(recipe), "--store", str(tmp_path / "nowhere")]) == 1
    monkeypatch.delenv("DAGSTER_HOME")
    assert main(command) == 1
