"""Batches of whole, padded rows: what they cost, and that scores by one engine never meet those of another."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_assets.contract import TrainSpec
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group, by_rows, pack
from dpo_assets.training.engines.attention import pads_attention
from dpo_assets.training.engines.base import attached_engine
from dpo_assets.training.engines.ladder import choose_kernels
from dpo_assets.training.engines.rows import runs_of
from dpo_assets.training.models.structure import description_of
from dpo_assets.training.policy import load_policy
from dpo_assets.training.trainers.step import PackedCollator
from dpo_assets.training.trainers.strategies import score_reference
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import rows_of
from dpo_assets_tests.training.tiny_models import tiny_config, tiny_model


@given(
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    budget=st.integers(1, 300),
    rows=st.sampled_from([1, 2]),
)
def test_runs_hold_every_item_once_and_cost_at_most_the_budget(widths: list[int], budget: int, rows: int) -> None:
    runs = by_rows(range(len(widths)), widths, budget, rows)
    assert sorted(n for run in runs for n in run) == list(range(len(widths)))
    for run in runs:
        assert rows * len(run) * max(widths[n] for n in run) <= budget or len(run) == 1
    # None could have gone into the run before it.
    for before, after in pairwise(runs):
        assert rows * (len(before) + 1) * max(widths[n] for n in before) > budget
        assert min(widths[n] for n in before) >= max(widths[n] for n in after)


ids = st.lists(st.integers(3, 60), min_size=1, max_size=12)
some_groups = st.lists(
    st.builds(lambda prompt, answers: Group(prompt, tuple(answers)), ids, st.lists(ids, min_size=1, max_size=3)),
    min_size=1, max_size=5,
)  # fmt: skip


@given(groups=some_groups, budget=st.integers(1, 80))
def test_every_scored_token_stands_in_its_row_behind_the_token_that_predicts_it(
    groups: list[Group], budget: int
) -> None:
    batch, wanted = pack(groups), rows_of(groups)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for run in runs_of(batch, budget):
        assert run.ids.shape == run.mask.shape
        assert run.ids.numel() <= budget or len(run.ids) == 1
        for n, (row, place) in enumerate(zip(run.row.tolist(), run.place.tolist(), strict=True)):
            tokens = run.ids[row][run.mask[row].bool()].tolist()
            assert run.mask[row].tolist() == sorted(run.mask[row].tolist(), reverse=True), "padding stands behind"
            owner = int(batch.scored.owner[run.scored[n]])
            assert tokens[place + 1] == int(batch.scored.target[run.scored[n]])
            found.setdefault(owner, (tokens, []))[1].append(place + 1)
    for owner, (prompt, completion) in enumerate(wanted):
        tokens, places = found[owner]
        assert tokens == [*prompt, *completion]
        assert sorted(places) == list(range(len(prompt), len(tokens)))


def test_a_step_on_whole_rows_is_cut_by_rows_times_the_widest(groups: list[Group], dataset: Path) -> None:
    """With the prompt counted once and padding not at all, a forward would cost up to twice its budget and more."""
    rows = list(load_split(dataset, "train"))
    budget = 4 * max(group.longest_row for group in groups)
    collator = PackedCollator(partial(dpo_group, max_length=192), budget, whole_rows=True)
    shapes = [forward.batch.padded.shape for forward in collator.step(rows).forwards]
    assert sum(count for count, _ in shapes) == 2 * len(rows)
    assert all(count * width <= budget for count, width in shapes)
    plain = PackedCollator(partial(dpo_group, max_length=192), budget, padded=True).step(rows)
    assert any(math.prod(forward.batch.padded.shape) > budget for forward in plain.forwards)


@pytest.mark.parametrize(
    ("family", "changed", "capability", "dtype", "padded"),
    [
        ("llama", {}, (8, 0), torch.bfloat16, False),
        ("llama", {}, (7, 5), torch.float16, True),
        ("llama", {}, (8, 0), torch.float32, True),
        ("llama", {"head_dim": 512}, (9, 0), torch.bfloat16, True),
        ("gemma2", {}, (9, 0), torch.bfloat16, True),
        ("gemma2", {"attn_logit_softcapping": None}, (9, 0), torch.bfloat16, False),
        ("deepseek_v3", {}, (9, 0), torch.bfloat16, True),
        ("gpt2", {}, (9, 0), torch.bfloat16, False),
        ("gpt2", {}, (7, 0), torch.float16, True),
    ],
)
def test_attention_is_padded_where_flash_attention_does_not_compute_it(
    family: str,
    changed: dict[str, Any],
    capability: tuple[int, int],
    dtype: torch.dtype,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the configuration and the card: no GPU is here to be asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    lm = SimpleNamespace(config=tiny_config(family, **changed))
    text = lm.config.get_text_config()
    assert pads_attention(text, description_of(lm), torch.device("cuda"), dtype) == padded
    assert pads_attention(text, None, torch.device("cuda"), dtype) == padded


@pytest.mark.parametrize("engine", ["fused", "transformers", "rows"])
def test_a_batch_is_cut_as_the_engine_pays_for_it(engine: str, groups: list[Group], plan_for: PlanMaker) -> None:
    """Padded attention pays for the widest row of a forward wherever it runs, not on a CPU alone."""
    model = tiny_model("llama")
    choose_kernels(model, plan_for(kernels=engine))
    budget = 2 * max(group.tokens for group in groups)

    def cut() -> list[list[int]]:
        def to_group(row: dict[str, Any]) -> Group:
            return groups[row["n"]]

        step = PackedCollator.of(model, to_group, budget).step([{"n": n} for n in range(len(groups))])
        return [forward.batch.scored.lengths.tolist() for forward in step.forwards]

    attached: Any = attached_engine(model)
    pads = cut()
    assert attached.pads_attention
    attached.__class__ = type("OnFlash", (type(attached),), {"pads_attention": False})
    assert (pads == cut()) == attached.padded


def test_reference_scores_of_one_engine_are_not_taken_for_those_of_another(
    model_folder: Path, groups: list[Group], plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    def scored(kernels: str) -> tuple[list[Any], int]:
        plan = plan_for().model_copy(update={"kernels": kernels})
        spec: TrainSpec = train_spec(plan, tmp_path / "out", reference_cache=tmp_path / "cache.sqlite")
        policy = load_policy(model_folder, plan, None, seed=0, dropout=0.0).proven(plan, groups[0])
        assert policy.kernels == kernels
        return score_reference(policy, groups[:4], spec, Log())

    (packed, _), (rows, reused), (again, known) = (scored(name) for name in ("transformers", "rows", "rows"))
    assert (reused, known) == (0, 4)
    assert again == rows
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(packed), atol=1e-3, rtol=0)
