"""The device a run trains on, seen without torch: NVML for a GPU, the operating system for memory."""

from __future__ import annotations

import dagster as dg
from pydantic import Field

from dpo_assets.errors import ConfigError
from dpo_assets.planning.precision import Device


class GpuResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Finds the device; `dpo_plan` asks it and records the precision it leads to, with the reason."""

    device: str = Field(default="auto", description="`auto`, `cpu` or `cuda`.")
    index: int = Field(default=0, ge=0, description="Which GPU, as NVML counts them.")

    def detect(self) -> Device:
        """The device to train on.

        Raises:
            ConfigError: when a GPU was asked for and none answers.
        """
        if self.device == "cpu":
            return cpu()
        found = self._gpu()
        if found is not None:
            return found
        if self.device == "cuda":
            raise ConfigError("hardware.device is `cuda`, and NVML finds no NVIDIA GPU here; use `auto` or `cpu`.")
        return cpu()

    def _gpu(self) -> Device | None:
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            if self.index >= pynvml.nvmlDeviceGetCount():
                return None
            handle = pynvml.nvmlDeviceGetHandleByIndex(self.index)
            capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            return Device("cuda", str(name), float(int(memory.free) // 2**30), (int(capability[0]), int(capability[1])))
        finally:
            pynvml.nvmlShutdown()


def cpu() -> Device:
    """This machine's CPU with all its memory: what is free changes by the second, and plans must repeat."""
    import psutil

    return Device("cpu", "CPU", float(int(psutil.virtual_memory().total / 2**30)))
