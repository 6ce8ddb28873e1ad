"""No claim about a model that was not made from it: mixed artefacts are refused, with what to materialise again.

The artefacts are small and made by hand, in the store and the event log of a real Dagster instance; the steps that read
them are the pipeline's own, run by Dagster.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.artifact import MANIFEST, Artifact, ArtifactTree, FileEntry, Manifest, fingerprint, write_json
from dpo_assets.assets.dpo_plan import PLAN
from dpo_assets.assets.eval_scores import SCORES
from dpo_assets.assets.gates import closed_gates
from dpo_assets.assets.graph import LINEAGE, NODES
from dpo_assets.assets.lineage import Conflict, Inputs, Lineage, Read
from dpo_assets.assets.materialisations import FINGERPRINT, PAGE
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step, guarded
from dpo_assets.checks.verdict import Verdict
from dpo_assets.component import DpoPipeline, build_dpo_defs
from dpo_assets.feedback.trained import TRAINED_GROUPS
from dpo_assets.planning.refresh import Refresh, SftData
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.pipelines import demo_recipe, failures
from dpo_assets_tests.samples import evaluation_report, plan

ORDER = [node.name for node in NODES if node.name != "quarantined_preferences"]


def gates_of(artifact: Artifact) -> Path:
    """Where the levels of its checks are kept."""
    return artifact.path.with_name(f"{artifact.fingerprint}.gates.json")


class Shelf:
    """A pipeline's store and event log, filled by hand: `make` is what materialising one asset would leave."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.tree = ArtifactTree(Path(instance.storage_directory()) / "dpo_assets" / "demo")
        self.now: dict[str, Artifact] = {}

    def make(
        self,
        node: str,
        content: str = "first",
        *,
        leave_out: tuple[str, ...] = (),
        also: Callable[[Path], None] = lambda _: None,
        shown: Mapping[str, Any] = {},
        trained_on: str = "",
        goes_on_from: str = "",
        **of_plan: Any,
    ) -> Artifact:
        """An artefact made from what stands on the shelf now, but for what it was not made from.

        `trained_on`: digest of the dataset that SFT trains on by this plan; default: the one on the shelf.
        `goes_on_from`: digest of the adapter of a release.
        """
        read = [read for read in LINEAGE.reads(node) if read.node not in leave_out]
        inputs = {one.node: one.part(self.now[one.node]) for one in read}
        inputs |= {"dpo_adapter": goes_on_from} if goes_on_from else {}

        def fill(folder: Path) -> None:
            write_json(folder / "content.json", [content, inputs if node == "dpo_plan" else ""])
            if node == "dpo_plan":
                sft = SftData(dataset=trained_on or self.now["dpo_dataset"].digest)
                made = plan(**{"refresh": Refresh(sft=sft), **of_plan})
                write_json(folder / PLAN, made.model_dump(mode="json"))
            also(folder)

        print_ = fingerprint(node, [content, trained_on, repr(of_plan)], inputs)
        artifact, _ = self.tree.find_or_build(node, print_, fill, inputs)
        self.now[node] = artifact
        write_json(gates_of(artifact), {})
        event = dg.AssetMaterialization(["demo", node], metadata={**shown, FINGERPRINT: print_})
        self.instance.report_runless_asset_event(event)
        return artifact

    def make_all(self, **of_plan: Any) -> None:
        for node in ORDER:
            self.make(node, **(of_plan if node == "dpo_plan" else {}))


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """One that keeps its event log in memory: these tests read it a hundred times."""
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def shelf(instance: dg.DagsterInstance) -> Shelf:
    filled = Shelf(instance)
    filled.make_all()
    return filled


class Reading(DpoPipeline):
    """The pipeline's own steps up to where they have read; there they stop."""

    read: Inputs | None = None

    def execute(self, step: Step, nodes: tuple[Node, ...]) -> Events:
        yield from guarded(step, step.node, self._read(step))

    def _read(self, step: Step) -> Iterator[Any]:
        self.read = step.inputs()
        raise dg.Failure("read, and no further")
        yield


CHECKS_OF_THE_ADAPTER, CHECKS_OF_SFT = "checks_of_the_adapter", "checks_of_sft"


@cache
def readers() -> tuple[Reading, dg.Definitions]:
    """The pipeline with a job for each asset by itself, and one for checks alone."""
    pipeline = Reading("demo", parse_recipe(demo_recipe()))
    jobs = [dg.define_asset_job(name, selection=dg.AssetSelection.assets(["demo", name])) for name in ORDER]
    alone = {CHECKS_OF_THE_ADAPTER: ("dpo_adapter", "collapse"), CHECKS_OF_SFT: ("sft_checkpoint", "eos_kept")}
    for name, (node, check) in alone.items():
        key = dg.AssetCheckKey(dg.AssetKey(["demo", node]), check)
        jobs.append(dg.define_asset_job(name, selection=dg.AssetSelection.checks(key)))
    return pipeline, dg.Definitions.merge(pipeline.build_defs(), dg.Definitions(jobs=jobs))


def reading(shelf: Shelf, job: str) -> Inputs | str:
    """What the step of a job reads, or why it reads nothing."""
    pipeline, defs = readers()
    pipeline.read = None
    result = defs.resolve_job_def(job).execute_in_process(instance=shelf.instance, raise_on_error=False)
    [said] = failures(result)
    return pipeline.read if pipeline.read is not None else said


def refused(shelf: Shelf, job: str) -> str:
    said = reading(shelf, job)
    assert isinstance(said, str), f"{job} read {dict(said)}"
    return said


def reads(shelf: Shelf, job: str) -> Inputs:
    found = reading(shelf, job)
    assert not isinstance(found, str), found
    return found


def to_make_again(message: str) -> list[str]:
    listed = message.partition("in this order: ")[2].partition(". Or,")[0]
    return [name.removeprefix("demo/") for name in listed.split(", ")]


def test_scores_of_a_model_on_pairs_of_another_split_are_refused_with_what_to_materialise_again(shelf: Shelf) -> None:
    shelf.make("dpo_dataset", "another seed")
    said = refused(shelf, "eval_scores")
    assert said == (
        "what `demo/eval_scores` reads was not made from one another. `demo/dpo_plan`, `demo/merged_model`, "
        "`demo/dpo_adapter`: made from another `demo/dpo_dataset` than is there now. "
        "Materialise again, in this order: demo/dpo_plan, demo/sft_checkpoint, demo/dpo_adapter, demo/merged_model. "
        "Or, to keep what was made, give `demo/dpo_dataset` its earlier settings and inputs back and materialise that: "
        "it is reused, unless a model was trained on another split since: its pairs stay in train, which makes another "
        "dataset."
    )
    release = refused(shelf, "published_model")
    assert to_make_again(release) == [
        "dpo_plan",
        "sft_checkpoint",
        "dpo_adapter",
        "merged_model",
        "eval_scores",
        "promotion",
    ]


def by_hand(shelf: Shelf, node: str) -> None:
    """What `Report materialization` of the UI writes."""
    shelf.instance.report_runless_asset_event(dg.AssetMaterialization(["demo", node]))


def test_a_materialisation_that_was_reported_by_hand_names_no_artefact_and_is_passed_over(shelf: Shelf) -> None:
    for node in ORDER:
        by_hand(shelf, node)
    found = reads(shelf, "published_model")
    assert {node: artifact.digest for node, artifact in found.items()} == {
        node: shelf.now[node].digest for node in found
    }
    assert not (shelf.tree.root / "_rejected").exists()


def test_what_was_only_reported_by_hand_was_not_materialised(instance: dg.DagsterInstance) -> None:
    shelf = Shelf(instance)
    shelf.make("base_model")
    by_hand(shelf, "dpo_dataset")
    assert "`demo/dpo_dataset` has not been materialised yet" in refused(shelf, "dpo_plan")


def test_the_history_goes_back_behind_as_many_held_tries_as_there_were(instance: dg.DagsterInstance) -> None:
    shelf = Shelf(instance)
    for number in range(PAGE + 3):
        artifact = shelf.make("raw_preferences", str(number), shown={"volume": number})
        if number:
            write_json(gates_of(artifact), {"feedback_volume": "error"})
    context = dg.build_asset_context(instance=instance, resources={"demo_artifacts": ArtifactStore()})
    step = Step(context, readers()[0].pipeline, "raw_preferences", LINEAGE)
    told = list(step.history("raw_preferences", "volume"))
    assert [value for value, _ in told] == list(range(PAGE + 2, -1, -1))
    assert [value for value, is_held in told if not is_held] == [0]


def test_scores_that_an_earlier_step_took_of_a_mixed_chain_are_not_released(shelf: Shelf) -> None:
    first = shelf.now["dpo_dataset"]
    shelf.make("dpo_dataset", "another seed")
    for node in ("dpo_plan", "eval_scores"):
        shelf.make(node)
    said = refused(shelf, "published_model")
    assert to_make_again(said) == ["sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores", "promotion"]
    assert shelf.make("dpo_dataset").digest == first.digest
    said = refused(shelf, "published_model")
    # What SFT trains on is known only once the plan is made again; what is as it was is reused then.
    trained = ["sft_checkpoint", "dpo_adapter", "merged_model"]
    assert to_make_again(said) == ["dpo_plan", *trained, "eval_scores", "promotion"]


def test_a_checkpoint_of_an_earlier_dataset_stands_beside_a_later_one_where_the_plan_chose_it(shelf: Shelf) -> None:
    earlier = shelf.now["dpo_dataset"].digest
    shelf.make("dpo_dataset", "more pairs")
    shelf.make("dpo_plan", trained_on=earlier)
    assert "made from another `demo/dpo_dataset`" in refused(shelf, "merged_model"), "the adapter is of all pairs"
    for node in ("dpo_adapter", "merged_model", "eval_scores", "promotion"):
        shelf.make(node)
    for reader in ("dpo_adapter", "eval_scores", "published_model"):
        assert reads(shelf, reader)
    shelf.make("dpo_plan", "SFT is renewed")
    said = refused(shelf, "eval_scores")
    assert "`demo/sft_checkpoint`: made from another `demo/dpo_plan` than is there now" in said
    assert to_make_again(said) == ["sft_checkpoint", "dpo_adapter", "merged_model"]


def test_an_adapter_that_went_on_from_an_earlier_one_is_no_mix_of_two(shelf: Shelf) -> None:
    went_on = shelf.tree.directory("dpo_adapter", shelf.now["dpo_adapter"].fingerprint)
    manifest = Manifest.model_validate_json((went_on / MANIFEST).read_bytes())
    inputs = manifest.inputs | {"dpo_adapter": "digest of an earlier one"}
    (went_on / MANIFEST).write_text(manifest.model_copy(update={"inputs": inputs}).model_dump_json(), encoding="utf-8")
    assert reads(shelf, "published_model")


def test_giving_the_dataset_its_settings_back_mends_it(shelf: Shelf) -> None:
    shelf.make("dpo_dataset", "another seed")
    shelf.make("dpo_dataset")
    assert reads(shelf, "eval_scores")
    assert reads(shelf, "published_model")


@pytest.mark.parametrize(
    ("changed", "step", "again"),
    [
        ("base_model", "dpo_plan", ["dpo_dataset"]),
        ("base_model", "merged_model", ["dpo_dataset", "dpo_plan", "sft_checkpoint", "dpo_adapter"]),
        ("dpo_dataset", "sft_checkpoint", ["dpo_plan"]),
        ("dpo_dataset", "dpo_adapter", ["dpo_plan", "sft_checkpoint"]),
        ("dpo_dataset", "merged_model", ["dpo_plan", "sft_checkpoint", "dpo_adapter"]),
        ("sft_checkpoint", "eval_scores", ["dpo_adapter", "merged_model"]),
        ("dpo_adapter", "eval_scores", ["merged_model"]),
        ("dpo_adapter", "published_model", ["merged_model", "eval_scores", "promotion"]),
        ("merged_model", "published_model", ["eval_scores", "promotion"]),
    ],
)
def test_another_artefact_in_mid_chain_stops_each_step_that_would_mix_it(
    shelf: Shelf, changed: str, step: str, again: list[str]
) -> None:
    shelf.make(changed, "another")
    said = refused(shelf, step)
    assert set(again) <= set(to_make_again(said))
    assert f"made from another `demo/{changed}`" in said
    for node in to_make_again(said):
        shelf.make(node, "again")
    assert reads(shelf, step)


def test_the_settings_on_the_card_are_those_that_the_adapter_was_trained_with(shelf: Shelf) -> None:
    shelf.make("dpo_plan", dpo={"beta": 0.2})
    said = refused(shelf, "merged_model")
    assert to_make_again(said) == ["dpo_adapter"]
    said = refused(shelf, "published_model")
    assert to_make_again(said) == ["dpo_adapter", "merged_model", "eval_scores", "promotion"]


def test_an_adopted_base_is_no_trained_checkpoint_of_a_later_plan(instance: dg.DagsterInstance) -> None:
    shelf = Shelf(instance)
    for node in ("base_model", "raw_preferences", "dpo_dataset"):
        shelf.make(node)
    shelf.make("dpo_plan", sft={"strategy": "adopt"})
    shelf.make("sft_checkpoint", leave_out=("dpo_dataset",))
    shelf.make("dpo_plan", sft={"strategy": "adopt", "learning_rate": 1e-5})
    assert reads(shelf, "dpo_adapter")
    shelf.make("dpo_dataset", "new feedback")
    shelf.make("dpo_plan", sft={"strategy": "adopt"})
    assert reads(shelf, "dpo_adapter")
    shelf.make("dpo_plan", sft={"strategy": "train"})
    said = refused(shelf, "dpo_adapter")
    assert to_make_again(said) == ["sft_checkpoint"]


def test_a_plan_that_differs_in_nothing_that_was_trained_by_is_no_other_plan(shelf: Shelf) -> None:
    shelf.make("dpo_plan", token_budget=1024, memory_gib=3.0, device_name="another card")
    for step in ("sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores"):
        assert reads(shelf, step)


def test_what_was_materialised_again_with_the_same_content_fits(shelf: Shelf) -> None:
    for node in ("dpo_dataset", "base_model", "dpo_adapter"):
        shelf.make(node)
    assert reads(shelf, "published_model")


def test_feedback_that_no_dataset_holds_yet_stops_nothing(shelf: Shelf) -> None:
    shelf.make("raw_preferences", "new rows")
    for step in ("dpo_plan", "dpo_adapter", "eval_scores", "published_model"):
        assert reads(shelf, step)


def test_a_mix_behind_what_a_step_reads_is_found_through_the_store(shelf: Shelf) -> None:
    """`published_model` does not read the SFT checkpoint: the adapter's record names it, and the store has its own."""
    assert "sft_checkpoint" not in {read.node for read in LINEAGE.reads("published_model")}
    shelf.make("dpo_dataset", "another seed")
    for node in ("dpo_plan", "dpo_adapter", "merged_model", "eval_scores"):
        shelf.make(node)
    said = refused(shelf, "published_model")
    assert "`demo/sft_checkpoint`: made from another `demo/dpo_plan`" in said
    assert to_make_again(said) == ["sft_checkpoint", "dpo_adapter", "merged_model", "eval_scores", "promotion"]


def test_scores_against_another_start_than_the_adapters_are_not_released(shelf: Shelf) -> None:
    shelf.make("sft_checkpoint", "other")
    shelf.make("eval_scores", "of another start")
    assert "another `demo/sft_checkpoint`" in refused(shelf, "published_model")


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text('{"split_leak"')], ids=["gone", "cut off"]
)
def test_a_gate_whose_record_cannot_be_read_is_closed(shelf: Shelf, damage: Callable[[Path], Any]) -> None:
    damage(gates_of(shelf.now["dpo_dataset"]))
    assert refused(shelf, "dpo_plan") == (
        "`demo/dpo_dataset` did not pass its checks, of which no record can be read (execute them again); mend it "
        "before going on from it."
    )


def test_a_node_without_checks_leaves_the_gates_of_the_artefact_that_it_shares(shelf: Shelf) -> None:
    context = dg.build_asset_context(instance=shelf.instance, resources={"demo_artifacts": ArtifactStore()})
    step, artifact = Step(context, readers()[0].pipeline, "dpo_dataset", LINEAGE), shelf.now["dpo_dataset"]
    write_json(gates_of(artifact), {"split_leak": "error"})
    with suppress(dg.DagsterError):  # The event that follows needs a run.
        list(step.result("quarantined_preferences", artifact, reused=True))
    assert closed_gates(artifact, {}) == ["split_leak"]


@pytest.mark.parametrize("found", [[], ["split_leak"], ["no_such_check"]], ids=["none", "one of many", "undeclared"])
def test_a_check_that_a_body_forgets_or_nobody_declared_is_no_green_run(shelf: Shelf, found: list[str]) -> None:
    """Dagster asks for no check result that is missing, and for none that is not declared."""
    context = dg.build_asset_context(instance=shelf.instance, resources={"demo_artifacts": ArtifactStore()})
    step = Step(context, readers()[0].pipeline, "dpo_dataset", LINEAGE)
    verdicts = [Verdict(name, "pass", 1, "-", "-") for name in found]
    before = gates_of(shelf.now["dpo_dataset"]).read_bytes()
    with pytest.raises(RuntimeError, match="`dpo_dataset` declares the checks"):
        list(step.result("dpo_dataset", shelf.now["dpo_dataset"], reused=True, verdicts=verdicts))
    assert gates_of(shelf.now["dpo_dataset"]).read_bytes() == before


def test_checks_are_evaluated_again_beside_what_their_artefact_was_made_from(shelf: Shelf) -> None:
    made_from = dict(shelf.now)
    shelf.make("dpo_dataset", "another seed")
    shelf.make("dpo_plan", dpo={"beta": 0.2})
    found = reads(shelf, CHECKS_OF_THE_ADAPTER)
    assert {node: artifact.digest for node, artifact in found.items()} == {
        read.node: made_from[read.node].digest for read in LINEAGE.reads("dpo_adapter")
    }


def test_checks_of_sft_are_evaluated_again_while_it_is_taken_up_and_after_it_was_renewed(shelf: Shelf) -> None:
    earlier = shelf.now["dpo_dataset"]
    shelf.make("dpo_dataset", "more pairs")
    chosen_by = shelf.make("dpo_plan", trained_on=earlier.digest)
    assert reads(shelf, CHECKS_OF_SFT)["dpo_plan"].digest == chosen_by.digest
    shelf.make("dpo_dataset", "even more pairs")
    shelf.make("dpo_plan", "SFT will be renewed")
    found = reads(shelf, CHECKS_OF_SFT)
    assert found["dpo_plan"].digest == chosen_by.digest
    assert found["dpo_dataset"].digest == chosen_by.manifest.inputs["dpo_dataset"], "what that plan read"


def test_checks_of_what_is_no_longer_kept_say_what_to_materialise(shelf: Shelf) -> None:
    gone = shelf.now["dpo_dataset"]
    shelf.make("dpo_dataset", "another seed")
    gone.path.rename(gone.path.parent.parent / "elsewhere")
    said = refused(shelf, CHECKS_OF_THE_ADAPTER)
    assert "`demo/dpo_dataset` that `demo/dpo_adapter` was made from is no longer kept" in said
    assert "materialise `demo/dpo_adapter` again" in said


@pytest.mark.parametrize("trained", ["sft_checkpoint", "dpo_adapter", "none of them"])
def test_a_scored_pair_that_the_model_was_trained_on_fails_its_check(shelf: Shelf, trained: str) -> None:
    """The record of the training against what was scored, whatever split and lineage say of them."""
    pairs = pl.DataFrame({"pair_id": ["one", "two"], "group_id": ["a", "b"]})

    def scores(folder: Path) -> None:
        evaluation_report(pairs=2).write(folder)
        write_json(folder / "generations.json", [])
        pairs.select("pair_id").write_parquet(folder / SCORES)

    shelf.make("dpo_dataset", "scored", also=lambda folder: pairs.write_parquet(folder / "eval.parquet"))
    shelf.make("dpo_plan")
    for node in ("sft_checkpoint", "dpo_adapter", "merged_model"):
        groups = pl.DataFrame({"group_id": ["b", "c"] if node == trained else ["c"]})
        shelf.make(node, also=lambda folder, groups=groups: groups.write_parquet(folder / TRAINED_GROUPS))
    shelf.make("eval_scores", also=scores)

    check = dg.AssetCheckKey(dg.AssetKey(["demo", "eval_scores"]), "held_out_unseen")
    job = dg.define_asset_job("check", selection=dg.AssetSelection.checks(check))
    defs = dg.Definitions.merge(build_dpo_defs("demo", demo_recipe()), dg.Definitions(jobs=[job]))
    result = defs.resolve_job_def("check").execute_in_process(instance=shelf.instance, raise_on_error=False)
    [found] = result.get_asset_check_evaluations()
    seen = 0 if trained == "none of them" else 1
    assert (found.passed, found.severity) == (not seen, dg.AssetCheckSeverity.ERROR)
    assert found.metadata["value"].value == f"{seen} of 2 scored pairs"


def test_what_a_node_does_not_declare_cannot_be_read(shelf: Shelf) -> None:
    inputs = reads(shelf, "dpo_plan")
    assert set(inputs) == {"dpo_dataset", "base_model"}
    assert Inputs.of("dpo_plan", inputs).digests == inputs.digests
    with pytest.raises(KeyError, match="`dpo_plan` does not declare that it reads `merged_model`"):
        inputs["merged_model"]
    with pytest.raises(KeyError, match="does not declare"):
        inputs.only("base_model")["dpo_dataset"]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_every_declared_read_is_read(node: Node) -> None:
    """By the module of its body: `inputs["..."]` stands there for each node that it declares, and for no other."""
    source = inspect.getsource(import_module(node.body.__module__))
    read = {
        child.slice.value
        for child in ast.walk(ast.parse(source))
        if isinstance(child, ast.Subscript)
        and isinstance(child.value, ast.Name)
        and child.value.id == "inputs"
        and isinstance(child.slice, ast.Constant)
    }
    assert read == {read.node for read in node.reads}


def made(node: str, content: str, **inputs: str) -> Artifact:
    files = {"content": FileEntry(sha256=content, size=1)}
    manifest = Manifest(kind=node, fingerprint=content, inputs=inputs, versions={}, files=files)
    return Artifact(Path(node), manifest)


CHAIN = Lineage({"a": (), "b": (Read("a"),), "c": (Read("b"),), "d": (Read("a"), Read("c"))})


def test_equal_content_from_different_inputs_is_no_conflict_where_one_of_them_fits() -> None:
    one, other = made("a", "1"), made("a", "2")
    of_one, of_other = made("b", "same", a=one.digest), made("b", "same", a=other.digest)
    assert of_one.digest == of_other.digest
    read = {"a": one, "c": made("c", "x", b=of_one.digest)}
    kept = {("b", of_one.digest): [of_other, of_one]}
    assert CHAIN.conflicts(read, lambda node, digest: kept.get((node, digest), [])) == []
    kept = {("b", of_one.digest): [of_other]}
    assert CHAIN.conflicts(read, lambda node, digest: kept.get((node, digest), [])) == [Conflict("b", "a")]


def test_two_that_name_different_ones_of_a_node_conflict_also_where_neither_of_those_is_kept() -> None:
    fork = Lineage({"a": (), "b": (Read("a"),), "c": (Read("a"),), "d": (Read("b"), Read("c"))})
    read = {"b": made("b", "x", a="one"), "c": made("c", "y", a="other")}
    assert fork.conflicts(read, lambda node, digest: []) == [Conflict("c", "a")]
    assert fork.conflicts(read | {"c": made("c", "y", a="one")}, lambda node, digest: []) == []
    assert fork.to_make_again("d", [Conflict("c", "a")], read.get) == ["a", "b", "c"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12))
def test_making_again_what_is_named_always_ends_the_conflict(history: list[str]) -> None:
    """Whatever was materialised in whatever order: one pass over the named nodes, and the chain fits."""
    latest: dict[str, Artifact] = {}
    everything: list[tuple[str, Artifact]] = []

    def make(node: str, content: str) -> None:
        inputs = {read.node: latest[read.node].digest for read in CHAIN.reads(node)}
        latest[node] = made(node, content, **inputs)
        everything.append((node, latest[node]))

    def kept(node: str, digest: str) -> list[Artifact]:
        return [artifact for name, artifact in everything if name == node and artifact.digest == digest]

    def conflicts() -> list[Conflict]:
        return CHAIN.conflicts({read.node: latest[read.node] for read in CHAIN.reads("d")}, kept)

    for node in "abc":
        make(node, "first")
    for number, node in enumerate(history):
        make(node, str(number))
    found = conflicts()
    again = CHAIN.to_make_again("d", found, latest.get)
    assert bool(again) == bool(found)
    for node in again:
        make(node, f"{node} again")
    assert conflicts() == []
