"""What a worker sees of this process's environment: what it computes with, one device, and no secret."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dpo_assets.contract import PlannedSpec, Spec
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.publishing.secrets import is_secret
from dpo_assets.resources.nvml import BY_BUS, ORDER, VISIBLE, gpus_in_sight
from dpo_assets.secret_shapes import masked

# The machine and its user, the interpreter and its libraries, the compilers that Triton and torch.compile call.
NAMES = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "LANG", "LANGUAGE", "TZ", "TERM", "NO_COLOR",
    "DO_NOT_TRACK", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR",
    "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH",
    "GLIBC_TUNABLES", "CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "MAX_JOBS", "RAYON_NUM_THREADS",
    "HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE",
    "HF_DEBUG", "HF_ENABLE_PARALLEL_LOADING", "HF_PARALLEL_LOADING_WORKERS",
})  # fmt: skip
# Settings of the libraries that train.
PREFIXES = (
    "LC_", "PYTHON", "CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NVTE_", "NCCL_", "TORCH_", "TORCHINDUCTOR_",
    "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "TRANSFORMERS_", "HF_HUB_DISABLE_", "TOKENIZERS_", "ACCELERATE_", "BNB_",
    "BITSANDBYTES_", "UNSLOTH_", "LIGER_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "MALLOC_",
    "POLARS_", "ARROW_",
)  # fmt: skip


OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def worker_environment(spec: Spec, more: Sequence[str] = ()) -> dict[str, str]:
    """The variables of a worker: those of NAMES and PREFIXES, and `more`; a secret is never among them, neither by its
    name nor by what it looks like.

    The worker is offline and needs no credential, so what is not known to be of use stays here. Of the devices it sees
    the one that was planned for, by its UUID, or else the only equal one here (`gpu_for`), and none where there is no
    plan or the plan is for the CPU: with several GPUs in sight, Transformers multiplies the batch by their number.

    Args:
        more: names of further variables.
    """
    wanted = NAMES | set(more)
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in wanted or name.startswith(PREFIXES)) and not is_secret(name) and masked(value) == value
    }
    return kept | {
        "OMP_NUM_THREADS": str(spec.threads),
        "PYTHONUNBUFFERED": "1",
        # Numbers mean NVML's order, whatever CUDA's own order is here.
        ORDER: BY_BUS,
        VISIBLE: _device(spec),
        **dict.fromkeys(OFFLINE, "1"),
    }


def _device(spec: Spec) -> str:
    return gpu_for(spec.plan) if isinstance(spec, PlannedSpec) and spec.plan.device == "cuda" else ""


def planned_gpu(plan: TrainingPlan) -> str:
    """The GPU of a plan, as CUDA_VISIBLE_DEVICES names it."""
    return plan.device_uuid or str(plan.device_index)


def gpu_for(plan: TrainingPlan) -> str:
    """The planned GPU, or the only one in sight that is its equal where that one is not in sight.

    A step may run in another container or on another node than its plan was made in. Equal are GPUs of one name (so of
    one compute capability), with memory for the plan's estimated peak. Of several none is taken: the worker then
    refuses the plan.
    """
    in_sight = gpus_in_sight(plan.memory_available_gib)
    equal = [gpu.uuid for gpu in in_sight if gpu.name == plan.device_name and gpu.memory_gib >= plan.memory_gib]
    if plan.device_uuid and plan.device_uuid not in {gpu.uuid for gpu in in_sight} and len(equal) == 1:
        return equal[0]
    return planned_gpu(plan)
