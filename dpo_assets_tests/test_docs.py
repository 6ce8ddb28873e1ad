"""The documents say what the code does."""

from __future__ import annotations

from dpo_assets.assets.graph import NODES
from dpo_assets.checks import bands
from dpo_assets.checks.catalog import CHECKS
from dpo_assets_tests.pipelines import PACKAGE

DOCS = PACKAGE.parent / "docs"


def test_every_check_and_every_band_stands_in_the_document() -> None:
    text = (DOCS / "checks.md").read_text(encoding="utf-8")
    assert [
        c.name for c in CHECKS if f"`{c.name}` | {'yes' if c.blocking else 'warns'} | {c.description}" not in text
    ] == []
    assert [
        b.source for b in bands.LEARNING_RATE if f"{b.ok_low:g} to {b.ok_high:g} | {b.error_above:g}" not in text
    ] == []
    assert [n for n, b in bands.BETA.items() if f"| {n} | {b.ok_low:g} to {b.ok_high:g}" not in text] == []


def test_every_asset_stands_in_the_design_and_in_the_readme() -> None:
    for document in (DOCS / "design.md", PACKAGE.parent / "README.md"):
        text = document.read_text(encoding="utf-8")
        assert [node.name for node in NODES if node.name not in text] == []


def test_the_notice_names_what_is_shipped() -> None:
    notice = (PACKAGE.parent / "NOTICE").read_text(encoding="utf-8")
    for folder in sorted((PACKAGE / "data").iterdir()):
        assert f"{folder.name}/" in notice
