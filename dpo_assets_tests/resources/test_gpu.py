"""Which device a plan is made for: of the GPUs in sight, and never a CPU where a GPU is there and does not answer.

There is no GPU and no driver where these tests run, so NVML's functions are replaced by those of a described machine;
its error classes and everything above them are real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from dpo_assets import GpuResource
from dpo_assets.errors import ConfigError
from dpo_assets.planning.precision import Device
from dpo_assets.resources import nvml
from dpo_assets.resources.environment import worker_environment
from dpo_assets_tests.test_launcher import spec_on

GIB = 2**30


@dataclass(eq=False)
class Card:
    """A GPU, or a part of one, as its driver tells of it. `fails`: function of NVML -> the error that it gives."""

    name: str = "NVIDIA L4"
    uuid: str = "GPU-aaaa1111"
    free: int = 20 * GIB
    capability: tuple[int, int] = (8, 9)
    parts: list[Card] | None = None
    fails: dict[str, int] = field(default_factory=dict)


@dataclass
class Machine:
    """NVML of a machine with these cards."""

    cards: list[Card]
    init: int = 0
    shut_down: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def asked(name: str, answer: Callable[[Card], Any]) -> None:
            def function(card: Card) -> Any:
                if name in card.fails:
                    raise pynvml.NVMLError(card.fails[name])
                return answer(card)

            monkeypatch.setattr(pynvml, name, function)

        asked("nvmlDeviceGetName", lambda card: card.name)
        asked("nvmlDeviceGetUUID", lambda card: card.uuid)
        asked("nvmlDeviceGetMemoryInfo", lambda card: SimpleNamespace(free=card.free))
        asked("nvmlDeviceGetCudaComputeCapability", lambda card: card.capability)
        asked("nvmlDeviceGetMaxMigDeviceCount", lambda card: 7)
        asked("nvmlDeviceGetMigMode", self._mig_mode)
        monkeypatch.setattr(pynvml, "nvmlInit", self._init)
        monkeypatch.setattr(pynvml, "nvmlShutdown", self._shutdown)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(self.cards))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", self._handle)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", self._part)

    def _init(self) -> None:
        if self.init:
            raise pynvml.NVMLError(self.init)

    def _shutdown(self) -> None:
        self.shut_down += 1

    def _handle(self, index: int) -> Card:
        card = self.cards[index]
        if code := card.fails.get("nvmlDeviceGetHandleByIndex"):
            raise pynvml.NVMLError(code)
        return card

    def _mig_mode(self, card: Card) -> list[int]:
        if card.capability < (8, 0):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(card.parts is not None)] * 2

    def _part(self, card: Card, number: int) -> Card:
        # Places are numbered through; those without an instance have no handle.
        if not card.parts or number % 2 or number // 2 >= len(card.parts):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return card.parts[number // 2]


FIRST, SECOND = Card(), Card(uuid="GPU-bbbb2222", free=10 * GIB + 1)
OTHER = Card("NVIDIA H200", "GPU-cccc3333", 139 * GIB, (9, 0))
SLICES = [
    Card("NVIDIA A100 MIG 1g.10gb", f"MIG-{n}{n}", 9 * GIB, fails={"nvmlDeviceGetCudaComputeCapability": 3})
    for n in (7, 8)
]
SPLIT = Card("NVIDIA A100", "GPU-dddd4444", 0, (8, 0), parts=SLICES)
OLD = Card("Tesla T4", "GPU-eeee5555", 14 * GIB, (7, 5))


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of this process, no device file and no card of this machine."""
    for name in (nvml.VISIBLE, nvml.ORDER):
        monkeypatch.delenv(name, raising=False)
    for name in ("DEVICE_FILES", "PCI_DEVICES"):
        monkeypatch.setattr(nvml, name, tmp_path / name)
        (tmp_path / name).mkdir()


@pytest.fixture
def detect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    def on(cards: list[Card], visible: str | None = None, order: str = "", init: int = 0, **fields: Any) -> Device:
        machine = Machine(cards, init)
        machine.install(monkeypatch)
        if visible is not None:
            monkeypatch.setenv(nvml.VISIBLE, visible)
        if order:
            monkeypatch.setenv(nvml.ORDER, order)
        try:
            return GpuResource(**fields).detect()
        finally:
            assert machine.shut_down == (0 if init else 1)

    return on


Detect = Callable[..., Device]


def test_a_gpu_is_told_with_its_uuid_and_its_free_memory_in_steps(detect: Detect) -> None:
    assert detect([FIRST]) == Device("cuda", "NVIDIA L4", 20.0, (8, 9), 0, "GPU-aaaa1111")
    assert detect([OLD, SECOND], index=1) == Device("cuda", "NVIDIA L4", 10.0, (8, 9), 1, "GPU-bbbb2222")


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 0, "GPU-aaaa1111"),
        (None, 1, "GPU-bbbb2222"),
        ("1", 0, "GPU-bbbb2222"),
        ("1,0", 1, "GPU-aaaa1111"),
        (" 1 , 0 ", 0, "GPU-bbbb2222"),
        ("GPU-bbbb2222", 0, "GPU-bbbb2222"),
        ("GPU-b", 0, "GPU-bbbb2222"),
        ("GPU-bbbb2222,0", 1, "GPU-aaaa1111"),
        ("1,-1,0", 0, "GPU-bbbb2222"),
    ],
)
def test_the_planned_gpu_is_one_of_those_in_sight(detect: Detect, visible: str, index: int, uuid: str) -> None:
    found = detect([FIRST, SECOND], visible, index=index)
    assert (found.uuid, found.index) == (uuid, ["GPU-aaaa1111", "GPU-bbbb2222"].index(uuid))


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "none", "void"])
def test_where_all_gpus_are_hidden_there_is_none(detect: Detect, visible: str) -> None:
    assert detect([FIRST], visible).kind == "cpu"
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES is `{visible}`, which hides every GPU; use `auto`"):
        detect([FIRST], visible, device="cuda")


@pytest.mark.parametrize("visible", ["2", "7,0", "GPU-ffff", "MIG-1", "gpu0", "GPU-"])
def test_a_gpu_that_is_named_and_not_there_is_an_error_and_not_a_cpu(detect: Detect, visible: str) -> None:
    with pytest.raises(ConfigError, match=f"no GPU `{visible.split(',')[0]}` here") as refused:
        detect([FIRST, SECOND], visible)
    assert "0 (NVIDIA L4; GPU-aaaa1111), 1 (NVIDIA L4; GPU-bbbb2222)" in str(refused.value)


@pytest.mark.parametrize(("visible", "seen"), [(None, 2), ("1", 1), ("0,5,1", 1)])
def test_an_index_beyond_those_in_sight_is_an_error_and_not_a_cpu(detect: Detect, visible: str, seen: int) -> None:
    with pytest.raises(ConfigError, match=f"index is 2, and {seen} GPUs are in sight"):
        detect([FIRST, SECOND], visible, index=2)


def test_a_number_is_refused_where_cuda_would_count_by_speed(detect: Detect) -> None:
    with pytest.raises(ConfigError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        detect([OLD, OTHER], "0")
    assert detect([OLD, OTHER], "0", order="PCI_BUS_ID").uuid == OLD.uuid
    assert detect([OLD, OTHER], "GPU-c", order="FASTEST_FIRST").uuid == OTHER.uuid


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        (None, 0, "MIG-77"),
        (None, 1, "MIG-88"),
        (None, 2, "GPU-aaaa1111"),
        ("MIG-88", 0, "MIG-88"),
        ("GPU-d", 0, "MIG-77"),
    ],
)
def test_a_part_of_a_gpu_is_a_device_of_its_own(detect: Detect, visible: str, index: int, uuid: str) -> None:
    found = detect([SPLIT, FIRST], visible, index=index)
    assert found.uuid == uuid
    if uuid.startswith("MIG"):
        assert found == Device("cuda", SLICES[0].name, 9.0, (8, 0), 0, uuid)


def test_a_number_of_a_gpu_that_is_split_means_its_first_part(detect: Detect) -> None:
    assert detect([SPLIT], "0").uuid == "MIG-77"


def test_a_gpu_that_is_split_into_nothing_is_an_error(detect: Detect) -> None:
    with pytest.raises(ConfigError, match="GPU 0 is in MIG mode and has no instance"):
        detect([Card(parts=[])])


LOST, PERMISSION = pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_NO_PERMISSION


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMigMode", "nvmlDeviceGetName", "nvmlDeviceGetUUID",
        "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability",
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_does_not_answer_is_an_error_by_name_and_not_a_cpu(detect: Detect, call: str, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"GPU 0 is there, and does not answer: `{call}` says `GPU is lost`: .*Xid"):
        detect([Card(fails={call: LOST})], device=device)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, pynvml.NVML_ERROR_UNKNOWN, 4711])
def test_a_driver_that_does_not_start_is_an_error_by_name_and_not_a_cpu(detect: Detect, code: int) -> None:
    with pytest.raises(ConfigError, match=r"the NVIDIA driver is there, and does not answer: `nvmlInit`.*to `cpu`"):
        detect([FIRST], init=code)
    assert detect([FIRST], device="cpu", init=code).kind == "cpu"


def test_another_gpu_that_does_not_answer_is_no_matter(detect: Detect) -> None:
    lost = Card(uuid="GPU-dead", fails={"nvmlDeviceGetHandleByIndex": LOST})
    assert detect([lost, SECOND], "GPU-bbbb2222").uuid == SECOND.uuid
    assert detect([lost, SECOND], "1", order="PCI_BUS_ID").uuid == SECOND.uuid


def test_a_gpu_of_another_container_is_passed_over(detect: Detect) -> None:
    foreign = Card(uuid="GPU-far", fails={"nvmlDeviceGetHandleByIndex": PERMISSION})
    assert detect([foreign, SECOND]).uuid == SECOND.uuid
    with pytest.raises(ConfigError, match="this process may use none of them"):
        detect([foreign])


def test_a_number_counts_the_gpus_that_this_process_may_use(detect: Detect) -> None:
    """As CUDA does: in a container the driver lists all GPUs of the machine."""
    foreign = Card("NVIDIA H200", "GPU-far", fails={"nvmlDeviceGetHandleByIndex": PERMISSION})
    assert detect([foreign, FIRST, SECOND], "0").uuid == FIRST.uuid
    assert detect([foreign, FIRST, SECOND], "1").uuid == SECOND.uuid
    with pytest.raises(ConfigError, match="no GPU `2` here"):
        detect([foreign, FIRST, SECOND], "2")


PLANNED_FOR = Device("cuda", "NVIDIA L4", 20.0, (8, 9), 0, FIRST.uuid)


@pytest.mark.parametrize(
    ("cards", "visible", "uuid"),
    [
        ([FIRST, SECOND], None, FIRST.uuid),
        ([FIRST, SECOND], "1", SECOND.uuid),  # The planned one is another container's.
        ([SECOND], None, SECOND.uuid),
        ([OTHER, SECOND, OLD], None, SECOND.uuid),
        ([SECOND, Card(uuid="GPU-ffff")], None, FIRST.uuid),  # Which of the two is nobody's guess.
        ([OTHER], None, FIRST.uuid),
        ([Card(uuid="GPU-full", free=0)], None, FIRST.uuid),
        ([Card(uuid="GPU-dead", fails={"nvmlDeviceGetMemoryInfo": LOST}), SECOND], None, SECOND.uuid),
        ([], None, FIRST.uuid),
    ],
)
def test_where_the_planned_gpu_is_not_in_sight_the_only_equal_one_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, cards: list[Card], visible: str | None, uuid: str
) -> None:
    machine = Machine(cards)
    machine.install(monkeypatch)
    if visible is not None:
        monkeypatch.setenv(nvml.VISIBLE, visible)
    assert worker_environment(spec_on(PLANNED_FOR))[nvml.VISIBLE] == uuid
    assert machine.shut_down == 1


def test_memory_that_nvml_does_not_tell_is_asked_of_the_recipe(detect: Detect) -> None:
    shared = Card("NVIDIA GB10", fails={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED})
    with pytest.raises(ConfigError, match=r"memory of NVIDIA GB10.*set hardware\.memory_gib"):
        detect([shared])
    assert detect([shared], memory_gib=96.0).memory_gib == 96.0
    assert detect([FIRST], memory_gib=96.0).memory_gib == 20.0


NO_LIBRARY, NOT_LOADED = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED


@pytest.mark.parametrize(
    ("code", "why"), [(NO_LIBRARY, "no NVIDIA driver is installed"), (NOT_LOADED, "finds no card")]
)
def test_without_gpu_auto_is_the_cpu_and_cuda_an_error(detect: Detect, code: int, why: str) -> None:
    assert detect([], init=code).kind == "cpu"
    with pytest.raises(ConfigError, match=f"hardware.device is `cuda`, and .*{why}"):
        detect([], init=code, device="cuda")


def test_a_driver_without_cards_is_no_gpu(detect: Detect) -> None:
    assert detect([]).kind == "cpu"
    assert detect([], "0").kind == "cpu"


def test_device_files_without_a_driver_library_are_a_gpu_that_does_not_answer(detect: Detect) -> None:
    (nvml.DEVICE_FILES / "nvidiactl").touch()
    assert detect([], init=NO_LIBRARY).kind == "cpu"
    (nvml.DEVICE_FILES / "nvidia0").touch()
    with pytest.raises(ConfigError, match=r"/dev/nvidia0 is there.*NVIDIA_DRIVER_CAPABILITIES"):
        detect([], init=NO_LIBRARY)


@pytest.mark.parametrize(
    ("vendor", "kind", "gpu"),
    [
        ("0x10de", "0x030200", True),
        ("0x10de", "0x030000", True),
        ("0x10de", "0x040300", False),
        ("0x1002", "0x030000", False),
    ],
)
def test_a_card_whose_driver_is_not_loaded_is_a_gpu_that_does_not_answer(
    detect: Detect, vendor: str, kind: str, gpu: bool
) -> None:
    """An NVIDIA card has a sound function beside the display's, and other makers have displays too."""
    card = nvml.PCI_DEVICES / "0000:01:00.0"
    card.mkdir()
    (card / "vendor").write_text(f"{vendor}\n")
    (card / "class").write_text(f"{kind}\n")
    if not gpu:
        assert detect([], init=NOT_LOADED).kind == "cpu"
        return
    with pytest.raises(ConfigError, match=r"card is at PCI address 0000:01:00\.0, and its driver is not loaded"):
        detect([], init=NOT_LOADED)


def test_this_machine_is_told_without_a_traceback() -> None:
    """The real NVML of wherever this runs."""
    assert GpuResource().detect().memory_gib > 0
