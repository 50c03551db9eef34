"""What recording costs: a report in the driver, the delivery to MLflow, and the driver's memory.

200 trials of a sweep of 1,000 run at once beside a busy core; each tells of its epochs (8 series) and of its machine
(6 series), one after the other as reports arrive. Events are delivered while they are told, as in a sweep.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from semformer.store import Store
from sweeps.plan.table import load_table
from sweeps.plan.trials import Plan, Trial, make_plan
from sweeps.reports import EpochEnded, Report, Sampled, Started
from sweeps.tracking.state import TrialState
from sweeps.tracking.tracker import Tracker
from tests.benchmarks.bench_simulation import LOSSES, SAMPLE
from tests.servers import mlflow_server
from tests.workplace import table_text

TRIALS, LIVE = 1000, 200
EPOCHS, SAMPLES_AN_EPOCH = 50, 3
LEAST = 1000
"""Events a second that an sqlite database should get."""
STATE = TrialState("a trial", "running").tags()


def reports() -> Iterator[Report]:
    """What a trial tells of one segmentation network."""
    for epoch in range(1, EPOCHS + 1):
        for n in range(SAMPLES_AN_EPOCH):
            yield Sampled({name: value + n for name, value in SAMPLE.items()})
        yield EpochEnded("segmentor", 1, 1, epoch, EPOCHS, LOSSES)


def run(uri: str, plan: Plan, folder: Path) -> dict[str, float]:
    live = plan.trials[:LIVE]
    tracker = Tracker(uri, plan, Store(folder / "store"), folder=folder / "sweep")
    began = time.perf_counter()
    tracker.begin()
    _until_delivered(tracker)
    created = time.perf_counter() - began
    memory = psutil.Process().memory_info().rss
    seconds: list[float] = []
    began = time.perf_counter()
    for trial in live:
        tracker.tell(trial, Started("node", 1), STATE)
    for trial, report in _interleaved(live):
        before = time.perf_counter()
        tracker.tell(trial, report, STATE)
        seconds.append(time.perf_counter() - before)
    _until_delivered(tracker)
    elapsed = time.perf_counter() - began
    began = time.perf_counter()
    tracker.end("KILLED")
    ended = time.perf_counter() - began
    if tracker.errors:
        raise SystemExit(f"events were refused: {tracker.errors}")
    return {
        "runs_per_second": TRIALS / created,
        "median": statistics.median(seconds),
        "slow": statistics.quantiles(seconds, n=100)[-1],
        "events_per_second": len(seconds) / elapsed,
        "ended": ended,
        "bytes_a_trial": (psutil.Process().memory_info().rss - memory) / LIVE,
    }


def _interleaved(trials: tuple[Trial, ...]) -> Iterator[tuple[Trial, Report]]:
    for told in zip(*(reports() for _ in trials), strict=True):
        yield from zip(trials, told, strict=True)


def _until_delivered(tracker: Tracker) -> None:
    while tracker.undelivered:
        time.sleep(0.01)


@contextmanager
def busy_core() -> Iterator[None]:
    """As trials keep them."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, busy_core():
        folder = Path(temporary)
        rows = {f"r{n}": f"segmentor.sigma: {n}" for n in range(TRIALS)}
        (folder / "bench.yaml").write_text(table_text("bench", **rows))
        plan = make_plan([load_table(folder / "bench.yaml")], "micro", {}, (0,), None, Store(folder / "store"))
        told = run(f"sqlite:///{folder / 'mlflow.db'}", plan, folder / "on sqlite")
        print(line("sqlite", told), flush=True)
        with mlflow_server(folder) as server:
            print(line("a server", run(server.uri, plan, folder / "on a server")))
    if told["events_per_second"] < LEAST:
        raise SystemExit(f"fewer than {LEAST} events a second were delivered")


def line(name: str, told: Mapping[str, float]) -> str:
    cost = f"{1e6 * told['median']:.0f} us (99 %: {1e6 * told['slow']:.0f} us)"
    delivery = f"{told['events_per_second']:,.0f} events/s, {told['runs_per_second']:.0f} new runs/s"
    end = f"{told['ended']:.0f} s for {TRIALS} unfinished trials"
    memory = f"{told['bytes_a_trial'] / 1e3:.0f} kB a live trial"
    return f"| recording on {name}: one event; delivery; end; memory | {cost} | {delivery} | {end} | {memory} |"


if __name__ == "__main__":
    main()
