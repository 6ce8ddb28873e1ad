"""Liger and torch.compile on Transformers' layers: refused where they cannot be, the same run where they can."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from torch._dynamo.utils import counters

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import DatasetStats, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.sizes import find_model
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.engines import speedups
from dpo_assets.training.engines.speedups import speed_up
from dpo_assets.training.engines.transformers import TransformersEngine
from dpo_assets.training.models.loading import load_base
from dpo_assets.training.private.liger import Patches
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets_tests.samples import recipe
from dpo_assets_tests.training.conftest import PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import largest_difference, run_dpo, short_plan, write_pairs

PAIRS = DatasetStats(train_pairs=100, eval_pairs=10, max_length=512, longest_pair=900, mean_pair=500.0)
L4, CPU = Device("cuda", "L4", 22.0, (8, 9)), Device("cpu", "CPU", 16.0)


def planned(device: Device, **hardware: Any) -> Any:
    return make_plan(recipe(hardware=hardware), find_model("1b").shape, PAIRS, device)


def test_speedups_are_for_transformers_layers_which_auto_then_takes() -> None:
    plan = planned(L4, speedups=["liger", "compile"])
    assert (plan.kernels, plan.speedups) == ("transformers", ("compile", "liger"))
    assert planned(L4).kernels == "fused"


@pytest.mark.parametrize("kernels", ["fused", "unsloth"])
def test_speedups_beside_kernels_that_have_their_own_are_refused(kernels: str) -> None:
    with pytest.raises(ConfigError, match=r"hardware\.speedups \(compile\) are for Transformers' layers"):
        planned(L4, kernels=kernels, speedups=["compile"])


def test_liger_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="`liger` needs a GPU"):
        planned(CPU, speedups=["liger"])


def test_another_speedup_is_another_adapter() -> None:
    plain, faster = planned(L4, kernels="transformers"), planned(L4, speedups=["compile"])
    assert plain.dpo_part() != faster.dpo_part()
    assert plain.sft_part() != faster.sft_part()


def with_liger(monkeypatch: pytest.MonkeyPatch, *model_types: str) -> list[dict[str, Any]]:
    """A stand-in for Liger, whose kernels need a GPU: what it is asked to patch."""
    asked: list[dict[str, Any]] = []
    liger = Patches(model_types, lambda model, **options: asked.append({"model": model, **options}))
    monkeypatch.setattr(speedups.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(speedups, "patches", lambda: liger)
    return asked


def test_liger_that_is_not_installed_is_told_how_to_install_it(plan_for: PlanMaker) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'dpo-assets\[liger\]'"):
        speed_up(SimpleNamespace(config=SimpleNamespace(model_type="llama")), plan_for(speedups=("liger",)))


def test_liger_patches_the_layers_and_leaves_the_head(plan_for: PlanMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_liger(monkeypatch, "llama")
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    speed_up(model, plan_for(speedups=("liger",)))
    assert asked == [{"model": model, "fused_linear_cross_entropy": False, "cross_entropy": False}]


def test_an_architecture_that_liger_does_not_know_is_refused(
    plan_for: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_liger(monkeypatch, "llama", "qwen3")
    with pytest.raises(ConfigError, match="no layers for `exotic`; it has: llama, qwen3"):
        speed_up(SimpleNamespace(config=SimpleNamespace(model_type="exotic")), plan_for(speedups=("liger",)))


def test_only_compiled_layers_are_compared_with_gradients_recorded() -> None:
    with torch.no_grad():
        with TransformersEngine(torch.nn.Module(), compiled=True).as_the_policy():
            assert torch.is_grad_enabled()
        with TransformersEngine(torch.nn.Module()).as_the_policy():
            assert not torch.is_grad_enabled()


def test_a_compiled_run_is_the_plain_run_and_starts_at_ln_2(
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    prepared: tuple[pl.DataFrame, pl.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Everything of torch.compile but the code that inductor writes, which takes minutes to build on a CPU.
    monkeypatch.setattr(speedups, "BACKEND", "aot_eager")
    pairs = write_pairs(prepared[0], tmp_path)
    counters.clear()
    runs = {}
    for name, chosen in (("plain", ()), ("compiled", ("compile",))):
        plan = short_plan(plan_for, {}, steps=2, speedups=chosen)
        cache = tmp_path / f"{name}.sqlite"
        runs[name] = run_dpo(train_spec(plan, tmp_path / name, dataset=pairs, reference_cache=cache))
    assert counters["stats"]["unique_graphs"] > 0
    # Attention is outside of the graphs, by its own choice, and nothing else is.
    assert all("packed_rows" in reason for reason in counters["graph_break"])
    assert runs["compiled"].report["first_loss"] == pytest.approx(math.log(2), abs=5e-4)
    assert runs["compiled"].losses == pytest.approx(runs["plain"].losses, abs=1e-4)
    assert largest_difference(runs["compiled"].adapter, runs["plain"].adapter) < 5e-4


def test_layers_are_not_compiled_anew_for_batches_of_other_numbers_and_lengths(
    plan_for: PlanMaker, model_folder: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were, until dynamo's limit, and ran as they are from then on: scores before and after differed by 0.1."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(speedups, "BACKEND", backend)
    plan = plan_for(speedups=("compile",))
    model = load_base(model_folder, plan)
    plain, _ = score_groups(model, groups[:12], 100_000)
    speed_up(model, plan)
    counts, scores = [], {}
    for start, stop in ((0, 2), (2, 5), (5, 6), (6, 12)):
        part, _ = score_groups(model, groups[start:stop], 100_000)
        scores[start] = part
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 3
    assert [value for part in scores.values() for value in part] == pytest.approx(plain, abs=1e-3)
