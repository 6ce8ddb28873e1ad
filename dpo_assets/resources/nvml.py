"""Which GPU a run may have: those that NVML tells of, as far as CUDA_VISIBLE_DEVICES leaves them in sight.

NVML counts GPUs by their place on the PCI bus; CUDA counts them by speed unless CUDA_DEVICE_ORDER says PCI_BUS_ID. So a
GPU goes by its UUID from here on. The rules are those of NVIDIA's CUDA C++ Programming Guide, environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_assets.errors import ConfigError
from dpo_assets.machine import in_steps
from dpo_assets.planning.precision import Device

VISIBLE, ORDER, BY_BUS = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
HIDES_ALL = ("", "-1", "none", "void", "nodevfiles")  # Slurm writes the last for a job without GPUs.
DEVICE_FILES, PCI_DEVICES = Path("/dev"), Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # Vendor, and class of a PCI device.
WITHOUT = "To train without it, set hardware.device to `cpu`."


class NoGpu(Exception):
    """There is no GPU that this process could use. The text says why, as a clause."""


@dataclass(frozen=True)
class _Gpu:
    """A handle of NVML. A part of a GPU (MIG) has one of its own, and `whole` is the GPU that it is of."""

    handle: Any
    whole: Any
    index: int


def gpu_in_sight(number: int, memory_gib: float | None = None) -> Device:
    """The GPU with this number, from 0, among those in sight.

    Args:
        memory_gib: what to plan with where NVML does not tell a GPU's memory.

    Raises:
        NoGpu: there truly is none, or CUDA_VISIBLE_DEVICES hides all.
        ConfigError: one is there and cannot be used: it does not answer, or what was asked for is another one.
    """
    with _nvml():
        found = next(islice(_in_sight(), number, None), None)
        if found is None:
            raise _no_such(number)
        return _described(found, memory_gib)


def gpus_in_sight(memory_gib: float) -> list[Device]:
    """All that are in sight and answer, in CUDA's order; empty where there is none.

    Args:
        memory_gib: of a GPU whose memory NVML does not tell.
    """
    found: list[Device] = []
    with suppress(NoGpu, ConfigError), _nvml():
        for gpu in _in_sight():
            with suppress(ConfigError):
                found.append(_described(gpu, memory_gib))
    return found


@contextmanager
def _nvml() -> Iterator[None]:
    """NVML, started.

    Raises:
        NoGpu: there is none.
        ConfigError: there is one, and its driver does not answer.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _not_started(error) from None
    try:
        yield
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _not_started(error: Any) -> NoGpu | ConfigError:
    """A driver that is not there is one thing on a machine without GPU, and another on one with it."""
    import pynvml

    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        files = sorted(path.name for path in DEVICE_FILES.glob("nvidia[0-9]*"))
        if not files:
            return NoGpu("no NVIDIA driver is installed here")
        return ConfigError(
            f"/dev/{files[0]} is there, and the driver's library NVML (libnvidia-ml.so.1) is not. In a container, "
            f"start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility. {WITHOUT}"
        )
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED and not (cards := _cards_on_the_bus()):
        return NoGpu("the NVIDIA driver finds no card")
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return ConfigError(
            f"an NVIDIA card is at PCI address {cards[0]}, and its driver is not loaded; `modprobe nvidia` or a "
            f"restart after a change of the kernel may help. {WITHOUT}"
        )
    return _silent("the NVIDIA driver", "nvmlInit", error)


def _cards_on_the_bus() -> list[str]:
    found = []
    for device in sorted(PCI_DEVICES.glob("*")):
        with suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == NVIDIA and kind.startswith(DISPLAY):
                found.append(device.name)
    return found


_HINTS = {
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the driver was updated under a running kernel module; restart the machine",
    "NVML_ERROR_GPU_IS_LOST": "it fell off the bus; the kernel log has an Xid error, and a restart may bring it back",
    "NVML_ERROR_RESET_REQUIRED": "it needs a reset (nvidia-smi --gpu-reset) or a restart",
    "NVML_ERROR_NO_PERMISSION": "this user or container may not use it",
    "NVML_ERROR_NOT_SUPPORTED": "this card cannot tell",
}


def _silent(who: str, call: str, error: Any) -> ConfigError:
    import pynvml

    hint = next((text for name, text in _HINTS.items() if getattr(pynvml, name) == error.value), "see `nvidia-smi`")
    return ConfigError(f"{who} is there, and does not answer: `{call}` says `{error}`: {hint}. {WITHOUT}")


def _ask(who: str, call: str, *arguments: Any) -> Any:
    """What NVML answers to a call.

    Raises:
        ConfigError: with the call and what NVML said.
    """
    import pynvml

    try:
        return getattr(pynvml, call)(*arguments)
    except pynvml.NVMLError as error:
        raise _silent(who, call, error) from None


def _in_sight() -> Iterator[_Gpu]:
    """The GPUs that CUDA would see, in its order; of one that is split up, its parts."""
    count = int(_ask("the NVIDIA driver", "nvmlDeviceGetCount"))
    if count == 0:
        raise NoGpu("NVML finds no NVIDIA GPU here")
    listed = os.environ.get(VISIBLE)
    if listed is None:
        for index in _permitted(count):
            yield from _parts(_ask(f"GPU {index}", "nvmlDeviceGetHandleByIndex", index), index)
        return
    entries = [entry.strip() for entry in listed.split(",")]
    if entries[0].lower() in HIDES_ALL:
        raise NoGpu(f"{VISIBLE} is `{listed}`, which hides every GPU")
    for place, entry in enumerate(entries):
        found = _named(entry, count)
        if found is None and place == 0:
            raise ConfigError(f"{VISIBLE} is `{listed}`, and there is no GPU `{entry}` here. There are: {_all(count)}.")
        if found is None:  # CUDA leaves out such an entry and all behind it.
            return
        yield found


def _permitted(count: int) -> list[int]:
    """The GPUs that this process may use. A container's NVML counts all of the machine; CUDA counts these alone."""
    import pynvml

    mine = []
    for index in range(count):
        try:
            pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                continue
        mine.append(index)
    return mine


def _parts(handle: Any, index: int) -> Sequence[_Gpu]:
    import pynvml

    try:
        split = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError as error:
        if error.value not in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            raise _silent(f"GPU {index}", "nvmlDeviceGetMigMode", error) from None
        split = False
    if not split:
        return [_Gpu(handle, handle, index)]
    parts = []
    for number in range(int(_ask(f"GPU {index}", "nvmlDeviceGetMaxMigDeviceCount", handle))):
        with suppress(pynvml.NVMLError):  # Places that no instance has.
            parts.append(_Gpu(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number), handle, index))
    if not parts:
        raise ConfigError(f"GPU {index} is in MIG mode and has no instance; make one with `nvidia-smi mig`. {WITHOUT}")
    return parts


def _named(entry: str, count: int) -> _Gpu | None:
    """The GPU, or part of one, of an entry of CUDA_VISIBLE_DEVICES: a number, or the start of a UUID."""
    if entry.isdecimal():
        mine = _permitted(count)
        if int(entry) >= len(mine):
            return None
        _refuse_order_by_speed(entry, mine, count)
        index = mine[int(entry)]
        return _parts(_ask(f"GPU {index}", "nvmlDeviceGetHandleByIndex", index), index)[0]
    found = [gpu for uuid, gpu in _by_uuid(count) if entry and uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _refuse_order_by_speed(entry: str, mine: Sequence[int], count: int) -> None:
    """A number means another GPU to CUDA than to NVML where cards differ and CUDA counts the fastest first."""
    names = {_name(index) for index in mine}
    if os.environ.get(ORDER) == BY_BUS or len(names) == 1:
        return
    raise ConfigError(
        f"{VISIBLE} has the number {entry}, and CUDA counts these GPUs by speed: {_all(count)}. Set {ORDER}={BY_BUS}, "
        "or name the GPU by its UUID."
    )


def _name(index: int) -> str:
    import pynvml

    try:
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index)))
    except pynvml.NVMLError as error:
        return f"does not answer: {error}"


def _by_uuid(count: int) -> Iterator[tuple[str, _Gpu]]:
    """Every GPU that answers and every part of one. That of a GPU that is split up stands for its first part."""
    import pynvml

    for index in range(count):
        with suppress(pynvml.NVMLError, ConfigError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            parts = _parts(handle, index)
            yield str(pynvml.nvmlDeviceGetUUID(handle)), parts[0]
            for part in parts if parts[0].handle is not handle else ():
                yield str(pynvml.nvmlDeviceGetUUID(part.handle)), part


def _all(count: int) -> str:
    """The GPUs of this machine, for a message."""
    known: dict[int, list[str]] = {index: [_name(index)] for index in range(count)}
    for uuid, gpu in _by_uuid(count):
        known[gpu.index].append(uuid)
    return ", ".join(f"{index} ({'; '.join(told)})" for index, told in known.items())


def _no_such(number: int) -> ConfigError:
    seen = len(list(_in_sight()))
    if seen == 0:
        return ConfigError(f"this machine has GPUs, and this process may use none of them. {WITHOUT}")
    return ConfigError(f"the GPU resource's index is {number}, and {seen} GPUs are in sight; they are counted from 0.")


def _described(gpu: _Gpu, memory_gib: float | None) -> Device:
    who = f"GPU {gpu.index}"
    name, uuid = (str(_ask(who, call, gpu.handle)) for call in ("nvmlDeviceGetName", "nvmlDeviceGetUUID"))
    major, minor = _ask(who, "nvmlDeviceGetCudaComputeCapability", gpu.whole)
    return Device("cuda", name, _free_gib(gpu, name, memory_gib), (int(major), int(minor)), gpu.index, uuid)


def _free_gib(gpu: _Gpu, name: str, memory_gib: float | None) -> float:
    import pynvml

    try:
        return in_steps(int(pynvml.nvmlDeviceGetMemoryInfo(gpu.handle).free))
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
            raise _silent(f"GPU {gpu.index}", "nvmlDeviceGetMemoryInfo", error) from None
    if memory_gib is None:
        raise ConfigError(
            f"NVML does not tell the memory of {name}, as of GPUs that share the CPU's; set hardware.memory_gib to "
            "what a run may use of it."
        )
    return memory_gib
