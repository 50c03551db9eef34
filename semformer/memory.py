"""Memory: the peak of a stage, and what to do when it runs out."""

import errno
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from semformer.errors import MachineError

T = TypeVar("T")

SMALLER = {
    "caae": "a smaller caae.image_size, caae.backbone or caae.decoder_depth",
    "segmentor": "a smaller segmentor.image_size or segmentor.backbone",
    "cams": "smaller cams.scales",
    "evaluate": "smaller images or fewer threads",
    "train_cams": "smaller cams.scales",
    "affinity_labels": "smaller images or fewer threads",
    "affinity": "a smaller affinity.image_size, affinity.radius, affinity.backbone or affinity.batch_size",
    "walk": "a smaller walk.radius or affinity.backbone, or fewer threads",
    "pseudo_masks": "smaller images or fewer threads",
    "evaluate_masks": "smaller images or fewer threads",
    "deeplab": "a smaller deeplab.image_size, deeplab.head_width, deeplab.backbone or deeplab.batch_size",
    "segmentation": "smaller segmentation.scales, a smaller deeplab.backbone or fewer threads",
    "evaluate_seg": "smaller images or fewer threads",
    "pretrain": "a smaller --image-size or backbone",
}
"""Where threads take an image each (`stages.shards`), fewer of them take less at once."""
STATUS = Path("/proc/self/status")
EXHAUSTED = ("allocate memory", "out of memory", "ALLOC_FAILED", "could not create a primitive", "std::bad_alloc")
"""How RuntimeErrors tell it: of torch, of CUDA where others fill the GPU, of cuBLAS, cuDNN and oneDNN, of C++."""


def is_exhausted(error: BaseException) -> bool:
    """Whether the memory of the device, or of the machine, has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(told in str(error) for told in EXHAUSTED)


def in_parts(compute: Callable[[Sequence[int]], list[T]], rows: Sequence[int]) -> list[T]:
    """compute(rows); where they do not fit into memory together, of half of them at a time."""
    try:
        return compute(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_exhausted(error):
            raise
    half = len(rows) // 2
    return [one for part in (rows[:half], rows[half:]) for one in in_parts(compute, part)]


@contextmanager
def explained(stage: str, device: torch.device) -> Iterator[None]:
    """Turns running out of memory into a MachineError that says what to make smaller."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_exhausted(error):
            raise
        used = peak(device)
        raise MachineError(
            f"{stage}: out of memory on {used['name']}, with {used['peak_bytes'] / 2**30:.2f} GiB in use. "
            f"It needs {SMALLER[stage]}, or more memory (fewer trials at once)."
        ) from error


def reset_peak(device: torch.device) -> None:
    """Begin to measure `peak`, as far as the system allows it."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.empty_cache()  # what the stage before has left does not count
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> dict[str, Any]:
    """The most memory that this process has held since `reset_peak`: {"device", "name", "peak_bytes"}.

    On a GPU what torch has reserved of it (without CUDA's own context); on the CPU the resident set of the process.
    """
    if device.type == "cuda":
        name, used = torch.cuda.get_device_name(device), torch.cuda.max_memory_reserved(device)
    else:
        name, used = _cpu_name(), _peak_resident()
    return {"device": device.type, "name": name, "peak_bytes": used}


def _peak_resident() -> int:
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
