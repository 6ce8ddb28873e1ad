"""The licence of a base, and who states it: never guessed from a text. A release inherits it.

Identifiers are those of the Hub's list (https://huggingface.co/docs/hub/repositories-licenses): SPDX ids in lower case,
names of model licences, or `other` with `license_name` and `license_link`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dpo_assets.planning.companions import CARD, found, is_licence_file
from dpo_assets.planning.model_card import front_matter
from dpo_assets.recipe import BaseModelSection

OTHER = "other"
# What the Hub answered in May 2026 to a card with another one (huggingface_hub, issue 4218). The list grows, so an id
# that is not here is only asked about: whether it is refused, the Hub says.
HUB_LICENCES = frozenset(
    {
        "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
        "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
        "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
        "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib",
        "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3",
        "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", OTHER,
    }
)  # fmt: skip
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

    @property
    def unlisted(self) -> str:
        """What to look at where the Hub was not known to list the identifier; empty for one that it lists."""
        if self.identifier in HUB_LICENCES:
            return ""
        near = difflib.get_close_matches(self.identifier, sorted(HUB_LICENCES), n=1)
        return (
            f"the Hub did not list `{self.identifier}` in May 2026, and refuses the card of a release with an id that "
            f"it does not list{f'; did you mean `{near[0]}`?' if near else ''}"
        )


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
    if not isinstance(identifier, str) or _listed_as(identifier) in NOTHING_SAID:
        return None
    name, link = (value if isinstance(value := front.get(f"license_{key}"), str) else None for key in ("name", "link"))
    return Licence(identifier=_listed_as(identifier), name=name, link=link, stated_by="model card")


def _listed_as(identifier: str) -> str:
    """The Hub's ids are all in lower case."""
    return identifier.strip().lower()


def licence_of(section: BaseModelSection, stated: Licence | None) -> Licence | None:
    """The licence that counts: the recipe's, else what the base states."""
    if section.licence is not None and (said := _listed_as(section.licence)) not in NOTHING_SAID:
        # Name and link of the card go with the identifier of the card.
        same = stated if stated is not None and stated.identifier == said else None
        return Licence(
            identifier=said,
            name=section.licence_name or (same.name if same else None),
            link=section.licence_link or (same.link if same else None),
            stated_by="recipe",
        )
    return stated
