"""Settings of every test process, made before torch or a Hub client is imported: one thread, no telemetry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import dagster as dg

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "DO_NOT_TRACK"):
    os.environ[_name] = "1"
os.environ.pop("DAGSTER_HOME", None)
os.environ.pop("HF_TOKEN", None)


# Files of few tests that take minutes, the longest first. A process takes the next file when it is done with one, so
# a long file that begins last is waited for by itself.
LONGEST = (
    "test_demo.py", "test_daemon.py", "test_out_of_memory.py", "test_every_architecture.py", "test_stages.py",
    "test_launcher.py", "test_collapse.py",
    "test_dpo_equals_trl.py", "test_speedups.py", "test_memory.py", "test_feedback_assets.py", "test_bad_input.py",
    "test_collapse_guard.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; everything else in its order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A real Dagster instance on disk, with pools and its own artefact storage."""
    import dagster as dg

    home = tmp_path / "dagster_home"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as opened:
        yield opened


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `instance_after` keeps what it made, for all processes of this test session."""
    own = tmp_path_factory.getbasetemp()
    # Under xdist each process has a folder of its own in the session's.
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "homes"
    folder.mkdir(exist_ok=True)
    return folder
