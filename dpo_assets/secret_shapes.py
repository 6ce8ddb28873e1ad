"""What keys and tokens look like, wherever they turn up: in logs, in releases, in feedback; and how a URL is shown."""

from __future__ import annotations

import re

HIDDEN = "***"  # In place of what may not be shown of a URL.

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

# A URL in a text, up to the first character that none has. One slash too few is a slip, and hides no less.
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]+):(/{1,3})((?:[^\s/?#]*@)?[^\s'\"`<>|\\^]+)")
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs", "hf")  # What stands before the @ is a container's name there.


def without_url_secrets(text: str) -> str:
    """The text as it may be shown: the URLs in it without user, password, query and fragment.

    Whether a parameter of a query is a secret cannot be told from its name: signatures, tokens and keys have as many
    names as there are services. So none is shown, only that there is a query: `https://***@host/a.jsonl?***`.
    """
    return _URL.sub(_shown_url, text)


def _shown_url(found: re.Match[str]) -> str:
    scheme, slashes, rest = found[1], found[2], found[3]
    # Elsewhere than in HTTP a question mark can be a wildcard; a query has an equals sign.
    query = re.search(r"[?#]" if scheme.lower().startswith("http") else r"\?(?=.*=)|#(?=.*=)", rest)
    shown, cut = (rest[: query.start()], rest[query.start()]) if query else (rest, "")
    return f"{scheme}:{slashes}{_without_user(scheme.lower(), shown)}{cut and cut + HIDDEN}"


def _without_user(scheme: str, rest: str) -> str:
    host, slash, path = rest.partition("/")
    user, at, host_alone = host.rpartition("@")
    if at:
        named = scheme in _CONTAINERS and ":" not in user
        return rest if named else f"{HIDDEN}@{host_alone}{slash}{path}"
    # What follows the colon is no port, so it is a password with a slash or a question mark in it.
    _, colon, port = host.rpartition(":")
    if colon and not port.isdigit() and not host.endswith("]"):
        return f"{HIDDEN}@{path.rpartition('@')[2]}" if "@" in path else HIDDEN
    return rest
