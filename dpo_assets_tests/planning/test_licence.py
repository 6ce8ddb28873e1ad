"""Who states the licence of a base, and that none is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dpo_assets.planning.licence import OF_A_FILE, Licence, card_licence, licence_of, read_licence
from dpo_assets.recipe import BaseModelSection

LLAMA = "---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE\n---\n# Model\n"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("", None),
        ("# Model\nlicense: mit\n", None),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: unknown\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: \n---\n", None),
        ("---\nbase_model: org/a---b\nlicense: mit\n---\n# Model\n", "mit"),
    ],
)
def test_the_licence_is_read_from_the_front_matter_and_from_nowhere_else(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, newline="")
    found = card_licence(tmp_path / "README.md")
    assert (found and found.identifier) == licence
    assert read_licence(tmp_path) == found


def test_a_card_that_names_another_licence_says_its_name_and_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(LLAMA)
    assert read_licence(tmp_path) == Licence(
        identifier="other", name="my-licence", link="LICENSE", stated_by="model card"
    )


@pytest.mark.parametrize(
    ("names", "link"),
    [
        (["LICENSE.txt"], "LICENSE.txt"),
        (["NOTICE", "copying"], "copying"),
        (["NOTICE", "USE_POLICY.md", "Third-Party-Licenses.txt"], None),
        ([], None),
    ],
)
def test_a_file_of_terms_is_a_licence_of_no_known_name(tmp_path: Path, names: list[str], link: str | None) -> None:
    """Its text is not read for one: what looks like MIT may have a clause more."""
    for name in names:
        (tmp_path / name).write_text("MIT License")
    found = read_licence(tmp_path)
    assert found == (link and Licence(identifier="other", name=OF_A_FILE, link=link, stated_by="licence file"))


CARD = Licence(identifier="other", name="theirs", link="LICENSE", stated_by="model card")


@pytest.mark.parametrize(
    ("section", "stated", "licence"),
    [
        ({}, None, None),
        ({}, CARD, CARD),
        ({"licence": "gemma"}, CARD, Licence(identifier="gemma", stated_by="recipe")),
        ({"licence": " Apache-2.0 "}, None, Licence(identifier="apache-2.0", stated_by="recipe")),
        ({"licence": "unknown"}, None, None),
        (
            {"licence": "other"},
            CARD,
            Licence(identifier="other", name="theirs", link="LICENSE", stated_by="recipe"),
        ),
        (
            {"licence": "other", "licence_name": "ours", "licence_link": "https://example.org/terms"},
            CARD,
            Licence(identifier="other", name="ours", link="https://example.org/terms", stated_by="recipe"),
        ),
    ],
    ids=["none", "card", "recipe", "as it is written", "said to be unknown", "named by the card", "named here"],
)
def test_the_recipe_goes_before_what_the_base_states(
    section: dict[str, Any], stated: Licence | None, licence: Licence | None
) -> None:
    assert licence_of(BaseModelSection(source="./base", **section), stated) == licence


@pytest.mark.parametrize(
    ("identifier", "said"),
    [("mit", ""), ("other", ""), ("apache2", "did you mean `apache-2.0`?"), ("of-mars", "does not list")],
)
def test_an_id_that_the_hub_was_not_known_to_list_is_told_with_the_nearest_one(identifier: str, said: str) -> None:
    found = Licence(identifier=identifier, stated_by="recipe").unlisted
    assert found.endswith(said)
    assert bool(found) == bool(said)


def test_a_name_beside_a_known_licence_is_refused() -> None:
    with pytest.raises(ValidationError, match="go with `licence: other`"):
        BaseModelSection(source="./base", licence="mit", licence_name="mine")
