"""The random walk of one photograph's maps beside the obvious way, which squares the transition matrix: one thread.

A map of 94x125 (500x375 at stride 4), 2 classes, radius 5, 2^8 steps. The dense matrix has 11,750 rows, and squaring it
8 times takes 26 TFLOP: it is squared once, which is counted 8 times. Each way has a process of its own.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from semformer import memory
from semformer.random_walk import along_edges, edge_affinities, transition

HEIGHT, WIDTH, CLASSES, RADIUS, BETA, SQUARINGS = 94, 125, 2, 5, 10.0, 8
REPEATS = 5
REQUIRED_RATIO, REQUIRED_MIB = 200, 200
CPU = torch.device("cpu")


class Taken(NamedTuple):
    seconds: float
    """Of the CPU: what else the machine does hardly counts."""
    mib: float
    """Beside what the process held before."""
    process_mib: float
    """All that it held at once, torch included."""


def make_maps() -> tuple[Tensor, Tensor]:
    """Maps (1, C, H, W) and edges (1, H, W): smooth noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, CLASSES + 1, HEIGHT // 6, WIDTH // 6, generator=generator)
    noise = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    return noise[:, 1:], noise[:, 0]


def sparse_steps() -> Taken:
    maps, edges = make_maps()

    def walk() -> None:
        along_edges(maps, edges, radius=RADIUS, beta=BETA, steps=2**SQUARINGS)

    return taken(walk, repeats=REPEATS)


def dense_squarings() -> Taken:
    """Raises AssertionError unless the square takes maps where two steps take them."""
    maps, edges = make_maps()
    padded = F.pad(edges, (RADIUS - 1, RADIUS - 1, 0, RADIUS - 1), value=1.0)
    step = transition(edge_affinities(padded, RADIUS), radius=RADIUS, beta=BETA)
    values = maps.flatten(2)[0].T.double()
    squares = []

    def square() -> None:
        matrix = step.float().to_dense()
        squares.append(matrix @ matrix)

    once = taken(square, repeats=1)
    torch.testing.assert_close((squares[0] @ values.float()).double(), step @ (step @ values), atol=1e-4, rtol=1e-4)
    return once._replace(seconds=SQUARINGS * once.seconds)


def taken(compute: Callable[[], None], repeats: int) -> Taken:
    torch.set_num_threads(1)
    memory.reset_peak(CPU)
    before, seconds = memory.peak(CPU)["peak_bytes"], []
    for _ in range(repeats):
        started = time.process_time()
        compute()
        seconds.append(time.process_time() - started)
    peak = memory.peak(CPU)["peak_bytes"]
    return Taken(statistics.median(seconds), (peak - before) / 2**20, peak / 2**20)


def alone(measure: Callable[[], Taken]) -> Taken:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure).result()


def main() -> None:
    ours, dense = alone(sparse_steps), alone(dense_squarings)
    ratio = dense.seconds / ours.seconds
    what = f"random walk: {HEIGHT}x{WIDTH}, {CLASSES} classes, 2^{SQUARINGS} steps"
    plain = f"plain: one squaring of {dense.seconds / SQUARINGS:.0f} s, times {SQUARINGS}"
    print(f"| {what} ({plain}) | {dense.seconds:.0f} s | {ours.seconds:.2f} s | {ratio:.0f}x |")
    print(
        f"| {what}, its memory (with the whole process) | {dense.mib:.0f} MiB ({dense.process_mib:.0f}) "
        f"| {ours.mib:.0f} MiB ({ours.process_mib:.0f}) | {dense.mib / ours.mib:.0f}x |"
    )
    if ratio < REQUIRED_RATIO or ours.mib > REQUIRED_MIB:
        raise SystemExit(f"the walk is less than {REQUIRED_RATIO}x faster, or takes more than {REQUIRED_MIB} MiB")


if __name__ == "__main__":
    main()
