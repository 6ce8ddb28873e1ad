"""What keys and tokens look like, wherever they turn up: in logs, in releases, in feedback, in URLs.

Shapes alone, so that every room can ask. The values of this environment are known to `publishing/secrets.py`.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

MASK = "[secret]"

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
    "GitLab token": re.compile(r"\bglpat-(?=[A-Za-z_-]{0,19}[0-9])[A-Za-z0-9_-]{20,}"),
    "Google API key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    "Slack token": re.compile(r"\bxox[abeoprs]-[0-9][A-Za-z0-9-]{10,}"),
    "Stripe key": re.compile(r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{20,}\b"),
    # Header and payload are JSON objects in base64, so both begin as `{"` does.
    "JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    # With its body, where the end is there: the first line alone is the least of the secret.
    "private key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[\s\S]{0,20000}?-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"
    ),
}
# What a text has that may hold one of PATTERNS, for engines without look-around and `\b` (Rust's).
HINT = (
    r"hf_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]|AKIA|ASIA|gh[pousr]_[A-Za-z0-9]|github_pat_|glpat-|AIza|xox[abeoprs]-"
    r"|[rs]k_(?:live|test)_|eyJ|PRIVATE KEY"
)

# Passwords are taken up to the last `@` of a word, because people do not quote an `@` or a `/` in them. A number up to
# the path is a port: its URL may well have an `@` further on.
_PASSWORD = re.compile(
    r"(?P<before>(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s:/@?#\"'<>`]*:)"
    r"(?![0-9]{1,5}(?:[/?#]|$))(?P<secret>(?:(?!://)[^\s\"'<>`])+)(?=@)"
)
_SECRET_FIELD = (
    r"x-(?:amz|goog|oss)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid|googleaccessid"
    r"|(?:[a-z0-9]+[_-])*(?:token|secret|password|passwd|pwd|credentials?|apikey|key|auth|code)"
)
# Where a secret stands, whatever it looks like. `before` stays, what follows it is masked.
_PLACES = (
    _PASSWORD,
    # The user of an HTTP address without a password is a token in its place.
    re.compile(r"(?P<before>https?://)[^\s:/@?#\"'<>`]+(?=@)", re.IGNORECASE),
    re.compile(rf"(?P<before>[?&;](?:{_SECRET_FIELD})=)[^&;\s\"'<>`]+", re.IGNORECASE),
    re.compile(
        r"(?P<before>\b(?:password|passwd|pwd)=)(?!(?:none|null|true|false)\b)[^\s&;,)\"'<>`]{4,}", re.IGNORECASE
    ),
    re.compile(r"(?P<before>\b(?:bearer|basic)\s+)(?=\S*[0-9=])[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE),
)

_SIGNATURE = re.compile(r"x-(?:amz|goog|oss)-signature|signature|sig", re.IGNORECASE)
# What a signature brings along (AWS, Google, Azure, CloudFront, Alibaba): who may read and until when, not what.
_PRESIGNED = re.compile(
    r"x-(?:amz|goog|oss)-.*|signature|expires|key-pair-id|policy|awsaccesskeyid|googleaccessid|ossaccesskeyid"
    r"|sig|s[eiprstv]|spr|srt|sk(?:oid|tid|t|e|s|v)|sdd|saoid|suoid|scid",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(_SECRET_FIELD, re.IGNORECASE)
_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Z])(?=.*[a-z])[A-Za-z0-9_~+/=-]{24,}|[0-9a-f]{32,}")


def masked(text: str) -> str:
    """The text with everything shaped like a secret masked: keys, passwords in URLs, signatures, HTTP credentials."""
    for pattern in PATTERNS.values():
        text = pattern.sub(MASK, text)
    for pattern in _PLACES:
        text = pattern.sub(rf"\g<before>{MASK}", text)
    return text


def shown_url(url: str) -> str:
    """A URL or path as it may be shown and kept: who asks, and with what right, is left out.

    Gone are user and password, and what a presigned URL adds, so that the next signature gives the same text. What else
    stands in the query of an HTTP address stays, because it may say which file is meant; values that are named or look
    like a secret are masked. Elsewhere a `?` may be a wildcard. A local path comes back as it is.
    """
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url)
    if scheme is None:
        return url
    whole = masked(url)
    # Not every user is one: `abfs://container@account` and `hf://datasets/org/name@revision` say what is read.
    whole = re.sub(rf"(?<=://)(?:[^/@]*:)?{re.escape(MASK)}@", "", whole, count=1)
    if not scheme.group().lower().startswith("http"):
        return whole
    before, _, query = whole.partition("#")[0].partition("?")
    fields = [(name, value) for name, _, value in (part.partition("=") for part in query.split("&")) if name]
    if any(_SIGNATURE.fullmatch(name) for name, _ in fields):
        fields = [(name, value) for name, value in fields if not _PRESIGNED.fullmatch(name)]
    kept = "&".join(f"{name}={_shown_value(name, value)}" if value else name for name, value in fields)
    return f"{before}?{kept}" if kept else before


def _shown_value(name: str, value: str) -> str:
    return MASK if _SECRET_NAME.fullmatch(name) or _RANDOM.fullmatch(value) else value


def passwords_in(value: str) -> set[str]:
    """The password of a URL as it is written and as it is meant; empty for any other text."""
    found = _PASSWORD.match(value)
    if found is None:
        return set()
    return {found["secret"], unquote(found["secret"])}


# Last words of the names of variables that hold a secret, and words that make one wherever they stand.
_LAST = re.compile(
    r"(?:TOKENS?|KEYS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|_PWD|_PASS|_PAT|_DSN|CONNECTION_STRING)$"
)
_ANYWHERE = re.compile(r"SECRET|PASSW|PRIVATE_KEY|ACCESS_KEY|API_?KEY|AUTH_?TOKEN|TOKEN_(?!IZ)|_TOKEN_|HF_TOKEN")


def says_secret(name: str) -> bool:
    """Whether the name of an environment variable says that its value is a secret."""
    name = name.upper()
    return _LAST.search(name) is not None or _ANYWHERE.search(name) is not None
