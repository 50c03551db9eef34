"""What the trials of a sweep are doing, from their reports: kept by the driver, shown live, read by `status`."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # which imports torch, and takes seconds
    from sweeps.plan.trials import Plan, Trial

LINE_EVERY = 30.0
"""Seconds after which a trial gets a line without having ended an epoch."""

NO_LOSSES = ("lr", "images_per_second", "micro_batch", "gpu_memory")
"""Of what an epoch measures; not in its line."""


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
    reason: str = ""
    """Why it failed."""
    spoke: float = 0.0
    """When it last had a line of its own, on the sweep's clock."""


class SweepState:
    """`tell` takes the reports of `sweeps.cluster.trial` and `sweeps.schedule.gate`."""

    def __init__(self, plan: "Plan"):
        self.plan = plan
        self.trials = {trial.key: TrialState(self._name(trial)) for trial in plan.trials}
        self.made: dict[str, list[float]] = defaultdict(list)  # seconds by stage
        self.found: Counter[str] = Counter()
        self.missing = {t.key: {k.stage: k.digest for k in t.keys.values()} for t in plan.trials}
        self.there = set(plan.cached)
        self.workers = 1
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def complete(self) -> bool:
        return all(state.status in ("finished", "found", "pruned") for state in self.trials.values())

    def tell(self, trial: "Trial", report: Mapping[str, Any]) -> str:
        """Takes a report; returns a line for people, or "" where there is nothing worth one."""
        if trial.key not in self.trials:
            self.trials[trial.key] = TrialState(self._name(trial))
            self.missing[trial.key] = {key.stage: key.digest for key in trial.keys.values()}
        state, event, line = self.trials[trial.key], report["event"], ""
        if event == "start":
            state.status, state.stage, state.spoke = "running", next(iter(trial.keys)), self.seconds
            state.host, state.told = report.get("host", ""), ""
            self.workers = max(self.workers, sum(s.status == "running" for s in self.trials.values()))
        elif event in ("progress", "epoch"):
            line = self._progress(state, report)
        elif event == "waiting":
            state.stage, state.told = report["stage"], f"waiting: {report['holder']} makes it"
        elif event == "stage":
            self.there.add(report["key"])
            if report["found"]:
                self.found[report["stage"]] += 1
            else:
                self.made[report["stage"]].append(report["seconds"])
                line = f"{report['stage']} made in {duration(report['seconds'])}"
            state.stage, state.epoch, state.told, state.left = report["stage"], "", "done", math.nan
        elif event == "found":
            state.status, state.told = "found", self._result(trial, report.get("metrics", {}))
            self.found.update(list(trial.keys))
        elif event in ("finished", "pruned"):
            told = self._result(trial, report.get("metrics", {}))
            self.trials[trial.key] = state = TrialState(state.name, event, told=told, host=state.host)
            line = f"{event}, {told}" if told else event
        elif event == "retry":
            self.trials[trial.key] = state = TrialState(state.name, told=f"again after {report['error']}")
            line = f"tried again after {report['reason']}"
        elif event == "failed":
            state = TrialState(state.name, "failed", report["stage"], "", report["error"], host=state.host)
            self.trials[trial.key], state.reason = state, report["reason"]
            line = f"failed: {report['reason']}"
        if line:
            state.spoke = self.seconds
        return line

    def explain(self, waiting: Mapping[str, tuple[str, str]]) -> None:
        """Note why queued trials wait, as `Gate.waiting` tells it."""
        for key, (stage, maker) in waiting.items():
            state = self.trials.get(key)
            if state is None or state.status != "queued":
                continue
            if other := self.trials.get(maker):
                epoch = f", epoch {other.epoch}" if other.stage == stage and other.epoch else ""
                state.told = f"waits for {stage}, which {other.name} makes{epoch}"
            else:
                state.told = f"waits for {stage}, which {maker} makes" if maker else "waits for a free place"

    def left(self) -> float:
        """Seconds that the sweep may still take, once every kind of stage that is missing has been measured."""
        todo = [key for key, state in self.trials.items() if state.status in ("queued", "running")]
        missing = {(stage, digest) for key in todo for stage, digest in self.missing[key].items()}
        missing = [stage for stage, digest in missing if digest not in self.there]
        if any(stage not in self.made for stage in missing):
            return math.nan
        return sum(sum(self.made[stage]) / len(self.made[stage]) for stage in missing) / self.workers

    def counts(self) -> dict[str, float]:
        """For the parent run: trials by how they ended, stages made, seconds of work and of the clock."""
        by_status = Counter(state.status for state in self.trials.values())
        made = {f"sweep/made_{name}": float(len(seconds)) for name, seconds in self.made.items()}
        seconds = {"sweep/work_seconds": sum(map(sum, self.made.values())), "sweep/wall_seconds": self.seconds}
        return {f"sweep/{status}": float(n) for status, n in by_status.items()} | made | seconds

    def as_json(self) -> dict[str, Any]:
        """What `read` takes; numbers that are not known are null."""
        left = self.left()
        trials = [
            {"key": key, **asdict(state), "left": None if math.isnan(state.left) else state.left}
            for key, state in self.trials.items()
        ]
        made = {stage: len(seconds) for stage, seconds in self.made.items()}
        seconds = {"seconds": self.seconds, "left": None if math.isnan(left) else left}
        return {"at": time.time(), **seconds, "made": made, "found": dict(self.found), "trials": trials}

    def _progress(self, state: TrialState, report: Mapping[str, Any]) -> str:
        state.stage, state.left = report["stage"], report["seconds_left"]
        state.epoch = f"{report['epoch']}/{report['epochs']}" if report["epochs"] else ""
        losses = [f"{n} {v:.3f}" for n, v in report["values"].items() if n not in NO_LOSSES]
        speed = f"{report['images_per_second']:.0f} img/s"
        state.told = " ".join(filter(None, [*losses, speed, report["note"]]))
        if report["event"] != "epoch" and self.seconds - state.spoke <= LINE_EVERY:
            return ""
        at = [f"epoch {state.epoch}"] if state.epoch else []
        at += [f"step {report['step']}/{report['steps']}"] if report["event"] == "progress" else []
        return f"{state.stage} {', '.join(at)}, {state.told}, {duration(state.left)} left"

    def _name(self, trial: "Trial") -> str:
        return self.plan.rows_of(trial) + (f" (seed {trial.config.seed})" if len(self.plan.seeds) > 1 else "")

    def _result(self, trial: "Trial", metrics: Mapping[str, float]) -> str:
        names = dict.fromkeys(metric.name for table in self.plan.tables for metric in table.metrics) or ("miou",)
        values = {name: metrics.get(f"cam/{trial.config.data.eval_split}/{name}") for name in names}
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value is not None)


@dataclass
class Snapshot:
    """A sweep's state as its driver wrote it last."""

    at: float
    """Seconds since the epoch."""
    seconds: float
    left: float
    trials: list[TrialState]

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Self:
        names = {field.name for field in fields(TrialState)}
        trials = []
        for record in told["trials"]:
            values = {name: value for name, value in record.items() if name in names}
            trials.append(TrialState(**values | {"left": _number(record["left"])}))
        return cls(told["at"], told["seconds"], _number(told["left"]), trials)


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
