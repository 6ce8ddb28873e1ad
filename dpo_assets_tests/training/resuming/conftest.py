"""What the tests of resuming share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dpo_assets_tests.training.resuming.workers import Workers, workers


@pytest.fixture(scope="package")
def worker() -> Iterator[Workers]:
    """Starts workers."""
    with workers() as made:
        yield made
