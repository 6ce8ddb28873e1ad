"""The licence of a base, and who states it: never guessed from a text. A release inherits it.

Identifiers are those of the Hub's list (https://huggingface.co/docs/hub/repositories-licenses): SPDX ids in lower case,
names of model licences, or `other` with `license_name` and `license_link`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from dpo_assets.planning.companions import CARD, found, is_licence_file
from dpo_assets.recipe import BaseModelSection

OTHER = "other"
NOTHING_SAID = frozenset({"", "unknown", "none"})  # `unknown` is an entry of the Hub's list.
OF_A_FILE = "licence-of-the-base-model"  # A name for terms that only a file states.
_OF_THE_MODEL = re.compile(r"licen[cs]e|copying", re.IGNORECASE)
_OF_OTHERS = re.compile(r"third[ _-]?party", re.IGNORECASE)


class Licence(BaseModel):
    """What the front matter of a card says of a licence, and where it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identifier: str
    name: str | None = None
    link: str | None = None
    stated_by: Literal["recipe", "model card", "licence file", "package"]

    @property
    def shown(self) -> str:
        """One line for people."""
        more = ", ".join(part for part in (self.name, self.link) if part)
        return f"{self.identifier} ({more})" if more else self.identifier


def read_licence(folder: Path) -> Licence | None:
    """What a model's folder says: its card, else the file of its terms, whose name alone is known of it."""
    texts = [name for name in found(folder, is_licence_file) if _OF_THE_MODEL.search(name)]
    texts = [name for name in texts if not _OF_OTHERS.search(name)]
    if (stated := card_licence(folder / CARD)) is not None:
        return stated
    return Licence(identifier=OTHER, name=OF_A_FILE, link=texts[0], stated_by="licence file") if texts else None


def card_licence(card: Path) -> Licence | None:
    """The licence in the front matter of a model card; None where it names none, or several."""
    front = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    stated = front.get("license")
    identifier = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    if not isinstance(identifier, str) or identifier.strip().lower() in NOTHING_SAID:
        return None
    name, link = (value if isinstance(value := front.get(f"license_{key}"), str) else None for key in ("name", "link"))
    return Licence(identifier=identifier.strip(), name=name, link=link, stated_by="model card")


def licence_of(section: BaseModelSection, stated: Licence | None, packaged: str | None = None) -> Licence | None:
    """The licence that counts: the recipe's, else what the base states, else that of a model of this package."""
    if section.licence is not None and section.licence.strip().lower() not in NOTHING_SAID:
        # Name and link of the card go with the identifier of the card.
        same = stated if stated is not None and stated.identifier == section.licence else None
        return Licence(
            identifier=section.licence,
            name=section.licence_name or (same.name if same else None),
            link=section.licence_link or (same.link if same else None),
            stated_by="recipe",
        )
    return stated or (Licence(identifier=packaged, stated_by="package") if packaged else None)


def front_matter(text: str) -> Mapping[str, Any]:
    """The metadata at the head of a card, between two lines of three dashes; empty where there is none."""
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in (closing := [line.rstrip() for line in lines[1:]]):
        return {}
    try:
        front = yaml.safe_load("\n".join(closing[: closing.index("---")]))
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
