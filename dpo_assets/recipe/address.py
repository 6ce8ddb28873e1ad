"""Addresses, files, variables and time zones that a recipe names.

No secret can be in them: they reach artefacts, cards, caches and logs.
"""

from __future__ import annotations

import re
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator

from dpo_assets.secret_shapes import masked, without_url_secrets
from dpo_assets.section import hidden_fault


def is_url(path: str) -> bool:
    """Whether a path is a URL of a file system (`s3://...`) rather than a local file. One letter is a drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None and not path.lower().startswith("file://")


def holds_more_than_a_place(url: str) -> bool:
    """Whether a URL has a user, password, query or fragment, or anything shaped like a key, beside a place."""
    return bool(set(url) & {"?", "#", "@"}) or masked(without_url_secrets(url)) != url


def _service(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise hidden_fault("it is no http address: it begins with `http://` or `https://`")
    if holds_more_than_a_place(url):
        raise hidden_fault(
            "it holds a user, a password, a query, a fragment or a key, and addresses are kept in artefacts; write "
            "scheme, host and path alone. A key belongs into an environment variable"
        )
    return url


def _local(path: str) -> str:
    if is_url(path) or without_url_secrets(path) != path:
        raise hidden_fault("it is an address, and a file or folder of this machine is meant; fetch it, and name that")
    return path


def _link(url: str) -> str:
    if masked(url) != url:
        raise hidden_fault("it holds a user, a password, a signature or a key, and the card of a release shows it")
    return url


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise hidden_fault(
            "the name of an environment variable is meant (letters, digits and `_`), not its value: export the value "
            "under a name, and write that here. If this is a URL with a password or a key, it stands in this file now"
        )
    return name


def _time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone `{name}`; IANA names are meant, such as `Europe/Vienna`") from None
    return name


# What a field of the recipe takes. A fault never repeats the value.
ServiceAddress = Annotated[str, AfterValidator(_service)]
LocalPath = Annotated[str, AfterValidator(_local)]
TimeZone = Annotated[str, AfterValidator(_time_zone)]
VariableName = Annotated[str, AfterValidator(_variable)]
PublicLink = Annotated[str, AfterValidator(_link)]
