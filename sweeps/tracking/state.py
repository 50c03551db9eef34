"""What the trials of a sweep are doing, from their reports: one record each, kept by the driver.

The live display, `status` and the tags in MLflow are all made from these records.
"""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from semformer.keys import StageKey, to_make
from sweeps.plan import scores
from sweeps.reports import (
    EpochEnded,
    Failed,
    Finished,
    Found,
    Progress,
    Pruned,
    Report,
    Retried,
    StageDone,
    Started,
    Waiting,
)

if TYPE_CHECKING:  # which imports torch, and takes seconds
    from sweeps.plan.trials import Sweep, Trial

LINE_EVERY = 30.0
"""Seconds after which a trial gets a line without having ended an epoch."""
NO_LOSSES = ("lr", "images_per_second", "pieces", "gpu_memory")
"""Of what an epoch measures; not in its line."""
ENDED = ("finished", "found", "pruned", "failed")


@dataclass
class TrialState:
    """`status`: queued, running, finished, found (all its stages were there), pruned or failed. Times in seconds."""

    name: str
    status: str = "queued"
    stage: str = ""
    epoch: str = ""
    """ "3/20"."""
    told: str = ""
    """What it measures, or why it waits."""
    left: float = math.nan
    host: str = ""
    gpu: str = ""
    reason: str = ""
    """Why it failed, or is tried again."""
    found: dict[str, bool] = field(default_factory=dict)
    """Of its stages that are done, which were found in the store."""
    held: float = 0.0
    """How long its processes have run that have ended."""
    since: float = 0.0
    """When the one that runs has started, on the sweep's clock."""
    spoke: float = 0.0
    """When it last had a line of its own, on the sweep's clock."""

    def tags(self) -> dict[str, str]:
        """What MLflow shows of it. A trial that is called finished has its stages in the store, found or made."""
        told = {
            "status": "finished" if self.status == "found" else self.status,
            "reason": f"tried again after {self.reason}" if self.reason and self.status == "queued" else self.reason,
            "host": self.host,
            "gpu": self.gpu,
            "stages_found": json.dumps(self.found) if self.found else "",
        }
        return {name: text for name, text in told.items() if text or name == "reason"}


class SweepState:
    """`tell` takes the reports of trials and of the gate."""

    def __init__(self, plan: "Sweep", clock: Callable[[], float] = time.monotonic):
        self.plan, self.clock = plan, clock
        self.trials = {trial.key: TrialState(self._name(trial)) for trial in plan.trials}
        self.made: dict[str, list[float]] = defaultdict(list)  # seconds by stage
        self.found: Counter[str] = Counter()
        self.keys = {trial.key: trial.keys for trial in plan.trials}
        self.there = set(plan.cached)
        self.statuses = Counter(state.status for state in self.trials.values())
        self.unfit: dict[str, str] = {}
        """By node: why no trial is to run there."""
        self.workers = 1
        self.started = clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    @property
    def complete(self) -> bool:
        return not self.statuses["queued"] + self.statuses["running"] + self.statuses["failed"]

    def tell(self, trial: "Trial", report: Report, metrics: Mapping[str, float] | None = None) -> str:
        """Takes a report; returns a line for people, or "" where there is nothing worth one.

        `metrics`: the final ones of a trial that was found.
        """
        if trial.key not in self.trials:
            self.trials[trial.key] = TrialState(self._name(trial))
            self.statuses["queued"] += 1
            self.keys[trial.key] = trial.keys
        state = self.trials[trial.key]
        before = state.status
        line = self._tell(trial, state, report, metrics or {})
        if before == "running" != state.status:
            state.held += self.seconds - state.since
        self.statuses[before] -= 1
        self.statuses[state.status] += 1
        self.workers = max(self.workers, self.statuses["running"])
        if line:
            state.spoke = self.seconds
        return line

    def explain(self, waiting: Mapping[str, tuple[str, str]]) -> None:
        """Note why queued trials wait, as `Gate.waiting` tells it."""
        for key, (stage, maker) in waiting.items():
            state = self.trials.get(key)
            if state is None or state.status != "queued":
                continue
            if not stage:
                state.told = maker or "waits for a free place"
            elif other := self.trials.get(maker):
                epoch = f", epoch {other.epoch}" if other.stage == stage and other.epoch else ""
                state.told = f"waits for {stage}, which {other.name} makes{epoch}"
            else:
                state.told = f"waits for {stage}, which {maker} makes"

    def left(self) -> float:
        """Seconds that the sweep may still take, once every kind of stage that is missing has been measured."""
        todo = [key for key, state in self.trials.items() if state.status in ("queued", "running")]
        stages = [stage.stage for stage in {stage for key in todo for stage in self._missing(key)}]
        if any(stage not in self.made for stage in stages):
            return math.nan
        return sum(sum(self.made[stage]) / len(self.made[stage]) for stage in stages) / self.workers

    def held(self) -> float:
        """Seconds for which trials have held their places, whatever came of it."""
        return sum(state.held for state in self.trials.values()) + self.at_work()

    def at_work(self) -> float:
        """Seconds since the trials that run were started."""
        return sum(self.seconds - state.since for state in self.trials.values() if state.status == "running")

    def in_work(self) -> set[str]:
        """Digests of the stages that running trials have still to make."""
        running = (key for key, state in self.trials.items() if state.status == "running")
        return {stage.digest for key in running for stage in self._missing(key)}

    def counts(self) -> dict[str, float]:
        """For the parent run: trials by how they ended, stages made, seconds of work and of the clock."""
        made = {f"sweep/made_{name}": float(len(seconds)) for name, seconds in self.made.items()}
        seconds = {"sweep/work_seconds": sum(map(sum, self.made.values())), "sweep/wall_seconds": self.seconds}
        return {f"sweep/{status}": float(n) for status, n in self.statuses.items() if n} | made | seconds

    def as_json(self) -> dict[str, Any]:
        """What `Snapshot.read` takes; numbers that are not known are null."""
        left = self.left()
        trials = [
            {"key": key, **vars(state), "left": None if math.isnan(state.left) else state.left}
            for key, state in self.trials.items()
        ]
        made = {stage: len(seconds) for stage, seconds in self.made.items()}
        seconds = {"seconds": self.seconds, "left": None if math.isnan(left) else left}
        told = {"made": made, "found": dict(self.found), "unfit": self.unfit}
        return {"at": time.time(), **seconds, **told, "trials": trials}

    def _tell(self, trial: "Trial", state: TrialState, report: Report, metrics: Mapping[str, float]) -> str:
        match report:
            case Started():
                state.status, state.stage = "running", next(iter(trial.keys))
                state.since = state.spoke = self.seconds
                state.host, state.gpu, state.told, state.reason = report.host, report.gpu, "", ""
            case Progress():
                return self._progress(state, report)
            case Waiting():
                state.stage, state.told = report.stage, f"waiting: {report.holder} makes it"
            case StageDone():
                return self._stage_done(state, report)
            case Found(stages):
                state.status, state.told, state.reason = "found", self._result(trial, metrics), ""
                state.found = dict.fromkeys(stages, True)
                self.found.update(stages)
            case Finished():
                self._end(state, "finished", self._result(trial, report.metrics))
                return f"finished, {state.told}" if state.told else "finished"
            case Pruned():
                self._end(state, "pruned", "")
                return "pruned"
            case Retried():
                self._end(state, "queued", f"again after {report.failure.error}", report.failure.reason)
                return f"tried again after {report.failure.reason}"
            case Failed():
                self._end(state, "failed", report.failure.error, report.failure.reason)
                return f"failed: {report.failure.reason}"
        return ""

    def _missing(self, trial: str) -> list[StageKey]:
        """The stages that must be made for a trial, by its key."""
        return to_make(self.keys[trial], lambda key: key.digest in self.there)

    def _progress(self, state: TrialState, report: Progress) -> str:
        is_epoch = isinstance(report, EpochEnded)
        state.stage, state.left = report.stage, report.seconds_left
        state.epoch = f"{report.epoch}/{report.epochs}" if report.epochs else ""
        losses = [f"{n} {v:.3f}" for n, v in report.values.items() if n not in NO_LOSSES]
        rate = report.images_per_second
        speed = f"{rate:.{0 if rate >= 10 else 1}f} img/s"
        state.told = " ".join(filter(None, [*losses, speed, report.note]))
        if not is_epoch and self.seconds - state.spoke <= LINE_EVERY:
            return ""
        at = [f"epoch {state.epoch}"] if state.epoch else []
        at += [] if is_epoch else [f"step {report.step}/{report.steps}"]
        return f"{state.stage} {', '.join(at)}, {state.told}, {duration(state.left)} left"

    def _stage_done(self, state: TrialState, report: StageDone) -> str:
        self.there.add(report.key)
        state.found[report.stage] = report.found
        state.stage, state.epoch, state.told, state.left = report.stage, "", "done", math.nan
        if report.found:
            self.found[report.stage] += 1
            return ""
        self.made[report.stage].append(report.seconds)
        return f"{report.stage} made in {duration(report.seconds)}"

    @staticmethod
    def _end(state: TrialState, status: str, told: str, reason: str = "") -> None:
        state.status, state.stage, state.epoch, state.left = status, "", "", math.nan
        state.told, state.reason = told, reason

    def _name(self, trial: "Trial") -> str:
        return self.plan.name_of(trial) + (f" (seed {trial.config.seed})" if len(self.plan.seeds) > 1 else "")

    def _result(self, trial: "Trial", metrics: Mapping[str, float]) -> str:
        values = {name: metrics.get(scores.recorded(name, trial.config)) for name in self.plan.scores}
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value is not None)


@dataclass
class Snapshot:
    """A sweep's state as its driver wrote it last."""

    at: float
    """Seconds since the epoch."""
    seconds: float
    left: float
    unfit: dict[str, str]
    trials: list[TrialState]

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Self:
        names = {field.name for field in fields(TrialState)}
        trials = []
        for record in told["trials"]:
            values = {name: value for name, value in record.items() if name in names}
            trials.append(TrialState(**values | {"left": _number(record["left"])}))
        return cls(told["at"], told["seconds"], _number(told["left"]), told.get("unfit", {}), trials)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def duration(seconds: float) -> str:
    """ "8.4 s", "90 s", "14 min", "2.5 h"; "?" for NaN."""
    if seconds != seconds:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
