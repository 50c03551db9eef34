"""A day on 1,000 spot GPUs in a few minutes: what the driver costs, and what lost nodes cost.

10,000 trials on 30,000 distinct stages, run by the real queue, gate, faults, state, display and journal; time is
simulated, and trials are: they report epochs, samples, stages and ends as real ones do. Nodes fail at 1 % an hour, and
every few hours the market takes half of them. Checked at the end: every trial's result came once, every stage was made
once, no epoch that had ended was trained again.
"""

import argparse
import gc
import heapq
import io
import itertools
import random
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from semformer.config import load_config
from semformer.keys import StageKey
from sweeps.plan.trials import Cell, Plan, Trial
from sweeps.reports import EpochEnded, Failed, Finished, Found, Progress, Report, Retried, Sampled, StageDone, Started
from sweeps.schedule.faults import Faults, Places
from sweeps.schedule.gate import Gate
from sweeps.tracking.display import Display
from sweeps.tracking.folder import SweepFolder
from sweeps.tracking.journal import Journal
from sweeps.tracking.state import SweepState

HOUR = 3600.0
SECONDS = {"caae": 2 * HOUR, "segmentor": 1.5 * HOUR, "cams": 0.3 * HOUR, "evaluate": 120.0}
EPOCHS = {"caae": 200, "segmentor": 20}
START = 15.0
"""Seconds until a trial's process is at work."""
FAILURES = 0.01
"""Of the nodes, an hour."""
WAVES = 4 * HOUR
"""Between two waves that take half of the nodes, on average."""
GPUS_A_NODE = 4
NEW_NODE = 600.0
"""Seconds until a lost node is replaced."""
SAMPLE_EVERY, SAVE_EVERY = 60.0, 300.0
LOSSES = {"total": 1.0, "CF": 0.1, "CB": 0.2, "AS": 0.3, "AC": 0.4, "SS": 0.5, "lr": 0.01, "images_per_second": 800.0}
SAMPLE = {f"system/{name}": 50.0 for name in ("cpu", "memory", "memory_percentage", "gpu", "gpu_memory", "power")}


class Shelf:
    """Stands for the store: what was published. The gate looks at nothing else of it."""

    def __init__(self) -> None:
        self.published: set[str] = set()

    def find(self, key: StageKey, *, verify: bool = True) -> bool | None:
        return True if key.digest in self.published else None

    def holder(self, key: StageKey) -> None:
        return None


@dataclass
class Process:
    """A trial's process on a node."""

    trial: Trial
    node: str
    started: float
    steps: Iterator[tuple[float, Report | None]]
    ended: bool = False


@dataclass
class Totals:
    held: float = 0.0
    results: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    epochs: Counter[tuple[str, int]] = field(default_factory=Counter)
    retries: int = 0
    reports: int = 0
    lost_nodes: int = 0


def make_trials(n: int) -> list[Trial]:
    """`n` trials: a CAAE for ten of them, a segmentation network for nine of ten, maps and scores of their own."""
    config = load_config("paper")
    trials = []
    for i in range(n):
        caae = StageKey("caae", {"n": i // 10})
        segmentor = StageKey("segmentor", {"n": i - (i % 10 == 9), "inputs": {"caae": caae.digest}})
        cams = StageKey("cams", {"n": i, "inputs": {"segmentor": segmentor.digest}})
        evaluate = StageKey("evaluate", {"n": i, "inputs": {"cams": cams.digest}})
        keys = {key.stage: key for key in (caae, segmentor, cams, evaluate)}
        trials.append(Trial(config, None, "simulated", keys, (Cell("many", f"row-{i}", 0),)))
    return trials


class Simulation:
    """The driver's parts as the runner and `drive` wire them, on a clock of its own."""

    def __init__(self, trials: list[Trial], gpus: int, folder: Path, seed: int):
        self.now, self.totals, self.random = 0.0, Totals(), random.Random(seed)
        self.shelf, self.trained = Shelf(), Counter()  # epochs that are saved, by stage digest
        self.nodes = {f"node-{n}": 0 for n in range(gpus // GPUS_A_NODE)}  # -> trials on it
        self.numbers = itertools.count(len(self.nodes))
        self.live: dict[str, Process] = {}
        plan = Plan("many", "Many", (), "paper", {}, (0,), tuple(trials), frozenset())
        self.state = SweepState(plan, clock=lambda: self.now)
        self.display = Display(self.state, Console(file=io.StringIO(), force_terminal=True, width=160))
        self.folder, self.journal = SweepFolder(folder), Journal(folder)
        faults = Faults(
            lambda: Places(dict.fromkeys(self.nodes, "a node"), may_grow=True), patience=HOUR, clock=lambda: self.now
        )
        self.gate = Gate(
            trials,
            self.shelf,
            self.tell,
            faults,
            room=lambda: GPUS_A_NODE * len(self.nodes),
            seconds=lambda key: SECONDS[key.stage],
            clock=lambda: self.now,
        )
        self.events: list[tuple[float, int, Any]] = []
        self.order = itertools.count()
        self.choosing: list[float] = []
        self.driver = 0.0

    def at(self, when: float, what: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), what))

    def run(self) -> float:
        """Simulated seconds until all trials have ended."""
        self.at(self.random.expovariate(FAILURES * len(self.nodes) / HOUR), self.fail_one)
        self.at(self.random.expovariate(1 / WAVES), self.wave)
        self.at(SAVE_EVERY, self.save)
        self.fill()
        while not self.gate.finished:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self.now

    # The driver

    def fill(self) -> None:
        while True:
            runner_id = str(next(self.order))
            before = time.perf_counter()
            trial = self.gate.next(runner_id)
            self.choosing.append(time.perf_counter() - before)
            self.driver += self.choosing[-1]
            if trial is None:
                return
            node = min(self.nodes, key=self.nodes.__getitem__)
            self.nodes[node] += 1
            process = Process(trial, node, self.now, self.work(trial, node))
            self.live[runner_id] = process
            self.step(runner_id, process)

    def step(self, runner_id: str, process: Process) -> None:
        """The next thing that a process does, if it still lives."""
        if process.ended:
            return
        seconds, report = next(process.steps, (0.0, None))
        if report is None:
            self.at(self.now, lambda: self.end(runner_id, process))
            return
        self.at(self.now + seconds, lambda: self.hear(runner_id, process, report))

    def hear(self, runner_id: str, process: Process, report: Report) -> None:
        if process.ended:
            return
        self.take_note(process.trial, report)
        before = time.perf_counter()
        self.gate.hear(runner_id, report)
        self.tell(process.trial, report)
        self.driver += time.perf_counter() - before
        if isinstance(report, StageDone):
            self.fill()
        self.step(runner_id, process)

    def end(self, runner_id: str, process: Process, died: str = "") -> None:
        if process.ended:
            return
        process.ended = True
        del self.live[runner_id]
        self.totals.held += self.now - process.started
        if process.node in self.nodes:
            self.nodes[process.node] -= 1
        before = time.perf_counter()
        self.gate.ended(runner_id, (lambda: died) if died else None)
        self.driver += time.perf_counter() - before
        if not died:
            self.fill()

    def tell(self, trial: Trial, report: Report) -> None:
        self.totals.reports += 1
        if isinstance(report, Finished | Found | Failed):
            self.totals.results[trial.key] += 1
        self.totals.retries += isinstance(report, Retried)
        line = self.state.tell(trial, report)
        self.display.tell(trial, line)
        if isinstance(report, EpochEnded | Sampled):
            self.journal.append({"event": type(report).__name__, "key": trial.key, "values": dict(report.values)})

    def save(self) -> None:
        before = time.perf_counter()
        self.state.explain(self.gate.waiting())
        self.folder.save(self.state.as_json())
        self.display.refresh()
        self.driver += time.perf_counter() - before
        self.at(self.now + SAVE_EVERY, self.save)

    # The trials

    def work(self, trial: Trial, node: str) -> Iterator[tuple[float, Report | None]]:
        """What a trial reports, each with the seconds that it takes before."""
        yield START, Started(node, 1, "0", node)
        for stage, key in trial.keys.items():
            if key.digest in self.shelf.published:
                yield 0.0, StageDone(stage, key.digest, found=True)
                continue
            epochs = EPOCHS.get(stage, 0)
            for epoch in range(self.trained[key.digest], epochs):
                yield from self.shown(stage, SECONDS[stage] / epochs, epoch + 1, epochs)
                yield 0.0, EpochEnded(stage, 1, 1, epoch + 1, epochs, LOSSES, 800.0, 60.0)
            if not epochs:
                yield from self.shown(stage, SECONDS[stage], 0, 0)
            yield 0.0, StageDone(stage, key.digest, found=False, seconds=SECONDS[stage])
        yield 0.0, Finished({"cam/train/miou": 60.0})

    def shown(self, stage: str, seconds: float, epoch: int, epochs: int) -> Iterator[tuple[float, Report]]:
        left = seconds
        while left > SAMPLE_EVERY:
            yield SAMPLE_EVERY, Progress(stage, 1, 2, epoch, epochs, LOSSES, 800.0, left)
            yield 0.0, Sampled(SAMPLE)
            left -= SAMPLE_EVERY
        yield left, Progress(stage, 2, 2, epoch, epochs, LOSSES, 800.0, 0.0)

    def take_note(self, trial: Trial, report: Report) -> None:
        if isinstance(report, StageDone) and not report.found:
            self.shelf.published.add(report.key)
            self.totals.made[report.key] += 1
        if isinstance(report, EpochEnded):
            digest = trial.keys[report.stage].digest
            self.trained[digest] = report.epoch
            self.totals.epochs[digest, report.epoch] += 1

    # The cluster

    def fail_one(self) -> None:
        if self.nodes:
            self.lose([self.random.choice(list(self.nodes))])
        self.at(self.now + self.random.expovariate(FAILURES * max(1, len(self.nodes)) / HOUR), self.fail_one)

    def wave(self) -> None:
        self.lose(self.random.sample(list(self.nodes), len(self.nodes) // 2))
        self.at(self.now + self.random.expovariate(1 / WAVES), self.wave)

    def lose(self, nodes: list[str]) -> None:
        self.totals.lost_nodes += len(nodes)
        for node in nodes:
            del self.nodes[node]
            self.at(self.now + NEW_NODE, self.add_node)
        gone = set(nodes)
        for runner_id, process in [item for item in self.live.items() if item[1].node in gone]:
            self.end(runner_id, process, died="its node died")
        self.fill()

    def add_node(self) -> None:
        self.nodes[f"node-{next(self.numbers)}"] = 0
        self.fill()


def run(n_trials: int, gpus: int, folder: Path, seed: int = 0) -> dict[str, float]:
    trials = make_trials(n_trials)
    stages = {key.digest: key for trial in trials for key in trial.keys.values()}
    gc.collect()
    started = time.perf_counter()
    simulation = Simulation(trials, gpus, folder, seed)
    simulated = simulation.run()
    totals = simulation.totals
    assert set(totals.results) == {trial.key for trial in trials}
    assert set(totals.results.values()) == {1}
    assert set(totals.made) == set(stages)
    assert set(totals.made.values()) == {1}
    assert max(totals.epochs.values()) == 1
    assert simulation.state.complete
    useful = sum(SECONDS[key.stage] for key in stages.values())
    return {
        "stages": len(stages),
        "simulated_hours": simulated / HOUR,
        "useful_gpu_hours": useful / HOUR,
        "wasted_share": 1 - useful / totals.held,
        "lost_nodes": totals.lost_nodes,
        "retries": totals.retries,
        "reports": totals.reports,
        "choosing_mean_ms": 1e3 * statistics.fmean(simulation.choosing),
        "choosing_99_ms": 1e3 * statistics.quantiles(simulation.choosing, n=100)[-1],
        "driver_ms_a_trial": 1e3 * simulation.driver / n_trials,
        "driver_share": simulation.driver / simulated,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = run(options.trials, options.gpus, Path(folder) / "sweep", options.seed)
    for name, value in told.items():
        print(f"{name.replace('_', ' ')}: {value:,.3g}" if value < 1000 else f"{name.replace('_', ' ')}: {value:,.0f}")
    assert told["choosing_mean_ms"] < 1.0
    assert told["peak_mb"] < 1500


if __name__ == "__main__":
    main()
