"""What keys and tokens look like, wherever they turn up: in logs, in releases, in feedback."""

from __future__ import annotations

import re

# Shapes of keys that people paste into feedback and configs. Each is specific enough not to hit ordinary words.
PATTERNS: dict[str, re.Pattern[str]] = {
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),
    # Also of Anthropic, OpenRouter and others that took the form over. Words joined by hyphens have it too, so the body
    # either begins with a long run without a hyphen that has a digit, or follows a known prefix and has a digit and a
    # capital near its start.
    "API key (sk-)": re.compile(
        r"\bsk-(?:(?:[a-z0-9]{1,8}-){0,2}(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}[A-Za-z0-9_-]*"
        r"|(?:proj|svcacct|admin|None|ant-[a-z]+[0-9]*)-(?=[a-z0-9_-]{0,60}[A-Z])(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{20,})"
    ),
    "AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{36,})\b"),
    # With its body, where the end is there: the first line alone is the least of the secret.
    "private key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[\s\S]{0,20000}?-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"
    ),
}
