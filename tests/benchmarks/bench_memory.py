"""The memory of each stage at preset paper, on a CPU: `python -m tests.benchmarks.bench_memory DEVKIT`, some minutes.

The paper's networks with random weights, one step on the first two photographs of a devkit; each stage in a process of
its own, whose memory is told: with PyTorch and the pack of the photographs.
"""

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from semformer import memory, pipeline
from semformer.config import load_config
from semformer.store import Store
from tests.devkits import few_photographs

TRAINED = ("caae", "segmentor", "affinity", "deeplab")
OPTIONS = {"pretrained": False, "epochs": 1, "batch_size": 2}
IMAGES = 2
CPU = torch.device("cpu")


def run_until(stage: str, devkit: Path, store: Path) -> tuple[float, float]:
    """Seconds, and the peak of this process in MiB."""
    torch.set_num_threads(1)
    config = load_config("paper", {f"{name}.{option}": value for name in TRAINED for option, value in OPTIONS.items()})
    data, started = pipeline.open_data(config, devkit), time.monotonic()
    for _ in pipeline.run(config, data, Store(store), device=CPU, progress=lambda told: None, until=stage):
        pass
    return time.monotonic() - started, memory.peak(CPU)["peak_bytes"] / 2**20


def main() -> None:
    (sample,) = map(Path, sys.argv[1:])
    print(f"| stage, of {IMAGES} photographs to learn from | time | memory |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        devkit = few_photographs(sample, Path(folder) / "data", train=IMAGES, val=1)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as process:
            for stage in pipeline.STAGES:
                taken = process.submit(run_until, stage.name, devkit, Path(folder) / "store")
                seconds, mib = taken.result()
                print(f"| {stage.name} | {seconds:.0f} s | {mib:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
