"""Releases to their feedback and back, from the manifests of a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_assets.artifact import Artifact, ArtifactTree, write_json
from dpo_assets.checks.evidence.ledger import Decided, Ledger
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.cli import main
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.batches import INDEX, PAIRS
from dpo_assets.feedback.library import BATCH_KIND, PAIRED_KIND
from dpo_assets.publishing.trace import Trace, Withdrawn


class Store:
    """A pipeline's folder with artefacts of nothing but their lineage."""

    def __init__(self, folder: Path) -> None:
        self.tree, self._made = ArtifactTree(folder), 0

    def add(
        self,
        kind: str,
        inputs: Mapping[str, Artifact | str],
        files: Mapping[str, pl.DataFrame] = {},
        said: Mapping[str, Any] = {},
    ) -> Artifact:
        self._made += 1

        def build(into: Path) -> None:
            (into / "number").write_text(str(self._made))
            for name, table in files.items():
                table.write_parquet(into / name)
            for name, value in said.items():
                write_json(into / name, value)

        digests = {name: one if isinstance(one, str) else one.digest for name, one in inputs.items()}
        return self.tree.find_or_build(kind, f"{self._made:032x}", build, digests)[0]

    def dataset(self, train: list[str], held_out: list[str], raw: Artifact | None = None) -> Artifact:
        tables = {"train.parquet": pairs(train), "eval.parquet": pairs(held_out)}
        return self.add("dpo_dataset", {"raw_preferences": raw} if raw else {}, tables)

    def released(self, dataset: Artifact, sft: Artifact | None = None) -> Artifact:
        inputs = {"dpo_dataset": dataset, "dpo_plan": "a part of a plan"}
        adapter = self.add("dpo_adapter", inputs | ({"sft_checkpoint": sft} if sft else {}))
        merged = self.add("merged_model", {"dpo_adapter": adapter})
        return self.add("published_model", {"merged_model": merged, "dpo_adapter": adapter})


def pairs(names: list[str]) -> pl.DataFrame:
    rows = [
        {"pair_id": f"pair-{name}", "source": f"{name[0]}.jsonl", "row": name, "line": 1, "row_hash": f"hash-{name}"}
        for name in names
    ]
    schema = {"pair_id": pl.String, "source": pl.String, "row": pl.String, "line": pl.Int64, "row_hash": pl.String}
    return pl.DataFrame(rows, schema=schema).with_columns(prompt=pl.lit("more columns"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "pipeline")


def used(rows: pl.DataFrame) -> set[tuple[str, str]]:
    return set(rows.select("row", "use").iter_rows())


def test_a_release_goes_back_to_every_row_of_its_dataset_and_of_its_sft_checkpoints(store: Store) -> None:
    earlier, dataset = store.dataset(["a1", "b1"], ["b2"]), store.dataset(["a1", "a2"], ["b2"])
    sft = store.add("sft_checkpoint", {"dpo_dataset": earlier})
    release = store.released(dataset, sft)
    found = Trace.of(store.tree.root).release(release.fingerprint)
    assert set(found.datasets) == {earlier.digest, dataset.digest}
    assert used(found.rows) == {
        ("a1", "trained on"), ("a2", "trained on"), ("b1", "trained on"), ("b2", "held out")
    }  # fmt: skip
    assert found.rows.height == 4
    assert found.gone == ()


def test_what_an_earlier_sft_checkpoint_was_looked_at_with_is_behind_no_release(store: Store) -> None:
    """It is in no weight; a row that was withdrawn from the held-out ones counts as withdrawn."""
    raw = feedback(store, "a1", "a2", "a3")
    earlier = store.dataset(["a1"], ["a2", "b1"], raw)
    sft = store.add("sft_checkpoint", {"dpo_dataset": earlier})
    first = store.released(earlier, sft)
    now = store.dataset(["a1", "a3"], ["a2"], raw)
    second = store.released(now, sft)
    trace = Trace.of(store.tree.root)
    assert used(trace.release(second.fingerprint).rows) == {
        ("a1", "trained on"), ("a3", "trained on"), ("a2", "held out")
    }  # fmt: skip
    inputs = {"sft_checkpoint": sft.digest, "dpo_dataset": now.digest}
    assert trace.withdrawn(first.fingerprint, inputs) == Withdrawn(gone=1)


def test_a_release_goes_back_to_what_the_release_that_it_went_on_from_was_trained_on(store: Store) -> None:
    earlier, now = store.dataset(["a1"], ["a2"]), store.dataset(["a1", "a3"], ["a2"])
    before = store.add("dpo_adapter", {"dpo_dataset": earlier})
    adapter = store.add("dpo_adapter", {"dpo_adapter": before, "dpo_dataset": now})
    release = store.add("published_model", {"dpo_adapter": adapter})
    found = Trace.of(store.tree.root).release(release.fingerprint)
    assert (set(found.datasets), found.own) == ({earlier.digest, now.digest}, now.digest)


@pytest.mark.parametrize("name", ["pair-a1", "hash-a1", "a1"])
def test_a_row_is_found_in_every_release_that_it_touched_and_in_no_other(store: Store, name: str) -> None:
    first, second = store.released(store.dataset(["a1", "b1"], ["a2"])), store.released(store.dataset(["b1"], ["a1"]))
    store.released(store.dataset(["b1"], ["a2"]))
    touched = {r.name: used(found) for r in Trace.of(store.tree.root).releases if (found := r.touched_by(name)).height}
    assert touched == {first.fingerprint: {("a1", "trained on")}, second.fingerprint: {("a1", "held out")}}


def test_a_source_names_all_its_rows(store: Store) -> None:
    store.released(store.dataset(["a1", "b1"], ["a2"]))
    [release] = Trace.of(store.tree.root).releases
    assert used(release.touched_by("a.jsonl")) == {("a1", "trained on"), ("a2", "held out")}


def test_a_dataset_that_is_gone_is_said_and_not_passed_over(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    release = store.released(store.dataset(["a1"], ["a2"]))
    folder = next((store.tree.root / "dpo_dataset").glob("*/manifest.json")).parent
    folder.rename(store.tree.root.parent / "elsewhere")
    found = Trace.of(store.tree.root).release(release.fingerprint)
    assert len(found.gone) == 1
    assert found.rows.height == 0
    for asked in (["--release", release.fingerprint], ["--row", "a1"]):
        assert main(["provenance", str(store.tree.root), *asked]) == 1
        assert "not in the store any more" in capsys.readouterr().out


def test_a_name_of_no_release_or_of_several_is_refused_with_those_that_there_are(store: Store) -> None:
    one, two = (store.released(store.dataset([name], ["b1"])) for name in ("a1", "a2"))
    trace = Trace.of(store.tree.root)
    for name, number in (("f", 0), ("0", 2)):
        with pytest.raises(ConfigError, match=f"^{number} releases are called {name}") as refused:
            trace.release(name)
        assert one.fingerprint in str(refused.value)
        assert two.fingerprint in str(refused.value)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_no_store_of_a_pipeline_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no artefact"):
        Trace.of(tmp_path / name)


def test_the_command_lists_releases_their_rows_and_the_releases_of_a_row(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    release = store.released(store.dataset(["a1", "b1"], ["a2"]))
    folder = str(store.tree.root)
    assert main(["provenance", folder]) == 0
    assert release.fingerprint in capsys.readouterr().out
    assert main(["provenance", folder, "--release", release.fingerprint]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("a1", "b1", "a2", "trained on", "held out"))
    assert main(["provenance", folder, "--row", "hash-b1"]) == 0
    assert release.fingerprint in capsys.readouterr().out
    assert main(["provenance", folder, "--row", "unheard of"]) == 0
    assert "touched no release" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- withdrawn rows


def feedback(store: Store, *names: str, made: tuple[str, ...] = ()) -> Artifact:
    """`raw_preferences` as read: a batch of rows, and one of pairs that were made of several rows."""
    batch = store.add(BATCH_KIND, {}, {PAIRS: pairs(list(names))})
    paired = store.add(PAIRED_KIND, {}, {PAIRS: pairs(list(made) or ["none"]).with_columns(row_hash=pl.lit(None))})
    index = {"files": [{"batches": [{"batch": batch.fingerprint}]}], "paired": {"batch": paired.fingerprint}}
    return store.add("raw_preferences", {}, {}, {INDEX: index})


def test_rows_that_left_the_feedback_are_withdrawn_and_others_left_out(store: Store) -> None:
    first = store.released(store.dataset(["a1", "a2", "a3"], ["a4"], feedback(store, "a1", "a2", "a3", "a4")))
    raw = feedback(store, "a1", "a4", "a5")
    dataset = store.dataset(["a1", "a5"], [], raw)
    trace = Trace.of(store.tree.root)
    inputs = {"dpo_dataset": dataset.digest}
    assert trace.withdrawn(first.fingerprint, inputs) == Withdrawn(gone=2, left_out=1)
    assert trace.withdrawn(first.fingerprint, {**inputs, "sft_checkpoint": "gone"}) == Withdrawn(gone=2, left_out=1)
    assert trace.withdrawn("f" * 32, inputs) is None
    # For a release that is live again, by the feedback that was read last: `a4` is there, whatever a dataset left out.
    assert trace.withdrawn_since(first.fingerprint) == 2
    assert trace.withdrawn_since("f" * 32) is None
    (raw.path / INDEX).unlink()
    assert trace.withdrawn(first.fingerprint, inputs) == Withdrawn(unknown=3)
    assert trace.withdrawn_since(first.fingerprint) is None


def test_a_row_that_the_sft_checkpoint_still_goes_back_to_is_not_withdrawn_from_the_release(store: Store) -> None:
    earlier = store.dataset(["a1"], [], feedback(store, "a1"))
    first = store.released(earlier)
    sft = store.add("sft_checkpoint", {"dpo_dataset": earlier})
    now = store.dataset(["a2"], [], feedback(store, "a2"))
    inputs = {"dpo_dataset": now.digest, "sft_checkpoint": sft.digest}
    assert Trace.of(store.tree.root).withdrawn(first.fingerprint, inputs) == Withdrawn()


def test_a_pair_that_was_made_of_several_rows_is_known_by_its_file_and_id(store: Store) -> None:
    raw = feedback(store, "b1", made=("a1",))
    rows = pairs(["a1", "a2", "b1"]).with_columns(row_hash=pl.Series([None, None, "hash-b1"]))
    found = Trace.of(store.tree.root).in_feedback(rows, raw.digest)
    assert found is not None
    assert found.to_list() == [True, False, True]


def test_a_row_that_was_edited_was_withdrawn_as_it_was(store: Store) -> None:
    raw = feedback(store, "a1", "a2")
    rows = pairs(["a1", "a2"]).with_columns(row_hash=pl.Series(["hash-of-before", "hash-a2"]))
    found = Trace.of(store.tree.root).in_feedback(rows, raw.digest)
    assert found is not None
    assert found.to_list() == [False, True]


def live(store: Store, release: Artifact, name: str) -> None:
    """The ledger in which a release of a model of that name is live."""

    def go(ledger: Ledger) -> Ledger:
        decided = Decided(
            number=len(ledger.lines) + 1, before=ledger.head, at="2026-11-27T12:00:00+00:00", champion=ledger.champion,
            challenger=name, inputs={}, primaries={}, level=None, saw=(), found=False, reason="as this test says",
            decision="promote" if ledger.champion else "first_publication",
        )  # fmt: skip
        return ledger.append(decided).released(
            decided, at=decided.at, repo_id="org/bot", commit=f"commit of {name}", tag="t",
            artefact=release.fingerprint, known=[],
        )  # fmt: skip

    LedgerFile.of(store.tree.root).extend(go)


def test_the_command_says_of_a_row_which_releases_it_touched_which_is_live_and_whether_it_is_withdrawn(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    first = store.released(store.dataset(["a1", "a2"], [], feedback(store, "a1", "a2")))
    live(store, first, "m1")
    second = store.released(store.dataset(["a1"], [], feedback(store, "a1")))
    live(store, second, "m2")
    staged = store.released(store.dataset(["a1"], []))
    folder = str(store.tree.root)

    def asked(*options: str) -> list[dict[str, Any]]:
        assert main(["provenance", folder, *options, "--json"]) == 0
        answer: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return answer

    told = {one["release"]: (one["number"], one["live"]) for one in asked("--row", "a1")}
    assert told == {first.fingerprint: (1, False), second.fingerprint: (2, True), staged.fingerprint: (None, False)}
    [one] = asked("--row", "a2")
    assert (one["number"], [row["withdrawn"] for row in one["rows"]]) == (1, ["yes"])
    assert {row["withdrawn"] for one in asked("--row", "a1") for row in one["rows"]} == {"no"}
    assert main(["provenance", folder, "--row", "a2"]) == 0
    printed = capsys.readouterr().out
    assert "withdrawn" in printed
    assert "yes" in printed
    assert main(["releases", folder]) == 0
    printed = capsys.readouterr().out
    assert "release 2, live" in printed
    assert "release 1, live" not in printed
    assert main(["releases", folder, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["kind"] for line in lines] == ["release", "decision"] * 2
    assert [line["number"] for line in lines if line["live"]] == [4]


def test_the_history_of_a_pipeline_without_a_release_says_so(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.dataset(["a1"], [])
    assert main(["releases", str(store.tree.root)]) == 0
    assert "holds no decision on a release" in capsys.readouterr().out
    assert main(["releases", str(store.tree.root / "nowhere")]) == 1
