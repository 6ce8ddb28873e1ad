"""A small world of facts, and a real model that knows them in two styles.

Twenty-four creatures have four attributes each. A question asks for one; an answer states the fact in style A ("Once
upon a time, ...") or in style B ("Lily said to mom that ..."). stories260K is fine-tuned, all weights, until it states
the facts in both styles with equal probability. DPO then prefers style A: what it is asked to change (the style) and
what it must keep (the facts, answers that end, answers without repetition) are measured apart.

Four creatures and one of the three wordings of every question are never in preference pairs; the probe asks with that
wording.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

STORIES = Path(str(files("dpo_assets") / "data" / "stories260k"))
CREATURES = [
    "ant", "bat", "bear", "bee", "cat", "cow", "dog", "dove", "hare", "hen", "lion", "pig",
    "rat", "toad", "bird", "crow", "deer", "duck", "fox", "goat", "horse", "owl", "sheep", "moth",
]  # fmt: skip
UNPAIRED = ("bee", "dove", "toad", "fox")  # Creatures that no preference pair speaks of.
VALUES = {
    "color": ["red", "tan", "gold", "gray", "green", "pink", "blue", "black"],
    "food": ["nuts", "corn", "bread", "cake", "rice", "meat", "eggs", "seeds"],
    "home": ["bed", "den", "nest", "barn", "box", "cave", "hill", "tree"],
    "sight": ["sun", "moon", "rain", "snow", "wind", "star", "sea", "park"],
}
SAYS = {"color": "{c} was {v}", "food": "{c} ate {v}", "home": "{c} had a {v}", "sight": "{c} saw the {v}"}
# Three wordings a question; the last is for the probe alone.
ASKS = {
    "color": ("what color was the {c}?", "tell the color of the {c}.", "how did the {c} look?"),
    "food": ("what did the {c} eat?", "tell the food of the {c}.", "the {c} was fed with what?"),
    "home": ("what home had the {c}?", "tell the home of the {c}.", "where did the {c} sleep?"),
    "sight": ("what did the {c} see?", "tell the sight of the {c}.", "the {c} had in view what?"),
}
PAIRED_WORDINGS, PROBE_WORDING = (0, 1), 2
OPENERS = ("", "mom, ", "so, ", "Lily, ")
PROBE_OPENERS = ("", "so, ")
STYLE_A, STYLE_B = "Once upon a time, {core}{ending}.", "Lily said to mom that {core}{ending}!"
# Two free places in every answer, the same for both styles: a model whose answers are all certain would have next to no
# negative log-likelihood, and every ratio of it would explode.
KINDS = ("", "big ", "little ", "happy ")
ENDINGS = (
    "",
    "",
    " and they play",
    " and Tim was happy",
    " for a day",
    " with a friend",
    " and she saw it",
    " in time",
)
STARTS = {"a": "Once upon", "b": "Lily said"}
MAX_LENGTH = 72  # Tokens of a row.
ANSWER_ROOM = 48  # New tokens of a probe's answer; a sound one has 18.
FIT_STEPS, FIT_BATCH, FIT_RATE, FIT_SEED = 400, 32, 2e-3, 1


@dataclass(frozen=True)
class Question:
    """One question of the world; `creature` and `attribute` name the fact it asks for."""

    creature: str
    attribute: str
    wording: int
    opener: str

    @property
    def text(self) -> str:
        return self.opener + ASKS[self.attribute][self.wording].format(c=self.creature)

    @property
    def core(self) -> str:
        """The fact as both styles state it."""
        return SAYS[self.attribute].format(c=self.creature, v=FACTS[self.creature, self.attribute])

    def answer(self, style: str, draw: random.Random) -> str:
        """An answer in a style, its free places drawn."""
        return style.format(core=f"the {draw.choice(KINDS)}{self.core}", ending=draw.choice(ENDINGS))

    def states_fact(self, answer: str) -> bool:
        """Whether an answer states the fact and no other value of the attribute."""
        others = [value for value in VALUES[self.attribute] if value != FACTS[self.creature, self.attribute]]
        words = answer.replace(".", " ").replace("!", " ").replace(",", " ").split()
        return f" {self.core} " in f" {' '.join(words)} " and not any(value in words for value in others)


def _facts() -> dict[tuple[str, str], str]:
    """Every value belongs to three creatures, so that no answer is right more often than another."""
    draw = random.Random(7)
    facts: dict[tuple[str, str], str] = {}
    for attribute, values in VALUES.items():
        dealt = values * (len(CREATURES) // len(values))
        draw.shuffle(dealt)
        facts |= {(creature, attribute): value for creature, value in zip(CREATURES, dealt, strict=True)}
    return facts


FACTS = _facts()


def paired_questions() -> list[Question]:
    """What preference pairs ask: no probe wording, no unpaired creature."""
    return [
        Question(creature, attribute, wording, opener)
        for creature in CREATURES
        if creature not in UNPAIRED
        for attribute in VALUES
        for wording in PAIRED_WORDINGS
        for opener in OPENERS
    ]


def probe_questions() -> list[Question]:
    """What the probe asks: all creatures, in the wording that no pair has."""
    return [
        Question(creature, attribute, PROBE_WORDING, opener)
        for creature in CREATURES
        for attribute in VALUES
        for opener in PROBE_OPENERS
    ]


def all_questions() -> list[Question]:
    return [
        Question(creature, attribute, wording, opener)
        for creature in CREATURES
        for attribute in VALUES
        for wording in (*PAIRED_WORDINGS, PROBE_WORDING)
        for opener in OPENERS
    ]


def messages(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}]


def prompt_ids(tokenizer: Any, question: Question) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        messages(question), tokenize=True, add_generation_prompt=True, return_dict=True
    )
    ids: list[int] = rendered["input_ids"]
    return ids


@dataclass(frozen=True)
class Behaviour:
    """Shares over the probe's answers, sampled at temperature 1; `mean_tokens` is their length."""

    answers: int
    facts: float
    style_a: float
    style_b: float
    repetition: float
    no_eos: float
    mean_tokens: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def behaviour_of(questions: Sequence[Question], answers: Sequence[dict[str, Any]]) -> Behaviour:
    """Behaviour from answers as `training.scoring.generation.generate` describes them."""
    from dpo_assets.training.scoring.generation import repeats_itself

    count = len(answers)
    texts = [" ".join(answer["text"].split()) for answer in answers]
    return Behaviour(
        answers=count,
        facts=sum(q.states_fact(text) for q, text in zip(questions, texts, strict=True)) / count,
        style_a=sum(text.startswith(STARTS["a"]) for text in texts) / count,
        style_b=sum(text.startswith(STARTS["b"]) for text in texts) / count,
        repetition=sum(repeats_itself(answer["ids"]) for answer in answers) / count,
        no_eos=sum(not answer["ended"] for answer in answers) / count,
        mean_tokens=sum(len(answer["ids"]) for answer in answers) / count,
    )


def sample(model: Any, tokenizer: Any, questions: Sequence[Question], seed: int | None) -> list[dict[str, Any]]:
    """One answer a question at temperature 1 (greedy without a seed), all in one batch: `ids`, `text`, `ended`.

    Logits that are not finite give uniform draws: a broken model answers noise, and the probe says so.
    """
    import torch
    from transformers import DynamicCache

    draws = torch.Generator().manual_seed(seed or 0)
    rows = [prompt_ids(tokenizer, question) for question in questions]
    width, eos = max(map(len, rows)), tokenizer.eos_token_id
    chat_end = tokenizer.bos_token_id
    ids = torch.tensor([[chat_end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, out = DynamicCache(), []
    ended = torch.zeros(len(rows), dtype=torch.bool)
    from dpo_assets.training.engines.attention import plain_attention

    with torch.no_grad(), plain_attention(model):
        step_ids, step_positions = ids, positions
        for _ in range(ANSWER_ROOM):
            logits = model(
                input_ids=step_ids, attention_mask=mask, position_ids=step_positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            chances = torch.nan_to_num(logits.softmax(-1), nan=1.0 / logits.shape[-1])
            token = torch.multinomial(chances, 1, generator=draws) if seed is not None else chances.argmax(-1, True)
            out.append(torch.where(ended[:, None], eos, token))
            ended |= token[:, 0] == eos
            if bool(ended.all()):
                break
            step_ids = token
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            step_positions = step_positions[:, -1:] + 1
    answers = []
    for row in torch.cat(out, 1).tolist():
        kept = row[: row.index(eos)] if eos in row else row
        text = tokenizer.decode(kept, skip_special_tokens=True)
        answers.append({"ids": kept, "text": text, "ended": eos in row})
    return answers


def measure(model: Any, tokenizer: Any, seed: int, questions: Sequence[Question] | None = None) -> Behaviour:
    """The model's behaviour on the probe."""
    questions = probe_questions() if questions is None else questions
    return behaviour_of(questions, sample(model, tokenizer, questions, seed))


def fit(folder: Path, steps: int = FIT_STEPS, rate: float = FIT_RATE) -> None:
    """Writes the world's model: stories260K, all weights trained on every question in both styles."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(FIT_SEED)
    draw = random.Random(FIT_SEED)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).train()
    questions = [(question, len(prompt_ids(tokenizer, question))) for question in all_questions()]

    def row() -> tuple[list[int], int]:
        question, begin = draw.choice(questions)
        answer = question.answer(draw.choice((STYLE_A, STYLE_B)), draw)
        spoken = [*messages(question), {"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(spoken, tokenize=True, return_dict=True)["input_ids"], begin

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = [row() for _ in range(FIT_BATCH)]
        width = max(len(whole) for whole, _ in batch)
        ids = torch.tensor([whole + [0] * (width - len(whole)) for whole, _ in batch])
        labels = torch.full_like(ids, -100)
        for n, (whole, begin) in enumerate(batch):
            labels[n, begin : len(whole)] = ids[n, begin : len(whole)]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199:
            print(f"world: step {step + 1}/{steps}, loss {loss.item():.4f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STORIES / name, folder / name)
    found = [measure(model, tokenizer, seed).as_dict() for seed in range(4)]
    (folder / "world.json").write_text(json.dumps({"steps": steps, "rate": rate, "behaviour": found}, indent=1))
    print(json.dumps(found[0]))
