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
_NOTHING = r"(?!(?:none|null|true|false)\b)"
_UNQUOTED = r"[^\s&;,)\"'<>`]{4,}"
_PASSWORDS = (
    _PASSWORD,
    re.compile(r"(?P<before>\bjdbc:oracle:[a-z]{1,8}:[^\s:/@\"'<>`]{1,128}/)[^\s@\"'<>`]+(?=@)", re.IGNORECASE),
    re.compile(rf"(?P<before>(?:password|passwd|(?<![A-Za-z])pwd)=){_NOTHING}{_UNQUOTED}", re.IGNORECASE),
    # With spaces it may be code, so the value must have a digit.
    re.compile(
        rf"(?P<before>(?:password|passwd)(?=\s)\s{{0,3}}=\s{{0,3}}){_NOTHING}(?=\S{{0,64}}[0-9]){_UNQUOTED}",
        re.IGNORECASE,
    ),
)
# Ends of names: what stands before them (`aws_secret_`, `PG`) does not matter. `token` alone is a word of tokenizers.
_QUOTED_FIELD = (
    r"passw(?:or)?d|passphrase|(?<![A-Za-z])pwd|secret|(?:access|account|api|private|secret|shared)[_-]?key"
    r"|(?:access|api|auth|bearer|hf|refresh|security|session)[_-]?token"
)
# Where a secret stands, whatever it looks like. `before` stays, what follows it is masked.
_PLACES = (
    *_PASSWORDS,
    # The user of an HTTP address without a password is a token in its place.
    re.compile(r"(?P<before>https?://)[^\s:/@?#\"'<>`]+(?=@)", re.IGNORECASE),
    re.compile(rf"(?P<before>[?&;](?:{_SECRET_FIELD})=)[^&;\s\"'<>`]+", re.IGNORECASE),
    # A quoted value as JSON, Python, YAML and TOML write it, up to the same quote; also where it was quoted again.
    re.compile(
        rf"(?P<before>(?:{_QUOTED_FIELD})(?:\\{{0,3}}[\"'])?\s{{0,3}}[:=]\s{{0,3}}(?P<quote>\\{{0,3}}[\"']))"
        rf"(?:(?!(?P=quote))(?:\\.|[^\\\n])){{4,}}(?=(?P=quote))",
        re.IGNORECASE,
    ),
    # A key of a cloud in its own files: connection strings of Azure, credentials of AWS.
    re.compile(
        r"(?P<before>(?:access|account|api|secret)[_-]?key\s{0,3}=\s{0,3})[A-Za-z0-9/+_.-]{16,}={0,2}", re.IGNORECASE
    ),
    re.compile(r"(?P<before>\b(?:bearer|basic)\s+)(?=\S*[0-9=])[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE),
)


def masked(text: str) -> str:
    """The text with everything shaped like a secret masked: keys, passwords in URLs, signatures, HTTP credentials."""
    for pattern in PATTERNS.values():
        text = pattern.sub(MASK, text)
    for pattern in _PLACES:
        text = pattern.sub(rf"\g<before>{MASK}", text)
    return text


# A URL in a text, up to the first character that none has. One slash too few is a slip, and hides no less.
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]+):(/{1,3})((?:[^\s/?#]*@)?[^\s'\"`<>|\\^]+)")
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs", "hf")  # What stands before the @ is a container's name there.


def without_url_secrets(text: str) -> str:
    """The text as it may be shown: the URLs in it without user, password, query and fragment.

    Whether a parameter of a query is a secret cannot be told from its name: signatures, tokens and keys have as many
    names as there are services. So none is shown, only that there is a query: `https://[secret]@host/a.jsonl?[secret]`.
    """
    return _URL.sub(_shown_url, text)


def _shown_url(found: re.Match[str]) -> str:
    scheme, slashes, rest = found[1], found[2], found[3]
    # Elsewhere than in HTTP a question mark can be a wildcard; a query has an equals sign.
    query = re.search(r"[?#]" if scheme.lower().startswith("http") else r"\?(?=.*=)|#(?=.*=)", rest)
    shown, cut = (rest[: query.start()], rest[query.start()]) if query else (rest, "")
    return f"{scheme}:{slashes}{_without_user(scheme.lower(), shown)}{cut and cut + MASK}"


def _without_user(scheme: str, rest: str) -> str:
    host, slash, path = rest.partition("/")
    user, at, host_alone = host.rpartition("@")
    if at:
        named = scheme in _CONTAINERS and ":" not in user
        return rest if named else f"{MASK}@{host_alone}{slash}{path}"
    # What follows the colon is no port, so it is a password with a slash or a question mark in it.
    _, colon, port = host.rpartition(":")
    if colon and not port.isdigit() and not host.endswith("]"):
        return f"{MASK}@{path.rpartition('@')[2]}" if "@" in path else MASK
    return rest


def passwords_in(value: str) -> set[str]:
    """The passwords in URLs and connection strings, as they are written and as they are meant.

    `postgresql://me:password@host/db`, `jdbc:...;password=...`, `host=... password=...`: wherever in the text.
    """
    found = (one[0][len(one["before"]) :] for pattern in _PASSWORDS for one in pattern.finditer(value))
    return {form for secret in found for form in (secret, unquote(secret))}


# Last words of the names of variables that hold a secret, and words that make one wherever they stand.
_LAST = re.compile(
    r"(?:TOKENS?|KEYS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|_PWD|_PASS|_PAT|_DSN|CONNECTION_STRING"
    r"|(?:^|_)(?:AUTH|JWT|SAS))$"
)
_ANYWHERE = re.compile(
    r"SECRET|PASSW|PASSFILE|PRIVATE_KEY|ACCESS_KEY|API_?KEY|AUTH_?TOKEN|TOKEN_(?!IZ)|_TOKEN_|HF_TOKEN"
)


def says_secret(name: str) -> bool:
    """Whether the name of an environment variable says that its value is a secret."""
    name = name.upper()
    return _LAST.search(name) is not None or _ANYWHERE.search(name) is not None
