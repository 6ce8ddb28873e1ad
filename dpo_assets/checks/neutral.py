"""Texts that no feedback is about, and how much less likely a policy finds them than its start did."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.evidence.clusters import clustered_ratio
from dpo_assets.checks.reports import EvaluationReport, NotMeasured, Perplexity
from dpo_assets.checks.verdict import Verdict, upper_limit
from dpo_assets.errors import ConfigError

# Sixty paragraphs of the project's own: everyday facts, letters, rules, code, twelve other languages.
NEUTRAL = Path(str(files("dpo_assets") / "data" / "neutral" / "paragraphs.txt"))
LARGEST_EXPONENT = 700.0  # Above, exp overflows.


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus: of a JSONL file the `text` of each row, of any other file what blank lines part.

    Raises:
        ConfigError: for a file that cannot be read or holds no text, and for the first damaged row, with its line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluation.corpus: {path} cannot be read: {error}") from None
    lines = content.split("\n")  # Not splitlines: texts may hold U+2028.
    if path.suffix == ".jsonl":
        texts = [_text(line, f"{path.name}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        texts = _paragraphs(lines)
    if not texts:
        raise ConfigError(f"evaluation.corpus: {path} holds no text")
    return texts


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"evaluation.corpus: {where}: no JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f'evaluation.corpus: {where}: not a row of the form {{"text": "..."}}')
    return text


def _paragraphs(lines: Sequence[str]) -> list[str]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line.rstrip("\r"))
        else:
            found.append([])
    return ["\n".join(paragraph) for paragraph in found if paragraph]


def perplexities(
    tokens: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    texts: Sequence[object] | None = None,
    confidence: float = 0.95,
) -> Perplexity:
    """Perplexity per token of the same texts by two models, and their ratio with its interval over texts.

    exp(-sum of log-probabilities / sum of tokens): every token weighs the same. The interval of the ratio is that
    of the nats per token that were lost (`clustered_ratio`).

    Args:
        tokens: of each text; or words, or bytes.
        before: summed log-probability of each text by the start, in nats.
        after: the same by the policy.
        texts: what each belongs to, where several are no independent evidence.
    """
    total = sum(tokens)
    lost = clustered_ratio([b - a for b, a in zip(before, after, strict=True)], tokens, texts, confidence)
    return Perplexity(
        texts=len(tokens),
        tokens=round(total),
        sft=_exp(-math.fsum(before) / total) if total else math.nan,
        policy=_exp(-math.fsum(after) / total) if total else math.nan,
        ratio=_exp(lost.value),  # Lost are nats per token.
        low=None if lost.low is None else _exp(lost.low),
        high=None if lost.high is None else _exp(lost.high),
        p_above=lost.p_above,
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if not nats > LARGEST_EXPONENT else math.inf


def neutral_perplexity(report: EvaluationReport, bands: Bands) -> Verdict:
    """How much likelihood of neutral text went: damage that reaches beyond what was trained on.

    A sound ratio proves little, because facts and habits go first; a high one is damage.
    """
    name, limit = "neutral_perplexity", bands.limit("neutral_perplexity")
    band = f"at most x{limit.warn:g} of SFT's, blocked above x{limit.error:g}"
    part = report.neutral
    if part is None or isinstance(part, NotMeasured):
        why = part.not_measured if part else "these scores are of an earlier version"
        return Verdict(
            name, "warn", f"not measured: {why}", band, limit.source, "materialise eval_scores again; see the value"
        )
    level = upper_limit(part.ratio, limit.warn, limit.error)
    if level == "error" and math.isfinite(part.ratio) and part.low is not None and part.low <= limit.warn:
        level = "warn"  # Few texts: the interval holds a harmless value.
    ends = f"[{part.low:.3f}, {part.high:.3f}]" if part.low is not None and part.high is not None else "unbounded"
    return Verdict(
        name,
        level,
        round(part.ratio, 4),
        band,
        limit.source,
        "" if level == "pass" else "lower dpo.learning_rate 5 to 10 times, raise dpo.beta, or add the `sft` term",
        f"perplexity {part.sft:.4g} before, {part.policy:.4g} after, on {part.texts} texts of {part.tokens} tokens; "
        f"interval {ends}",
    )
