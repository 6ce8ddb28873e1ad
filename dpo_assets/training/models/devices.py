"""The one device that a worker may train on."""

from __future__ import annotations

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan


def refuse_other_devices(plan: TrainingPlan, gpus: int) -> None:
    """Raises:
    ConfigError: when the plan is for a GPU and this process sees none, or more than one. Which one, is not compared.
    """
    if plan.device == "cpu" or gpus == 1:
        return
    device = plan.device_uuid or str(plan.device_index)
    if gpus == 0:
        raise ConfigError(
            f"the plan is for {plan.device_name} ({device}), and PyTorch sees no GPU here: another machine, a PyTorch "
            "without CUDA, or a driver too old for it. Materialise dpo_plan again where the training runs."
        )
    raise ConfigError(
        f"the plan is for one GPU, and PyTorch sees {gpus}, by which the batch would be multiplied. Set "
        f"CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES={device}."
    )
