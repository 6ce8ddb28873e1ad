"""One training process on a GPU at a time, without a pool: held by a real process, which is really killed."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_assets.resources.gpu_lock import gpu_held, lock_path

GPU = "GPU-00000000-of-a-test"
HOLDER = """
import logging, sys, time
from dpo_assets.resources.gpu_lock import gpu_held
with gpu_held(sys.argv[1], logging.getLogger("holder")):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, GPU], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_training_waits_for_the_gpu_and_gets_it_when_the_first_is_killed(
    holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    log, got = logging.getLogger("second"), threading.Event()

    def train() -> None:
        with gpu_held(GPU, log):
            got.set()

    second = threading.Thread(target=train, daemon=True)
    second.start()
    assert not got.wait(1.0)
    assert f"waits for the GPU {GPU}" in caplog.text
    with gpu_held("GPU-another", log), gpu_held("", log):
        pass
    holder.kill()
    assert got.wait(10.0)
    second.join()


def test_a_gpu_that_another_user_locked_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As root, who may open every file, the refusal has to be made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(lock_path(GPU)))

    monkeypatch.setattr("dpo_assets.resources.gpu_lock.FileLock.acquire", refuse)
    with gpu_held(GPU, logging.getLogger("second")):
        pass
    assert "is another user's" in caplog.text
