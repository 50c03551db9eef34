"""What a trial uses of its machine, by MLflow's names, so that its page shows it under "System metrics".

MLflow's own monitor writes to the server by itself; trials do not. Importing it alone would take each trial seconds.
"""

import os
from collections.abc import Iterator

import psutil


def sample() -> dict[str, float]:
    """Use of CPU and memory since the last call, and of the trial's GPUs, which count from 0.

    Without NVIDIA's library (package nvidia-ml-py), or without a GPU, only CPU and memory.
    """
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": 100 * memory.used / memory.total,
        **dict(_gpus()),
    }


def _gpus() -> Iterator[tuple[str, float]]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(pynvml.nvmlDeviceGetCount())) if visible is None else filter(None, visible.split(","))
    for i, name in enumerate(names):
        try:
            by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
            handle = by_index(int(name)) if name.isdigit() else by_uuid(name)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            yield f"system/gpu_{i}_memory_usage_megabytes", memory.used / 1e6
            yield f"system/gpu_{i}_memory_usage_percentage", 100 * memory.used / memory.total
            yield f"system/gpu_{i}_utilization_percentage", float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            yield f"system/gpu_{i}_power_usage_watts", pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        except pynvml.NVMLError:  # fake GPUs; a part of a GPU, which has no use of its own
            continue
