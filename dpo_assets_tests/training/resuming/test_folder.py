"""Checkpoints on disk: none is taken up that is damaged, half-written or of something else, and it is said of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.training.resuming.folder import MARKER, REJECTED, Checkpoint, CheckpointFolder, Reached
from dpo_assets.training.resuming.pace import AGAIN, PARTS, Pace, most_again
from dpo_assets_tests.machines import disk_of, make_room
from dpo_assets_tests.training.conftest import Log

IDENTITY = {"fingerprint": "f" * 32, "training settings": "1e-5"}


def files(folder: Path) -> None:
    (folder / "state.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "state.json").write_text('{"a": 1}', encoding="utf-8")


@pytest.fixture
def two(tmp_path: Path) -> CheckpointFolder:
    """A folder with checkpoints of steps 3 and 7."""
    made = CheckpointFolder(tmp_path / "checkpoints" / ("f" * 32), IDENTITY, "dpo")
    for step in (3, 7):
        made.write(step, files)
    return made


def flipped(newest: Path) -> None:
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-8] ^= 1
    (newest / "state.safetensors").write_bytes(data)


def truncated(name: str) -> Callable[[Path], None]:
    return lambda newest: (newest / name).write_bytes((newest / name).read_bytes()[:-5])


def of_another_step(newest: Path) -> None:
    shutil.copy(newest.with_name("step-000000003") / MARKER, newest / MARKER)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flipped, "state.safetensors is not what was written"),
    "truncated tensors": (truncated("state.safetensors"), "state.safetensors has 2043 bytes and not 2048"),
    "truncated values": (truncated("state.json"), "state.json has 3 bytes and not 8"),
    "gone": (lambda newest: (newest / "state.json").unlink(), "state.json is missing"),
    "no marker": (lambda newest: (newest / MARKER).unlink(), f"{MARKER} is missing"),
    "truncated marker": (truncated(MARKER), f"{MARKER} cannot be read"),
    "a pickle beside": (lambda newest: (newest / "optimizer.pt").write_bytes(b"\x80\x04."), "it holds optimizer.pt"),
    "renamed": (of_another_step, "its marker is that of step 3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_by_name_and_the_one_before_it_is_taken(
    damage: str, two: CheckpointFolder
) -> None:
    harm, said = DAMAGES[damage]
    harm(two.folder / "step-000000007")
    log = Log()
    found = two.newest(log)
    assert found is not None
    assert found.step == 3
    (line,) = log.messages
    assert f"checkpoint step-000000007 is not gone on from: {said}" in line
    (aside,) = (two.folder.parent / REJECTED).iterdir()
    assert str(aside) in line
    assert two.newest(Log()) == found


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(two: CheckpointFolder) -> None:
    other = CheckpointFolder(two.folder, IDENTITY | {"training settings": "2e-5", "reference": "base"}, "dpo")
    log = Log()
    assert other.newest(log) is None
    assert len(log.messages) == 2
    assert all("it is of another run (reference, training settings differ)" in line for line in log.messages)


def test_what_a_dead_writer_left_is_removed_and_said(two: CheckpointFolder) -> None:
    partial = two.folder / "step-000000009.tmp-4711"
    shutil.copytree(two.folder / "step-000000007", partial)
    log = Log()
    found = two.newest(log)
    assert found is not None
    assert found.step == 7
    assert not partial.exists()
    assert log.messages == ["dpo: step-000000009.tmp-4711 was never finished and is removed"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_earlier_ones(two: CheckpointFolder) -> None:
    def full(folder: Path) -> None:
        files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        two.write(9, full)
    assert sorted(path.name for path in two.folder.iterdir()) == ["step-000000003", "step-000000007"]


def test_a_file_system_that_fills_up_at_a_checkpoint_keeps_those_before_it(tmp_path: Path) -> None:
    """A real one, of 64 KiB; and once there is room, the next one is written."""
    with disk_of(tmp_path / "disk", 64) as disk:
        made = CheckpointFolder(disk / "sft" / ("f" * 32), IDENTITY, "sft")
        made.write(3, files)

        def large(folder: Path) -> None:
            files(folder)
            (folder / "more.safetensors").write_bytes(bytes(100_000))

        with pytest.raises(OSError, match="No space left on device"):
            made.write(7, large)
        assert [path.name for path in made.folder.iterdir()] == ["step-000000003"]
        found = CheckpointFolder(made.folder, IDENTITY, "sft").newest(Log())
        assert found is not None
        assert found.step == 3
        make_room(disk, 400)
        assert made.write(7, large).step == 7


def test_the_last_two_are_kept_and_the_marker_is_written_last(two: CheckpointFolder) -> None:
    seen: list[list[str]] = []

    def watched(folder: Path) -> None:
        files(folder)
        seen.append(sorted(path.name for path in folder.iterdir()))

    two.flush(two.write(12, watched), at_once=True)
    assert seen == [["state.json", "state.safetensors"]]
    assert sorted(path.name for path in two.folder.iterdir()) == ["step-000000007", "step-000000012"]
    marker = json.loads((two.folder / "step-000000012" / MARKER).read_text(encoding="utf-8"))
    assert (marker["step"], marker["identity"], sorted(marker["files"])) == (12, IDENTITY, seen[0])


def test_a_flushed_checkpoint_stays_beside_the_last_two_and_a_kill_needs_no_flush(two: CheckpointFolder) -> None:
    three, seven = (Checkpoint(two.folder / f"step-{step:09d}", step) for step in (3, 7))
    two.flush(three, at_once=False)
    two.flush(seven, at_once=False)  # Within the same seconds: not flushed.
    for step in (8, 9, 10):
        two.flush(two.write(step, files), at_once=False)
    assert [path.name[-2:] for path in sorted(two.folder.iterdir())] == ["03", "09", "10"]
    two.flush(two.write(11, files), at_once=True)
    assert [path.name[-2:] for path in sorted(two.folder.iterdir())] == ["10", "11"]
    found = CheckpointFolder(two.folder, IDENTITY, "dpo").newest(Log())
    assert found is not None
    assert found.step == 11


def test_steps_that_are_done_twice_are_counted_over_all_tries(tmp_path: Path) -> None:
    first = Reached(tmp_path)
    assert first.begin(0).steps_again == 0
    first.at(12)
    second = Reached(tmp_path).begin(10)
    assert (second.resumed, second.steps_again) == (1, 2)
    (tmp_path / "reached").write_text("torn", encoding="ascii")
    third = Reached(tmp_path)
    assert third.begin(10).steps_again == 2
    third.at(19)
    with (tmp_path / "tries.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"from": 1\n')
    last = Reached(tmp_path).begin(0)
    assert (last.resumed, last.steps_again) == (2, 21)


@settings(max_examples=200, deadline=None)
@given(
    step_seconds=st.floats(0.001, 100), cost=st.floats(0.0001, 50), share=st.floats(0.001, 0.5),
    least=st.floats(0, 600), steps=st.integers(1, 400),
)  # fmt: skip
def test_checkpoints_cost_no_more_than_their_share_of_the_time_and_the_first(
    step_seconds: float, cost: float, share: float, least: float, steps: int
) -> None:
    """The first one's cost is not known beforehand."""
    pace, now, last, last_step, written = Pace(share, least, 20.0), 50.0, 50.0, 0, 0
    pace.start(now, 0)
    for step in range(1, steps + 1):
        now += step_seconds
        if pace.due(now, step, steps):
            assert now - last >= least or step - last_step >= max(1, steps // PARTS)
            pace.wrote(now, now + cost, step)
            now += cost
            last, last_step, written = now, step, written + 1
            left = pace.left(now)
            pace.waited(left / 2)
            now += left / 2
    assert pace.spent <= max(cost, share * (now - 20.0)) + 1e-6
    assert pace.written == written


@settings(max_examples=200, deadline=None)
@given(step_seconds=st.floats(0.001, 100), steps=st.integers(1, 400), cost=st.floats(0.0, 1.0))
def test_a_kill_costs_a_tenth_of_the_steps_where_checkpoints_are_worth_it_and_what_the_share_pays_for_where_not(
    step_seconds: float, steps: int, cost: float
) -> None:
    """Both limits where a checkpoint costs at most what the share leaves for it; else the share's."""
    share, seconds = 0.02, cost * step_seconds  # Up to a step's own time, fifty times what the share pays of one.
    pace, now, last_step, worst = Pace(share, 1e9, 0.0), 0.0, 0, 0
    pace.start(now, 0)
    for step in range(1, steps + 1):
        now += step_seconds
        worst = max(worst, step - last_step)
        if pace.due(now, step, steps):
            pace.wrote(now, now + seconds, step)
            now, last_step = now + seconds, step
    paid = seconds / share / step_seconds  # Steps in which the share pays for a checkpoint.
    assert worst <= max(most_again(steps), 2 * paid + 1)
    assert most_again(steps) <= max(1, steps / AGAIN)


def test_a_short_stage_has_a_checkpoint_every_twentieth_of_it_and_a_long_one_every_minute() -> None:
    def waits(step_seconds: float, steps: int) -> float:
        pace, now = Pace(0.02, 60.0, 0.0), 0.0
        pace.start(now, 0)
        for step in range(1, steps + 1):
            now += step_seconds
            if pace.due(now, step, steps):
                return now
        return now

    assert waits(0.1, 100) == pytest.approx(0.5)
    assert waits(5.0, 10_000) == pytest.approx(60.0)
    assert waits(0.1, 9) == pytest.approx(0.1), "steps that are no twentieth are whole ones"
