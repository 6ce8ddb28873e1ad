"""The device a run trains on, seen without torch: NVML for a GPU, the operating system for memory."""

from __future__ import annotations

import dagster as dg
from pydantic import Field

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import this_cpu
from dpo_assets.planning.precision import Device

# Free memory in steps of this size: what other programs take changes by the second, and plans must repeat.
STEP_GIB = 0.25


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
            return this_cpu()
        found = self._gpu()
        if found is not None:
            return found
        if self.device == "cuda":
            raise ConfigError("hardware.device is `cuda`, and NVML finds no NVIDIA GPU here; use `auto` or `cpu`.")
        return this_cpu()

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
            free = int(memory.free) / 2**30 // STEP_GIB * STEP_GIB
            major, minor = int(capability[0]), int(capability[1])
            return Device("cuda", str(name), free, (major, minor), self.index)
        finally:
            pynvml.nvmlShutdown()
