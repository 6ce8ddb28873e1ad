"""How exact a score is: a tie is 1e-4 nats of a margin, which is made of four sums over hundreds of tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.head import TokenScores
from dpo_assets.training.scoring.logprobs import exact_logps, score_groups, sequence_logps

VOCABULARY, TOKENS = 49_152, 250


def test_an_answer_under_a_large_vocabulary_is_scored_as_in_fp64() -> None:
    """`log_softmax` on a CPU adds the terms one by one, and all its errors have one sign: 4e-4 nats here."""
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY) * 4
    target = torch.randint(0, VOCABULARY, (TOKENS,))
    exact = logits.double().log_softmax(-1)
    entropy = -(exact.exp() * exact).sum(-1)
    scores = ops.score_logits(logits, target, None)
    wanted = exact.gather(1, target[:, None])[:, 0]
    assert abs(float((scores.logps.double() - wanted).sum())) < 5e-5
    torch.testing.assert_close(scores.entropy, entropy.float(), atol=1e-5, rtol=1e-5)


def test_the_slope_of_a_score_is_that_of_the_softmax() -> None:
    torch.manual_seed(1)
    leaf = (torch.randn(5, 97) * 3).requires_grad_()
    target = torch.tensor([0, 96, 3, 50, 50])
    leaf.log_softmax(-1).gather(1, target[:, None]).sum().backward()
    for dtype in (torch.float32, torch.bfloat16):
        grad = torch.full((5, 97), math.nan, dtype=dtype)
        ops.score_logits(leaf.detach().clone(), target, grad)
        assert leaf.grad is not None
        torch.testing.assert_close(grad, leaf.grad.to(dtype), atol=1e-6, rtol=1e-2)


def test_a_sum_over_an_answer_is_rounded_once() -> None:
    """500 nats of 0.1 each: added one by one in fp32 they are 2e-3 nats off."""
    batch = pack([Group([1], ([2] * 5_000, [3]))])
    logps = torch.full((5_001,), -0.1)
    scores = TokenScores(logps, logps, logps, logps > 0)
    assert float(exact_logps(scores, batch)[0]) == pytest.approx(-5_000 * float(torch.tensor(0.1)), abs=1e-9)
    assert float(sequence_logps(scores, batch)[0]) == pytest.approx(-5_000 * float(torch.tensor(0.1)), abs=3e-5)


@pytest.fixture(scope="module")
def exact_model(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()


def test_in_fp64_the_packed_score_is_the_plain_sum_of_log_softmax(exact_model: Any, groups: list[Group]) -> None:
    """So what differs in fp32 is rounding. RewardBench's and lm-eval's own code: `benchmarks/other_scorers.py`."""
    few = groups[:4]
    theirs = []
    for group in few:
        for answer in group.completions:
            row = torch.tensor([[*group.prompt, *answer]])
            with torch.no_grad():
                logps = exact_model(row, use_cache=False).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
            theirs.append(float(logps.gather(1, torch.tensor(answer)[:, None]).sum()))
    ours, _ = score_groups(exact_model, few, 1024)
    assert ours == pytest.approx(theirs, abs=1e-6, rel=0)
