"""A small language model as a judge, behind a server of OpenAI's protocol, on pairs that people ranked.

    python -m dpo_assets.training.models.smollm2 models/smollm2-135m-instruct
    python -m benchmarks.judge_model --model models/smollm2-135m-instruct [--verdict text]

The pairs are those of the package (OpenAssistant, ranked by people), the shortest of each conversation, as a CPU is
asked. Of 85 in a hundred conversations they measure the judge, as people's pairs do in a pipeline. Of the others the
first answer is the one that people preferred in about seven of ten, so the share that a judge should find is known. All
is asked through `judging.endpoint`, in both orders, over HTTP; the server holds the model. Replies are kept in the file
`--replies`: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.sources import FeedbackFile
from dpo_assets.feedback.sources.finding import BUILTIN_FEEDBACK
from dpo_assets.judging.comparing import Comparison, Form, Judge, Message, Reply, compare
from dpo_assets.judging.endpoint import CANDIDATES, Endpoint
from dpo_assets.judging.pairs import AnswerPair
from dpo_assets.judging.rates import Tally, share_of
from dpo_assets.judging.replies import Remembered
from dpo_assets.judging.shares import corrected
from dpo_assets.report.tables import table
from dpo_assets_tests.judging.server import Candidates, JudgeServer

CONFIDENCE, OF_PEOPLE, PREFERRED_FIRST = 0.95, 0.85, 0.7


class ServedModel:
    """What a server does with a question: greedy tokens, and the log-probabilities of the first one."""

    def __init__(self, folder: Path, new_tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.new_tokens = new_tokens

    def __call__(self, messages: list[dict[str, str]]) -> tuple[str, Candidates]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            out: Any = self.model.generate(
                ids,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        nats, tokens = out.logits[0][0].float().log_softmax(-1).topk(CANDIDATES)
        first: Candidates = {}
        for token, value in zip(tokens.tolist(), nats.tolist(), strict=True):
            first.setdefault(self.tokenizer.decode([token]), value)
        return self.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True), first


def people_ranked(longest: int, most: int) -> list[AnswerPair]:
    """The package's pairs, preferred answer first: the shortest of each conversation, in the order of their ids."""
    source = Path(str(files("dpo_assets") / BUILTIN_FEEDBACK["oasst"]))
    read = read_file(FeedbackFile(source, source.name, "oasst_tree"), ReadOptions())
    pairs: dict[str, Pair] = {}
    for pair in sorted(read.pairs, key=lambda one: (_characters(one), one.pair_id)):
        if _characters(pair) <= longest:
            pairs.setdefault(pair.group_id, pair)
    return [
        AnswerPair(
            [{"role": message["role"], "content": message["content"]} for message in pair.prompt],
            pair.chosen[-1]["content"],
            pair.rejected[-1]["content"],
        )
        for pair in sorted(pairs.values(), key=lambda one: one.pair_id)[:most]
    ]


def _characters(pair: Pair) -> int:
    return sum(len(message["content"]) for message in (*pair.prompt, *pair.chosen, *pair.rejected))


def draw(pair: AnswerPair, what: str) -> float:
    """From 0 to 1, by the conversation: the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{what}:{pair.opening}".encode()).digest()[:8], "big") / 2**64


def compared(judge: Judge, pairs: Sequence[AnswerPair], what: str) -> list[Comparison]:
    found = []
    for number, pair in enumerate(pairs, start=1):
        found.append(compare(judge, pair.conversation, pair.first, pair.second))
        if number % 10 == 0 or number == len(pairs):
            print(f"{number} of {len(pairs)} {what}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model with a template")
    parser.add_argument("--verdict", choices=get_args(Form), default="letter")
    parser.add_argument("--longest", type=int, default=2_000, help="characters of a conversation with both answers")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="at most")
    parser.add_argument("--replies", type=Path, default=Path("judge.sqlite"))
    parser.add_argument("--max-tokens", type=int, default=48, help="of a reply in text")
    args = parser.parse_args()
    started, form = time.perf_counter(), args.verdict
    pairs = people_ranked(args.longest, args.pairs)
    people = [pair for pair in pairs if draw(pair, "side") < OF_PEOPLE]
    kept = [pair for pair in pairs if draw(pair, "side") >= OF_PEOPLE]
    turned = [draw(pair, "turn") >= PREFERRED_FIRST for pair in kept]
    answers = [
        AnswerPair(one.conversation, one.second, one.first) if turn else one
        for one, turn in zip(kept, turned, strict=True)
    ]
    with JudgeServer(ServedModel(args.model, 1 if form == "letter" else args.max_tokens)) as server:
        endpoint = Endpoint(server.url, args.model.name, "NO_KEY", args.max_tokens, 600.0, form)
        judge = Remembered(_Anywhere(endpoint), args.replies)
        by_people, of_answers = compared(judge, people, "pairs of people"), compared(judge, answers, "answers")
    rows = [told(name, found) for name, found in (("pairs of people", by_people), ("answers", of_answers))]
    print(table(["asked of", "pairs", "first preferred", "ties", "second", "no verdict", "by order"], rows))
    agreement = share_of(by_people, [pair.opening for pair in people], CONFIDENCE)
    share = share_of(of_answers, [pair.opening for pair in answers], CONFIDENCE)
    true = 1 - sum(turned) / len(turned) if turned else math.nan
    print(f"\nagrees with people: {agreement.proportion(CONFIDENCE)}")
    print(f"first answer preferred: {share.proportion(CONFIDENCE)}; by people {true:.3f}")
    print(f"corrected: {corrected(share, agreement, CONFIDENCE)}")
    print(f"longer answer preferred by people: {longer(people):.3f}, by the judge: {longer(people, by_people):.3f}")
    print(f"{2 * len(pairs)} questions, {time.perf_counter() - started:.0f} s")
    return 0


@dataclass(frozen=True)
class _Anywhere:
    """A judge that is known without its address: each run's server has another port."""

    endpoint: Endpoint

    @property
    def identity(self) -> str:
        return self.endpoint.identity.replace(self.endpoint.shown, "a server of its own")

    @property
    def form(self) -> Form:
        return self.endpoint.form

    def reply(self, messages: Sequence[Message]) -> Reply:
        return self.endpoint.reply(messages)


def told(name: str, found: Sequence[Comparison]) -> list[str]:
    tally = Tally.of(found)
    counts = (tally.asked, tally.wins, tally.ties, tally.losses, tally.nulls, tally.flipped)
    return [name, *map(str, counts)]


def longer(pairs: Sequence[AnswerPair], found: Sequence[Comparison] | None = None) -> float:
    """How often the longer answer is the one that people preferred, or that a judge does."""
    outcomes = [one.outcome for one in found] if found else ["win"] * len(pairs)
    agreed = [
        (pair.lengths[0] > pair.lengths[1]) == (outcome == "win")
        for pair, outcome in zip(pairs, outcomes, strict=True)
        if outcome in ("win", "loss")
    ]
    return sum(agreed) / len(agreed) if agreed else math.nan


if __name__ == "__main__":
    sys.exit(main())
