"""The reference cache: what its key depends on, and that a wrong reference never trains."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peft import PeftModel
from trl.trainer.utils import disable_dropout_in_model

from dpo_assets.artifact import VOLATILE
from dpo_assets.contract import TrainSpec
from dpo_assets.errors import GateError
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.packages import computing, versions
from dpo_assets.training.policy import Policy
from dpo_assets.training.scoring import cache as cached
from dpo_assets.training.scoring import logprobs
from dpo_assets.training.scoring.cache import ScoreCache, Scores, kept_scores, pair_key, score_key
from dpo_assets.training.stages import dpo
from dpo_assets.training.trainers.reference import reference_scores
from dpo_assets.training.trainers.strategies import score_reference
from dpo_assets_tests.training.conftest import TRAIN_PAIRS, Log, PlanMaker, SpecMaker, small_part
from dpo_assets_tests.training.dense import summed_logps

LN2 = math.log(2)


class Scorer:
    """Gives every pair a score of its own and remembers which pairs it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Group] = []

    def __call__(self, groups: Sequence[Group]) -> Scores:
        self.asked += groups
        return [(-float(sum(g.completions[0])), -float(sum(g.completions[1]))) for g in groups]


def pair(number: int) -> Group:
    return Group([number, 1], ([2, number], [3]))


# --- the cache ----------------------------------------------------------------------------------------------------


def test_a_pair_is_scored_once_and_then_known(tmp_path: Path) -> None:
    cache, scorer = ScoreCache(tmp_path / "sub" / "cache.sqlite", "key"), Scorer()
    pairs = [pair(n) for n in range(5)]
    first, reused = reference_scores(pairs, cache, scorer)
    assert (reused, scorer.asked) == (0, pairs)
    second, reused = reference_scores(pairs, cache, scorer)
    assert (reused, scorer.asked) == (5, pairs)
    assert second == first == Scorer()(pairs)


def test_new_pairs_only_are_scored_and_every_score_keeps_its_place(tmp_path: Path) -> None:
    cache, scorer = ScoreCache(tmp_path / "cache.sqlite", "key"), Scorer()
    reference_scores([pair(1), pair(3)], cache, scorer)
    scorer.asked.clear()
    scores, reused = reference_scores([pair(n) for n in range(5)], cache, scorer)
    assert scorer.asked == [pair(0), pair(2), pair(4)]
    assert reused == 2
    assert scores == Scorer()([pair(n) for n in range(5)])


def test_what_is_left_of_a_pass_that_was_killed_falls_into_the_parts_that_the_whole_would_have_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward rounds by what else is in it."""
    monkeypatch.setattr(cached, "LARGEST", 8)
    parts: list[list[Group]] = []

    def killed_after(count: int) -> Callable[[Sequence[Group]], Scores]:
        def score(part: Sequence[Group]) -> Scores:
            if count == len(parts):
                raise KeyboardInterrupt
            parts.append(list(part))
            return Scorer()(part)

        return score

    for pairs, tenth in ((25, 3), (200, 8)):
        groups = [pair(n) for n in range(pairs)]
        kept_scores(groups, None, killed_after(10**6))
        whole, parts[:] = list(parts), []
        cache = ScoreCache(tmp_path / f"{pairs}.sqlite", "key")
        with pytest.raises(KeyboardInterrupt):
            kept_scores(groups, cache, killed_after(4))
        kept_scores(groups, cache, killed_after(10**6))
        assert parts == whole
        assert len(whole[0]) == tenth
        parts.clear()


def test_a_pair_that_stands_twice_gets_its_score_in_both_places(tmp_path: Path) -> None:
    pairs = [pair(1), pair(2), pair(1)]
    for cache in (None, ScoreCache(tmp_path / "cache.sqlite", "key")):
        assert reference_scores(pairs, cache, Scorer())[0] == Scorer()(pairs)


def test_without_a_cache_every_pair_is_scored() -> None:
    scorer = Scorer()
    for _ in range(2):
        assert reference_scores([pair(1)], None, scorer)[1] == 0
    assert len(scorer.asked) == 2


def test_another_key_knows_nothing_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    reference_scores([pair(1)], ScoreCache(path, "one"), Scorer())
    assert ScoreCache(path, "two").get([pair_key(pair(1))]) == {}


def test_the_key_of_a_pair_tells_prompt_chosen_and_rejected_apart() -> None:
    groups = [
        Group([1, 2], ([3], [4])),
        Group([1], ([2, 3], [4])),
        Group([1, 2], ([4], [3])),
        Group([1, 2], ([3, 4], [5])),
        Group([12], ([3], [4])),
        Group([1, 2], ([3], [5])),
        Group([1, 2], ([5], [4])),
        Group([1, 5], ([3], [4])),
        Group([1, 2], ([3],)),
    ]
    assert len({pair_key(group) for group in groups}) == len(groups)
    assert pair_key(Group((1, 2), ((3,), (4,)))) == pair_key(groups[0])


def test_the_key_depends_on_every_fact_and_not_on_their_order() -> None:
    assert score_key(base="a", start="b") == score_key(start="b", base="a")
    assert len({score_key(base="a", start="b"), score_key(base="b", start="a"), score_key(base="a")}) == 3


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_kept(tmp_path: Path, wrong: float) -> None:
    """SQLite keeps NaN as NULL, so a kept one comes back as None and no later run can ever start."""
    cache = ScoreCache(tmp_path / "cache.sqlite", "key")
    with pytest.raises(GateError):
        reference_scores([pair(1)], cache, lambda groups: [(wrong, -1.0)])
    assert reference_scores([pair(1)], cache, Scorer()) == (Scorer()([pair(1)]), 0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_whoever_takes_a_score_that_is_not_finite_asks_for_it_again(tmp_path: Path, wrong: float) -> None:
    """An evaluation tells such a score, and does not stop."""
    cache, pairs = ScoreCache(tmp_path / "cache.sqlite", "key"), [pair(1), pair(2)]
    told, known = kept_scores(pairs, cache, lambda groups: [(-1.0, wrong), (-2.0, -3.0)], least=2)
    assert (repr(told), known) == (repr([(-1.0, wrong), (-2.0, -3.0)]), 0)
    again, known = kept_scores(pairs, cache, Scorer())
    assert (again, known) == ([*Scorer()([pair(1)]), (-2.0, -3.0)], 1)


# --- scores and keys of the stage ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(model_folder: Path, plan_for: PlanMaker, sft_adapter: Path) -> PeftModel:
    """Where DPO starts: the trained SFT adapter on its base, dropout off."""
    model = attach_adapter(load_base(model_folder, plan_for()), plan_for(), sft_adapter, seed=0, dropout=0.0)
    disable_dropout_in_model(model)
    return model


def cached_spec(train_spec: SpecMaker, plan: Any, folder: Path, start: Path | None, **more: Any) -> TrainSpec:
    """A spec as the asset writes it, with a reference cache."""
    values: dict[str, Any] = {
        "start_adapter": start,
        "reference_cache": folder / "reference.sqlite",
        "inputs": {"sft_checkpoint": "s" * 64},
        "base_digest": "b" * 64,
        "tokenizer_digest": "t" * 64,
    }
    return train_spec(plan, folder, **(values | more))


def test_the_reference_is_the_policy_at_its_start(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
) -> None:
    few = groups[:6]
    spec = cached_spec(train_spec, plan_for(token_budget=600), tmp_path, sft_adapter)
    scores, _ = score_reference(Policy(policy, "transformers"), few, spec, Log())
    expected = summed_logps(policy.eval(), few)
    assert [value for both in scores for value in both] == pytest.approx(expected, abs=1e-3)


def test_with_reference_base_the_adapter_is_off_for_the_scores_only(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
) -> None:
    few = groups[:3]
    spec = cached_spec(train_spec, plan_for(dpo={"reference": "base"}), tmp_path, sft_adapter)
    scores = [value for both in score_reference(Policy(policy, "transformers"), few, spec, Log())[0] for value in both]
    by_sft = summed_logps(policy.eval(), few)
    with policy.disable_adapter():
        assert scores == pytest.approx(summed_logps(policy, few), abs=1e-3)
    assert scores != pytest.approx(by_sft, abs=1.0)
    assert summed_logps(policy, few) == pytest.approx(by_sft, abs=1e-6)


def test_the_cache_outlives_a_change_of_anything_that_scores_do_not_depend_on(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
) -> None:
    few = groups[:3]
    first, reused = score_reference(
        Policy(policy, "transformers"), few, cached_spec(train_spec, plan_for(), tmp_path, sft_adapter), Log()
    )
    assert reused == 0
    changes: list[dict[str, Any]] = [
        {"learning_rate": 5e-5},
        {"beta": 0.3},
        {"epochs": 3.0, "batch_size": 4, "seed": 7},
        {"warmup_ratio": 0.0, "schedule": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.5},
    ]
    for change in changes:
        spec = cached_spec(train_spec, plan_for(dpo=change), tmp_path, sft_adapter, fingerprint="other")
        assert score_reference(Policy(policy, "transformers"), few, spec, Log()) == (first, 3), change


@pytest.mark.parametrize(
    ("plan_change", "spec_change"),
    [
        pytest.param({}, {"base_digest": "c" * 64}, id="base"),
        pytest.param({}, {"inputs": {"sft_checkpoint": "z" * 64}}, id="start"),
        pytest.param({}, {"start_adapter": None}, id="no-start"),
        pytest.param({}, {"tokenizer_digest": "u" * 64}, id="tokenizer"),
        pytest.param({"precision": "bf16"}, {}, id="precision"),
        pytest.param({"device_name": "another CPU"}, {}, id="device"),
        pytest.param({"dpo": {"reference": "base"}}, {}, id="reference"),
    ],
)
def test_another_reference_is_scored_again(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
    plan_change: dict[str, Any],
    spec_change: dict[str, Any],
) -> None:
    few = groups[:1]
    score_reference(
        Policy(policy, "transformers"), few, cached_spec(train_spec, plan_for(), tmp_path, sft_adapter), Log()
    )
    spec = cached_spec(train_spec, plan_for(**plan_change), tmp_path, sft_adapter, **spec_change)
    assert score_reference(Policy(policy, "transformers"), few, spec, Log())[1] == 0


@pytest.mark.parametrize(("padded", "largest"), [(False, 6), (True, 1)], ids=["flash", "padded rows"])
def test_the_reference_pass_takes_larger_forwards_than_training_where_rows_are_not_padded(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    padded: bool,
    largest: int,
) -> None:
    """By whether flash attention is there, which no CPU has."""
    few = groups[:6]
    monkeypatch.setattr(type(engine_of(policy)), "pads_attention", padded)
    spec = cached_spec(train_spec, plan_for(token_budget=1), tmp_path, sft_adapter)
    spec = spec.model_copy(update={"plan": spec.plan.model_copy(update={"reference_budget": 10_000})})
    packed: list[int] = []

    def watched(run: Sequence[Group]) -> PackedBatch:
        packed.append(len(run))
        return pack(run)

    monkeypatch.setattr(logprobs, "pack", watched)
    monkeypatch.setattr(cached, "PARTS", 1)
    score_reference(Policy(policy, "transformers"), few, spec, Log())
    assert max(packed) == largest


def test_other_kernels_score_again(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
) -> None:
    spec = cached_spec(train_spec, plan_for(), tmp_path, sft_adapter)
    score_reference(Policy(policy, "transformers"), groups[:1], spec, Log())
    assert score_reference(Policy(policy, "fused"), groups[:1], spec, Log())[1] == 0


def installed(folder: Path, name: str, version: str) -> str:
    """A folder for the path in which a package stands by its metadata alone."""
    (folder / f"{name.replace('-', '_')}-{version}.dist-info").mkdir(parents=True)
    (folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return str(folder)


@pytest.mark.parametrize(
    ("package", "precision", "again"),
    [
        *(
            (name, "fp32", True)
            for name in ("transformers", "peft", "triton", "fla-core", "mamba-ssm", "causal-conv1d")
        ),
        ("bitsandbytes", "4bit", True),
        ("bitsandbytes", "fp32", False),
        ("liger-kernel", "fp32", False),
        ("unsloth", "fp32", False),
    ],
)
def test_another_version_of_what_computes_scores_again(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    precision: str,
    again: bool,
) -> None:
    spec = cached_spec(train_spec, plan_for(precision=precision), tmp_path, sft_adapter)
    score_reference(Policy(policy, "transformers"), groups[:1], spec, Log())
    monkeypatch.syspath_prepend(installed(tmp_path / "site", package, "99.9"))
    assert versions()[package] == "99.9"
    assert score_reference(Policy(policy, "transformers"), groups[:1], spec, Log())[1] == (0 if again else 1)


def test_liger_counts_where_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, "liger-kernel", "99.9"))
    assert computing("transformers", "fp32", ["liger"])["liger-kernel"] == "99.9"
    assert "liger-kernel" not in computing("transformers", "fp32", [])


@pytest.mark.parametrize("damage", [b"", b"not a database at all, by far" * 200], ids=["emptied", "overwritten"])
def test_a_damaged_cache_is_set_aside_and_the_pairs_are_scored_again(tmp_path: Path, damage: bytes) -> None:
    path, scorer = tmp_path / "reference.sqlite", Scorer()
    reference_scores([pair(1)], ScoreCache(path, "key"), scorer)
    path.write_bytes(damage)
    cache = ScoreCache(path, "key")
    scores, reused = reference_scores([pair(1)], cache, scorer)
    assert reused == 0
    assert reference_scores([pair(1)], ScoreCache(path, "key"), scorer) == (scores, 1)
    # An emptied file is an empty database; anything else is kept, beside, for whoever wants to look.
    assert (cache.set_aside is not None) == bool(damage)
    assert cache.set_aside is None or cache.set_aside.read_bytes() == damage


@pytest.mark.parametrize("change", ["chosen = chosen + 1e-12", "rejected = 'x'", "digest = ''", "pair = 'other'"])
def test_a_score_that_is_not_what_was_kept_is_dropped_counted_and_scored_again(tmp_path: Path, change: str) -> None:
    path, scorer = tmp_path / "reference.sqlite", Scorer()
    pairs = [pair(n) for n in range(4)]
    right, _ = reference_scores(pairs, ScoreCache(path, "key"), scorer)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"update scores set {change} where pair = ?", (pair_key(pairs[2]),))
    scorer.asked.clear()
    cache = ScoreCache(path, "key")
    assert reference_scores(pairs, cache, scorer) == (right, 3)
    assert scorer.asked == [pairs[2]]
    assert cache.dropped == 1
    assert "1 kept scores in reference.sqlite were not what had been kept" in cache.damage
    again = ScoreCache(path, "key")
    assert reference_scores(pairs, again, scorer) == (right, 4)
    assert again.damage == ""


def test_a_shorter_max_length_scores_again_only_what_it_cuts(
    policy: PeftModel,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    groups: list[Group],
    tmp_path: Path,
) -> None:
    longest = groups[0]
    shorter = longest.truncated(len(longest.prompt) + len(longest.completions[0]) - 1)
    score_reference(
        Policy(policy, "transformers"), [longest], cached_spec(train_spec, plan_for(), tmp_path, sft_adapter), Log()
    )
    scores, reused = score_reference(
        Policy(policy, "transformers"), [shorter], cached_spec(train_spec, plan_for(), tmp_path, sft_adapter), Log()
    )
    assert reused == 0
    assert scores[0] == pytest.approx(summed_logps(policy.eval(), [shorter]), abs=1e-3)


# --- the whole stage ----------------------------------------------------------------------------------------------


def test_a_refresh_scores_new_pairs_only_and_starts_at_ln_2_from_cached_ones(
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    sft_adapter: Path,
    prepared: tuple[pl.DataFrame, pl.DataFrame],
    dataset: Path,
    tmp_path: Path,
) -> None:
    grown = tmp_path / "dataset"
    grown.mkdir()
    small_part(prepared[0], TRAIN_PAIRS + 3).write_parquet(grown / "train.parquet")
    cache = tmp_path / "reference.sqlite"
    runs = [
        ("first", dataset, {}, 0),
        ("again", dataset, {"learning_rate": 2e-4, "beta": 0.2}, TRAIN_PAIRS),
        ("grown", grown, {}, TRAIN_PAIRS),
    ]
    for name, folder, change, known in runs:
        out = tmp_path / name
        spec = cached_spec(train_spec, plan_for(dpo=change), out, sft_adapter, reference_cache=cache, dataset=folder)
        log = Log()
        dpo.run(spec, log)
        assert read(out / VOLATILE)["reference_pairs_from_cache"] == known
        assert abs(read(out / "report.json")["first_loss"] - LN2) <= 5e-4
        assert any(f"{known} from the cache" in message for message in log.messages)


def test_with_reference_base_a_trained_start_stops_at_the_first_step(
    plan_for: PlanMaker, train_spec: SpecMaker, sft_adapter: Path, tmp_path: Path
) -> None:
    plan = plan_for(dpo={"reference": "base"})
    with pytest.raises(GateError) as stopped:
        dpo.run(train_spec(plan, tmp_path / "out", start_adapter=sft_adapter), Log())
    error = stopped.value
    assert error.check == "reference_is_start"
    assert isinstance(error.value, float)
    assert math.isfinite(error.value)
    assert abs(error.value - LN2) > 5e-4
    assert error.band == "0.693147 +- 0.0005"
    assert "dpo.reference" in error.fix
    assert "`sft`" in error.fix
    assert not (tmp_path / "out" / "adapter").exists()


def test_with_reference_base_an_untrained_start_is_its_own_reference(
    plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    plan = plan_for(dpo={"reference": "base", "epochs": 0.3})
    dpo.run(train_spec(plan, tmp_path / "out"), Log())
    assert abs(read(tmp_path / "out" / "report.json")["first_loss"] - LN2) <= 5e-4


def test_an_sft_adapter_with_dropout_still_starts_at_ln_2_and_its_scores_repeat(
    plan_for: PlanMaker, train_spec: SpecMaker, sft_adapter: Path, tmp_path: Path
) -> None:
    """DPO trains without dropout whatever SFT did; otherwise policy and reference differ by chance."""
    config = read(sft_adapter / "adapter_config.json")
    assert config["lora_dropout"] > 0
    plan = plan_for(dpo={"epochs": 0.3})
    for name in ("one", "two"):
        dpo.run(train_spec(plan, tmp_path / name, start_adapter=sft_adapter), Log())
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    assert first == second
    assert abs(read(tmp_path / "one" / "report.json")["first_loss"] - LN2) <= 1e-6


def test_a_stale_reference_stops_at_the_first_step(
    plan_for: PlanMaker, train_spec: SpecMaker, sft_adapter: Path, groups: list[Group], tmp_path: Path
) -> None:
    """Scores in the cache that no longer are those of the start."""
    spec = cached_spec(train_spec, plan_for(), tmp_path / "out", sft_adapter)
    policy = attach_adapter(load_base(spec.base_model, spec.plan), spec.plan, None, seed=0, dropout=0.0)
    score_reference(
        Policy(policy, "transformers"), groups, spec, Log()
    )  # By the base, under the key of the SFT adapter.
    with pytest.raises(GateError, match="not the start of training") as stopped:
        dpo.run(spec, Log())
    assert "delete the reference cache" in stopped.value.fix


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
