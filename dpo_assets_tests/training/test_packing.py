"""Packing changes where tokens stand and nothing else: index tables, scores and gradients are those of single rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoModelForCausalLM

from dpo_assets.training.batches.batch import PackedBatch, Tensors
from dpo_assets.training.batches.data import TOKEN_COLUMNS, dpo_group, longest_group, sft_group
from dpo_assets.training.batches.packing import Group, pack, under_budget
from dpo_assets.training.engines import attention, head
from dpo_assets.training.engines.head import Head, ScoredHead
from dpo_assets.training.scoring import proof
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps
from dpo_assets.training.trainers.step import STEP, Coupled, PackedCollator, Step
from dpo_assets_tests.training.dense import row_logits, row_logps, rows_of

VOCABULARY = 512
TOKEN_TOLERANCE = 1e-5  # Nats per token between packed and row-by-row scoring in fp32,
FP32_ROUNDING = 2e-6  # and the last digits of a large one.
GRADIENT_TOLERANCE = 1e-5  # Relative to the norm of the whole gradient.
SAME_FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def tokens(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=most)


def random_groups(longest: int = 9, most: int = 5) -> st.SearchStrategy[list[Group]]:
    """Groups of a prompt and one to three completions."""
    completions = st.lists(tokens(longest), min_size=1, max_size=3).map(tuple)
    return st.lists(st.builds(Group, tokens(longest), completions), min_size=1, max_size=most)


@pytest.mark.parametrize(
    ("to_group", "longest"), [(dpo_group, ([1, 2], [3] * 4, [4] * 9)), (sft_group, ([5], [6] * 7, [7]))]
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_longest_group_is_found_in_either_split(
    to_group: Callable[..., Group], longest: tuple[list[int], ...], split: str, tmp_path: Path
) -> None:
    """It is found by lengths, and the lengths of a group are those of the answers that it has."""
    few, others = ([1], [2], [3]), [([1, 2], [3] * 4, [4] * 9), ([5], [6] * 7, [7]), ([8] * 3, [9] * 2, [9])]
    for name, rows in (("train", [few]), ("eval", [few]), (split, [few, *others])):
        columns = zip(TOKEN_COLUMNS, (["p"] * len(rows), *map(list, zip(*rows, strict=True))), strict=True)
        pl.DataFrame(dict(columns)).write_parquet(tmp_path / f"{name}.parquet")
    found = longest_group(tmp_path, partial(to_group, max_length=10), tmp_path / "scratch")
    assert found == to_group(dict(zip(TOKEN_COLUMNS[1:], longest, strict=True)), max_length=10)


# --- where tensors are --------------------------------------------------------------------------------------------


def tensors_in(held: Any) -> list[Tensor]:
    """Every tensor of a dataclass, however deep."""
    match held:
        case Tensor():
            return [held]
        case Tensors():
            return [tensor for field in fields(held) for tensor in tensors_in(getattr(held, field.name))]
        case list() | tuple():
            return [tensor for entry in held for tensor in tensors_in(entry)]
    return []


@pytest.fixture
def step() -> dict[str, Step]:
    """A collator's, with all that a forward can carry."""
    rows = [{"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}] * 2
    made = PackedCollator(lambda _: Group([1, 2], ([3], [4, 5])), budget=5, referenced=True).step(rows)
    coupled = Coupled(slopes=torch.ones(1, 2), share=torch.zeros(()))
    return {STEP: replace(made, forwards=tuple(replace(forward, coupled=coupled) for forward in made.forwards))}


def test_accelerate_moves_every_tensor_of_a_step_to_the_device(step: dict[str, Step]) -> None:
    """It leaves what it does not know where it is, and a table on the CPU would fail in the first forward on a GPU."""
    before = tensors_in(step[STEP])
    moved = send_to_device(step, "meta")[STEP]
    assert isinstance(moved, Step)
    after = tensors_in(moved)
    assert len(after) == len(before) == 2 * (2 + 4 + 4 + 4 + 3)
    assert all(tensor.is_meta for tensor in after)
    assert [(tensor.shape, tensor.dtype) for tensor in after] == [(tensor.shape, tensor.dtype) for tensor in before]


def test_a_data_loader_pins_every_tensor_of_a_step(step: dict[str, Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU has no memory to pin, so moving away stands for it."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, device=None: tensor.to("meta"))
    pinned = pin_memory(step)[STEP]
    assert all(tensor.is_meta for tensor in tensors_in(pinned))


def test_copies_of_a_step_are_waited_for_unless_asked_not_to(
    step: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[bool] = set()
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, non_blocking: asked.add(non_blocking) or tensor)
    step[STEP].to("cpu")
    assert asked == {False}
    asked.clear()
    step[STEP].to("cpu", non_blocking=True)
    assert asked == {True}


# --- index tables -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(random_groups())
def test_every_row_is_its_prompt_and_its_completion_again(groups: list[Group]) -> None:
    batch = pack(groups)
    rows, width = batch.padded.shape
    source = batch.padded.source.view(rows, width)
    expected = rows_of(groups)
    assert rows == len(expected)
    assert width == max(len(prompt) + len(completion) for prompt, completion in expected)
    for slots, (prompt, completion) in zip(source, expected, strict=True):
        length = len(prompt) + len(completion)
        assert batch.ids[slots[:length]].tolist() == prompt + completion
        assert batch.positions[slots[:length]].tolist() == list(range(length))
        # Filler repeats the row's first token: it belongs to this row's group, not to a neighbour's.
        assert set(slots[length:].tolist()) <= {int(slots[0])}


@settings(deadline=None)
@given(random_groups())
def test_the_tables_of_flash_attention_are_those_of_each_row(groups: list[Group]) -> None:
    """A group's first row asks for its prompt and completion, a further one for its completion alone; all see both."""
    batch = pack(groups)
    asked = [
        (len(c) + (len(g.prompt) if rank == 0 else 0), len(g.prompt) + len(c))
        for g in groups
        for rank, c in enumerate(g.completions)
    ]
    assert batch.unpadded.query_starts.diff().tolist() == [queries for queries, _ in asked]
    assert batch.unpadded.key_starts.diff().tolist() == [keys for _, keys in asked]
    assert batch.unpadded.longest == (max(queries for queries, _ in asked), max(keys for _, keys in asked))
    assert int(batch.unpadded.query_starts[-1]) == len(batch.ids)
    seen = [batch.ids[batch.unpadded.source][start:end].tolist() for start, end in pairwise(batch.unpadded.key_starts)]
    assert seen == [[*prompt, *completion] for prompt, completion in rows_of(groups)]


@settings(deadline=None)
@given(random_groups())
def test_every_slot_of_keys_is_that_of_one_token_and_is_found_from_it(groups: list[Group]) -> None:
    """Gradients of keys are gathered by these: a slot that is missed or taken twice is a wrong gradient on a GPU."""
    batch = pack(groups)
    found = sorted(
        (slot, token) for token, slots in enumerate(batch.unpadded.slots.tolist()) for slot in slots if slot >= 0
    )
    assert found == list(enumerate(batch.unpadded.source.tolist()))


def test_the_longest_queries_and_the_longest_keys_can_be_those_of_different_rows() -> None:
    batch = pack([Group([1] * 6, ([2], [3] * 4))])
    assert batch.unpadded.longest == (7, 10)


@settings(deadline=None)
@given(random_groups())
def test_a_prompt_stands_in_the_stream_once(groups: list[Group]) -> None:
    batch = pack(groups)
    stream = [token for g in groups for token in [*g.prompt, *[t for c in g.completions for t in c]]]
    assert batch.ids.tolist() == stream
    assert len(stream) == sum(g.tokens for g in groups)
    assert batch.row_lengths == [len(prompt) + len(completion) for prompt, completion in rows_of(groups)]


@settings(deadline=None)
@given(random_groups())
def test_home_and_shared_slots_cover_each_row_token_exactly_once(groups: list[Group]) -> None:
    batch = pack(groups)
    rows, width = batch.padded.shape
    real = {
        row * width + column
        for row, (prompt, completion) in enumerate(rows_of(groups))
        for column in range(len(prompt) + len(completion))
    }
    covered = batch.padded.home.tolist()
    assert batch.padded.source[batch.padded.home].tolist() == list(range(len(batch.ids)))
    for stream, slot in batch.padded.shared:
        # Once each: the backward adds with plain indexing, which would lose the second of two equal indices.
        assert len(set(stream.tolist())) == len(stream)
        assert torch.equal(batch.padded.source[slot], stream)
        covered += slot.tolist()
    assert len(covered) == len(set(covered))
    assert set(covered) == real
    assert rows * width == len(batch.padded.source)


@settings(deadline=None)
@given(random_groups())
def test_each_completion_token_is_predicted_from_the_token_before_it_in_its_own_row(groups: list[Group]) -> None:
    batch = pack(groups)
    rows, width = batch.padded.shape
    source = batch.padded.source.view(rows, width)
    predict, target, owner = (getattr(batch.scored, name).tolist() for name in ("predict", "target", "owner"))
    expected = [
        (int(source[row, len(prompt) + n - 1]), token, row)
        for row, (prompt, completion) in enumerate(rows_of(groups))
        for n, token in enumerate(completion)
    ]
    assert list(zip(predict, target, owner, strict=True)) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 50)), st.integers(1, 120))
def test_under_budget_keeps_every_item_in_order_within_the_budget(sizes: list[int], budget: int) -> None:
    items = list(enumerate(sizes))
    runs = list(under_budget(items, sizes, budget))
    assert [item for run in runs for item in run] == items
    for run in runs:
        assert sum(size for _, size in run) <= budget or len(run) == 1
    for run, following in pairwise(runs):
        # No forward is smaller than it has to be.
        assert sum(size for _, size in run) + following[0][1] > budget


@given(tokens(9), st.lists(tokens(20), min_size=1, max_size=3), st.integers(1, 24))
def test_truncation_keeps_the_start_of_each_row_and_never_empties_one(
    prompt: list[int], completions: list[list[int]], max_length: int
) -> None:
    group = Group(prompt, tuple(completions))
    if len(prompt) >= max_length:
        with pytest.raises(ValueError, match="leaves no room"):
            group.truncated(max_length)
        return
    for before, after in zip(rows_of([group]), rows_of([group.truncated(max_length)]), strict=True):
        assert after[1]
        assert after[0] + after[1] == (before[0] + before[1])[:max_length]


# --- scores of the real model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Any:
    """The real model with Transformers' own attention, which knows nothing of packing."""
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def packed(model_folder: Path) -> Any:
    attention.register()
    return AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation=attention.NAME
    ).eval()


def assert_same_scores(packed: Any, plain: Any, groups: Sequence[Group]) -> None:
    with torch.no_grad():
        batch = pack(groups)
        scores = score_tokens(packed, batch)
        logits = torch.cat([row_logits(plain, *row) for row in rows_of(groups)])
    logps = logits.log_softmax(-1)
    theirs = logps.gather(-1, batch.scored.target[:, None])[:, 0]
    torch.testing.assert_close(scores.logps, theirs, atol=TOKEN_TOLERANCE, rtol=FP32_ROUNDING)
    torch.testing.assert_close(scores.entropy, -(logps.exp() * logps).sum(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1), atol=1e-4, rtol=0)
    # A token whose two best logits are equal to the last digits may fall to either side.
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert torch.equal(scores.top1[clear], (logits.argmax(-1) == batch.scored.target)[clear])
    summed = [float(part.sum()) for part in theirs.split([len(completion) for _, completion in rows_of(groups)])]
    torch.testing.assert_close(sequence_logps(scores, batch), torch.tensor(summed), atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize(("off", "refused"), [(0.0, False), (5e-4, False), (-5e-4, False), (2e-3, True), (-2e-3, True)])
def test_the_probe_refuses_what_differs_by_more_than_a_thousandth_of_a_nat_a_token(
    packed: Any, groups: list[Group], monkeypatch: pytest.MonkeyPatch, off: float, refused: bool
) -> None:
    """A model's own forward that is off by so much stands for an architecture whose attention differs by so much."""
    own = proof._row_logps

    def shifted(lm: Any, prompt: Sequence[int], completion: Sequence[int], autocast: Any) -> Tensor:
        return own(lm, prompt, completion, autocast) + off

    monkeypatch.setattr(proof, "_row_logps", shifted)
    if not refused:
        proof.assert_exact(packed, groups[0])
        return
    with pytest.raises(proof.NotExactError, match="nats row by row"):
        proof.assert_exact(packed, groups[0])


@settings(max_examples=15, deadline=None, suppress_health_check=SAME_FIXTURE)
@given(groups=random_groups(longest=40, most=4))
def test_packed_scores_of_random_groups_equal_row_by_row_scores(packed: Any, plain: Any, groups: list[Group]) -> None:
    assert_same_scores(packed, plain, groups)


def test_packed_scores_of_real_pairs_equal_row_by_row_scores(packed: Any, plain: Any, groups: list[Group]) -> None:
    assert_same_scores(packed, plain, groups[:12])


def test_the_token_budget_does_not_change_scores_or_their_order(packed: Any, groups: list[Group]) -> None:
    at_once, lengths = score_groups(packed, groups[:8], budget=10**6)
    one_by_one, same_lengths = score_groups(packed, groups[:8], budget=1)
    assert lengths == same_lengths == [len(completion) for _, completion in rows_of(groups[:8])]
    assert at_once == pytest.approx(one_by_one, abs=1e-3)


def test_without_a_packed_batch_the_attention_is_transformers_own(packed: Any, plain: Any, groups: list[Group]) -> None:
    with torch.no_grad():
        for row in rows_of(groups[:2]):
            assert torch.equal(row_logits(packed, *row), row_logits(plain, *row))


# --- gradients through LoRA ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(model_folder: Path) -> PeftModel:
    """A LoRA policy away from its base, so that A and B both get gradients."""
    attention.register()
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention.NAME)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert isinstance(model, PeftModel)
    return model


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    size = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert size > 0
    off = torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm()
    assert float(off / size) <= GRADIENT_TOLERANCE
    for name, gradient in theirs.items():
        assert float(gradient.norm()) > 0, name


def weighted_packed(policy: PeftModel, batch: PackedBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each row, a loss that every row enters with a weight of its own)."""
    logps = sequence_logps(score_tokens(policy, batch), batch)
    return logps.detach(), (weights * logps).sum()


@pytest.fixture(scope="module")
def sample(groups: list[Group]) -> list[Group]:
    """Real pairs, a single and a triple: every number of completions that a prompt can have here."""
    some = [Group(g.prompt, tuple(c[:60] for c in g.completions)) for g in groups[:4]]
    single = Group(some[0].prompt, some[0].completions[:1])
    triple = Group(some[1].prompt, (*some[1].completions, some[2].completions[0]))
    return [single, *some, triple]


def test_packed_gradients_equal_the_sum_over_unpacked_rows(policy: PeftModel, sample: list[Group]) -> None:
    weights = torch.linspace(-1.0, 1.5, len(rows_of(sample)))
    logps, loss = weighted_packed(policy, pack(sample), weights)
    ours = gradients(policy, loss)
    policy.get_base_model().set_attn_implementation("sdpa")
    try:
        rows = [row_logps(policy, *row).sum() for row in rows_of(sample)]
        theirs = gradients(policy, (weights * torch.stack(rows)).sum())
    finally:
        policy.get_base_model().set_attn_implementation(attention.NAME)
    torch.testing.assert_close(logps, torch.stack(rows).detach(), atol=1e-3, rtol=1e-6)
    assert_same_gradients(ours, theirs)


def test_sharing_a_prompt_changes_neither_scores_nor_gradients(policy: PeftModel, sample: list[Group]) -> None:
    alone = [Group(prompt, (completion,)) for prompt, completion in rows_of(sample)]
    weights = torch.linspace(-1.0, 1.5, len(alone))
    logps, loss = weighted_packed(policy, pack(sample), weights)
    logps_alone, loss_alone = weighted_packed(policy, pack(alone), weights)
    assert len(pack(sample).ids) < len(pack(alone).ids)
    torch.testing.assert_close(logps, logps_alone, atol=1e-3, rtol=1e-6)
    assert_same_gradients(gradients(policy, loss), gradients(policy, loss_alone))


def test_gradient_checkpointing_changes_no_gradient(policy: PeftModel, sample: list[Group]) -> None:
    weights = torch.linspace(-1.0, 1.5, len(rows_of(sample)))
    _, loss = weighted_packed(policy, pack(sample), weights)
    plain_gradients = gradients(policy, loss)
    policy.train()
    policy.enable_input_require_grads()
    policy.get_base_model().gradient_checkpointing_enable()
    try:
        assert policy.get_base_model().is_gradient_checkpointing
        _, loss = weighted_packed(policy, pack(sample), weights)
        assert_same_gradients(gradients(policy, loss), plain_gradients)
    finally:
        policy.get_base_model().gradient_checkpointing_disable()
        policy.disable_input_require_grads()
        policy.eval()


def test_scoring_the_same_batch_twice_gives_the_same_bits(policy: PeftModel, sample: list[Group]) -> None:
    weights = torch.linspace(-1.0, 1.5, len(rows_of(sample)))
    first, second = (gradients(policy, weighted_packed(policy, pack(sample), weights)[1]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the chunked head ---------------------------------------------------------------------------------------------

HEAD_CASES = [
    pytest.param(1.0, 0.0, False, id="plain"),
    pytest.param(1.0, 0.0, True, id="bias"),
    pytest.param(0.25, 0.0, False, id="scale"),
    pytest.param(1.0, 2.0, False, id="softcap"),
    pytest.param(1.7, 2.0, True, id="scale-softcap-bias"),
]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024], ids="chunk{}".format)
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), HEAD_CASES)
def test_the_chunked_head_equals_a_dense_float64_log_softmax(
    chunk: int, scale: float, softcap: float, with_bias: bool
) -> None:
    torch.manual_seed(chunk)
    tokens, width, vocabulary = 7, 6, 11
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight, target = torch.randn(vocabulary, width), torch.randint(vocabulary, (tokens,))
    bias = torch.randn(vocabulary) if with_bias else None
    outside = torch.randn(tokens)  # What the loss passes back, different for each token.

    ours = ScoredHead.apply(hidden, Head(weight, bias, scale, softcap), target, chunk)
    (gradient,) = torch.autograd.grad(ours[0], hidden, outside)

    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, weight.double(), None if bias is None else bias.double()) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, target[:, None])[:, 0]
    (exact_gradient,) = torch.autograd.grad(picked, exact, outside.double())

    expected = (picked, -(logps.exp() * logps).sum(-1), logits.mean(-1))
    for value, theirs in zip(ours[:3], expected, strict=True):
        torch.testing.assert_close(value.double(), theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[3], logits.argmax(-1) == target)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-5, rtol=1e-5)
    assert [value.requires_grad for value in ours] == [True, False, False, False]


@pytest.mark.parametrize("chunk", [1, 50, 51], ids="chunk{}".format)
def test_chunk_borders_change_neither_scores_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, policy: PeftModel, sample: list[Group], chunk: int
) -> None:
    batch = pack(sample)
    assert len(batch.scored.target) > 2 * chunk
    weights = torch.linspace(-1.0, 1.5, len(rows_of(sample)))
    whole_logps, whole = weighted_packed(policy, batch, weights)
    whole_gradients = gradients(policy, whole)
    monkeypatch.setattr(head, "head_chunk", lambda *_: chunk)
    logps, loss = weighted_packed(policy, batch, weights)
    torch.testing.assert_close(logps, whole_logps, atol=1e-4, rtol=1e-6)
    assert_same_gradients(gradients(policy, loss), whole_gradients)
