"""Which SFT checkpoint a plan takes up and which release it goes on from, as a pipeline's store and ledger tell it.

Artefacts are small and made by hand, on the shelf that the tests of lineage use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dpo_assets.artifact import write_json
from dpo_assets.assets.graph import LINEAGE
from dpo_assets.assets.lineage import Inputs
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.assets.refreshing import ADAPTER, CONFIG, Refreshing
from dpo_assets.assets.step import Step
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.refresh import ChosenSft, ChosenStart
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.pipelines import demo_recipe
from dpo_assets_tests.samples import coverage, dpo_report, plan
from dpo_assets_tests.test_eval_scores import go_live
from dpo_assets_tests.test_lineage import Shelf, gates_of, instance

__all__ = ["instance"]  # A fixture.
SHAPE = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}


def with_pairs(count: int, first: int = 0) -> Callable[[Path], None]:
    """A dataset that trains on so many pairs."""
    table = pl.DataFrame({"pair_id": [f"{n:032x}" for n in range(first, first + count)]})
    return lambda folder: table.write_parquet(folder / "train.parquet")


def with_adapter(**changes: Any) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / ADAPTER).mkdir()
        write_json(folder / ADAPTER / CONFIG, SHAPE | changes)

    return fill


class Pipelined(Shelf):
    """A shelf whose data and adapters are there as far as a plan looks at them."""

    def data(self, pairs: int, first: int = 0, content: str = "") -> None:
        self.make("dpo_dataset", f"{pairs} from {first}{content}", also=with_pairs(pairs, first))

    def model(self, content: str = "first", rank: int = 16) -> None:
        """All that is trained, on what is on the shelf."""
        self.make("dpo_plan")
        self.make("sft_checkpoint", content, also=with_adapter(r=rank))
        self.make("dpo_adapter", content, also=with_adapter(r=rank))
        self.make("merged_model", content)

    def chosen(self, planned: TrainingPlan | None = None, **refresh: Any) -> tuple[ChosenSft, ChosenStart]:
        recipe = parse_recipe(demo_recipe(refresh=refresh))
        context = dg.build_asset_context(instance=self.instance, resources={"demo_artifacts": ArtifactStore()})
        step = Step(context, Pipeline("demo", recipe), "dpo_plan", LINEAGE)
        inputs = Inputs.of("dpo_plan", {node: self.now[node] for node in ("dpo_dataset", "base_model")})
        return Refreshing(step, planned or plan(), inputs).chosen()

    def why(self, asked: str = "replay", planned: TrainingPlan | None = None) -> str:
        """Why the run is full."""
        _, start = self.chosen(planned, policy=asked)
        assert start.refresh.whole
        return start.why


@pytest.fixture
def shelf(instance: dg.DagsterInstance) -> Pipelined:
    filled = Pipelined(instance)
    filled.make("base_model")
    filled.make("raw_preferences")
    filled.data(100)
    filled.model()
    return filled


def test_sft_is_taken_up_with_the_pairs_it_was_trained_on_and_a_count_of_what_it_lacks(shelf: Pipelined) -> None:
    was = dict(shelf.now)
    shelf.data(110)
    sft, _ = shelf.chosen()
    assert sft.checkpoint == was["sft_checkpoint"].digest
    assert (sft.data.dataset, sft.data.pairs, sft.data.newer) == (was["dpo_dataset"].digest, 100, 10)


@pytest.mark.parametrize(
    ("pairs", "first", "refresh"),
    [(130, 0, {}), (101, 0, {"renew_sft_after": 0.0}), (100, 1, {}), (99, 0, {})],
    ids=["many new", "any new", "one gone, one new", "one gone"],
)
def test_sft_is_renewed_by_many_new_pairs_and_by_each_that_is_gone(
    shelf: Pipelined, pairs: int, first: int, refresh: dict[str, Any]
) -> None:
    shelf.data(pairs, first)
    sft, _ = shelf.chosen(**refresh)
    assert sft.checkpoint is None
    assert (sft.data.dataset, sft.data.newer) == (shelf.now["dpo_dataset"].digest, 0)


def test_pairs_that_are_held_out_alone_renew_nothing(shelf: Pipelined) -> None:
    shelf.data(100, content=", more held out")
    assert shelf.chosen(renew_sft_after=0.0)[0].checkpoint == shelf.now["sft_checkpoint"].digest


def test_sft_of_another_base_or_of_a_dataset_that_is_gone_or_behind_a_red_gate_is_not_taken_up(
    shelf: Pipelined,
) -> None:
    dataset = shelf.now["dpo_dataset"]
    shelf.data(101)
    assert shelf.chosen()[0].checkpoint is not None
    write_json(gates_of(shelf.now["sft_checkpoint"]), {"sft_finite": "error"})
    assert shelf.chosen()[0].checkpoint is None
    write_json(gates_of(shelf.now["sft_checkpoint"]), {})
    base = shelf.now["base_model"]
    shelf.make("base_model", "another")
    assert shelf.chosen()[0].checkpoint is None
    shelf.now["base_model"] = base
    dataset.path.rename(dataset.path.parent.parent / "elsewhere")
    assert shelf.chosen()[0].checkpoint is None


def test_dpo_goes_on_from_the_release_that_is_live_with_what_is_new(shelf: Pipelined) -> None:
    was = dict(shelf.now)
    shelf.data(110)
    assert "no release is live" in shelf.why()
    shelf.data(100)
    go_live(shelf)
    shelf.data(110)
    for asked, sampled in (("replay", 10), ("continue", 0)):
        _, start = shelf.chosen(policy=asked)
        assert start.refresh.model_dump(exclude={"sft"}) == {
            "policy": asked, "generation": 2, "adapter": was["dpo_adapter"].digest,
            "since": was["dpo_dataset"].digest, "new": 10, "sampled": sampled,
        }  # fmt: skip
    assert shelf.chosen(policy="replay", replay_ratio=100.0)[1].refresh.sampled == 100


def test_a_release_that_cannot_be_gone_on_from_makes_the_run_full_and_says_why(shelf: Pipelined) -> None:
    go_live(shelf)
    shelf.data(150)
    assert "starts from another SFT policy" in shelf.why(), "it is renewed: a third of the pairs is new"
    shelf.data(99)
    assert "starts from another SFT policy" in shelf.why(), "and so it is by a pair that is gone"
    shelf.data(110)
    shelf.make("base_model", "another")
    assert "another base" in shelf.why()


def test_an_adapter_of_another_shape_is_not_gone_on_from(shelf: Pipelined) -> None:
    shelf.make("dpo_adapter", "wider", also=with_adapter(r=32))
    shelf.make("merged_model", "wider")
    go_live(shelf)
    shelf.data(110)
    assert "has another r" in shelf.why()


def test_the_checkpoint_of_the_release_that_is_live_comes_first(shelf: Pipelined) -> None:
    """So challenger and champion are measured against one start, also where a later one is there."""
    go_live(shelf)
    live = shelf.now["sft_checkpoint"]
    shelf.data(105)
    shelf.model("second")
    assert shelf.now["sft_checkpoint"].digest != live.digest
    shelf.data(110)
    assert shelf.chosen()[0].checkpoint == live.digest
    shelf.data(130)
    assert shelf.chosen()[0].checkpoint == shelf.now["sft_checkpoint"].digest, "of 130, it lacks fewer than a fifth"


def test_the_adopted_base_of_a_release_with_other_target_modules_is_not_gone_on_from(shelf: Pipelined) -> None:
    """Told by the plan: the worker would refuse it once the run is on its way."""
    adopting = plan(sft={"strategy": "adopt"}, lora=plan().lora.model_copy(update={"rank": 16, "alpha": 16}))

    def trained(folder: Path) -> None:
        with_adapter()(folder)
        write_json(folder / "report.json", dpo_report().model_dump(mode="json"))

    shelf.make("sft_checkpoint", "adopted")
    shelf.make("dpo_adapter", "adopted", also=trained)
    shelf.make("merged_model", "adopted")
    go_live(shelf)
    shelf.data(110)
    assert shelf.chosen(adopting, policy="replay")[1].refresh.generation == 2
    fewer = adopting.model_copy(update={"coverage": coverage(**{"mlp.up_proj": 4000})})
    assert "has another target modules" in shelf.why(planned=fewer)


@pytest.mark.parametrize("asked", ["replay", "continue"])
def test_a_release_behind_which_an_adapter_is_gone_is_of_no_known_generation(shelf: Pipelined, asked: str) -> None:
    """Counted as far as the store reaches, it would be an early one for ever."""
    shelf.data(105)
    shelf.model("second")
    first, second = shelf.tree.listed("dpo_adapter"), shelf.now["dpo_adapter"]
    behind = next(one for one in first if one.digest != second.digest)
    shelf.make("dpo_adapter", "third", also=with_adapter(), goes_on_from=behind.digest)
    shelf.make("merged_model", "third")
    go_live(shelf)
    shelf.data(110)
    assert shelf.chosen(policy=asked)[1].refresh.generation == 3
    behind.path.rename(behind.path.parent.parent / "elsewhere")
    assert "an adapter that the release that is live went on from is not in the store" in shelf.why(asked)


@pytest.mark.parametrize("node", ["merged_model", "dpo_adapter", "sft_checkpoint"])
def test_what_is_missing_of_the_release_that_is_live_ends_a_run_before_it_trains(shelf: Pipelined, node: str) -> None:
    go_live(shelf)
    shelf.data(110)
    gone = shelf.now[node].path
    gone.rename(gone.parent.parent / "elsewhere")
    for asked in ("replay", "full"):
        with pytest.raises(ConfigError, match=f"the champion's `{node}`.* is gone from"):
            shelf.chosen(policy=asked)


def test_a_run_on_the_data_of_the_release_that_is_live_may_make_again_what_is_missing(shelf: Pipelined) -> None:
    go_live(shelf, dpo_dataset=shelf.now["dpo_dataset"].digest)
    gone = shelf.now["merged_model"].path
    gone.rename(gone.parent.parent / "elsewhere")
    sft, start = shelf.chosen()
    assert sft.checkpoint == shelf.now["sft_checkpoint"].digest
    assert start.refresh.whole
    shelf.data(110)
    with pytest.raises(ConfigError, match="Put the folder back from a backup"):
        shelf.chosen()
