"""The device a run trains on, seen without torch: NVML for a GPU, the operating system for memory."""

from __future__ import annotations

import dagster as dg
from pydantic import Field

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import this_cpu
from dpo_assets.planning.precision import Device
from dpo_assets.resources.nvml import NoGpu, gpu_in_sight


class GpuResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Finds the device; `dpo_plan` asks it and records the precision it leads to, with the reason."""

    device: str = Field(default="auto", description="`auto`, `cpu` or `cuda`.")
    index: int = Field(
        default=0,
        ge=0,
        description="Which of the GPUs that CUDA_VISIBLE_DEVICES leaves in sight, from 0; without it, in NVML's order.",
    )
    memory_gib: float | None = Field(
        default=None, description="GiB to plan with on a GPU whose memory NVML does not tell."
    )

    def detect(self) -> Device:
        """The device to train on.

        Raises:
            ConfigError: when a GPU was asked for and there is none, or when one is there and cannot be used: `auto`
                takes the CPU only where there truly is no GPU.
        """
        if self.device == "cpu":
            return this_cpu()
        try:
            return gpu_in_sight(self.index, self.memory_gib)
        except NoGpu as reason:
            if self.device == "cuda":
                raise ConfigError(f"hardware.device is `cuda`, and {reason}; use `auto` or `cpu`.") from None
        return this_cpu()
